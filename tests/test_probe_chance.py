"""Permutation tests of probes: what is permuted, what is scored, and how seldom nothing is taken for something."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mechinterp_cli.methods.probe.chance import Chance, adjusted, chance, with_chance
from mechinterp_cli.methods.probe.exchange import exchanges
from mechinterp_cli.methods.probe.folds import Folds, class_folds
from mechinterp_cli.methods.probe.options import ProbeName, ProbeOptions
from mechinterp_cli.methods.probe.permuted_fits import Basis, newton_steps
from mechinterp_cli.methods.probe.scoring import Problem, fit

DRAWS = 99


def problem_of(labels: Sequence[float], classes: int | None, groups: Sequence[str] | None = None) -> Problem:
    own = groups or [str(i) for i in range(len(labels))]
    return Problem.of(labels, classes, own, ProbeOptions(folds=4, inner_folds=2))


def drawn_of(problem: Problem, *, draws: int = DRAWS, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    texts = range(len(problem.targets))
    return exchanges(problem.targets.tolist(), texts, problem.groups, problem.nested.outer, draws=draws, seed=seed)


def noise(n: int, d: int, seed: int) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, d)))


# --- what is permuted


def test_labels_are_exchanged_within_folds_so_that_every_fold_keeps_its_classes() -> None:
    labels = np.random.default_rng(0).integers(3, size=40)
    folds = class_folds(labels, 5)
    groups = [str(i) for i in range(40)]
    drawn = exchanges(labels.tolist(), range(40), groups, folds, draws=50, seed=0)
    assert drawn.shape == (50, 40)
    for mask in folds.test.numpy():
        assert all(sorted(labels[row][mask]) == sorted(labels[mask]) for row in drawn)
    assert len({tuple(row) for row in drawn}) == 50
    assert np.array_equal(drawn, exchanges(labels.tolist(), range(40), groups, folds, draws=50, seed=0))
    assert not np.array_equal(drawn, exchanges(labels.tolist(), range(40), groups, folds, draws=50, seed=1))


def one_fold(n: int) -> Folds:
    """All samples are tested in the first of two folds."""
    return Folds(torch.tensor([[False] * n, [True] * n]))


def test_words_of_a_text_are_shifted_and_keep_their_order() -> None:
    labels, texts, groups = [0, 0, 0, 1, 1, 1, 0, 1], [0] * 6 + [1] * 2, ["a"] * 8
    drawn = exchanges(labels, texts, groups, one_fold(8), draws=200, seed=0)
    found = {tuple(labels[i] for i in row[:6]) for row in drawn}
    assert found == {tuple(np.roll(labels[:6], k).tolist()) for k in range(6)}
    assert {tuple(labels[i] for i in row[6:]) for row in drawn} == {(0, 1), (1, 0)}


def test_texts_of_one_label_exchange_it_as_a_whole_within_their_group() -> None:
    # a sentence's words all have its label: they are not exchanged one by one
    labels, texts = [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 2, 2, 3]
    groups = ["noun"] * 7 + ["other"]
    drawn = exchanges(labels, texts, groups, one_fold(8), draws=200, seed=0)
    found = {tuple(labels[i] for i in row) for row in drawn}
    assert found == {(0, 0, 1, 1, 1, 0, 0, 0), (1, 1, 0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 1, 1, 0)}


def test_groups_of_one_label_exchange_it_with_such_groups_of_their_fold() -> None:
    labels, groups = [0, 0, 1, 1, 0, 1], ["a", "a", "b", "b", "c", "d"]
    folds = Folds(torch.tensor([[False, False, False, False, True, True], [True, True, True, True, False, False]]))
    drawn = exchanges(labels, range(6), groups, folds, draws=200, seed=0)
    found = {tuple(labels[i] for i in row) for row in drawn}
    assert found == {(*ab, *cd) for ab in ((0, 0, 1, 1), (1, 1, 0, 0)) for cd in ((0, 1), (1, 0))}


# --- what is scored


@pytest.mark.parametrize("name", ["mass_mean", "lda"])
@pytest.mark.parametrize(("classes", "d"), [(2, 6), (3, 6), (2, 60), (3, 60)])
def test_scores_of_means_and_discriminants_are_the_probes_own_of_every_draw(
    name: ProbeName, classes: int, d: int
) -> None:
    labels = (np.arange(48) % (classes + 1) % classes).tolist()
    x, problem = noise(48, d, 0), problem_of(labels, classes)
    x[:, 0] += 2 * torch.tensor(labels)
    drawn = drawn_of(problem, draws=5)
    found = chance(name, x, problem, (1.0,), drawn)
    assert found is not None
    for row, score in zip([np.arange(48), *drawn], [found.observed, *found.drawn], strict=True):
        own = Problem(problem.targets[torch.tensor(row)], classes, problem.groups, problem.nested)
        assert float(fit(name, x, own, ProbeOptions()).correct.mean()) == pytest.approx(score, abs=1e-12)


def test_scores_of_ridge_are_the_probes_own_of_every_draw() -> None:
    y = np.random.default_rng(0).normal(size=40)
    x, problem = noise(40, 60, 1), problem_of(y.tolist(), None)
    x[:, 0] += torch.tensor(3 * y)
    drawn = drawn_of(problem, draws=5)
    found = chance("ridge", x, problem, (0.1,), drawn)
    assert found is not None
    for row, score in zip([np.arange(40), *drawn], [found.observed, *found.drawn], strict=True):
        own = Problem(problem.targets[torch.tensor(row)], None, problem.groups, problem.nested)
        wanted = float(fit("ridge", x, own, ProbeOptions(penalties=(0.1,))).correct.mean())
        assert score == pytest.approx(wanted, rel=1e-8)


def test_a_logistic_score_is_the_probes_own_where_the_penalty_is_strong_and_near_it_elsewhere() -> None:
    labels = np.random.default_rng(2).integers(2, size=80)
    x, problem = noise(80, 30, 2), problem_of(labels.tolist(), 2)
    x[:, 0] += torch.tensor(2.0 * labels)
    drawn = drawn_of(problem, draws=30)
    for penalty, farthest in ((1e-4, 0.0), (10.0, 0.15)):
        found = chance("logistic", x, problem, (penalty,), drawn)
        assert found is not None
        own = float(fit("logistic", x, problem, ProbeOptions(penalties=(penalty,))).correct.mean())
        assert abs(found.observed - own) <= farthest


@pytest.mark.parametrize("classes", [2, 3])
def test_a_newton_step_is_that_of_the_objective(classes: int) -> None:
    labels = torch.arange(20) % (classes + 1) % classes
    x, train = noise(20, 5, 3), torch.arange(20) < 15
    members = torch.nn.functional.one_hot(labels, classes).double()
    targets = members[:, 1:] if classes == 2 else members
    basis = Basis.of(x, train, torch.arange(20), standardise=True)
    (found,) = newton_steps(basis, targets[train][:, None], (0.7,), classes=True)
    scaled = (x - x[train].mean(0)) / x[train].std(0, correction=0)
    columns = targets.shape[1]
    share = targets[train].mean(0)
    start = share.logit() if columns == 1 else share.log()

    def objective(w: Tensor) -> Tensor:
        logits = scaled[train] @ w.view(5, columns) + start
        if columns == 1:
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[train], reduction="sum")
        else:
            loss = torch.nn.functional.cross_entropy(logits, labels[train], reduction="sum")
        return 0.7 * loss + w.square().sum() / 2

    zero = torch.zeros(5 * columns, dtype=torch.float64)
    gradient = torch.func.grad(objective)(zero)
    curvature = torch.autograd.functional.hessian(objective, zero)  # type: ignore[no-untyped-call]
    step = -torch.linalg.solve(curvature, gradient)
    torch.testing.assert_close(found[:, 0], scaled @ step.view(5, columns) + start)


# --- what comes of it


def ps(seeds: range, planted: float, *, n: int = 60, d: int = 20) -> list[float]:
    """Of two classes drawn at random, of which activations know so much."""
    out = []
    for seed in seeds:
        labels = np.random.default_rng(1000 + seed).permutation(np.repeat([0, 1], n // 2))
        x, problem = noise(n, d, seed), problem_of(labels.tolist(), 2)
        x[:, 0] += planted * torch.tensor(labels)
        found = chance("logistic", x, problem, ProbeOptions().penalties, drawn_of(problem, seed=seed))
        assert found is not None
        out.append(found.p)
    return out


def test_random_labels_are_seldom_readable_in_20_seeds_and_planted_ones_always() -> None:
    assert sum(p > 0.05 for p in ps(range(20), 0.0)) >= 18
    assert all(p <= 0.05 for p in ps(range(5), 3.0))


@pytest.mark.slow
def test_random_labels_are_not_readable_in_90_of_100_seeds() -> None:
    found = ps(range(100), 0.0)
    assert 90 <= sum(p > 0.05 for p in found) < 100
    assert 0.4 < float(np.mean(found)) < 0.65


def test_words_of_one_label_are_not_exchanged_one_by_one() -> None:
    # the 6 words of a sentence are nearly one sample: taken for 6, sentences of no meaning would be readable
    seldom, often = 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        labels = np.repeat(rng.permutation(np.repeat([0, 1], 12)), 6)
        sentences = np.repeat(np.arange(24), 6).tolist()
        groups = [f"noun {sentence // 2}" for sentence in sentences]
        x = torch.tensor(np.repeat(rng.normal(size=(24, 8)), 6, axis=0) + 0.1 * rng.normal(size=(144, 8)))
        problem = problem_of(labels.tolist(), 2, groups)
        for texts in (sentences, range(144)):
            drawn = exchanges(labels.tolist(), texts, groups, problem.nested.outer, draws=DRAWS, seed=seed)
            found = chance("logistic", x, problem, (1.0,), drawn)
            assert found is not None
            if texts is sentences:
                seldom += found.p <= 0.05
            else:
                often += found.p <= 0.05
    assert seldom <= 4
    assert often >= 6


def test_two_folds_choose_by_the_inner_folds() -> None:
    labels = np.random.default_rng(4).permutation(np.repeat([0, 1], 20))
    x = noise(40, 5, 4)
    x[:, 0] += torch.tensor(4.0 * labels)
    problem = Problem.of(labels.tolist(), 2, [str(i) for i in range(40)], ProbeOptions(folds=2))
    found = chance("logistic", x, problem, (1e-3, 1.0), drawn_of(problem))
    assert found is not None
    assert (found.observed > 0.9, found.p) == (True, 1 / (DRAWS + 1))


def test_probes_without_a_test_have_none() -> None:
    problem = problem_of([0, 1] * 20, 2)
    assert chance("mlp", noise(40, 3, 0), problem, (1.0,), drawn_of(problem)) is None
    assert chance("logistic", noise(40, 3, 0), problem, (1.0,), drawn_of(problem, draws=0)) is None


def test_p_adjusted_is_of_the_highest_of_all_places() -> None:
    rng = np.random.default_rng(5)
    drawn = rng.random((3, 99))
    found = [Chance(observed, row) for observed, row in zip((0.97, 0.5, -0.4), drawn, strict=True)]
    first, second, third = adjusted(found)
    assert first == (1 + (drawn.max(0) >= 0.97).sum()) / 100
    assert second == max(first, (1 + (drawn[1:].max(0) >= 0.5).sum()) / 100)
    assert third == 1.0
    assert first > found[0].p


def test_rows_of_permuted_labels_follow_the_scores() -> None:
    row = {"target": "label", "score": 0.9, "ci_low": 0.8, "ci_high": 1.0, "selectivity": None, "unconverged": 0}
    drawn = np.linspace(0.3, 0.7, 41)
    label, permuted, other = with_chance([row | {"chance": Chance(0.88, drawn)}, row | {"chance": None}])
    assert (label["p"], label["p_adjusted"], label["statistic"], label["score"]) == (1 / 42, 1 / 42, 0.88, 0.9)
    assert (permuted["target"], permuted["score"]) == ("permuted", pytest.approx(0.5))
    assert (permuted["ci_low"], permuted["ci_high"]) == (pytest.approx(0.31), pytest.approx(0.69))
    assert other == row
