import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.metrics import r2_score
from sklearn.preprocessing import StandardScaler

from mechinterp_cli.methods.probe.means import class_moments, linear_discriminant, mass_mean, shrunk
from mechinterp_cli.methods.probe.ridge import fit_ridge, r2
from tests.test_probe_logistic import folds, synthetic

ALPHAS = (1e-2, 1.0, 100.0)


@pytest.mark.parametrize("kind", ["plain", "wide", "unequal scales", "correlated"])
@pytest.mark.parametrize("standardise", [True, False])
def test_ridge_is_scikit_learns(kind: str, standardise: bool) -> None:
    x, _ = synthetic(kind)
    y = x @ torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)).double() / x.std() + 3
    train = folds(len(x))
    fitted = fit_ridge(torch.stack([x, 2 * x.flip(0)]), y, train, ALPHAS, standardise=standardise)
    scores = r2(fitted.predict(torch.stack([x, 2 * x.flip(0)])), y, 1 - train)
    for site, own in enumerate((x, 2 * x.flip(0))):
        for fold, mask in enumerate(train.bool()):
            scaler = StandardScaler(with_std=standardise).fit(own[mask].numpy())
            scaled = scaler.transform(own.numpy())
            for number, alpha in enumerate(ALPHAS):
                wanted = SklearnRidge(alpha=alpha, solver="svd").fit(scaled[mask], y[mask].numpy())
                found = fitted.coefficients[site, fold, number].numpy()
                # Features of unequal scales lose half of the digits; 1.3e-6 was seen on another processor.
                assert np.linalg.norm(found - wanted.coef_) <= 1e-5 * np.linalg.norm(wanted.coef_)
                score = r2_score(y[~mask].numpy(), wanted.predict(scaled[~mask]))
                assert float(scores[site, fold, number]) == pytest.approx(score, abs=1e-6)


def test_ridge_of_repeated_samples_is_ridge_of_weights() -> None:
    x, _ = synthetic("plain")
    y = x[:, 0] + x[:, 1].square()
    weights = torch.ones(1, len(x))
    weights[0, :40] = 2
    found = fit_ridge(x[None], y, weights, ALPHAS).weights
    twice = fit_ridge(torch.cat([x, x[:40]])[None], torch.cat([y, y[:40]]), torch.ones(1, len(x) + 40), ALPHAS).weights
    assert (found - twice).norm() <= 1e-9 * found.norm()
    assert (found - fit_ridge(x[None], y, torch.ones(1, len(x)), ALPHAS).weights).norm() > 1e-3 * found.norm()


def test_r2_of_targets_that_are_all_alike_is_not_a_number() -> None:
    y = torch.tensor([1.0, 1.0, 2.0, 4.0])
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]])
    scores = r2(torch.tensor([2.0, 2.0, 2.0, 4.0]).expand(2, 1, 4), y, mask)
    assert scores[:, 0].isnan().tolist() == [True, False]
    assert float(scores[1, 0]) == 1.0


@pytest.mark.parametrize("kind", ["plain", "correlated", "few of one class", "three classes", "five classes"])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_linear_discriminant_is_scikit_learns(kind: str, shrinkage: float) -> None:
    x, labels = synthetic(kind)
    # scikit-learn shrinks features that it has scaled by their spread within classes; they are made to have one of 1
    train, classes = torch.ones(1, len(x)), int(labels.max()) + 1
    x = x / class_moments(x, labels, train, classes).within[0].diagonal().sqrt()
    train[0, ::4] = 0
    mask = train[0].bool()
    x[mask] = x[mask] / class_moments(x[mask], labels[mask], train[:, mask], classes).within[0].diagonal().sqrt()
    fitted = linear_discriminant(x[None], labels, train, classes=classes, shrinkage=shrinkage)
    wanted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None).fit(
        x[mask].numpy(), labels[mask].numpy()
    )
    chances = fitted.logits(x[None])[0, 0].softmax(0).T.numpy()
    np.testing.assert_allclose(chances, wanted.predict_proba(x.numpy()), atol=1e-3 if shrinkage else 1e-6)
    assert np.array_equal(fitted.predict(x[None])[0, 0].numpy(), wanted.predict(x.numpy()))
    if classes == 2:
        own, theirs = fitted.direction[0, 0].numpy(), wanted.coef_[0]
        assert own @ theirs / np.linalg.norm(own) / np.linalg.norm(theirs) >= 1 - (1e-3 if shrinkage else 1e-9)


def test_mass_mean_is_the_difference_of_means_and_whitened_it_is_the_discriminants_direction() -> None:
    x, labels = synthetic("correlated")
    train = folds(len(x))
    plain, white = (mass_mean(x[None], labels, train, whiten=one) for one in (False, True))
    discriminant = linear_discriminant(x[None], labels, train, classes=2, shrinkage=0.0)
    for fold, mask in enumerate(train.bool()):
        difference = x[mask & (labels == 1)].mean(0) - x[mask & (labels == 0)].mean(0)
        middle = x[mask & (labels == 1)].mean(0) + x[mask & (labels == 0)].mean(0)
        torch.testing.assert_close(plain.direction[0, fold], difference)
        assert torch.equal(plain.predict(x[None])[0, fold], ((x - middle / 2) @ difference > 0).long())
    torch.testing.assert_close(white.direction, discriminant.direction)
    assert torch.nn.functional.cosine_similarity(white.direction, plain.direction, dim=-1).max() < 0.9


def test_of_more_classes_mass_mean_takes_the_nearest_mean() -> None:
    x, labels = synthetic("three classes")
    found = mass_mean(x[None], labels, torch.ones(1, len(x)), classes=3).predict(x[None])[0, 0]
    means = torch.stack([x[labels == one].mean(0) for one in range(3)])
    assert torch.equal(found, torch.cdist(x, means).argmin(1))


def test_full_shrinkage_leaves_the_trace() -> None:
    covariance = torch.randn(5, 5).double()
    covariance = covariance @ covariance.T
    whole = shrunk(covariance, 1.0)
    torch.testing.assert_close(whole, torch.eye(5).double() * covariance.trace() / 5)
    torch.testing.assert_close(shrunk(covariance, 0.0), covariance)
