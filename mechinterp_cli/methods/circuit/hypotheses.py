"""Tests of a circuit (Shi et al. 2410.13032), each with three outcomes: yes, no, inconclusive.

Prompts of a template are not independent, so verdicts are read off intervals that resample clusters; the p-values are
those of the paper, whose null hypothesis is the good news (the circuit is equivalent, the rest is independent, an edge
is needed). Not to reject it is no proof, so a large p alone never says `yes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri
from scipy.stats import binom

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import Row, estimate
from mechinterp_cli.stats import choose_units

Floats = npt.NDArray[np.float64]
Verdict = Literal["yes", "no", "inconclusive"]

TIE = 1e-5
"""Relative to the spread of the scores: what rounding leaves of two that are the same."""
CORRELATED = 0.1
"""Correlations within this are too small to matter."""
VERDICT_LEVEL = 0.9


def equivalence(circuit: Floats, model: Floats, clusters: Sequence[str], stats: StatsSection, *, epsilon: float) -> Row:
    """Do circuit and model beat each other equally often?

    H0: |P(s(C) > s(M)) − 1/2| < ε. The statistic is the share of prompts on which the circuit's score is the higher
    one, ties counting half; p is the chance of one at least as far from 1/2 under a share of 1/2 + ε. Verdict `yes`:
    the 90 % interval of the share lies within 1/2 ± ε; `no`: wholly outside.

    Args:
        circuit: [prompts] scores of the circuit.
        model: [prompts] of the model.
        clusters: Of the prompts.
        stats: How intervals are made.
        epsilon: Half the width of what counts as equal.
    """
    wins = _wins(circuit, model)
    share, count = float(wins.mean()), len(wins)
    # One half too many or too few is rounded away from what would be further from 1/2.
    distance = abs(share - 0.5) - 1e-12
    k = np.arange(count + 1)
    p = float(binom.pmf(k, count, 0.5 + epsilon)[np.abs(k / count - 0.5) >= distance].sum())
    found = estimate(wins[None], None, clusters, stats)
    low, high = float(found.verdict_low[0]), float(found.verdict_high[0])
    verdict: Verdict = "inconclusive"
    if 0.5 - epsilon <= low and high <= 0.5 + epsilon:
        verdict = "yes"
    elif low > 0.5 + epsilon or high < 0.5 - epsilon:
        verdict = "no"
    ends = {"low": low, "high": high} if np.isfinite(low) and np.isfinite(high) else {}
    return {"statistic": share, **ends, "margin": epsilon, "p": min(1.0, p), "n": count, "verdict": verdict}


def _wins(circuit: Floats, model: Floats) -> Floats:
    """1 where the circuit is above the model, 0 below, 1/2 where they are the same but for rounding."""
    size = max(float(np.abs(model).max(initial=0)), float(np.abs(circuit).max(initial=0)))
    difference = circuit - model
    return np.where(np.abs(difference) <= TIE * size, 0.5, (difference > 0).astype(np.float64))


def independence(
    rest: Floats, model: Floats, clusters: Sequence[str], *, permutations: int, level: float, seed: int
) -> Row:
    """Does what is left without the circuit still follow the model?

    H0: the scores of the rest are independent of the model's. The statistic is HSIC (Gretton et al. 2007) with
    Gaussian kernels of median width, in parts of what each variable has with itself; p from permutations of prompts
    within clusters, so that templates alone make nothing dependent. Verdict `no`: p is small; `yes`: p is not, and the
    rest's scores do not vary at all, or the 90 % interval of their correlation with the model's lies within ±0.1.

    Args:
        rest: [prompts] scores without the circuit.
        model: [prompts] of the model.
        clusters: Of the prompts.
        permutations: How many.
        level: Of the test.
        seed: Of the permutations.
    """
    row: Row = {"margin": CORRELATED, "n": len(rest)}
    size = max(float(np.abs(model).max(initial=0)), float(np.abs(rest).max(initial=0)))
    if np.ptp(rest) <= TIE * size or np.ptp(model) <= TIE * size:
        return row | {"statistic": 0.0, "verdict": "yes"}
    ours, theirs = _centred_kernel(rest), _centred_kernel(model)
    scale = float(np.sqrt((ours**2).sum() * (theirs**2).sum()))
    found = float((ours * theirs).sum())
    orders = _orders(clusters, permutations, seed)
    drawn = np.array([(ours * theirs[np.ix_(order, order)]).sum() for order in orders])
    p = (1 + int((drawn >= found * (1 - 1e-12)).sum())) / (permutations + 1)
    low, high = _correlation_interval(rest, model, clusters)
    verdict: Verdict = "no" if p <= level else "inconclusive"
    if p > level and low >= -CORRELATED and high <= CORRELATED:
        verdict = "yes"
    ends = {"low": low, "high": high} if np.isfinite(low) else {}
    return row | {"statistic": found / scale, **ends, "p": p, "verdict": verdict}


def _centred_kernel(x: Floats) -> Floats:
    """[n, n], a Gaussian kernel whose width is the median distance, centred."""
    distance = np.abs(x[:, None] - x[None])
    width = float(np.median(distance[np.triu_indices(len(x), 1)])) or float(distance.max())
    kernel = np.exp(-(distance**2) / (2 * width**2))
    kernel -= kernel.mean(0)
    return np.asarray(kernel - kernel.mean(1, keepdims=True))


def _orders(clusters: Sequence[str], permutations: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Prompts in other orders, each within its cluster; within all where every prompt is a cluster of its own."""
    names, of = np.unique(np.asarray(clusters), return_inverse=True)
    strata = [np.flatnonzero(of == i) for i in range(len(names))]
    if all(len(members) < 2 for members in strata):
        strata = [np.arange(len(of))]
    rng = np.random.default_rng(seed)
    orders = []
    for _ in range(permutations):
        order = np.arange(len(of))
        for members in strata:
            order[members] = rng.permutation(members)
        orders.append(order)
    return orders


def _correlation_interval(a: Floats, b: Floats, clusters: Sequence[str]) -> tuple[float, float]:
    """Fisher's 90 % interval of Pearson's correlation, as many observations as there are clusters that are drawn."""
    count = choose_units(np.asarray(clusters)).count
    if count < 4:
        return float("nan"), float("nan")
    z = np.arctanh(np.clip(np.corrcoef(a, b)[0, 1], -1 + 1e-12, 1 - 1e-12))
    reach = ndtri((1 + VERDICT_LEVEL) / 2) / np.sqrt(count - 3)
    return float(np.tanh(z - reach)), float(np.tanh(z + reach))


@dataclass(frozen=True, eq=False)
class EdgeTests:
    """Of every edge that was taken out.

    Args:
        share: Of the edges that are not needed, those that matter less than it.
        p: Chance of so small a share for an edge that is needed.
        adjusted: The same for all edges together (Holm).
        verdicts: By edge.
    """

    share: Floats
    p: Floats
    adjusted: Floats
    verdicts: tuple[Verdict, ...]


def minimality(
    effects: Floats, low: Floats, high: Floats, needless: Floats, *, quantile: float, margin: float, level: float
) -> EdgeTests:
    """Does each edge matter more than edges that are not needed?

    H0 of an edge: its effect is, with probability `quantile` at least, larger in size than that of a random edge of the
    circuit with a random path added. p is binomial, adjusted over the edges by Holm's method. Verdict `no`: H0 is
    rejected, the edge is not needed; `yes`: it is not, and the 90 % interval of the effect lies beyond the margin.

    Args:
        effects: [edges] change of faithfulness when the edge goes.
        low: [edges] lower ends of the 90 % intervals.
        high: [edges] upper ends.
        needless: [draws] the same change for random edges of inflated circuits; none: no p-values.
        quantile: Which share must be exceeded.
        margin: The smallest change that matters.
        level: Of the tests.
    """
    count, draws = len(effects), len(needless)
    share, p, adjusted = (np.full(count, np.nan) for _ in range(3))
    if draws:
        beaten = (np.abs(effects)[:, None] > np.abs(needless)[None]).sum(1)
        share, p = beaten / draws, binom.cdf(beaten, draws, quantile)
        adjusted = holm(p)
    with np.errstate(invalid="ignore"):
        beyond = (low > margin) | (high < -margin)
        rejected = adjusted <= level
    verdicts: tuple[Verdict, ...] = tuple(
        "no" if out else "yes" if far else "inconclusive" for out, far in zip(rejected, beyond, strict=True)
    )
    return EdgeTests(share, p, adjusted, verdicts)


def holm(p: Floats) -> Floats:
    """Holm's step-down adjustment of p-values (1979)."""
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted


def within(low: float, high: float, margin: float) -> Verdict:
    """Whether a difference is none that matters: `yes` within ±margin, `no` beyond it, from a 90 % interval."""
    if not (np.isfinite(low) and np.isfinite(high)):
        return "inconclusive"
    if -margin <= low and high <= margin:
        return "yes"
    return "no" if low > margin or high < -margin else "inconclusive"
