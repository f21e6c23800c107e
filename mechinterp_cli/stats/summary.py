"""One row per trial × group × aggregate: effect first, then its interval, then p."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats.families import Correction, benjamini_hochberg, max_t, sign_flips, verdicts
from mechinterp_cli.stats.intervals import IntervalMethod, ratio_intervals
from mechinterp_cli.stats.observations import Floats, Observations, Status
from mechinterp_cli.stats.resampling import Integers, Units, choose_units, draw_weights

Aggregate = Literal["ratio_of_means", "mean_of_ratios", "mean"]
"""`ratio_of_means`: mean effect over mean difference between the streams. `mean_of_ratios`: mean of the prompts'
normalised effects, undefined ones dropped and counted. `mean`: the raw mean effect; its interval is in the metric's
own unit, where the other two are of `normalized`."""

ALL_GROUPS = "all"
"""The group that holds every prompt."""


@dataclass(frozen=True, kw_only=True)
class StatsOptions:
    """How intervals, tests and verdicts are made."""

    draws: int = 1000
    """Bootstrap draws."""
    level: float = 0.95
    """Coverage of `ci_low`, `ci_high`."""
    method: IntervalMethod = "studentized"
    min_clusters: int = 10
    """With fewer, prompts are drawn within clusters and sign flips go by prompt."""
    min_prompts: int = 20
    """With fewer there is a warning."""
    flips: int = 1999
    """Sign flips, where they are not all enumerated."""
    correction: Correction = "max_t"
    q: float = 0.05
    """False discovery rate, for Benjamini–Hochberg."""
    margin: float = 0.02
    """Smallest effect of interest, normalised."""
    raw_margin: float | None = None
    """The same in the metric's unit, for aggregate `mean`; without it that aggregate has no verdict."""
    verdict_level: float = 0.90
    seed: int = 0


@dataclass(frozen=True)
class Summary:
    """Columns of equal length, and what a reader must be told."""

    columns: Mapping[str, npt.NDArray[Any]]
    """Numbers are masked arrays (masked is null, NaN is a NaN that was computed), texts are object arrays with None."""
    warnings: tuple[str, ...]
    threshold: float
    """Denominators below this are undefined."""

    @property
    def rows(self) -> int:
        """Length of every column."""
        return len(self.columns["trial"])


@dataclass(frozen=True)
class _Slice:
    """Trials that apply to the same prompts of one group, under one aggregate."""

    trials: Integers
    prompts: Integers
    numerators: Floats
    """`[trials, prompts]`; 0 where dropped."""
    denominators: Floats
    """`[prompts]`; 0 where dropped."""
    units: Units


@dataclass
class _Table:
    """Columns of one group × aggregate while they are filled, a row per trial."""

    trials: int
    numbers: dict[str, Floats] = field(default_factory=dict)
    texts: dict[str, npt.NDArray[np.object_]] = field(default_factory=dict)

    NUMBERS = ("value", "effect", "normalized", "ci_low", "ci_high", "cluster_low", "cluster_high", "p", "p_adjusted")
    COUNTS = ("n", "n_dropped", "clusters")
    TEXTS = ("ci_method", "p_method", "family", "verdict", "status")

    def __post_init__(self) -> None:
        self.numbers = {name: np.full(self.trials, np.nan) for name in self.NUMBERS}
        self.numbers |= {name: np.zeros(self.trials) for name in self.COUNTS}
        self.texts = {name: np.full(self.trials, None, dtype=object) for name in self.TEXTS}

    def put(self, rows: Integers | npt.NDArray[np.bool_], **columns: Any) -> None:
        for name, values in columns.items():
            target = self.numbers if name in self.numbers else self.texts
            target[name][rows] = values


@dataclass(frozen=True)
class _Input:
    """What every step of a summary needs."""

    observations: Observations
    base: Floats
    other: Floats | None
    clusters: npt.NDArray[np.generic]
    families: npt.NDArray[np.object_]
    options: StatsOptions

    @cached_property
    def differences(self) -> Floats:
        """Other stream minus base, NaN without another stream."""
        return np.full_like(self.base, np.nan) if self.other is None else self.other - self.base


def summarise(
    observations: Observations,
    base: Floats,
    other: Floats | None,
    *,
    clusters: Sequence[str] | npt.NDArray[np.generic],
    families: Sequence[str],
    groups: Sequence[str] | None = None,
    aggregates: Sequence[Aggregate] | None = None,
    ratio_of_means_only: bool = False,
    options: StatsOptions | None = None,
) -> Summary:
    """Aggregates, intervals and tests of one metric's trials, over all prompts and by group.

    The result's columns are `trial, group, aggregate, value, effect, normalized, n, n_dropped, clusters, ci_low,
    ci_high, ci_method, cluster_low, cluster_high, p, p_method, p_adjusted, family, verdict, status`.

    - `value`, `effect`: means over all prompts that the trial applies to, also under `mean_of_ratios`, whose `n` counts
      those with a defined ratio.
    - `ci_low`, `ci_high` are of `normalized`, under aggregate `mean` of `effect`.
    - `cluster_low`, `cluster_high`: the same quantity within single clusters, smallest and largest.
    - `p`: two-sided sign-flip test that the effect is symmetric about 0; `p_adjusted` over the trial's family within
      the group, null where no correction is asked for.
    - `status`: `trivial` (effect exactly 0, not tested and in no family), `undefined` (nothing to normalise by:
      null), `nan` (a prompt is NaN: so is the row, without interval or test), `ok`.
    - A trial that applies to no prompt of a group has no row there.

    Args:
        observations: From `observe`.
        base: `[prompts]`, as given to `observe`.
        other: `[prompts]`, as given to `observe`.
        clusters: `[prompts]`, a label each.
        families: `[trials]`, a label each; trials of one label are corrected together.
        groups: `[prompts]`; given more than one distinct label, each is summarised too.
        aggregates: By default both normalised ones, or `mean` without another stream.
        ratio_of_means_only: As the metric says (rank and accuracy: single denominators are often 0).
        options: Tuning.

    Raises:
        UserError: A group has the reserved name, the mean of ratios is asked for and refused, or Benjamini–Hochberg
            cannot work.
        ValueError: A normalised aggregate is asked for without another stream.
    """
    wanted = tuple(aggregates or _usual(other is not None, ratio_of_means_only))
    if other is None and set(wanted) != {"mean"}:
        raise ValueError("without another stream there is nothing to normalise by")
    if ratio_of_means_only and "mean_of_ratios" in wanted:
        raise UserError(
            "stats.aggregates: mean_of_ratios is refused for rank and accuracy, whose single denominators are often 0",
            "Use ratio_of_means.",
        )
    labels = np.asarray(families, dtype=object)
    given = _Input(observations, base, other, np.asarray(clusters), labels, options or StatsOptions())
    parts, warnings = [], []
    for group, prompts in _groups(groups, len(base)):
        warnings += _warnings(given, group, prompts)
        parts += [(group, aggregate, _aggregate(given, prompts, aggregate)) for aggregate in wanted]
    return Summary(_join(parts), tuple(warnings), observations.threshold)


def _usual(normalised: bool, ratio_of_means_only: bool) -> tuple[Aggregate, ...]:
    if not normalised:
        return ("mean",)
    return ("ratio_of_means",) if ratio_of_means_only else ("ratio_of_means", "mean_of_ratios")


def _groups(groups: Sequence[str] | None, prompts: int) -> Iterator[tuple[str, Integers]]:
    yield ALL_GROUPS, np.arange(prompts)
    labels = np.asarray(groups if groups is not None else [], dtype=object)
    names = sorted(set(labels.tolist()))
    if ALL_GROUPS in names:
        raise UserError(f"task: a group is called {ALL_GROUPS!r}, which stands for every prompt", "Rename the group.")
    if len(names) > 1:
        for name in names:
            yield name, np.flatnonzero(labels == name)


def _warnings(given: _Input, group: str, prompts: Integers) -> list[str]:
    options, found = given.options, []
    clusters = len(set(given.clusters[prompts].tolist()))
    if len(prompts) < options.min_prompts:
        few = f"{len(prompts)} {'prompt is' if len(prompts) == 1 else 'prompts are'} fewer than {options.min_prompts}"
        found.append(f"group {group}: {few}; intervals and p-values are rough")
    if clusters < min(options.min_clusters, len(prompts)):
        few = f"{clusters} {'cluster is' if clusters == 1 else 'clusters are'} fewer than {options.min_clusters}"
        found.append(f"group {group}: {few}; intervals and p-values are conditional on these templates")
    return found


def _aggregate(given: _Input, prompts: Integers, aggregate: Aggregate) -> _Table:
    status = given.observations.status[:, prompts]
    present = status != Status.ABSENT
    table = _Table(len(status))
    table.put(np.arange(len(status)), n=present.sum(1), status=Status.OK.label)
    broken = (status == Status.NAN).any(1)
    trivial = present.any(1) & ((status == Status.TRIVIAL) | ~present).all(1)
    _means(table, given, prompts, present)
    _put_broken(table, status, broken)
    slices = list(_slices(given, prompts, present, ~broken & present.any(1), aggregate))
    for part in slices:
        _put_estimates(table, given, part, aggregate)
    tested = ~broken & ~trivial & (table.numbers["n"] > 0)
    _put_tests(table, given, prompts, slices, tested)
    _put_trivial(table, trivial & (table.numbers["n"] > 0))
    return table


def _means(table: _Table, given: _Input, prompts: Integers, present: npt.NDArray[np.bool_]) -> None:
    count = np.maximum(present.sum(1), 1)
    for name, values in (("value", given.observations.value), ("effect", given.observations.effect)):
        table.put(np.arange(table.trials), **{name: np.where(present, values[:, prompts], 0).sum(1) / count})


def _put_broken(table: _Table, status: npt.NDArray[np.int8], broken: npt.NDArray[np.bool_]) -> None:
    lost = (status[broken] == Status.NAN).sum(1)
    table.put(broken, value=np.nan, effect=np.nan, status=Status.NAN.label)
    table.put(broken, n=table.numbers["n"][broken] - lost, n_dropped=lost)


def _slices(
    given: _Input,
    prompts: Integers,
    present: npt.NDArray[np.bool_],
    usable: npt.NDArray[np.bool_],
    aggregate: Aggregate,
) -> Iterator[_Slice]:
    """Trials by the set of prompts they apply to: each set has its own clusters and its own denominators."""
    rows = np.flatnonzero(usable)
    if not len(rows):
        return
    patterns, which = np.unique(present[rows], axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        trials, at = rows[which.reshape(-1) == number], prompts[pattern]
        effect, denominators = given.observations.effect[np.ix_(trials, at)], given.differences[at]
        if aggregate == "mean_of_ratios":
            defined = np.abs(denominators) >= given.observations.threshold
            divisor = np.where(defined, denominators, 1.0)
            effect, denominators = np.where(defined, effect / divisor, 0), defined.astype(np.float64)
        elif aggregate == "mean":
            denominators = np.ones(len(at))
        units = choose_units(given.clusters[at], min_clusters=given.options.min_clusters)
        yield _Slice(trials, at, effect, denominators, units)


def _put_estimates(table: _Table, given: _Input, part: _Slice, aggregate: Aggregate) -> None:
    options, total = given.options, part.denominators.sum()
    least = given.observations.threshold * len(part.prompts) if aggregate == "ratio_of_means" else 0.5
    if aggregate == "mean_of_ratios":
        dropped = int((part.denominators == 0).sum())
        table.put(part.trials, n=len(part.prompts) - dropped, n_dropped=dropped)
    table.put(part.trials, clusters=part.units.clusters)
    if abs(total) < least:
        table.put(part.trials, status=Status.UNDEFINED.label, ci_method="undefined", verdict="inconclusive")
        return
    units = part.units
    weights = draw_weights(units, draws=options.draws, seed=options.seed)
    intervals = ratio_intervals(
        units.sums(part.numerators),
        units.sums(part.denominators[None])[0],
        units,
        weights,
        levels=(options.level, options.verdict_level),
        method=options.method,
        min_denominator=least,
    )
    low, high = intervals.low, intervals.high
    if aggregate != "mean":
        table.put(part.trials, normalized=intervals.estimate)
    margin = options.raw_margin if aggregate == "mean" else options.margin
    if margin is not None:
        table.put(part.trials, verdict=verdicts(low[1], high[1], margin))
    name = f"{options.method}, conditional on these templates" if units.conditional else options.method
    table.put(part.trials, ci_low=low[0], ci_high=high[0])
    table.put(part.trials, ci_method=np.where(np.isnan(low[0]), "undefined", name))
    _put_range(table, part, given.clusters[part.prompts], least / len(part.prompts))


def _put_range(table: _Table, part: _Slice, clusters: npt.NDArray[np.generic], least: float) -> None:
    """Smallest and largest estimate within a cluster; clusters with too small a denominator are left out."""
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    usable = [at for at in members if abs(part.denominators[at].sum()) >= least * len(at)]
    if usable:
        within = [part.numerators[:, at].sum(1) / part.denominators[at].sum() for at in usable]
        table.put(part.trials, cluster_low=np.min(within, axis=0), cluster_high=np.max(within, axis=0))


def _put_tests(
    table: _Table, given: _Input, prompts: Integers, slices: Sequence[_Slice], tested: npt.NDArray[np.bool_]
) -> None:
    """Sign-flip p-values of each family, flips shared by all its trials."""
    options = given.options
    units = choose_units(given.clusters[prompts], min_clusters=options.min_clusters)
    flips = sign_flips(units.count, flips=options.flips, seed=options.seed)
    by_prompt = units.conditional or units.count == len(prompts)
    kind = "exact" if flips.exact else f"{len(flips.signs)} draws"
    method = f"sign flips by {'prompt' if by_prompt else 'cluster'}, {kind}"
    place = np.full(len(given.base), -1)
    place[prompts] = units.of_prompt
    sums = np.zeros((table.trials, units.count))
    for part in slices:
        into = np.zeros((len(part.prompts), units.count))
        into[np.arange(len(part.prompts)), place[part.prompts]] = 1.0
        sums[part.trials] = part.numerators @ into
    for family in dict.fromkeys(given.families[tested].tolist()):
        rows = np.flatnonzero(tested & (given.families == family))
        p, adjusted = max_t(sums[rows], flips)
        if options.correction == "bh":
            adjusted = benjamini_hochberg(p, q=options.q, resolution=flips.resolution)
        elif options.correction == "none":
            adjusted = np.full_like(p, np.nan)
        table.put(rows, p=p, p_adjusted=adjusted, p_method=f"{method}, {options.correction}", family=family)


def _put_trivial(table: _Table, trivial: npt.NDArray[np.bool_]) -> None:
    """An effect that is exactly 0 has an interval of width 0; undefined denominators stay undefined."""
    exact = trivial & (table.texts["status"] == Status.OK.label)
    table.put(trivial, status=Status.TRIVIAL.label, ci_method="exact", verdict="no")
    table.put(exact, ci_low=0.0, ci_high=0.0)


def _join(parts: Sequence[tuple[str, str, _Table]]) -> dict[str, npt.NDArray[Any]]:
    """One array per column; rows without a prompt are left out."""
    kept = [np.flatnonzero((t.numbers["n"] + t.numbers["n_dropped"]) > 0) for _, _, t in parts]
    joined: dict[str, npt.NDArray[Any]] = {"trial": np.concatenate(kept)}
    joined["group"] = np.repeat(np.array([group for group, _, _ in parts], dtype=object), [len(k) for k in kept])
    joined["aggregate"] = np.repeat(np.array([name for _, name, _ in parts], dtype=object), [len(k) for k in kept])
    for name in (*_Table.NUMBERS, *_Table.COUNTS):
        joined[name] = np.concatenate([t.numbers[name][k] for (_, _, t), k in zip(parts, kept, strict=True)])
    for name in _Table.TEXTS:
        joined[name] = np.concatenate([t.texts[name][k] for (_, _, t), k in zip(parts, kept, strict=True)])
    broken = joined["status"] == Status.NAN.label
    for name in _Table.NUMBERS:
        computed = broken & (name in ("value", "effect", "normalized"))
        joined[name] = np.ma.MaskedArray(joined[name], mask=np.isnan(joined[name]) & ~computed)
    for name in _Table.COUNTS:
        joined[name] = joined[name].astype(np.int64)
    return joined
