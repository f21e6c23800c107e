"""Readable? Used? Each with three outcomes: yes, no within the margin, inconclusive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import FEWEST_DRAWS, SIGNIFICANT, Estimates, estimate
from mechinterp_cli.stats import verdicts
from mechinterp_cli.stats.families import step_down

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Readability:
    """What a probe's scores say of a site.

    Args:
        score: On prompts that it was not fitted on.
        p: Of the score, from permuted labels; None where there is none.
        chance: The baseline that the score is held against.
        low: Lower end of the 90 % interval of score − chance; None where there is none.
        high: Upper end.
    """

    score: float
    p: float | None = None
    chance: float | None = None
    low: float | None = None
    high: float | None = None

    def answer(self, margin: float) -> str:
        """`yes`: p is at most 0.05, and the interval, where there is one, lies above the margin.

        `no`: both ends of the interval are inside ± margin. `inconclusive`: anything else, a large p alone among it.

        Args:
            margin: The smallest difference from chance that matters, in the score's unit.
        """
        if self.low is None or self.high is None:
            return "yes" if self.p is not None and self.p <= SIGNIFICANT else "inconclusive"
        if -margin <= self.low and self.high <= margin:
            return "no"
        above = self.low > margin and (self.p is None or self.p <= SIGNIFICANT)
        return "yes" if above else "inconclusive"


@dataclass(frozen=True, eq=False)
class Beside:
    """One intervention's effects, and those of the random subspaces beside it.

    Args:
        own: [prompts], finite.
        random: [draws, prompts], finite; draw i of every member of a family comes from the same numbers.
        clusters: Of the prompts.
        matched: Whether the random subspaces remove the variance that they should.
    """

    own: Floats
    random: Floats
    clusters: Sequence[str]
    matched: bool = True


def family_rows(family: Sequence[Beside], stats: StatsSection, *, margin: float | None) -> list[Row]:
    """Columns from `random_effect` to `verdict` of each member of a family: the layers of an intervention.

    The statistic is the magnitude of the mean effect over prompts. `p` is the share of draws, the probe among them,
    where it is at least as large. `p_adjusted` is step-down max-T (Westfall & Young 1993, algorithm 4.1) over the
    family: statistics are divided by their root mean square over the draws and the probe's own, and draw i of the
    maximum takes draw i of every member. In one residual stream draw i is the same Gaussian vector shaped by each
    layer's covariance, so the dependence between layers is kept; where sites have features of their own (heads) the
    draws are independent, which can only make the maximum larger and p with it.

    `verdict`: `yes` needs the 90 % interval of the difference from the draws' mean beyond the margin and `p_adjusted`
    at most 0.05. `no` needs both ends of that interval inside ± margin (no more is lost than with any such subspace),
    or both ends of the effect's own (nothing is lost, whatever random subspaces do). Else it is `inconclusive`, as
    where the random subspaces do not match. With fewer than 199 draws there is a band, and neither p nor verdict.

    Args:
        family: Its members, of one number of draws.
        stats: How intervals are made.
        margin: The smallest difference that matters; None where no verdict is wanted.
    """
    rows = [_compared(one, stats) for one in family]
    if not family or len(family[0].random) < FEWEST_DRAWS:
        return [row for row, _ in rows]
    p, adjusted = p_values(family)
    found = []
    for i, (one, (row, intervals)) in enumerate(zip(family, rows, strict=True)):
        row |= {"p": float(p[i]), "p_adjusted": float(adjusted[i])}
        if margin is not None:
            row["verdict"] = _verdict(intervals, margin, float(adjusted[i])) if one.matched else "inconclusive"
        found.append(row)
    return found


def _verdict(intervals: Estimates, margin: float, p: float) -> str:
    """From the 90 % intervals of the effect and of its difference from random ones."""
    own, difference = verdicts(intervals.verdict_low, intervals.verdict_high, margin)
    if "no" in (own, difference):
        return "no"
    return "yes" if difference == "yes" and p <= SIGNIFICANT else "inconclusive"


def p_values(family: Sequence[Beside]) -> tuple[Floats, Floats]:
    """Probabilities p of each member beside its random draws, and adjusted for the family; `family_rows` says how."""
    own = np.array([abs(one.own.mean()) for one in family])
    random = np.stack([np.abs(one.random.mean(1)) for one in family])
    scale = np.sqrt((np.square(random).sum(1) + np.square(own)) / (random.shape[1] + 1))
    scale = np.where(scale > 0, scale, 1.0)
    return step_down(own / scale, lambda rows: random[rows] / scale[rows, None], random.shape[1], exact=False)


def _compared(one: Beside, stats: StatsSection) -> tuple[Row, Estimates]:
    """The band, and the difference from the random draws' mean; intervals of the effect and of the difference."""
    means = one.random.mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    difference = one.own - one.random.mean(0)
    found = estimate(np.stack([one.own, difference]), None, one.clusters, stats)
    row: Row = {"random_effect": float(means.mean()), "random_low": float(low), "random_high": float(high)}
    return row | {"difference": float(difference.mean()), **found.ends(1, "difference_low", "difference_high")}, found


def read_columns(read: Readability | None, margin: float) -> Mapping[str, Any]:
    """Columns of a site's readability; none where it is not known."""
    if read is None:
        return {}
    return {"score": read.score, "score_p": read.p, "chance": read.chance, "readable": read.answer(margin)}
