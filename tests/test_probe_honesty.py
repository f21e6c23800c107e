from collections import Counter

import numpy as np
import pytest
import torch

from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.probe.folds import class_folds
from mechinterp_cli.methods.probe.honesty import (
    accuracy_interval,
    control_labels,
    learning_masks,
    learning_sizes,
    majority_score,
    permutation_p,
    permuted_labels,
    selectivity,
)


def test_p_counts_the_score_itself_and_ties() -> None:
    assert permutation_p(0.8, [0.5, 0.8, 0.9]) == 0.75
    assert permutation_p(1.0, [0.5] * 199) == 1 / 200
    assert permutation_p(0.1 + 0.2, [0.3]) == 1.0


def test_labels_are_permuted_within_groups() -> None:
    groups = ["a"] * 6 + ["b"] * 4
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    drawn = permuted_labels(labels, groups, draws=2000, seed=0)
    assert all(sorted(row[:6]) == labels[:6] and sorted(row[6:]) == labels[6:] for row in drawn)
    assert len({tuple(row) for row in drawn}) == 20 * 4  # all there are
    assert np.array_equal(drawn, permuted_labels(labels, groups, draws=2000, seed=0))


def test_groups_of_one_label_move_as_a_whole() -> None:
    groups = ["a", "a", "b", "b", "b", "c", "d", "d", "d"]
    labels = [0, 0, 1, 1, 1, 1, 0, 1, 1]  # d holds two labels
    drawn = permuted_labels(labels, groups, draws=200, seed=0)
    patterns = {(tuple(row[:2]), tuple(row[2:5]), int(row[5])) for row in drawn}
    assert patterns == {((0, 0), (1, 1, 1), 1), ((1, 1), (0, 0, 0), 1), ((1, 1), (1, 1, 1), 0)}
    assert all(sorted(row[6:]) == [0, 1, 1] for row in drawn)


def test_without_groups_all_labels_are_exchanged() -> None:
    drawn = permuted_labels([0, 0, 1, 2], None, draws=300, seed=0)
    assert len({tuple(row) for row in drawn}) == 12
    assert all(sorted(row) == [0, 0, 1, 2] for row in drawn)


def test_majority_is_that_of_the_training_samples() -> None:
    labels = [0] * 6 + [1] * 4
    folds = class_folds(labels, 2)
    assert majority_score(labels, folds) == 0.6
    folds.train[:] = torch.tensor([[True] * 3 + [False] * 3 + [True] * 4, [False] * 3 + [True] * 3 + [False] * 4])
    # fold 0 trains on three 0 and four 1, and says 1 of three 0; fold 1 trains on 0 alone and says 0 of three 0, four 1
    assert majority_score(labels, folds) == 3 / 10


def test_intervals_of_accuracies_hold_them_and_widen_with_clusters() -> None:
    rng = torch.Generator().manual_seed(0)
    by_cluster = (torch.rand(20, generator=rng) < 0.7).repeat_interleave(10).double()
    stats = StatsOptions(bootstrap=500)
    clusters = [str(i // 10) for i in range(200)]
    alone, together = (
        accuracy_interval(by_cluster[None], own, stats) for own in ([str(i) for i in range(200)], clusters)
    )
    for found in (alone, together):
        assert found.low[0] < found.estimate[0] < found.high[0]
        assert found.estimate[0] == pytest.approx(float(by_cluster.mean()))
    assert together.high[0] - together.low[0] > 2 * (alone.high[0] - alone.low[0])


def test_control_labels_depend_on_the_word_type_alone_and_follow_the_labels_shares() -> None:
    types = [f"w{i % 500}" for i in range(2000)]
    labels = [0, 0, 0, 1] * 500
    found = control_labels(types, labels, seed=0)
    assert all(len(set(found[i::500].tolist())) == 1 for i in range(500))
    assert Counter(found[:500].tolist())[1] == pytest.approx(125, abs=30)
    assert np.array_equal(found, control_labels(types, labels, seed=0))
    assert not np.array_equal(found, control_labels(types, labels, seed=1))
    assert selectivity(0.9, 0.6) == pytest.approx(0.3)


def test_sizes_double_up_to_all() -> None:
    assert learning_sizes(100, 2) == (8, 16, 32, 64, 100)
    assert learning_sizes(40, 10) == (20, 40)
    assert learning_sizes(5, 2) == (5,)


def test_larger_training_sets_hold_smaller_ones_and_classes_keep_their_shares() -> None:
    labels = [0, 0, 0, 1] * 20
    train = class_folds(labels, 5).train[0]
    masks = learning_masks(train, labels, (8, 16, 64), seed=0)
    assert masks.sum(1).tolist() == [8, 16, 64]
    assert torch.equal(masks[2], train)
    for small, large in ((masks[0], masks[1]), (masks[1], masks[2])):
        assert bool((large | ~small).all())
    assert [int(torch.tensor(labels)[mask].sum()) for mask in masks] == [2, 4, 16]
    assert not torch.equal(masks, learning_masks(train, labels, (8, 16, 64), seed=1))
