"""Means and scales of features, fitted on training samples only."""

from dataclasses import dataclass

import torch
from torch import Tensor

CONSTANT = 1e-10
"""A feature whose spread is this share of its largest magnitude, or less, is constant; it is left at scale 1."""


@dataclass(frozen=True)
class Scaling:
    """What makes a task's training samples have mean 0 and variance 1.

    Args:
        mean: [tasks, d].
        scale: [tasks, d] standard deviations (of the population, as scikit-learn's StandardScaler); 1 where a feature
            is constant.
    """

    mean: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[n, d] to [tasks, n, d]; every sample is scaled, trained on or not."""
        return (x - self.mean[:, None]) / self.scale[:, None]

    def raw(self, weights: Tensor, intercepts: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of scaled features as coefficients of the features themselves.

        Args:
            weights: [tasks, ..., d].
            intercepts: [tasks, ...].
        """
        shape = (len(self.scale), *(1,) * (weights.dim() - 2), -1)
        own = weights / self.scale.view(shape)
        return own, intercepts - (own * self.mean.view(shape)).sum(-1)


def fit_scaling(x: Tensor, weights: Tensor) -> Scaling:
    """Means and scales of every task's own samples.

    Args:
        x: [n, d].
        weights: [tasks, n]: 0 for a sample that is not trained on.
    """
    middle = x.mean(0)
    centred = x - middle
    mass = weights.sum(1, keepdim=True)
    mean = weights @ centred / mass
    variance = (weights @ centred.square() / mass - mean.square()).clamp(min=0)
    limit = (CONSTANT * x.abs().amax(0)).clamp(min=torch.finfo(x.dtype).tiny)
    # what squares and their difference leave of a spread of nothing
    noise = (8 * torch.finfo(x.dtype).eps * mean.square()).sqrt()
    scale = variance.sqrt()
    return Scaling(mean + middle, torch.where(scale > torch.maximum(limit, noise), scale, 1.0))
