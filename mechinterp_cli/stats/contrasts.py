"""Is a trial's effect another in one group of prompts than in the other?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats.contrast_designs import Design, choose_design
from mechinterp_cli.stats.families import SignFlips, benjamini_hochberg, max_t, sign_flips, verdicts
from mechinterp_cli.stats.intervals import Intervals, ratio_intervals
from mechinterp_cli.stats.observations import Floats
from mechinterp_cli.stats.relabelling import ROUNDING, Relabelling, permuted_max_t, relabel
from mechinterp_cli.stats.resampling import Integers, draw_weights
from mechinterp_cli.stats.summary import StatsOptions

USUAL_LEVEL = 0.05
"""A test whose smallest possible p-value is above this is warned of."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two groups of prompts, trial by trial. Arrays are `[trials]`, NaN where an effect in either group is."""

    a: str
    b: str
    mean_a: Floats
    """Mean over clusters of their mean effects in group a, in the effects' unit."""
    mean_b: Floats
    difference: Floats
    """`mean_a − mean_b`."""
    low: Floats
    """Interval of the difference at `StatsOptions.level`; NaN where it has no end."""
    high: Floats
    verdict_low: Floats
    """The same at `StatsOptions.verdict_level` (90 %): the verdict goes by this one."""
    verdict_high: Floats
    p: Floats
    """Two-sided; NaN also where all effects are exactly 0, which is not tested."""
    p_adjusted: Floats
    """Over the tested trials, by `StatsOptions.correction`; NaN where that is `none`."""
    verdict: npt.NDArray[np.str_]
    """`yes` (another, by more than the margin), `no` (the same, within ± margin), `inconclusive`."""
    margin: float
    n_a: int
    """Prompts of group a that are compared."""
    n_b: int
    clusters_a: int
    clusters_b: int
    paired: bool
    method: str
    """How intervals and p-values were made."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Tests:
    """p-values of the tested trials."""

    p: Floats
    adjusted: Floats
    resolution: int
    method: str


def contrast(
    effects: Floats,
    groups: Sequence[str] | npt.NDArray[np.generic],
    clusters: Sequence[str] | npt.NDArray[np.generic],
    a: str,
    b: str,
    options: StatsOptions | None = None,
) -> Contrast:
    """Compare each trial's effect between two groups of prompts.

    A group's mean is the mean over clusters of their mean effects: a cluster counts once, however many prompts were
    drawn of it. Where clusters are of one size that is the mean over prompts.

    - *Paired*, where clusters with prompts of both groups hold at least half of each group: one difference of group
      means per such cluster (other prompts are left out and counted in a warning). Intervals resample clusters,
      studentised (Davison & Hinkley 1997, section 5.2) or BCa (Efron 1987). p is by sign flips of whole clusters:
      exact where differences are symmetric about 0.
    - *Paired, conditional*, where these clusters are fewer than `min_clusters` and each has at least two prompts of
      both groups: prompts are resampled within cluster and group, labels permuted within clusters.
    - *Unpaired* otherwise: clusters are resampled within each group (in a group of fewer than `min_clusters`, prompts
      within clusters), and the labels of whole clusters permuted. The statistic is Welch's t of the clusters' means:
      exact where clusters are exchangeable, right in large samples also where the groups differ in spread (Janssen
      1997; Chung & Romano 2013). p and interval do not then speak of the same where clusters are few: p is of
      clusters like these, and coarse.

    Flips and permutations are enumerated where they are few, and the same for all trials, so that `p_adjusted` is
    step-down max-T (Westfall & Young 1993, algorithm 4.1). A verdict is two one-sided tests at 5 %, read off the 90 %
    interval (Schuirmann 1987): a large p alone is never `no`.

    The order of trials does not matter, and swapping a and b changes signs only. The order of prompts matters only
    where prompts are resampled within clusters, and as little as another seed does.

    Args:
        effects: `[trials, prompts]`, in any unit; NaN on a prompt of either group makes the trial NaN.
        groups: `[prompts]`, a label each; prompts of other groups are not looked at.
        clusters: `[prompts]`, a label each; prompts of one cluster are not independent.
        a: One group.
        b: The other.
        options: Tuning. `raw_margin`, and `margin` where that is None, is the smallest difference of interest, in the
            effects' unit.

    Raises:
        UserError: A group does not exist or has fewer than two prompts, both are the same, or Benjamini–Hochberg
            cannot work.
        ValueError: Lengths do not agree.
    """
    options = options or StatsOptions()
    labels, names = np.asarray(groups, dtype=object), np.asarray(clusters)
    if effects.ndim != 2 or not effects.shape[1] == len(labels) == len(names):
        raise ValueError(f"effects {effects.shape}, {len(labels)} groups and {len(names)} clusters do not agree")
    _check_groups(labels, a, b)
    # Sorted, so that swapping a and b leaves every draw as it is.
    first, second = sorted((a, b))
    design = choose_design(labels, names, (first, second), options.min_clusters)
    either = effects[:, (labels == a) | (labels == b)]
    usable = np.asarray(np.isfinite(either).all(1))
    tested = usable & np.asarray((either != 0).any(1))
    # 0 stands for what is not usable, until the ends are put together.
    values = np.where(usable[:, None], effects[:, design.prompts], 0.0)
    in_a = design.first if a == first else ~design.first
    signed = np.where(in_a, design.weights, -design.weights)
    difference = _snapped((values @ signed)[:, None], values)[:, 0]
    intervals = _intervals(values, signed, difference, design, options)
    tests = _tests(values[tested], signed, design, options)
    margin = options.margin if options.raw_margin is None else options.raw_margin
    low, high = (np.where(usable, ends, np.nan) for ends in (intervals.low, intervals.high))
    counts = {a: int(in_a.sum()), b: int((~in_a).sum())}
    of_side = dict(zip((first, second), design.clusters, strict=True))
    return Contrast(
        a=a,
        b=b,
        mean_a=np.where(usable, values[:, in_a] @ design.weights[in_a], np.nan),
        mean_b=np.where(usable, values[:, ~in_a] @ design.weights[~in_a], np.nan),
        difference=np.where(usable, difference, np.nan),
        low=low[0],
        high=high[0],
        verdict_low=low[1],
        verdict_high=high[1],
        p=_placed(tests.p, tested),
        p_adjusted=_placed(tests.adjusted, tested),
        verdict=verdicts(low[1], high[1], margin),
        margin=margin,
        n_a=counts[a],
        n_b=counts[b],
        clusters_a=of_side[a],
        clusters_b=of_side[b],
        paired=design.paired,
        method=f"{_interval_method(design, options)}; {tests.method}",
        warnings=(*_few_prompts(counts, options), *design.warnings, *_coarse(tests)),
    )


def _check_groups(labels: npt.NDArray[np.object_], a: str, b: str) -> None:
    names = sorted(set(labels.tolist()))
    listed = ", ".join(map(repr, names)) or "none"
    for name in (a, b):
        if name not in names:
            cause = f"contrast of groups: no prompt is in group {name!r}; the groups are {listed}"
            raise UserError(cause, "Name two of these groups.")
        count = int((labels == name).sum())
        if count < 2:
            cause = f"contrast of groups: group {name!r} has {count} prompt, and a contrast needs 2 in each"
            raise UserError(cause, "Use more prompts, or other groups.")
    if a == b:
        cause = f"contrast of groups: {a!r} is compared with itself; the groups are {listed}"
        raise UserError(cause, "Name two different groups.")


def _snapped(differences: Floats, values: Floats) -> Floats:
    """What rounding leaves of equal numbers is 0: `[trials, any]`, beside the values that were subtracted."""
    scale = np.abs(values).max(1, keepdims=True, initial=0)
    return np.where(np.abs(differences) > ROUNDING * scale, differences, 0.0)


def _placed(values: Floats, rows: npt.NDArray[np.bool_]) -> Floats:
    placed = np.full(len(rows), np.nan)
    placed[rows] = values
    return placed


def _intervals(values: Floats, signed: Floats, difference: Floats, design: Design, options: StatsOptions) -> Intervals:
    """Of the sum of weighted values; sums of units that differ in weight are linearised about their stratum's mean."""
    units = design.units
    sums, weights = units.sums(values * signed), units.sums(np.abs(signed)[None])[0]
    residuals = np.zeros_like(sums)
    for stratum in units.strata:
        share = weights[stratum] / weights[stratum].sum()
        residuals[:, stratum] = sums[:, stratum] - sums[:, stratum].sum(1, keepdims=True) * share
    return ratio_intervals(
        _snapped(residuals * units.count, values) + difference[:, None],
        np.ones(units.count),
        units,
        draw_weights(units, draws=options.draws, seed=options.seed),
        levels=(options.level, options.verdict_level),
        method=options.method,
    )


def _tests(values: Floats, signed: Floats, design: Design, options: StatsOptions) -> _Tests:
    null: SignFlips | Relabelling
    if design.by_cluster:
        units, kind = design.units, "sign flips by cluster"
        null = sign_flips(units.count, flips=options.flips, seed=options.seed)
        p, adjusted = max_t(_snapped(units.sums(values * signed) * units.count, values), null)
    else:
        kind = "labels permuted within clusters" if design.paired else "labels of clusters permuted"
        members, labels, strata = _exchangeable(design)
        null = relabel(labels, strata, draws=options.flips, seed=options.seed)
        means = np.stack([values[:, part].mean(1) for part in members], axis=1)
        p, adjusted = permuted_max_t(means, labels, null)
    if options.correction == "bh":
        adjusted = benjamini_hochberg(p, q=options.q, resolution=null.resolution)
    elif options.correction == "none":
        adjusted = np.full_like(p, np.nan)
    drawn = "exact" if null.exact else f"{options.flips} draws"
    return _Tests(p, adjusted, null.resolution, f"{kind}, {drawn}, {options.correction}")


def _exchangeable(design: Design) -> tuple[list[Integers], npt.NDArray[np.bool_], list[Integers]]:
    """Prompts of each unit whose label may be another, the labels, and the units among which labels are exchanged."""
    if design.paired:
        clusters = [np.flatnonzero(design.cluster == i) for i in range(design.units.clusters)]
        return [np.array([i]) for i in range(len(design.prompts))], design.first, clusters
    members = [cell for cell in design.cells() if len(cell)]
    return members, design.first[[cell[0] for cell in members]], [np.arange(len(members))]


def _interval_method(design: Design, options: StatsOptions) -> str:
    one, other = design.clusters
    by = f"paired by cluster ({one})" if design.paired else f"unpaired ({one + other} clusters)"
    conditional = ", conditional on these clusters" if design.units.conditional else ""
    return f"{by}, {options.method}{conditional}"


def _few_prompts(counts: Mapping[str, int], options: StatsOptions) -> Iterator[str]:
    for name, count in counts.items():
        if count < options.min_prompts:
            few = f"{count} {'prompt is' if count == 1 else 'prompts are'} fewer than {options.min_prompts}"
            yield f"group {name}: {few}; intervals and p-values are rough"


def _coarse(tests: _Tests) -> Iterator[str]:
    if tests.resolution < 1 / USUAL_LEVEL:
        yield f"p-values cannot be below {1 / tests.resolution:.2g}: too few clusters to exchange"
