import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.methods.probe.basis import RANK
from mechinterp_cli.methods.probe.logistic import Logistic, Tasks, fit_logistic, fit_site
from mechinterp_cli.methods.probe.spaces import spaces
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.walk import forward
from tests.models_fixtures import smollm2, toy

__all__ = ["smollm2", "toy"]

PENALTIES = (1e-3, 1e-1, 1.0, 10.0)
COEFFICIENTS = 1e-4
"""Largest distance from scikit-learn's coefficients, as a share of their norm."""


def synthetic(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[n, d] activations and [n] labels."""
    rng = np.random.default_rng(seed)
    n, d, classes = {"wide": (60, 150, 2), "three classes": (150, 20, 3), "five classes": (200, 12, 5)}.get(
        kind, (160, 25, 2)
    )
    x = rng.normal(size=(n, d))
    if kind == "unequal scales":
        x = x * np.logspace(-2, 3, d) + 50
    if kind == "correlated":
        x = x @ rng.normal(size=(d, d)) * 0.3 + rng.normal(size=(n, 1)) * 4
    scores = (x - x.mean(0)) / x.std(0) @ rng.normal(size=(d, classes)) / 2 + rng.gumbel(size=(n, classes))
    if kind == "few of one class":
        scores[:, 1] -= 5
    return torch.tensor(x), torch.tensor(scores.argmax(1))


KINDS = ("plain", "wide", "unequal scales", "correlated", "few of one class", "three classes", "five classes")


def folds(n: int, count: int = 3) -> Tensor:
    """[folds, n] masks of training samples."""
    train = torch.ones(count, n)
    for fold in range(count):
        train[fold, fold::count] = 0
    return train


def oracle(x: Tensor, labels: Tensor, penalty: float, **others: Any) -> Any:
    with warnings.catch_warnings():
        # what it prints of its line search at the limit of rounding is no failure: its gradient is checked below
        warnings.simplefilter("ignore")
        return LogisticRegression(C=penalty, tol=1e-10, max_iter=20_000, **others).fit(x.numpy(), labels.numpy())


def agrees(fitted: Logistic, x: Tensor, labels: Tensor, train: Tensor, penalties: tuple[float, ...]) -> None:
    assert bool(fitted.converged.all())
    predicted = fitted.predict(x)
    for fold, mask in enumerate(train.bool()):
        scaler = StandardScaler().fit(x[mask].numpy())
        scaled = torch.tensor(scaler.transform(x.numpy()))
        for number, penalty in enumerate(penalties):
            wanted = oracle(scaled[mask], labels[mask], penalty)
            found = fitted.coefficients[fold, number].numpy()
            distance = np.linalg.norm(found - wanted.coef_) / np.linalg.norm(wanted.coef_)
            assert distance <= COEFFICIENTS, (fold, penalty, distance)
            own = predicted[fold, number][~mask].numpy()
            assert (own == labels[~mask].numpy()).mean() == wanted.score(scaled[~mask].numpy(), labels[~mask].numpy())
            chances = fitted.log_probabilities(x)[fold, number].exp().T.numpy()
            np.testing.assert_allclose(chances, wanted.predict_proba(scaled.numpy()), atol=1e-3)
            loss = -np.log(wanted.predict_proba(scaled.numpy())[np.arange(len(x)), labels.numpy()])[mask.numpy()].sum()
            reached = penalty * loss + (wanted.coef_**2).sum() / 2
            assert float(fitted.objective[fold, number]) == pytest.approx(reached, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_chances_scores_and_objectives_are_those_of_scikit_learn(kind: str) -> None:
    x, labels = synthetic(kind)
    train, classes = folds(len(x)), int(labels.max()) + 1
    assert [len(set(labels[mask].tolist())) for mask in train.bool()] == [classes] * len(train)
    fitted = fit_site(x, Tasks.of(labels, train, classes), PENALTIES)
    agrees(fitted, x, labels, train, PENALTIES)


def test_sites_are_solved_apart_and_float32_activations_are_taken_up_to_their_own_rounding() -> None:
    x = torch.stack([synthetic("plain", seed)[0] for seed in range(2)])
    labels = synthetic("plain")[1]
    tasks = Tasks.of(labels, folds(len(labels)), 2)
    whole = fit_logistic(x, tasks, PENALTIES)
    for site in range(2):
        alone = fit_site(x[site], tasks, PENALTIES)
        assert torch.equal(whole.weights[site], alone.weights)
        assert torch.equal(whole.logits(x)[site], alone.logits(x[site]))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    several = fit_logistic(x, tasks, PENALTIES)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert torch.equal(several.weights, whole.weights)
    single = fit_logistic(x.float(), tasks, PENALTIES)
    assert (single.weights - whole.weights).norm() <= 1e-5 * whole.weights.norm()
    assert single.weights.dtype == torch.float64


def test_without_standardisation_the_penalty_is_on_the_activations_own_coefficients() -> None:
    x, labels = synthetic("correlated")
    train = folds(len(x))
    fitted = fit_site(x, Tasks.of(labels, train, 2), (0.1, 10.0), standardise=False)
    scaled = fit_site(x, Tasks.of(labels, train, 2), (0.1, 10.0))
    for number, penalty in enumerate((0.1, 10.0)):
        wanted = oracle(x[train[0].bool()], labels[train[0].bool()], penalty).coef_[0]
        distance = np.linalg.norm(fitted.weights[0, number, 0].numpy() - wanted) / np.linalg.norm(wanted)
        assert distance <= COEFFICIENTS
    assert (scaled.weights - fitted.weights).norm() > 0.1 * fitted.weights.norm()


def test_samples_that_are_not_trained_on_change_nothing() -> None:
    x, labels = synthetic("plain")
    train = folds(len(x))
    fitted = fit_site(x, Tasks.of(labels, train, 2), PENALTIES, tolerance=1e-8)
    changed, flipped = x.clone(), labels.clone()
    changed[0::3] = 5 - 40 * changed[0::3]
    flipped[0::3] = 1 - flipped[0::3]
    again = fit_site(changed, Tasks.of(flipped, train, 2), PENALTIES, tolerance=1e-8)
    assert (again.weights[0] - fitted.weights[0]).norm() <= 1e-6 * fitted.weights[0].norm()
    assert (again.weights[1] - fitted.weights[1]).norm() > 0.1 * fitted.weights[1].norm()


def test_weights_are_the_same_as_repeated_samples() -> None:
    x, labels = synthetic("three classes")
    weights = torch.ones(1, len(x))
    weights[0, :50] = 2
    fitted = fit_site(x, Tasks.of(labels, weights, 3), (1.0,), tolerance=1e-8)
    twice, again = torch.cat([x, x[:50]]), torch.cat([labels, labels[:50]])
    repeated = fit_site(twice, Tasks.of(again, torch.ones(1, len(again)), 3), (1.0,), tolerance=1e-8)
    assert (repeated.weights - fitted.weights).norm() <= 1e-6 * fitted.weights.norm()


def test_constant_features_get_no_weight() -> None:
    x, labels = synthetic("plain")
    x[:, 3], x[:, 7] = 0.0, 1e4
    train = folds(len(x))
    x[train[0].bool(), 9] = 2.0  # constant in one fold only
    fitted = fit_site(x, Tasks.of(labels, train, 2), PENALTIES, tolerance=1e-8)
    assert bool(fitted.converged.all())
    assert float(fitted.coefficients[..., [3, 7]].abs().max()) <= 1e-6
    assert float(fitted.coefficients[0, ..., 9].abs().max()) <= 1e-6
    assert float(fitted.coefficients[1, ..., 9].abs().max()) > 1e-3


def test_tasks_of_the_same_samples_and_tasks_of_others_are_solved_to_the_same_optimum() -> None:
    x, labels = synthetic("wide")
    train = torch.cat([folds(len(x)), torch.ones(1, len(x))])
    draws = torch.stack([labels.roll(7 * i) for i in range(15)])
    many = Tasks(draws.repeat_interleave(4, 0), train.repeat(15, 1), 2)
    found = [space for space in spaces(x, many.weights.double(), 4, standardise=True)]
    assert [space.vectors is None for space in found] == [False] * 4
    assert torch.cat([space.tasks for space in found]).sort().values.tolist() == list(range(60))
    together = fit_site(x, many, PENALTIES, tolerance=1e-8)
    few = Tasks(draws[2:3], train[1:2], 2)
    space, *others = spaces(x, few.weights.double(), 1, standardise=True)
    assert space.vectors is None and not others
    alone = fit_site(x, few, PENALTIES[:1], tolerance=1e-8)
    assert (together.weights[9, 0] - alone.weights[0, 0]).norm() <= 1e-7 * alone.weights.norm()


@pytest.mark.parametrize("shape", [(400, 300), (180, 400)])
def test_a_part_of_the_eigenvectors_is_enough(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.normal(size=shape) / np.arange(1, shape[1] + 1) @ rng.normal(size=(shape[1], shape[1])))
    labels = (x[:, 0] + x.std() * torch.tensor(rng.normal(size=shape[0])) > 0).long()
    train = folds(len(x))
    (space,) = spaces(x, train.double(), len(PENALTIES), standardise=True)
    assert space.basis.vectors is not None and space.basis.vectors.shape[1] == RANK + 1
    agrees(fit_site(x, Tasks.of(labels, train, 2), PENALTIES), x, labels, train, PENALTIES)


@pytest.mark.parametrize("kind", ["plain", "wide", "five classes"])
def test_a_loose_tolerance_is_kept_in_float32(kind: str) -> None:
    x, labels = synthetic(kind)
    tasks = Tasks.of(labels, folds(len(x)), int(labels.max()) + 1)
    loose, exact = fit_site(x, tasks, PENALTIES, tolerance=1e-3), fit_site(x, tasks, PENALTIES, tolerance=1e-7)
    distance = (loose.coefficients - exact.coefficients).flatten(2).norm(dim=2)
    norm = exact.coefficients.flatten(2).norm(dim=2)
    assert bool((distance <= 1e-3 * norm).all()) and float((distance / norm).max()) > 1e-6
    assert int(loose.steps.sum()) < int(exact.steps.sum())


@pytest.mark.parametrize("penalty", [1e5, 1e8])
def test_separable_classes_with_hardly_any_penalty_are_solved_or_said_not_to_be(penalty: float) -> None:
    x, labels = synthetic("wide")
    tasks = Tasks.of(labels, torch.ones(1, len(x)), 2)
    fitted = fit_site(x, tasks, (penalty,))
    assert torch.equal(fitted.predict(x)[0, 0], labels)
    assert bool(torch.isfinite(fitted.weights).all())
    assert bool(fitted.converged.all())
    assert float(fitted.gradient[0, 0]) <= 1e-3 * float(fitted.coefficients.norm())
    stopped = fit_site(x, tasks, (1e-3, penalty), max_steps=8)
    assert stopped.converged.tolist() == [[True, False]]
    assert int(stopped.steps.max()) == 8
    assert float(stopped.objective[0, 1]) > float(fitted.objective[0, 0])


def test_many_tasks_in_chunks_are_the_tasks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = synthetic("plain")
    draws = torch.stack([labels.roll(7 * i) for i in range(5)])
    tasks = Tasks(draws, torch.ones(5, len(x)), 2)
    whole = fit_site(x, tasks, PENALTIES, tolerance=1e-8)
    monkeypatch.setattr("mechinterp_cli.methods.probe.logistic.CHUNK_CPU", 1)
    apart = fit_site(x, tasks, PENALTIES, tolerance=1e-8)
    assert (whole.weights - apart.weights).norm() <= 1e-7 * whole.weights.norm()


# --- activations of models


def activations(loaded: LoadedModel, texts: Tensor, layer: int) -> Tensor:
    """[prompts, d_model] at the last position."""
    site = Site("resid_post", layer)
    with torch.no_grad():
        return read_sites(loaded.model, loaded.anatomy, {site}, lambda: forward(loaded.model, texts, last_only=True))[
            site
        ][:, -1]


def test_on_activations_of_the_toy_coefficients_are_those_of_scikit_learn(toy: LoadedModel) -> None:
    tokens = torch.randint(1, toy.anatomy.vocab_size, (90, 8), generator=torch.Generator().manual_seed(0))
    labels = (tokens[:, -2] % 3).long()  # of the token before: what attention must have moved
    x = activations(toy, tokens, 1).double()
    train = folds(len(x))
    fitted = fit_site(x, Tasks.of(labels, train, 3), (1e-2, 1.0))
    agrees(fitted, x, labels, train, (1e-2, 1.0))


@pytest.mark.slow
def test_on_activations_of_smollm2_coefficients_are_those_of_scikit_learn(smollm2: LoadedModel) -> None:
    names, verbs = ("Mary", "John", "Tom", "Anna", "Paul", "Lisa"), ("liked", "hated", "enjoyed", "missed")
    things = ("the film", "a song", "the walk", "this book")
    texts = [f"{name} {verb} {thing} yesterday" for name in names for verb in verbs for thing in things]
    labels = torch.tensor([verb in ("liked", "enjoyed") for _ in names for verb in verbs for _ in things]).long()
    encoded = [smollm2.tokenizer(text)["input_ids"] for text in texts]
    x = torch.cat([activations(smollm2, torch.tensor([ids]), 12) for ids in encoded]).double()
    train = folds(len(x))
    fitted = fit_site(x, Tasks.of(labels, train, 2), PENALTIES)
    agrees(fitted, x, labels, train, PENALTIES)
