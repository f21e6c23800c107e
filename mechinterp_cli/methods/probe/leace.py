"""Erasing what linear probes could read: LEACE, and plain orthogonal erasure."""

from dataclasses import dataclass

import torch
from torch import Tensor

SVD_TOLERANCE = 0.01
"""Singular values of the whitened cross-covariance at or below this are left in."""


@dataclass(frozen=True)
class Eraser:
    """The affine map `r(x) = x − left · right · (x − bias)`.

    Args:
        left: [d, rank].
        right: [rank, d].
        bias: [d]: what stays where it is; the mean of the activations that it was fitted on.
    """

    left: Tensor
    right: Tensor
    bias: Tensor

    @property
    def matrix(self) -> Tensor:
        """P, [d, d]: `r(x) = P x + offset`."""
        return torch.eye(len(self.left), dtype=self.left.dtype, device=self.left.device) - self.left @ self.right

    @property
    def offset(self) -> Tensor:
        """[d]: `left · right · bias`."""
        return self.left @ (self.right @ self.bias)

    @property
    def rank(self) -> int:
        """Directions that are erased."""
        return self.left.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d], in x's own precision."""
        wide = x.to(self.left.dtype)
        return (wide - (wide - self.bias) @ self.right.T @ self.left.T).to(x.dtype)


def fit_leace(
    x: Tensor,
    z: Tensor,
    *,
    shrinkage: bool = True,
    svd_tolerance: float = SVD_TOLERANCE,
) -> Eraser:
    """LEACE (2306.03819, theorem 4.3): `r(x) = x − W⁺ P W (x − E x)`, W = (Σ_xx^{1/2})⁺, P onto the columns of W Σ_xz.

    Of all affine maps that leave no covariance between r(x) and z it changes x least, in the mean square, so no linear
    probe does better on r(x) than one that always says the same. Everything is float64.

    That holds with shrinkage too, but not where a singular value is left in. The reference code's constraint that the
    trace of Σ_xx must not rise is always met: it falls by `tr(P Σ_xx)`, Σ_xx being the one that W is made of.

    Args:
        x: [n, d] activations, n at least 2.
        z: [n, k] concept: one column per class (0 and 1), or numbers.
        shrinkage: Σ_xx is shrunk towards a multiple of the identity (`shrunk_covariance`); without, divided by n − 1.
        svd_tolerance: Singular values of W Σ_xz at or below this are left in.
    """
    x, z = x.double(), z.double()
    n = len(x)
    middle = x.mean(0)
    centred = x - middle
    scatter = centred.T @ centred
    sigma = shrunk_covariance(scatter / n, n) if shrinkage else scatter / (n - 1)
    cross = centred.T @ (z - z.mean(0)) / (n - 1)
    root, whiten = _roots(sigma)
    left, values, _ = torch.linalg.svd(whiten @ cross, full_matrices=False)
    left = left[:, values > svd_tolerance]
    return Eraser(root @ left, left.T @ whiten, middle)


def orthogonal(directions: Tensor, bias: Tensor | None = None) -> Eraser:
    """Plain erasure of the span of some directions; `bias` is what stays where it is, 0 if not given.

    Args:
        directions: [k, d], of any length; those that depend on others add nothing.
        bias: [d].
    """
    wide = directions.double()
    _, values, right = torch.linalg.svd(wide, full_matrices=False)
    kept = values > values[0] * torch.finfo(torch.float64).eps * max(wide.shape)
    basis = right[kept]
    return Eraser(basis.T, basis, torch.zeros_like(wide[0]) if bias is None else bias.double())


def shrunk_covariance(covariance: Tensor, n: int) -> Tensor:
    """Optimal linear shrinkage for large dimensions (Bodnar, Gupta & Parolya, 1308.2608) towards `tr(S)/d · 1`.

    The share that is kept is `α = 1 − (‖S‖²_tr/n) / (‖S‖² − tr(S)²/d)` (norms: nuclear, Frobenius), which may go
    below 0 where samples are few; the trace stays.

    Args:
        covariance: S, [d, d], divided by n.
        n: Samples.
    """
    d = len(covariance)
    trace = covariance.trace()
    spread = covariance.square().sum() - trace.square() / d
    eps = torch.finfo(covariance.dtype).eps
    if spread <= eps * covariance.square().sum():
        return covariance
    keep = 1 - trace.square() / n / spread
    return keep * covariance + (1 - keep) * trace / d * torch.eye(d, dtype=covariance.dtype, device=covariance.device)


def _roots(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Σ^{1/2} and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values[-1] * len(sigma) * torch.finfo(sigma.dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    return vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
