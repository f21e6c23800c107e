from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.probe.folds import (
    Folds,
    class_folds,
    nested_class_folds,
    nested_number_folds,
    number_folds,
)
from mechinterp_cli.methods.probe.honesty import crossing, leak_warnings
from mechinterp_cli.methods.probe.nested import score_classes, score_numbers
from mechinterp_cli.methods.probe.standardise import fit_scaling
from tests.test_probe_logistic import PENALTIES, synthetic

LABELS = [0, 0, 1, 0, 1, 2] * 10
GROUPS = [f"g{i // 4}" for i in range(60)]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_every_sample_is_tested_once_and_classes_keep_their_shares(groups: list[str] | None) -> None:
    found = class_folds(LABELS, 5, groups=groups)
    assert found.test.sum(0).tolist() == [1] * 60
    slack = 0 if groups is None else 3
    for test in found.test.numpy():
        for label, share in enumerate((6, 4, 2)):
            assert abs((np.array(LABELS)[test] == label).sum() - share) <= slack


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_no_group_is_on_both_sides_and_without_groups_some_are(kind: str) -> None:
    def split(groups: list[str] | None) -> Folds:
        return class_folds(LABELS, 5, groups=groups) if kind == "classes" else number_folds(60, 5, groups=groups)

    assert not crossing(GROUPS, split(GROUPS))
    assert crossing(GROUPS, split(None))


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_inner_folds_hold_training_samples_only(groups: list[str] | None, kind: str) -> None:
    nested = (
        nested_class_folds(LABELS, 4, 3, groups=groups)
        if kind == "classes"
        else nested_number_folds(60, 4, 3, groups=groups)
    )
    assert nested.train.shape == nested.test.shape == (4, 3, 60)
    assert not bool((nested.train & nested.test).any())
    both = nested.train | nested.test
    assert torch.equal(both, nested.outer.train[:, None].expand_as(both))
    assert torch.equal(nested.test.sum(1), nested.outer.train.long())
    if groups is not None:
        for outer in range(4):
            assert not {g for g, t in zip(GROUPS, nested.outer.test[outer], strict=True) if t} & {
                g for g, t in zip(GROUPS, nested.outer.train[outer], strict=True) if t
            }


def test_seeds_shuffle_and_one_seed_gives_the_same() -> None:
    first, again, other = (class_folds(LABELS, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train, again.train)
    assert not torch.equal(first.train, other.train)


@pytest.mark.parametrize(
    ("make", "cause", "remedy"),
    [
        (
            lambda: class_folds([1] * 12, 3),
            "probe.folds: all 12 samples have class 1; there is nothing to tell apart",
            "Give samples of at least two classes.",
        ),
        (
            lambda: class_folds([0, 1, 0], 5),
            "probe.folds: 5 folds of 3 samples; every fold needs one to test",
            "Give at most 3 folds, or more samples.",
        ),
        (
            lambda: number_folds(3, 5),
            "probe.folds: 5 folds of 3 samples; every fold needs one to test",
            "Give at most 3 folds, or more samples.",
        ),
        (
            lambda: number_folds(6, 3, groups=["a", "a", "a", "b", "b", "b"]),
            "probe.folds: 3 folds of 2 groups; a group is never split",
            "Give at most 2 folds, or leave `group` out.",
        ),
        (
            lambda: class_folds([0, 1] * 3, 2, groups=["a"] * 6),
            "probe.folds: 2 folds of 1 group; a group is never split",
            "Give more groups, or leave `group` out.",
        ),
        (
            lambda: class_folds([0] * 9 + [1] * 2, 3),
            "probe.folds: class 1 has 2 samples, fewer than the 3 folds",
            "Give at most 2 folds, or more samples of this class.",
        ),
        (
            lambda: class_folds([0] * 9 + [1], 3),
            "probe.folds: class 1 has 1 sample, fewer than the 3 folds",
            "Give more samples of this class, or leave it out.",
        ),
        (
            lambda: class_folds([0] * 9 + [1] * 3, 3, groups=[f"g{i // 3}" for i in range(12)]),
            "probe.folds: class 1 occurs in group 'g3' only: it is never both trained on and tested",
            "Give samples of this class in at least two groups, or leave the class out.",
        ),
        (
            lambda: nested_class_folds([0] * 9 + [1] * 3, 3, 3),
            "probe.inner_folds: class 1 has 2 samples, fewer than the 3 folds",
            "Give at most 2 folds, or more samples of this class.",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(make: Callable[[], object], cause: str, remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert (caught.value.cause, caught.value.remedy) == (cause, remedy)


def test_a_class_that_lacks_in_training_is_refused() -> None:
    labels = [0, 0, 1, 1] * 3 + [2] * 3 + [0, 2]
    groups = ["a", "b", "c", "d"] * 3 + ["e"] * 3 + ["f", "e2"]
    seen = set()
    for seed in range(20):
        try:
            found = class_folds(labels, 2, groups=groups, seed=seed)
        except UserError as error:
            assert "is missing from the training samples of fold" in error.cause
            seen.add("refused")
        else:
            assert all({labels[i] for i in mask.nonzero().flatten().tolist()} == {0, 1, 2} for mask in found.train)
            seen.add("split")
    assert "split" in seen


# --- leaks


def test_duplicates_on_both_sides_are_found_and_those_on_one_side_are_not() -> None:
    texts = [f"text {i}" for i in range(60)]
    folds = class_folds(LABELS, 5)
    assert leak_warnings(texts, None, folds) == []
    own = folds.test[0].nonzero().flatten().tolist()
    texts[own[1]] = texts[own[0]]  # both are tested in fold 0
    assert leak_warnings(texts, None, folds) == []
    other = folds.test[1].nonzero().flatten().tolist()[0]
    texts[other] = texts[own[0]]
    found = crossing(texts, folds)
    assert found == {texts[own[0]]: tuple(sorted((own[0], own[1], other)))}
    listed = ", ".join(map(str, sorted((own[0], own[1], other))))
    assert leak_warnings(texts, None, folds) == [
        f"1 text on both sides of the split, as {texts[own[0]]!r} (samples {listed}): scores are too high"
    ]


def test_texts_that_differ_in_capitals_and_blanks_alone_are_duplicates() -> None:
    texts = [f"Text {i}" for i in range(60)]
    folds = class_folds(LABELS, 5)
    one, other = (int(folds.test[fold].nonzero()[0]) for fold in (0, 1))
    texts[other] = f" {texts[one].upper().replace(' ', '  ')}\n"
    (warning,) = leak_warnings(texts, None, folds)
    assert warning.startswith("1 text on both sides of the split")
    texts[other] += "!"
    assert leak_warnings(texts, None, folds) == []


def test_groups_on_both_sides_are_told() -> None:
    texts = [f"text {i}" for i in range(60)]
    (warning,) = leak_warnings(texts, GROUPS, class_folds(LABELS, 5))
    assert "groups on both sides of the split, as 'g0' (samples 0, 1, 2, 3)" in warning
    assert leak_warnings(texts, GROUPS, class_folds(LABELS, 5, groups=GROUPS)) == []


def test_standardisation_is_fitted_on_training_samples_only() -> None:
    x, _ = synthetic("unequal scales")
    folds = number_folds(len(x), 4)
    scaling = fit_scaling(x, folds.train.double())
    leaking = fit_scaling(x, torch.ones(1, len(x)).double())
    for fold, mask in enumerate(folds.train):
        wanted = StandardScaler().fit(x[mask].numpy())
        np.testing.assert_allclose(scaling.mean[fold], wanted.mean_, rtol=1e-10)
        np.testing.assert_allclose(scaling.scale[fold], wanted.scale_, rtol=1e-8)
        np.testing.assert_allclose(scaling(x)[fold], wanted.transform(x.numpy()), atol=1e-8)
        assert float((scaling.scale[fold] / leaking.scale[0] - 1).abs().max()) > 0.01


def test_a_test_sample_far_off_does_not_change_what_is_fitted_where_a_leak_would_change_the_score() -> None:
    x, labels = synthetic("plain")
    labels = (x[:, 0] + 0.1 * x[:, 1] > 0).long()
    nested = nested_class_folds(labels.tolist(), 3, 2)
    (before,) = score_classes(x, labels[None], [nested], (1e-3, 1e-2), classes=2, tolerance=1e-6)
    moved = x.clone()
    far = int(nested.outer.test[0].nonzero()[0])
    moved[far, 0] += 1e4  # over all samples, the scale of feature 0 would be 800 times as large
    (after,) = score_classes(moved, labels[None], [nested], (1e-3, 1e-2), classes=2, tolerance=1e-6)
    torch.testing.assert_close(after.weights[0], before.weights[0], rtol=1e-3, atol=1e-6)
    assert int(after.penalty[0]) == int(before.penalty[0])
    rest = nested.outer.test[0].clone()
    rest[far] = False
    assert torch.equal(after.predicted[0][rest], before.predicted[0][rest])
    mask, own = nested.outer.train[0].numpy(), rest.numpy()
    leaking = StandardScaler().fit(moved.numpy())
    probe = LogisticRegression(C=1e-2).fit(leaking.transform(moved.numpy())[mask], labels[mask].numpy())
    leaked = probe.score(leaking.transform(moved.numpy())[own], labels[own].numpy())
    honest = float((before.predicted[0] == labels)[rest].double().mean())
    assert honest > leaked + 0.1


# --- the choice of the penalty


def test_nested_scores_are_those_of_a_loop_over_scikit_learn() -> None:
    x, labels = synthetic("three classes")
    nested = nested_class_folds(labels.tolist(), 3, 3, seed=4)
    (found,) = score_classes(x, labels[None], [nested], PENALTIES, classes=3)
    right = 0
    for fold in range(3):
        totals = []
        for penalty in PENALTIES:
            total = 0
            for train, test in zip(nested.train[fold].numpy(), nested.test[fold].numpy(), strict=True):
                probe = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, tol=1e-8, max_iter=5000))
                probe.fit(x[train].numpy(), labels[train].numpy())
                total += int((probe.predict(x[test].numpy()) == labels[test].numpy()).sum())
            totals.append(total)
        best = int(np.argmax(totals))
        assert int(found.penalty[fold]) == best
        mask = nested.outer.train[fold].numpy()
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=PENALTIES[best], tol=1e-8, max_iter=5000))
        probe.fit(x[mask].numpy(), labels[mask].numpy())
        assert np.array_equal(probe.predict(x.numpy()), found.predicted[fold].numpy())
        right += int((probe.predict(x[~mask].numpy()) == labels[~mask].numpy()).sum())
    assert found.accuracy(labels, nested) == pytest.approx(right / len(x))
    assert found.unconverged == 0


def test_test_labels_do_not_choose_the_penalty() -> None:
    x, labels = synthetic("plain")
    nested = nested_class_folds(labels.tolist(), 3, 3)
    flipped = torch.where(nested.outer.test[0], 1 - labels, labels)
    sets = torch.stack([labels, flipped])
    honest, other = score_classes(x, sets, [nested, nested], PENALTIES, classes=2)
    assert int(honest.penalty[0]) == int(other.penalty[0])
    torch.testing.assert_close(honest.weights[0], other.weights[0])
    assert not torch.allclose(honest.weights[1], other.weights[1])


def test_of_equally_good_penalties_the_strongest_is_taken_and_stopped_fits_are_counted() -> None:
    x, _ = synthetic("plain")
    labels = (torch.arange(len(x)) % 2).long()
    x = (100.0 * labels[:, None] + x[:, :1]).double()
    nested = nested_class_folds(labels.tolist(), 2, 2)
    (found,) = score_classes(x, labels[None], [nested], (10.0, 1.0, 0.1), classes=2)
    assert found.penalty.tolist() == [2, 2]
    (stopped,) = score_classes(x, labels[None], [nested], (10.0, 1.0, 0.1), classes=2, max_steps=2)
    assert stopped.unconverged == 18  # 6 fits of 3 penalties


def test_ridge_chooses_its_penalty_by_inner_error() -> None:
    x, _ = synthetic("wide")
    y = x[:, 0] - x[:, 1] + 0.5 * torch.randn(len(x), generator=torch.Generator().manual_seed(0)).double()
    nested = nested_number_folds(len(x), 3, 3)
    alphas = (1e-3, 10.0, 1e6)
    found = score_numbers(x, y, nested, alphas)
    errors = (found.held_out(nested) - y).square().mean()
    assert set(found.penalty.tolist()) <= {0, 1}
    assert float(errors) < float((y - y.mean()).square().mean())
    flat = score_numbers(x, torch.full_like(y, 3.0), nested, alphas)
    assert flat.penalty.tolist() == [2, 2, 2]
    torch.testing.assert_close(flat.held_out(nested), torch.full_like(y, 3.0))
