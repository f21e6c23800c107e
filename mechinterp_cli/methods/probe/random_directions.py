"""Random subspaces that remove as much variance of some activations as a given one, and have its rank.

A direction u of length 1 removes u·Σu of the variance tr Σ. An isotropic one removes hardly any of it where a few
directions hold most of the variance (of SmolLM2's stream 0.15 %, where a difference of class means removes 4 to 27 %),
so being larger than isotropic ones says little. Here every draw is a Gaussian ε that is shaped by a power of the
covariance, Σ^(t/2) ε: t = 0 is isotropic, t = 1 is like the activations themselves. The removed variance rises with t
for every ε and every rank (its derivative is ½ Σ_ij P_ij² (λ_i − λ_j)(log λ_i − log λ_j), P the projection in Σ's
eigenvectors), so each draw has one t at which it removes what is wanted, and bisection finds it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

MATCH_TOLERANCE = 1e-3
"""Of the wanted share of variance: how near every draw must come."""
FLOOR = 1e-12
"""Eigenvalues below this share of the largest count as this much where they are raised to a power."""
LARGEST_POWER = 4096.0
HALVINGS = 50


@dataclass(frozen=True, eq=False)
class Cloud:
    """Mean and covariance of the activations that directions were fitted on, float64.

    Args:
        mean: [features].
        covariance: [features, features], divided by the number of activations.
    """

    mean: Float[Tensor, " features"]
    covariance: Float[Tensor, "features features"]

    @classmethod
    def of(cls, activations: Float[Tensor, "samples features"]) -> "Cloud":
        """Of some activations."""
        wide = activations.double()
        mean = wide.mean(0)
        away = wide - mean
        return cls(mean, away.T @ away / len(wide))

    @cached_property
    def total(self) -> float:
        """Variance of all features together."""
        return float(self.covariance.trace())

    def variance(self, basis: Float[Tensor, "rank features"]) -> float:
        """Variance in the span of orthonormal rows."""
        rows = basis.double()
        return float(((rows @ self.covariance) * rows).sum())

    def removed(self, basis: Float[Tensor, "rank features"]) -> float:
        """The share of the variance that is in the span of orthonormal rows: what projecting it out removes."""
        return self.variance(basis) / self.total if self.total else 0.0

    def moved(self, matrix: Float[Tensor, "features features"]) -> float:
        """The share of the variance that x → A x + b takes away or moves, E|(I − A)(x − mean)|² / tr Σ."""
        change = torch.eye(len(self.mean), dtype=torch.float64) - matrix.double()
        return float(((change @ self.covariance) * change).sum()) / self.total if self.total else 0.0


@dataclass(frozen=True, eq=False)
class RandomSubspaces:
    """Random subspaces beside a given one.

    Args:
        bases: Orthonormal rows of each, [draws, rank, features], float32.
        removed: Share of the variance that each removes, [draws].
        wanted: The share that they were to remove.
    """

    bases: Float[Tensor, "draws rank features"]
    removed: Float[Tensor, " draws"]
    wanted: float

    @property
    def matched(self) -> bool:
        """Whether every draw removes what was wanted, within `MATCH_TOLERANCE` of it."""
        return bool(((self.removed - self.wanted).abs() <= MATCH_TOLERANCE * self.wanted).all())


def matched_subspaces(
    cloud: Cloud,
    wanted: float,
    rank: int,
    *,
    draws: int,
    seed: int,
    apart_from: Float[Tensor, "other features"] | None = None,
) -> RandomSubspaces:
    """Draw random subspaces that remove a wanted share of the variance; the module's text says how.

    Draw i of a seed is shaped from the same ε whatever the covariance, so draws of one index belong together over the
    layers of a residual stream.

    Args:
        cloud: Of the activations.
        wanted: Share of their variance, in (0, 1).
        rank: Dimensions of each.
        draws: How many.
        seed: Of the draws.
        apart_from: Orthonormal rows that every draw shall be orthogonal to. Where what is left of the space cannot
            give the wanted share, the draws come as near as they can and are not `matched`.
    """
    start = gaussians(draws, rank, len(cloud.mean), seed)
    frame = _complement(apart_from, len(cloud.mean))
    values, vectors = torch.linalg.eigh(frame @ cloud.covariance @ frame.T)
    # eigenvectors as rows of the whole space, so that ε keeps its meaning from layer to layer
    axes = vectors.T @ frame
    shaper = _Shaper(start @ axes.T, values.clamp(min=0))
    bases = (shaper.at(_powers(shaper.variance, wanted * cloud.total, draws)) @ axes).float()
    return _measured(cloud, bases, wanted)


def isotropic_subspaces(cloud: Cloud, wanted: float, rank: int, *, draws: int, seed: int) -> RandomSubspaces:
    """Random subspaces that are drawn without looking at the activations: what `matched_subspaces` is not."""
    bases = orthonormal_rows(gaussians(draws, rank, len(cloud.mean), seed))
    return _measured(cloud, bases.float(), wanted)


def orthonormal_rows(rows: Float[Tensor, "draws rank features"]) -> Float[Tensor, "draws rank features"]:
    """Orthonormal rows of the same spans."""
    columns: Tensor = torch.linalg.qr(rows.mT)[0]
    return columns.mT


def gaussians(draws: int, rank: int, features: int, seed: int) -> Float[Tensor, "draws rank features"]:
    """Unit Gaussian numbers, float64; more draws begin with the same, and higher ranks with the same rows."""
    rows = [np.random.default_rng((seed, row)).standard_normal((draws, features)) for row in range(rank)]
    return torch.from_numpy(np.stack(rows, axis=1))


@dataclass(frozen=True, eq=False)
class _Shaper:
    """Shapes draws by powers of the covariance, in its eigenvectors.

    Args:
        start: [draws, rank, axes].
        values: Eigenvalues [axes], at least 0.
    """

    start: Tensor
    values: Tensor

    @cached_property
    def _logs(self) -> Tensor:
        largest = self.values.max().clamp(min=torch.finfo(self.values.dtype).tiny)
        return (self.values / largest).clamp(min=FLOOR).log()

    def at(self, powers: Tensor) -> Tensor:
        """Orthonormal rows [draws, rank, axes] of every draw at its power [draws]."""
        exponent = powers[:, None] / 2 * self._logs
        scale = (exponent - exponent.amax(1, keepdim=True)).exp()
        return orthonormal_rows(self.start * scale[:, None])

    def variance(self, powers: Tensor) -> Tensor:
        """Variance [draws] that each removes at its power."""
        return (self.at(powers).square() * self.values).sum((1, 2))


def _powers(variance: Callable[[Tensor], Tensor], wanted: float, draws: int) -> Tensor:
    """Of every draw the power at which it has the wanted variance; the nearest end where there is none."""
    zero = torch.zeros(draws, dtype=torch.float64)
    sign = torch.where(variance(zero) < wanted, 1.0, -1.0).double()
    near, far, step = zero, sign, 1.0
    # outwards by doubling: far powers make the rows of a draw alike, so none is tried that need not be
    while step < LARGEST_POWER and bool((short := (wanted - variance(far)) * sign > 0).any()):
        near, step = torch.where(short, far, near), step * 2
        far = torch.where(short, sign * step, far)
    for _ in range(HALVINGS):
        middle = (near + far) / 2
        short = (wanted - variance(middle)) * sign > 0
        near, far = torch.where(short, middle, near), torch.where(short, far, middle)
    return far


def _complement(rows: Tensor | None, features: int) -> Tensor:
    """Orthonormal rows of all that is orthogonal to some orthonormal rows."""
    if rows is None:
        return torch.eye(features, dtype=torch.float64)
    whole: Tensor = torch.linalg.qr(rows.double().T, mode="complete")[0]
    return whole.T[len(rows) :]


def _measured(cloud: Cloud, bases: Tensor, wanted: float) -> RandomSubspaces:
    wide = bases.double()
    removed = ((wide @ cloud.covariance) * wide).sum((1, 2)) / (cloud.total or 1.0)
    return RandomSubspaces(bases.contiguous(), removed, wanted)
