"""Probes that are solved by means and covariances: mass-mean, linear discriminant."""

from dataclasses import dataclass

import torch
from torch import Tensor

PINV = 1e-10
"""Eigenvalues of a covariance below this share of the largest are taken for 0."""


@dataclass(frozen=True)
class Linear:
    """Fitted probes.

    Args:
        weights: [sites, folds, classes, d]; for two classes too there are two rows.
        intercepts: [sites, folds, classes].
    """

    weights: Tensor
    intercepts: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """[sites, folds, classes, n]: log-probabilities up to a constant where classes are normal, of one covariance.

        Args:
            x: [sites, n, d].
        """
        found = self.weights.flatten(1, 2) @ x.to(self.weights.dtype).transpose(1, 2)
        return found.view(*self.intercepts.shape, -1) + self.intercepts[..., None]

    def predict(self, x: Tensor) -> Tensor:
        """Classes, [sites, folds, n]."""
        return self.logits(x).argmax(-2)

    @property
    def direction(self) -> Tensor:
        """[sites, folds, d]: class 1 less class 0, where there are two."""
        return self.weights[..., 1, :] - self.weights[..., 0, :]


@dataclass(frozen=True)
class Moments:
    """Of one site.

    Args:
        means: [folds, classes, d].
        within: [folds, d, d] covariance about the class means, divided by the number of samples.
        shares: [folds, classes] of the training samples.
    """

    means: Tensor
    within: Tensor
    shares: Tensor


def class_moments(x: Tensor, labels: Tensor, train: Tensor, classes: int) -> Moments:
    """Class means and the covariance that classes share, float64.

    Args:
        x: [n, d].
        labels: [n] from 0 on; every class must be among each fold's training samples.
        train: [folds, n], 1 for a sample that is trained on.
        classes: How many.
    """
    labels, train = labels.to(x.device), train.to(x.device)
    x, middle = x.double() - x.double().mean(0), x.double().mean(0)
    members = torch.nn.functional.one_hot(labels, classes).T * train.double()[:, None]
    counts = members.sum(-1)
    means = members @ x / counts[..., None]
    own = means[:, labels]
    centred = (x - own) * train.double()[..., None]
    within = centred.transpose(1, 2) @ centred / counts.sum(1)[:, None, None]
    return Moments(means + middle, within, counts / counts.sum(1, keepdim=True))


def mass_mean(x: Tensor, labels: Tensor, train: Tensor, *, classes: int = 2, whiten: bool = False) -> Linear:
    """Mass-mean probe (2310.06824, section 5): the difference of class means, as classifier `σ(θᵀ (x − middle))`.

    Unwhitened, θ = μ₁ − μ₀; whitened, θ = Σ⁺ (μ₁ − μ₀), Σ the covariance about the class means. A sample is on the
    side of class 1 beyond the middle of the two means; for more classes the nearest mean wins, in the metric of Σ⁺
    where whitened.

    Args:
        x: [sites, n, d].
        labels: [n].
        train: [folds, n] masks.
        classes: How many.
        whiten: Whether by Σ⁺.
    """
    found = []
    for site in x:
        moments = class_moments(site, labels, train, classes)
        inverse = _pinv(moments.within) if whiten else torch.eye(site.shape[1], dtype=torch.float64, device=x.device)
        found.append(_linear(moments.means, moments.means @ inverse))
    return Linear(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def linear_discriminant(x: Tensor, labels: Tensor, train: Tensor, *, classes: int, shrinkage: float) -> Linear:
    """Linear discriminant analysis with a shared covariance `(1 − shrinkage) Σ + shrinkage · tr(Σ)/d · 1`.

    Σ is the covariance about the class means; class shares of the training samples are the priors (scikit-learn's
    LinearDiscriminantAnalysis with `solver="lsqr"` shrinks standardised features instead: equal where shrinkage is 0).

    Args:
        x: [sites, n, d].
        labels: [n].
        train: [folds, n] masks.
        classes: How many.
        shrinkage: From 0, where the pseudo-inverse is taken, to 1, where the nearest class mean wins.
    """
    found = []
    for site in x:
        moments = class_moments(site, labels, train, classes)
        inverse = _pinv(shrunk(moments.within, shrinkage))
        weights, intercepts = _linear(moments.means, moments.means @ inverse)
        found.append((weights, intercepts + moments.shares.log()))
    return Linear(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """Towards the multiple of the identity of the same trace, [..., d, d]."""
    d = covariance.shape[-1]
    trace = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(d, dtype=covariance.dtype, device=covariance.device)
    return (1 - shrinkage) * covariance + shrinkage * trace[..., None, None] * eye


def _pinv(covariance: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.pinv(covariance, rtol=PINV, hermitian=True)
    return inverse


def _linear(means: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Rows Σ⁺μ and intercepts −μᵀΣ⁺μ/2."""
    return weights, -(means * weights).sum(-1) / 2
