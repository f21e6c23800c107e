"""Ridge regression of numbers, for all sites × folds × penalties together.

The objective is scikit-learn's: Σ weight · (y − ŷ)² + penalty · ‖w‖², the intercept free. One eigendecomposition of
each fold's covariance (or of its Gram matrix where samples are fewer than features) serves every penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.standardise import Scaling, fit_scaling


@dataclass(frozen=True)
class Ridge:
    """Fitted probes.

    Args:
        weights: [sites, folds, penalties, d], of the activations as they are; float64.
        intercepts: [sites, folds, penalties].
        scale: [sites, folds, d], what features were divided by.
    """

    weights: Tensor
    intercepts: Tensor
    scale: Tensor

    @property
    def coefficients(self) -> Tensor:
        """Of standardised features: scikit-learn's `coef_`."""
        return self.weights * self.scale[..., None, :]

    def predict(self, x: Tensor) -> Tensor:
        """[sites, folds, penalties, n], in the target's unit.

        Args:
            x: [sites, n, d].
        """
        found = self.weights.flatten(1, 2) @ x.to(self.weights.dtype).transpose(1, 2)
        return found.view(*self.intercepts.shape, -1) + self.intercepts[..., None]


def fit_ridge(x: Tensor, y: Tensor, train: Tensor, penalties: Sequence[float], *, standardise: bool = True) -> Ridge:
    """Fit every site × fold × penalty.

    Args:
        x: [sites, n, d] activations.
        y: [n] numbers, or [folds, n].
        train: [folds, n] weights of samples, 0 for one that is not trained on.
        penalties: scikit-learn's alpha, above 0.
        standardise: Scale features to variance 1 on each fold's own training samples.
    """
    weights, targets = train.to(x.device).double(), y.to(x.device).double().expand(len(train), -1)
    alphas = torch.tensor(penalties, dtype=torch.float64, device=x.device)
    sites = [_fit_site(site.double(), targets, weights, alphas, standardise) for site in x]
    return Ridge(*(torch.stack(parts) for parts in zip(*sites, strict=True)))


def _fit_site(
    x: Tensor, targets: Tensor, weights: Tensor, alphas: Tensor, standardise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scaling = fit_scaling(x, weights)
    if not standardise:
        scaling = Scaling(scaling.mean, torch.ones_like(scaling.scale))
    middle = (weights * targets).sum(1) / weights.sum(1)
    found = []
    for fold, mass in enumerate(weights):
        root = mass.sqrt()
        scaled = (x - scaling.mean[fold]) / scaling.scale[fold] * root[:, None]
        found.append(_every_penalty(scaled, (targets[fold] - middle[fold]) * root, alphas))
    own, intercepts = scaling.raw(torch.stack(found), middle[:, None].expand(-1, len(alphas)))
    return own, intercepts, scaling.scale


def _every_penalty(x: Tensor, y: Tensor, alphas: Tensor) -> Tensor:
    """[penalties, d] of centred x and y."""
    n, d = x.shape
    if d <= n:
        values, vectors = torch.linalg.eigh(x.T @ x)
        inside: Tensor = vectors.T @ (x.T @ y)
        primal: Tensor = inside / (values.clamp(min=0) + alphas[:, None])
        return torch.matmul(primal, vectors.T)
    values, vectors = torch.linalg.eigh(x @ x.T)
    dual: Tensor = (vectors.T @ y) / (values.clamp(min=0) + alphas[:, None])
    return torch.matmul(torch.matmul(dual, vectors.T), x)


def r2(predicted: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """1 − Σ(y − ŷ)² / Σ(y − ȳ)² over some samples, ȳ their own mean; NaN where they are all alike.

    Args:
        predicted: [..., folds, penalties, n].
        y: [n].
        mask: [folds, n]: the samples of each fold that count.
    """
    kept, targets = mask.to(predicted), y.to(predicted)
    mean = (kept * targets).sum(1, keepdim=True) / kept.sum(1, keepdim=True)
    total = (kept * (targets - mean).square()).sum(1)
    left = (kept[:, None] * (targets - predicted).square()).sum(-1)
    return 1 - left / torch.where(total > 0, total, torch.nan)[:, None]
