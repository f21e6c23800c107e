"""Bootstrap intervals of ratios of sums, for thousands of trials at once.

Every aggregate of this project is Σ numerators / Σ denominators over units: ratio of means (effects over differences
between the streams), mean of ratios (ratios over ones), mean (effects over ones).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from mechinterp_cli.stats.observations import Floats
from mechinterp_cli.stats.resampling import Units

IntervalMethod = Literal["bca", "studentized"]

CHUNK_BYTES = 8 << 20
"""Size of one `[trials, draws]` array; about ten are alive at once."""
ALIKE = 1e-6
"""A draw whose standard error is this share of the sample's, or less, holds one unit over and over."""
ROUNDING = 1e-6
"""A standard error of this share of the estimate, or less, is none: float32 gives no more."""


@dataclass(frozen=True)
class Intervals:
    """Two-sided intervals at several levels."""

    estimate: Floats
    """`[trials]`"""
    low: Floats
    """`[levels, trials]`; NaN where the interval is undefined."""
    high: Floats


@dataclass(frozen=True)
class _Sample:
    """Sums per unit, and how often each unit is drawn."""

    numerators: Floats
    """`[trials, units]`"""
    denominators: Floats
    """`[units]`"""
    units: Units
    weights: Floats
    """`[draws, units]`"""

    @property
    def estimate(self) -> Floats:
        return np.asarray(self.numerators.sum(-1) / self.denominators.sum())

    @property
    def residuals(self) -> Floats:
        """Numerators less what the estimate makes of their denominators; they sum to 0."""
        return self.numerators - self.estimate[:, None] * self.denominators

    @property
    def deviations(self) -> Floats:
        """`[trials, draws]`: the draws' estimates minus the estimate."""
        return (self.residuals @ self.weights.T) / (self.weights @ self.denominators)


def ratio_intervals(
    numerators: Floats,
    denominators: Floats,
    units: Units,
    weights: Floats,
    *,
    levels: Sequence[float] = (0.95,),
    method: IntervalMethod = "bca",
    min_denominator: float = 0.0,
) -> Intervals:
    """Intervals of Σ numerators / Σ denominators, numerator and denominator resampled together.

    `bca` is bias-corrected and accelerated (Efron 1987), the acceleration from the jackknife over units;
    `studentized` divides each draw's deviation by its own linearised standard error (bootstrap-t).

    Args:
        numerators: `[trials, units]`, finite.
        denominators: `[units]`.
        units: What was resampled.
        weights: `[draws, units]` from `draw_weights`; the same draws for all trials.
        levels: Coverage of each interval.
        method: `bca` or `studentized`.
        min_denominator: Draws whose Σ denominators is below this (or of the other sign) are unusable; where more
            than half an interval's tail is, the interval is undefined.
    """
    estimates = numerators.sum(-1) / denominators.sum()
    shape = (len(levels), len(numerators))
    low, high = np.full(shape, np.nan), np.full(shape, np.nan)
    drawn = weights @ denominators
    usable = drawn * np.sign(denominators.sum()) > min_denominator
    if units.count < 2 or (~usable).mean() > (1 - max(levels)) / 4:
        return Intervals(estimates, low, high)
    ends = _bca if method == "bca" else _studentized
    step = max(1, CHUNK_BYTES // (8 * len(weights)))
    for start in range(0, len(numerators), step):
        rows = slice(start, start + step)
        low[:, rows], high[:, rows] = ends(_Sample(numerators[rows], denominators, units, weights[usable]), levels)
    return Intervals(estimates, low, high)


def _bca(sample: _Sample, levels: Sequence[float]) -> tuple[Floats, Floats]:
    deviations = np.sort(sample.deviations, axis=1)
    draws = deviations.shape[1]
    below = ((deviations < 0).sum(1) + (deviations <= 0).sum(1)) / (2 * draws)
    # All draws on one side would put the correction at infinity.
    bias = ndtri(np.clip(below, 0.5 / draws, 1 - 0.5 / draws))
    acceleration = _acceleration(sample)
    tails = ndtri((1 - np.asarray(levels)) / 2)[:, None]

    def end(tail: Floats) -> Floats:
        shifted = bias + tail
        probability = ndtr(bias + shifted / (1 - acceleration * shifted))
        return sample.estimate + np.stack([_quantiles(deviations, row) for row in probability])

    return end(tails), end(-tails)


def _acceleration(sample: _Sample) -> Floats:
    """Skewness of the jackknife's influence values over 6, stratum by stratum."""
    total, below = sample.numerators.sum(-1), sample.denominators.sum()
    cubes, squares = np.zeros(len(total)), np.zeros(len(total))
    for stratum in sample.units.strata:
        size = len(stratum)
        left = below - sample.denominators[stratum]
        # A unit that holds the whole denominator has no estimate without it.
        left = np.where(left == 0, np.nan, left)
        without = (total[:, None] - sample.numerators[:, stratum]) / left
        influence = (size - 1) * (without.mean(1, keepdims=True) - without) / size
        cubes += (influence**3).sum(1)
        squares += (influence**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        acceleration = cubes / (6 * squares**1.5)
    return np.where(np.isfinite(acceleration), acceleration, 0.0)


def _quantiles(ordered: Floats, probability: Floats) -> Floats:
    """Linear quantiles of rows, each at its own probability."""
    at = probability * (ordered.shape[1] - 1)
    lower = np.floor(at).astype(np.int64)
    upper = np.minimum(lower + 1, ordered.shape[1] - 1)
    rows = np.arange(len(ordered))
    share = (at - lower).astype(np.float64)
    mixed: Floats = ordered[rows, lower] * (1 - share) + ordered[rows, upper] * share
    return mixed


def _studentized(sample: _Sample, levels: Sequence[float]) -> tuple[Floats, Floats]:
    deviations = sample.deviations
    errors = _standard_errors(sample, sample.weights, deviations)
    own = _standard_errors(sample, np.ones((1, sample.units.count)), np.zeros((len(deviations), 1)))[:, 0]
    own = np.where(own > ROUNDING * np.abs(sample.estimate), own, 0.0)
    # A draw of one unit over and over has no error of its own: its ratio has no bound, and an interval that reaches
    # as far as such draws has no end (NaN).
    alike = errors <= ALIKE * own[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(alike, np.where(deviations == 0, 0.0, np.copysign(np.inf, deviations)), deviations / errors)
    ordered = np.sort(ratios, axis=1)
    tail = (1 - np.asarray(levels)) / 2
    flat = np.ones(len(ordered))
    with np.errstate(invalid="ignore"):
        low, high = (
            np.where(own > 0, np.stack([_quantiles(ordered, flat * at) for at in places]) * own, 0.0)
            for places in (1 - tail, tail)
        )
    bounded = np.isfinite(low) & np.isfinite(high)
    return np.where(bounded, sample.estimate - low, np.nan), np.where(bounded, sample.estimate - high, np.nan)


def _standard_errors(sample: _Sample, weights: Floats, deviations: Floats) -> Floats:
    """Linearised standard error of each draw's ratio, `[trials, draws]`, between units within strata."""
    variance = np.zeros_like(deviations)
    for stratum in sample.units.strata:
        size, drawn = len(stratum), weights[:, stratum].T
        residuals, below = sample.residuals[:, stratum], sample.denominators[stratum]
        squares = (
            residuals**2 @ drawn - 2 * deviations * ((residuals * below) @ drawn) + deviations**2 * (below**2 @ drawn)
        )
        centre = residuals @ drawn - deviations * (below @ drawn)
        variance += np.maximum(squares - centre**2 / size, 0) * size / (size - 1)
    return np.sqrt(variance) / np.abs(weights @ sample.denominators)
