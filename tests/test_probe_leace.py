import importlib
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from mechinterp_cli.methods.probe.leace import Eraser, fit_leace, orthogonal, shrunk_covariance
from mechinterp_cli.methods.probe.logistic import Tasks, fit_site


def concept(classes: int, *, n: int = 400, d: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated activations, labels, one-hot labels; classes are readable."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % (classes + 1) % classes  # class 0 is twice as common
    spread = torch.randn(d, d, generator=rng, dtype=torch.float64)
    means = 1.5 * torch.randn(classes, d, generator=rng, dtype=torch.float64)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) @ spread + means[labels] + 4
    return x, labels, torch.nn.functional.one_hot(labels, classes).double()


def reference(x: Tensor, z: Tensor, **others: bool | float) -> tuple[Tensor, Tensor]:
    """P and erased activations of the `concept-erasure` package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it compiles with TorchScript at import
        package = importlib.import_module("concept_erasure")
    eraser = package.LeaceFitter.fit(x, z, **others).eraser
    return eraser.P, eraser(x)


def by_formula(x: Tensor, z: Tensor) -> Tensor:
    """P of theorem 4.3 in numpy, by pseudo-inverses: no shrinkage, no tolerance, no constraint on the trace."""
    a, b = x.numpy() - x.numpy().mean(0), z.numpy() - z.numpy().mean(0)
    sigma, cross = a.T @ a / (len(a) - 1), a.T @ b / (len(a) - 1)
    values, vectors = np.linalg.eigh(sigma)
    whiten = np.linalg.pinv(vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T, rcond=1e-7)
    whitened = whiten @ cross
    return torch.tensor(
        np.eye(len(sigma))
        - np.linalg.pinv(whiten, rcond=1e-7) @ whitened @ np.linalg.pinv(whitened, rcond=1e-7) @ whiten
    )


def best_accuracy(x: Tensor, labels: Tensor, classes: int) -> float:
    """Of a fresh logistic probe on its own training data."""
    fitted = fit_site(x, Tasks.of(labels, torch.ones(1, len(x)), classes), (100.0,))
    return float((fitted.predict(x)[0, 0] == labels).double().mean())


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_a_fresh_probe_learns_nothing_after_erasure_and_did_before(classes: int, shrinkage: bool) -> None:
    x, labels, z = concept(classes, n=420)
    majority = float(labels.bincount().max()) / len(labels)
    eraser = fit_leace(x, z, shrinkage=shrinkage)
    assert best_accuracy(x, labels, classes) > majority + 0.2
    assert best_accuracy(eraser(x), labels, classes) <= majority + 1e-9
    assert eraser.rank == classes - 1
    # class means are all where the mean was, and the mean stays
    means = torch.stack([eraser(x)[labels == one].mean(0) for one in range(classes)])
    torch.testing.assert_close(means, x.mean(0).expand(classes, -1))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("dependent", [False, True])
def test_it_is_the_formula(classes: int, dependent: bool) -> None:
    x, _, z = concept(classes)
    if dependent:
        x = torch.cat([x, x[:, :3] + x[:, 3:6]], dim=1)
    eraser = fit_leace(x, z, shrinkage=False)
    wanted = by_formula(x, z)
    assert (eraser.matrix - wanted).norm() <= 1e-6 * wanted.norm() or dependent
    erased = (x - x.mean(0)) @ wanted.T + x.mean(0)
    assert (eraser(x) - erased).abs().max() <= 1e-6 * x.abs().max()
    torch.testing.assert_close(x @ eraser.matrix.T + eraser.offset, eraser(x))


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("constrain", [True, False])
@pytest.mark.parametrize("n", [400, 40])
def test_it_is_the_concept_erasure_packages(classes: int, shrinkage: bool, constrain: bool, n: int) -> None:
    x, _, z = concept(classes, n=n, d=30)
    matrix, erased = reference(x, z, shrinkage=shrinkage, constrain_cov_trace=constrain)
    found = fit_leace(x, z, shrinkage=shrinkage)
    assert (found.matrix - matrix).abs().max() <= 1e-5
    assert (found(x) - erased).abs().max() <= 1e-5 * x.abs().max()


@pytest.mark.parametrize("shrinkage", [True, False])
@pytest.mark.parametrize("n", [20, 400])
def test_the_trace_of_the_covariance_never_rises(n: int, shrinkage: bool) -> None:
    for seed in range(8):
        x, _, z = concept(3, n=n, d=30, seed=seed)
        x = x * torch.logspace(-3, 1, 30, dtype=torch.float64)
        sigma = torch.cov(x.T)
        if shrinkage:
            sigma = shrunk_covariance(torch.cov(x.T, correction=0), n)
        eraser = fit_leace(x, z, shrinkage=shrinkage)
        assert eraser.rank == 2
        left = eraser.matrix @ sigma @ eraser.matrix.T
        assert float(left.trace()) < float(sigma.trace())


def test_singular_values_below_the_tolerance_are_left_in() -> None:
    x, labels, z = concept(2)
    none = fit_leace(x, z, svd_tolerance=10.0)
    assert none.rank == 0
    assert torch.equal(none(x), x)
    assert fit_leace(x, z).rank == 1


def test_orthogonal_erasure_removes_the_span_and_nothing_else() -> None:
    x, _, _ = concept(2)
    directions = torch.randn(3, x.shape[1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    directions = torch.cat([directions, directions[:1] + directions[1:2]])
    eraser = orthogonal(directions)
    assert eraser.rank == 3
    assert float((eraser(x) @ directions.T).abs().max()) <= 1e-9
    basis = torch.linalg.qr(directions[:3].T)[0]
    torch.testing.assert_close(eraser(x), x - x @ basis @ basis.T)
    kept = orthogonal(directions, x.mean(0))
    torch.testing.assert_close(kept(x).mean(0), x.mean(0))
    assert isinstance(kept, Eraser)
    assert kept(x.float()).dtype == torch.float32


def test_shrinkage_keeps_the_trace_and_goes_away_with_samples() -> None:
    x, _, _ = concept(2, n=100)
    covariance = torch.cov(x.T, correction=0)
    few, many = shrunk_covariance(covariance, 20), shrunk_covariance(covariance, 10**9)
    torch.testing.assert_close(few.trace(), covariance.trace())
    torch.testing.assert_close(many, covariance)
    assert (few - covariance).norm() > 0.05 * covariance.norm()
    even = 2 * torch.eye(4, dtype=torch.float64)
    assert torch.equal(shrunk_covariance(even, 5), even)
