"""Tests of many trials at once: sign flips shared by a family, max-T, Benjamini–Hochberg, and verdicts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats.observations import Floats
from mechinterp_cli.stats.resampling import Integers

Correction = Literal["max_t", "bh", "none"]

CHUNK_BYTES = 8 << 20
"""Size of one `[trials, flips]` array."""
TIE = 1e-9
"""Relative: statistics that differ by less are equal but for rounding."""


@dataclass(frozen=True)
class SignFlips:
    """The signs that every trial of a family is tested under."""

    signs: Floats
    """`[flips, units]` of ±1; when exact, one of each pair that differs by all signs, the identity among them."""
    exact: bool

    @property
    def resolution(self) -> int:
        """One over the smallest p-value that these flips can give."""
        return len(self.signs) if self.exact else len(self.signs) + 1


def sign_flips(units: int, *, flips: int = 1999, exact_up_to: int = 4096, seed: int = 0) -> SignFlips:
    """All sign flips where there are few units, else a seeded sample of them.

    Args:
        units: Clusters, or prompts where there are too few clusters.
        flips: Sample size.
        exact_up_to: Enumerate where 2^(units − 1) is at most this (the test is two-sided, so half are enough).
        seed: Of the sample.
    """
    if units - 1 < 63 and 2 ** (units - 1) <= exact_up_to:
        bits = (np.arange(2 ** (units - 1))[:, None] >> np.arange(units)) & 1
        return SignFlips(np.where(bits == 1, -1.0, 1.0), exact=True)
    drawn = np.random.default_rng(seed).integers(0, 2, size=(flips, units), dtype=np.int8)
    return SignFlips(np.where(drawn == 1, -1.0, 1.0), exact=False)


def studentized_sums(sums: Floats) -> Floats:
    """`[trials, units]` scaled so that a row's sum is Σ s / √Σ s².

    Its square q, over the number of units C, gives the t statistic of the mean of the units' sums:
    `t² = (C − 1) q / (C − q)`, so both order flips and trials alike.
    """
    length = np.sqrt((sums**2).sum(-1, keepdims=True))
    return sums / np.where(length > 0, length, 1.0)


def max_t(sums: Floats, flips: SignFlips) -> tuple[Floats, Floats]:
    """Westfall–Young step-down max-T of one family (Westfall & Young 1993, algorithm 4.1).

    The null hypothesis of a trial is that its units' sums are symmetric about 0. The same flips are used for all
    trials, so the dependence between them is kept.

    Args:
        sums: `[trials, units]`: each trial's effects summed over each unit, finite.
        flips: From `sign_flips`.

    Returns:
        Two-sided p-values and those adjusted for the family, `[trials]` each.
    """
    scaled = studentized_sums(sums)
    observed = np.abs(scaled.sum(-1))

    def flipped(rows: Integers) -> Floats:
        return np.abs(scaled[rows] @ flips.signs.T)

    return step_down(observed, flipped, len(flips.signs), exact=flips.exact)


def step_down(
    observed: Floats, drawn: Callable[[Integers], Floats], draws: int, *, exact: bool
) -> tuple[Floats, Floats]:
    """Counts how often statistics under the null reach the observed ones, alone and as step-down maxima.

    Args:
        observed: `[trials]`, at least 0.
        drawn: From rows of trials to their statistics `[rows, draws]`, the same draws for all; may be overwritten.
        draws: How many there are.
        exact: The draws are all there can be, the observed one among them.

    Returns:
        p-values and those adjusted for the family, `[trials]` each.
    """
    order = np.argsort(observed, kind="stable")
    least = observed * (1 - TIE)
    own, stepped = np.zeros(len(observed)), np.zeros(len(observed))
    highest = np.zeros(draws)
    step = max(1, CHUNK_BYTES // (8 * draws))
    # From the weakest trial up: the maximum over a trial and all weaker ones is what it is compared with.
    for start in range(0, len(order), step):
        rows = order[start : start + step]
        found = drawn(rows)
        own[rows] = (found >= least[rows, None]).sum(1)
        np.maximum(found[0], highest, out=found[0])
        np.maximum.accumulate(found, axis=0, out=found)
        stepped[rows] = (found >= least[rows, None]).sum(1)
        highest = found[-1].copy()
    extra = 0 if exact else 1
    p, adjusted = (own + extra) / (draws + extra), (stepped + extra) / (draws + extra)
    # No trial may be adjusted to less than a stronger one.
    adjusted[order[::-1]] = np.maximum.accumulate(adjusted[order[::-1]])
    return p, adjusted


def benjamini_hochberg(p: Floats, *, q: float, resolution: int) -> Floats:
    """Benjamini–Hochberg adjusted p-values of one family (1995).

    Args:
        p: `[trials]`.
        q: False discovery rate that is to be reached.
        resolution: One over the smallest p-value that the test can give (flips + 1).

    Raises:
        UserError: The smallest possible p-value cannot pass the first step.
    """
    size = len(p)
    if resolution < size / q:
        raise UserError(
            f"stats.correction: Benjamini–Hochberg at q = {q} over {size} trials needs {int(np.ceil(size / q))} sign "
            f"flips, and the smallest p-value here is 1/{resolution}",
            "Raise stats.flips, use more prompts or clusters, or set stats.correction to max_t.",
        )
    order = np.argsort(p, kind="stable")
    scaled = p[order] * size / np.arange(1, size + 1)
    adjusted = np.empty(size)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return adjusted


def verdicts(low: Floats, high: Floats, margin: float) -> npt.NDArray[np.str_]:
    """`yes`, `no` or `inconclusive` from the ends of 90 % intervals.

    `yes`: the interval lies wholly beyond the margin on one side. `no`: both ends are inside ± margin.
    `inconclusive`: anything else, a wide interval around 0 among it; also where there is no interval.

    Args:
        low: Lower ends, NaN where there is none.
        high: Upper ends.
        margin: The smallest effect of interest, in the unit of the ends.
    """
    with np.errstate(invalid="ignore"):
        yes = (low > margin) | (high < -margin)
        no = (low >= -margin) & (high <= margin)
    return np.where(yes, "yes", np.where(no, "no", "inconclusive"))
