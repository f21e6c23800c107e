"""Intervals of numbers that are no ratio of sums: bias-corrected and accelerated (Efron 1987)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri

from mechinterp_cli.methods.beside import Row
from mechinterp_cli.stats import Units

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A number and its interval; NaN where there is none."""

    value: float
    low: float
    high: float
    method: str
    verdict_low: float = np.nan
    """Of the 90 % interval that verdicts are read off."""
    verdict_high: float = np.nan

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def columns(self, name: str = "value") -> Row:
        """The number and its interval for a table; null where there is none."""
        ends = (self.low, self.high) if self.known else (None, None)
        value = self.value if np.isfinite(self.value) else None
        return {
            name: value,
            "ci_low": ends[0],
            "ci_high": ends[1],
            "ci_method": self.method if self.known else "undefined",
        }


def bca(statistic: Callable[[Floats], Floats], units: Units, weights: Floats, *, level: float) -> Interval:
    """The bias-corrected and accelerated interval of any statistic of resampled units.

    Args:
        statistic: From how often each unit is drawn, [draws, units], to [draws].
        units: What is resampled.
        weights: [draws, units].
        level: Coverage.
    """
    own = float(statistic(np.ones((1, units.count)))[0])
    drawn = statistic(weights)
    drawn = np.sort(drawn[np.isfinite(drawn)])
    if not np.isfinite(own) or units.count < 2 or len(drawn) < len(weights) / 2:
        return Interval(own, np.nan, np.nan, "undefined")
    below = ((drawn < own).sum() + (drawn <= own).sum()) / (2 * len(drawn))
    bias = ndtri(np.clip(below, 0.5 / len(drawn), 1 - 0.5 / len(drawn)))
    shifted = bias + ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    places = ndtr(bias + shifted / (1 - _acceleration(statistic, units) * shifted))
    low, high = np.quantile(drawn, places)
    return Interval(own, float(low), float(high), "bca")


def _acceleration(statistic: Callable[[Floats], Floats], units: Units) -> float:
    """Skewness of the jackknife's influence values over 6, stratum by stratum."""
    cubes = squares = 0.0
    for stratum in units.strata:
        size = len(stratum)
        if size < 2:
            continue
        without = np.ones((size, units.count))
        # The others of its stratum are drawn as much more often, so that the stratum weighs what it does.
        without[:, stratum] = size / (size - 1)
        without[np.arange(size), stratum] = 0
        found = statistic(without)
        influence = (size - 1) * (found.mean() - found) / size
        cubes += float((influence**3).sum())
        squares += float((influence**2).sum())
    return cubes / (6 * squares**1.5) if squares > 0 and np.isfinite(cubes) else 0.0
