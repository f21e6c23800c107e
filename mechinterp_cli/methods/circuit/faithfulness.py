"""How much of the behaviour a circuit has, and the areas below and around its curve (MIB, 2504.13151).

f(C) = (m(C) − m(∅)) / (m(N) − m(∅)), m a mean over prompts; CPR = ∫ f dk of the signed ranking, CMD = ∫ |1 − f| dk of
the absolute one, by the trapezoid rule over linear k. Below the smallest size nothing is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import Row, estimate
from mechinterp_cli.methods.circuit.resampled import Interval, bca
from mechinterp_cli.stats import Units, choose_units, draw_weights

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ends:
    """One metric of the whole model and of the model with every edge patched.

    Args:
        full: [prompts].
        empty: [prompts].
        clusters: Of the prompts.
        stats: How intervals are made.
    """

    full: Floats
    empty: Floats
    clusters: Sequence[str]
    stats: StatsSection

    @cached_property
    def denominators(self) -> Floats:
        """[prompts]: what is between them."""
        return self.full - self.empty

    @property
    def usable(self) -> bool:
        """Whether enough lies between them to divide by."""
        return bool(abs(self.denominators.mean()) >= self.stats.denominator_absolute)

    @cached_property
    def units(self) -> Units:
        """What is resampled."""
        return choose_units(np.asarray(self.clusters))

    @cached_property
    def weights(self) -> Floats:
        """[draws, units]."""
        return draw_weights(self.units, draws=self.stats.bootstrap, seed=self.stats.seed)

    def faithfulness(self, values: Floats) -> Floats:
        """[circuits]; NaN where nothing normalises.

        Args:
            values: [circuits, prompts].
        """
        if not self.usable:
            return np.full(len(values), np.nan)
        return np.asarray((values - self.empty).sum(1) / self.denominators.sum())

    def with_intervals(self, numerators: Floats) -> Sequence[Interval]:
        """Σ numerators / Σ (full − empty) with intervals over prompts; both are resampled together.

        Args:
            numerators: [rows, prompts].
        """
        if not self.usable:
            return [Interval(np.nan, np.nan, np.nan, "undefined")] * len(numerators)
        found = estimate(numerators, self.denominators, self.clusters, self.stats)
        columns = (found.estimate, found.low, found.high, found.verdict_low, found.verdict_high)
        return [
            Interval(own, low, high, self.stats.interval, *verdict)
            for own, low, high, *verdict in zip(*(column.tolist() for column in columns), strict=True)
        ]

    def curve(self, values: Floats) -> Sequence[Interval]:
        """Faithfulness of circuits.

        Args:
            values: [circuits, prompts].
        """
        return self.with_intervals(values - self.empty)

    def cpr(self, sizes: Sequence[float], values: Floats) -> Interval:
        """Area below the curve: linear in the values, so its interval is that of one ratio.

        Args:
            sizes: Rising.
            values: [sizes, prompts].
        """
        return self.with_intervals((trapezoid(sizes) @ (values - self.empty))[None])[0]

    def cmd(self, sizes: Sequence[float], values: Floats) -> Interval:
        """Area between the curve and 1; bias-corrected and accelerated, as it is no ratio.

        Args:
            sizes: Rising.
            values: [sizes, prompts].
        """
        if not self.usable:
            return Interval(np.nan, np.nan, np.nan, "undefined")
        above = self.units.sums(values - self.empty)
        below = self.units.sums(self.denominators[None])[0]

        def area(weights: Floats) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                curves = (weights @ above.T) / (weights @ below)[:, None]
            return np.asarray(np.abs(1 - curves) @ trapezoid(sizes))

        return bca(area, self.units, self.weights, level=self.stats.ci)


def trapezoid(sizes: Sequence[float]) -> Floats:
    """[sizes] weights of the trapezoid rule over linear sizes; 0 for a single one."""
    steps = np.diff(np.asarray(sizes, dtype=np.float64))
    return np.asarray((np.concatenate([steps, [0.0]]) + np.concatenate([[0.0], steps])) / 2)


def band(draws: Floats) -> Row:
    """Mean and the middle 95 % of random draws; nothing where there are none.

    Args:
        draws: [draws], NaN left out.
    """
    known = draws[np.isfinite(draws)]
    if not len(known):
        return {}
    low, high = np.percentile(known, [2.5, 97.5])
    return {"random_mean": float(known.mean()), "random_low": float(low), "random_high": float(high)}
