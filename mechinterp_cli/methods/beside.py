"""Effects beside random ones, and intervals of means and shares over prompts: rows for tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import FEWEST_DRAWS
from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.stats import Units, choose_units, draw_weights, ratio_intervals, verdicts
from mechinterp_cli.stats.intervals import IntervalMethod

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
SIGNIFICANT = 0.05
VERDICT_LEVEL = 0.9


@dataclass(frozen=True)
class Estimates:
    """Of each row; NaN where there is none."""

    estimate: Floats
    low: Floats
    high: Floats
    verdict_low: Floats
    """Of the 90 % interval that verdicts are read off."""
    verdict_high: Floats
    units: Units
    """What was resampled."""

    def ends(self, row: int, *names: str) -> Row:
        """Two columns: the interval of a row, null where it has none."""
        low, high = float(self.low[row]), float(self.high[row])
        known = np.isfinite(low) and np.isfinite(high)
        return dict(zip(names, (low, high) if known else (None, None), strict=True))


def estimate(
    numerators: Floats,
    denominators: Floats | None,
    clusters: Sequence[str],
    stats: StatsSection,
    *,
    method: IntervalMethod | None = None,
) -> Estimates:
    """Σ numerators / Σ denominators of each row with intervals over prompts; the mean where there are no denominators.

    Args:
        numerators: [rows, prompts], finite.
        denominators: [prompts].
        clusters: Of the prompts; resampled together.
        stats: How.
        method: How the interval is made; as `stats` has it where None.
    """
    count = numerators.shape[1]
    below = np.ones(count) if denominators is None else denominators
    units = choose_units(np.asarray(clusters))
    weights = draw_weights(units, draws=stats.bootstrap, seed=stats.seed)
    found = ratio_intervals(
        units.sums(numerators),
        units.sums(below[None])[0],
        units,
        weights,
        levels=(stats.ci, VERDICT_LEVEL),
        method=method or stats.interval,
        min_denominator=0.5 if denominators is None else stats.denominator_absolute * count,
    )
    return Estimates(found.estimate, found.low[0], found.high[0], found.low[1], found.high[1], units)


def beside_random(
    own: Floats, random: Floats, clusters: Sequence[str], stats: StatsSection, *, margin: float, draws: int
) -> Row:
    """A chosen set's effects beside those of random sets: columns from `random_effect` to `verdict`.

    `p` is the share of sets, the chosen one among them, whose mean effect is at least as large in magnitude; it and the
    verdict need `FEWEST_DRAWS` draws, or all the different sets that there are where these are fewer. A verdict of
    `yes` needs both the interval of the difference beyond the margin and p at most `SIGNIFICANT`.

    Args:
        own: [prompts].
        random: [draws, prompts].
        clusters: Of the prompts.
        stats: How intervals are made.
        margin: The smallest difference that matters, in the unit of the effects.
        draws: How many random sets were asked for; there are fewer where there are no more different ones.
    """
    means = random.mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    difference = own - random.mean(0)
    found = estimate(difference[None], None, clusters, stats)
    row: Row = {"random_effect": float(means.mean()), "random_low": float(low), "random_high": float(high)}
    row |= {"difference": float(difference.mean()), **found.ends(0, "difference_low", "difference_high")}
    if draws < FEWEST_DRAWS:
        return row
    p = (1 + int((np.abs(means) >= abs(own.mean())).sum())) / (len(random) + 1)
    verdict = str(verdicts(found.verdict_low, found.verdict_high, margin)[0])
    return row | {"p": p, "verdict": "inconclusive" if verdict == "yes" and p > SIGNIFICANT else verdict}
