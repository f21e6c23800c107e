"""Readable? Used? Each with three outcomes: yes, no within the margin, inconclusive."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import FEWEST_DRAWS
from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import SIGNIFICANT, Estimates, estimate
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

    @property
    def sizes(self) -> "Beside":
        """The same of the effects' magnitudes."""
        return Beside(np.abs(self.own), np.abs(self.random), self.clusters, self.matched)


def family_rows(family: Sequence[Beside], stats: StatsSection, *, margin: float | None) -> list[Row]:
    """Columns from `random_effect` to `verdict` of each member of a family: the layers of an intervention.

    Each member has two statistics: the magnitude of the mean effect over prompts, and the mean magnitude (`size`). The
    mean alone would call a direction unused that moves the prompts of two labels in opposite ways; the magnitude alone
    would not tell an effect that all prompts share from what any perturbation does to each.

    `p` is the share of draws, the probe among them, where the statistic is at least as large. `p_adjusted` is step-down
    max-T (Westfall & Young 1993, algorithm 4.1) over both statistics of the whole family: each is standardised over the
    draws and the probe's own, and draw i of the maximum takes draw i of every member. In one residual stream draw i is
    the same Gaussian vector shaped by each layer's covariance, so the dependence between layers is kept; where sites
    have features of their own (heads) draws are independent, which can only make the maximum larger, and p with it.

    Of each statistic: `yes` needs the 90 % interval of the difference from the draws' mean beyond the margin, and
    `p_adjusted` at most 0.05; `no` needs both ends of that interval inside ± margin (no more is lost than with any such
    subspace), or both ends of the effect's own (nothing is lost, whatever random subspaces do). `verdict` is `yes`
    where either statistic says so, `no` where both do, else `inconclusive`, as where the random subspaces do not match.
    With fewer than 199 draws there is a band, and neither p nor verdict.

    Args:
        family: Its members, of one number of draws.
        stats: How intervals are made.
        margin: The smallest difference that matters; None where no verdict is wanted.
    """
    means, sizes = ([_compared(one, stats) for one in side] for side in (family, [one.sizes for one in family]))
    rows = [_columns(one, size) for one, size in zip(means, sizes, strict=True)]
    if not family or len(family[0].random) < FEWEST_DRAWS:
        return rows
    p, adjusted = p_values([*family, *(one.sizes for one in family)])
    for i, (one, row) in enumerate(zip(family, rows, strict=True)):
        j = i + len(family)
        row |= {"p": float(p[i]), "p_adjusted": float(adjusted[i])}
        row |= {"size_p": float(p[j]), "size_p_adjusted": float(adjusted[j])}
        if margin is not None:
            answers = {means[i].verdict(margin, adjusted[i]), sizes[i].verdict(margin, adjusted[j])}
            row["verdict"] = _together(answers) if one.matched else "inconclusive"
    return rows


def _together(answers: set[str]) -> str:
    return "yes" if "yes" in answers else "no" if answers == {"no"} else "inconclusive"


def p_values(family: Sequence[Beside]) -> tuple[Floats, Floats]:
    """Probabilities p of each member beside its random draws, and adjusted for the family; `family_rows` says how."""
    found = np.stack([np.abs(np.append(one.own.mean(), one.random.mean(1))) for one in family])
    spread = found.std(1, keepdims=True)
    standard = (found - found.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1.0)
    standard -= standard.min()  # ties are told relative to 0
    return step_down(standard[:, 0], lambda rows: standard[rows, 1:], found.shape[1] - 1, exact=False)


@dataclass(frozen=True)
class _Compared:
    """Mean, band and difference of one statistic; the 90 % intervals of the mean and of the difference.

    Args:
        mean: Of the effects over prompts.
        random: Mean over draws, and the 2.5 % and 97.5 % quantiles.
        difference: From the draws' mean, and its interval.
        found: Of the effect and of the difference.
    """

    mean: float
    random: tuple[float, float, float]
    difference: float
    found: Estimates

    def verdict(self, margin: float, p: float) -> str:
        """Of this statistic alone."""
        own, difference = verdicts(self.found.verdict_low, self.found.verdict_high, margin)
        if "no" in (own, difference):
            return "no"
        return "yes" if difference == "yes" and p <= SIGNIFICANT else "inconclusive"


def _compared(one: Beside, stats: StatsSection) -> _Compared:
    means = one.random.mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    difference = one.own - one.random.mean(0)
    found = estimate(np.stack([one.own, difference]), None, one.clusters, stats)
    band = (float(means.mean()), float(low), float(high))
    return _Compared(float(one.own.mean()), band, float(difference.mean()), found)


def _columns(mean: _Compared, size: _Compared) -> Row:
    row: Row = dict(zip(("random_effect", "random_low", "random_high"), mean.random, strict=True))
    row |= {"difference": mean.difference, **mean.found.ends(1, "difference_low", "difference_high")}
    row |= {"size": size.mean, "random_size": size.random[0], "size_difference": size.difference}
    return row | size.found.ends(1, "size_low", "size_high")


def read_columns(read: Readability | None, margin: float) -> Mapping[str, Any]:
    """Columns of a site's readability; none where it is not known."""
    if read is None:
        return {}
    return {"score": read.score, "score_p": read.p, "chance": read.chance, "readable": read.answer(margin)}
