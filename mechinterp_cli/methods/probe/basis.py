"""The features in which logistic problems are solved, and the preconditioner that their covariance gives.

A problem's curvature is about `scale/n · x.T x + 1`: one matrix for all penalties, folds and labels, up to a number.
Its leading eigenvectors are found once; beyond them every eigenvalue is taken for their mean (Halko, Martinsson & Tropp
2011, one power iteration). Measured on 40 problems of 1,000 × 576: 128 of them cost a fifth more steps than all 576,
and a fifth less time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

RANK = 128
"""Eigenvectors of the preconditioner; all of them where there are not many more."""
FLOOR = 1e-5
"""What the preconditioner shrinks along an eigenvector, against what it shrinks beyond them: at least this, or rounding
in float32 could make it climb."""


@dataclass(frozen=True)
class Basis:
    """Features and their covariance.

    Args:
        x: [n, k + 1] features, centred, and a last column of ones.
        values: [r + 1] eigenvalues of `x.T @ x`, the intercept's last.
        vectors: [k + 1, r + 1] their eigenvectors, float32; None where the features are the eigenvectors.
        rest: [] mean of the other eigenvalues; infinite where there are none.
    """

    x: Tensor
    values: Tensor
    vectors: Tensor | None
    rest: Tensor

    def to(self, dtype: torch.dtype) -> "Basis":
        """The features in another precision; the preconditioner keeps its own."""
        return Basis(self.x.to(dtype), self.values, self.vectors, self.rest)

    def precondition(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """A gradient through the inverse of `scale/n · x.T x + 1`, without the 1 for the intercept.

        Args:
            gradient: [problems, columns, k + 1].
            scale: [problems, 1, 1] weighted curvature of the loss, summed over samples.
        """
        curvature = scale.to(self.values.dtype) / len(self.x)
        stretch = curvature * self.values
        stretch[..., :-1] += 1
        if self.vectors is None:
            return gradient / stretch
        beyond = 1 / (curvature * self.rest + 1)
        flat = gradient.flatten(0, 1).to(self.vectors.dtype)
        inside = (flat @ self.vectors).view(*gradient.shape[:2], -1)
        inside *= torch.maximum(1 / stretch, FLOOR * beyond) - beyond
        shrunk = (inside.flatten(0, 1) @ self.vectors.T).view(gradient.shape).to(gradient.dtype)
        return torch.addcmul(shrunk, beyond.to(gradient.dtype), gradient)


def leading(x: Tensor) -> Basis:
    """Features as they are; a part of the eigenvectors, in float32.

    Args:
        x: [n, k], each feature's mean about 0.
    """
    n, k = x.shape
    small = x.float()
    rank = k if k <= RANK else min(n, RANK)
    if rank < k:
        draws = torch.randn(k, rank, generator=torch.Generator().manual_seed(0)).to(x.device)
        span = torch.linalg.qr(small.T @ (small @ draws))[0]
        inside = small @ span
        values, vectors = torch.linalg.eigh(inside.T @ inside)
        vectors = span @ vectors
        rest = (small.square().sum() - values.sum()).clamp(min=0) / (k - rank)
    else:
        values, vectors = torch.linalg.eigh(small.T @ small)
        rest = values.new_tensor(torch.inf)
    vectors = pad(vectors, (0, 1, 0, 1))
    vectors[-1, -1] = 1
    return Basis(pad(x, (0, 1), value=1), pad(values.clamp(min=0), (0, 1), value=n), vectors, rest)


def rotated(x: Tensor) -> tuple[Basis, Tensor]:
    """The eigenvectors themselves as features, no more than samples or features; and these, [k, rank], orthonormal.

    Nothing of the samples or of the coefficients' norm is lost, so the optimum is the same.

    Args:
        x: [n, k] float64, each feature's mean about 0.
    """
    n, k = x.shape
    if k <= n:
        values, vectors = torch.linalg.eigh(x.T @ x)
        found = x @ vectors
    else:
        values, left = torch.linalg.eigh(x @ x.T)
        kept = values > values[-1] * torch.finfo(values.dtype).eps * n
        values, left = values[kept], left[:, kept]
        found = left * values.sqrt()
        vectors = x.T @ (left / values.sqrt())
    values = pad(values.clamp(min=0), (0, 1), value=n).float()
    return Basis(pad(found, (0, 1), value=1), values, None, values.new_tensor(torch.inf)), vectors
