"""Estimates to tidy tables. A trial is a node under an estimator: its number is estimator × nodes + node."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from mechinterp_cli.methods.attribute.effects import Effects, Scale
from mechinterp_cli.methods.attribute.exact import Selection
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.verify import Choice, Verified
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.methods.tables import arrow_type, look_up, site_frame, trial_rows, typed_frame
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.summary import ALL_GROUPS
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Row = dict[str, Any]
_PLACES = ("position", "span", "template")
INTERVALS = 20_000
"""So many nodes, those with the largest estimates, get intervals: of a million nodes they would take minutes."""


@dataclass(frozen=True, eq=False)
class Estimates:
    """What one estimator gave.

    Args:
        name: Which.
        steps: Of integrated gradients; else None.
        values: [metrics, nodes, prompts], 0 where a node is known to do nothing.
        signless: Kinds of sites whose estimates are sizes.
    """

    name: str
    steps: int | None
    values: Floats
    signless: frozenset[str] = frozenset()

    @property
    def about(self) -> Row:
        """Its columns."""
        return {"estimator": self.name, "steps": self.steps}


@dataclass(frozen=True, eq=False)
class Exact:
    """What was computed exactly.

    Args:
        selection: Which nodes, and which sets of nodes.
        effects: [metrics, chosen and sets, prompts].
    """

    selection: Selection
    effects: Floats

    @property
    def choice(self) -> Choice:
        """Which nodes, and why."""
        return self.selection.choice

    @property
    def values(self) -> Floats:
        """[metrics, chosen, prompts]: the effects of single nodes."""
        return self.effects[:, : len(self.choice.nodes)]

    @property
    def together(self) -> Floats:
        """[metrics, sets, prompts]: the effects of sets of nodes."""
        return self.effects[:, len(self.choice.nodes) :]


@dataclass(frozen=True, eq=False)
class Attribution:
    """Estimates of the effects of all nodes, and the exact ones of some.

    Args:
        nodes: The nodes.
        prompts: The prompts.
        metrics: Names along the first axis of all values.
        estimates: By estimator.
        scales: By metric, the unedited streams.
        exact: What was verified.
        threshold: The smallest effect of interest; None where nobody can say.
    """

    nodes: Nodes
    prompts: PromptSet
    metrics: tuple[str, ...]
    estimates: Sequence[Estimates]
    scales: Sequence[Scale]
    exact: Exact | None
    threshold: float | None

    @cached_property
    def status(self) -> npt.NDArray[np.int8]:
        """[nodes, prompts]."""
        return self.nodes.status()

    @cached_property
    def usable(self) -> npt.NDArray[np.bool_]:
        """Nodes that are not known to be 0 on every prompt."""
        return np.asarray((self.status == Status.OK).any(1))

    @property
    def clusters(self) -> list[str]:
        """Of the prompts."""
        return [prompt.cluster for prompt in self.prompts.prompts]

    @property
    def groups(self) -> list[str]:
        """Of the prompts."""
        return [prompt.group for prompt in self.prompts.prompts]

    def effects(self, estimates: Estimates, metric: int) -> Effects:
        """All nodes' estimates of one metric."""
        return Effects(estimates.values[metric], self.status, self.scales[metric], self.sizes(estimates))

    def sizes(self, estimates: Estimates) -> npt.NDArray[np.bool_] | None:
        """[nodes], of which an estimator gives sizes; None where of none."""
        return np.isin(self.nodes.kinds, list(estimates.signless)) if estimates.signless else None

    def exact_effects(self, exact: Exact, metric: int) -> Effects:
        """The chosen nodes' exact effects on one metric."""
        return Effects(exact.values[metric], self.status[exact.choice.nodes], self.scales[metric])

    def verified(self) -> Iterator[Verified]:
        """Every estimator and metric beside the exact effects; nothing where nothing was verified."""
        if self.exact is None:
            return
        for estimates in self.estimates:
            for metric, name in enumerate(self.metrics):
                yield Verified(
                    {**estimates.about, "metric": name},
                    self.nodes,
                    self.usable,
                    self.exact.choice,
                    self.effects(estimates, metric),
                    self.exact_effects(self.exact, metric),
                    estimates.name,
                    self.threshold,
                    estimates.signless,
                )


def node_frame(nodes: Nodes) -> pd.DataFrame:
    """Where each node is, a row each: what a table needs to be read alone."""
    labels = [label for grid, _ in nodes.blocks() for label in grid.labels()]
    frame = _by_node(nodes, site_frame).drop(columns="trial")
    return frame.assign(label=pd.array(labels, dtype="string[pyarrow]"))


def _by_node(nodes: Nodes, describe: Callable[[Sequence[TrialSpec]], pd.DataFrame]) -> pd.DataFrame:
    """A row per node, from rows of each grid's units and rows of its places.

    Args:
        nodes: The nodes.
        describe: Specs to rows.
    """
    frames = []
    for grid, _ in nodes.blocks():
        places, units = len(grid.places), len(grid.units)
        by_unit = describe([grid.spec(unit * places, 0) for unit in range(units)]).drop(columns=list(_PLACES))
        by_place = describe([grid.spec(place, 0) for place in range(places)])[list(_PLACES)]
        unit, place = np.repeat(np.arange(units), places), np.tile(np.arange(places), units)
        parts = (by_unit.loc[unit].reset_index(drop=True), by_place.loc[place].reset_index(drop=True))
        frames.append(pd.concat(parts, axis=1))
    return pd.concat(frames, ignore_index=True)


def trials(attribution: Attribution, anatomy: Anatomy) -> pd.DataFrame:
    """One row per trial."""
    nodes, bound = attribution.nodes, attribution.nodes.bound

    def describe(specs: Sequence[TrialSpec]) -> pd.DataFrame:
        return typed_frame(trial_rows(specs, anatomy, op=bound.operation, source=bound.source_name))

    frame, count = _by_node(nodes, describe).drop(columns="trial"), len(nodes)
    parts = [
        frame.assign(trial=np.arange(count) + at * count, **estimates.about)
        for at, estimates in enumerate(attribution.estimates)
    ]
    return pd.concat(parts, ignore_index=True)


def summary(attribution: Attribution, frame: pd.DataFrame) -> pd.DataFrame:
    """One row per trial × metric × group.

    Args:
        attribution: The estimates.
        frame: From `node_frame`.
    """
    parts = []
    for at, estimates in enumerate(attribution.estimates):
        for metric, name in enumerate(attribution.metrics):
            for group, members in _members(attribution):
                columns = _summarised(attribution, estimates, metric, members)
                where = frame.assign(trial=np.arange(len(frame)) + at * len(frame), **estimates.about)
                whole = pd.concat([where, pd.DataFrame(columns)], axis=1).assign(metric=name, group=group)
                parts.append(whole[whole["n"] > 0])
    return pd.concat(parts, ignore_index=True)


def _members(attribution: Attribution) -> list[tuple[str, list[int]]]:
    """All prompts, and each group's where there are several."""
    groups = attribution.groups
    names = list(dict.fromkeys(groups))
    several = [(name, [i for i, own in enumerate(groups) if own == name]) for name in names] if len(names) > 1 else []
    return [(ALL_GROUPS, list(range(len(groups)))), *several]


def _part(effects: Effects, members: Sequence[int]) -> Effects:
    """The effects on some of the prompts; the thresholds stay those of all."""
    if len(members) == effects.effects.shape[1]:
        return effects
    scale, at = effects.scale, list(members)
    other = None if scale.other is None else scale.other[at]
    part = Scale(scale.base[at], other, scale.stats)
    return Effects(effects.effects[:, at], effects.status[:, at], part, effects.sizes)


def _summarised(attribution: Attribution, estimates: Estimates, metric: int, members: Sequence[int]) -> dict[str, Any]:
    """The columns of all nodes on some prompts."""
    found = _part(attribution.effects(estimates, metric), members)
    clusters = [attribution.clusters[i] for i in members]
    wanted = found.strongest(INTERVALS)
    low, high = found.intervals(clusters, wanted)
    n = found.n
    with np.errstate(invalid="ignore", divide="ignore"):
        base = np.where(found.present, found.scale.base, 0.0).sum(1) / n
    idle = ~(found.status == Status.OK).any(1)
    undefined = np.isnan(found.best) & (n > 0)
    stats = found.scale.stats
    columns = {
        "aggregate": np.full(len(n), "mean" if found.normalized is None else "ratio_of_means", dtype=object),
        "value": _nullable(base + found.mean),
        "effect": _nullable(found.mean),
        "estimate": _nullable(found.mean),
        "normalized": None if found.normalized is None else _nullable(found.normalized),
        "n": n,
        "n_dropped": np.zeros(len(n), dtype=np.int64),
        "clusters": np.full(len(n), len(set(clusters))),
        "ci_low": _nullable(low),
        "ci_high": _nullable(high),
        "ci_method": np.where(wanted, np.where(np.isnan(low), "undefined", stats.interval), "none").astype(object),
        "status": np.where(undefined, "undefined", np.where(idle, "trivial", "ok")).astype(object),
    }
    return columns | _exact_columns(attribution, estimates, metric, members)


def _exact_columns(
    attribution: Attribution, estimates: Estimates, metric: int, members: Sequence[int]
) -> dict[str, Any]:
    """What was measured, null for the nodes that were not chosen."""
    exact, count = attribution.exact, len(attribution.nodes)
    if exact is None:
        return {}
    found = _part(attribution.exact_effects(exact, metric), members)
    at, part = exact.choice.nodes, np.full(count, None, dtype=object)
    part[at] = exact.choice.part(estimates.name)
    mean, normalized = np.full(count, np.nan), np.full(count, np.nan)
    mean[at] = found.mean
    if found.normalized is not None:
        normalized[at] = found.normalized
    return {"exact": _nullable(mean), "exact_normalized": _nullable(normalized), "part": part}


def _nullable(values: Floats) -> pd.arrays.ArrowExtensionArray:
    """Numbers with null in place of NaN."""
    return pd.arrays.ArrowExtensionArray(pa.array(values, mask=np.isnan(values), from_pandas=False))


def results(attribution: Attribution, frame: pd.DataFrame, nodes: Integers | None) -> pa.Table:
    """One row per trial × prompt × metric.

    Args:
        attribution: The estimates.
        frame: From `node_frame`.
        nodes: Which nodes; all where None.
    """
    chosen = np.arange(len(attribution.nodes)) if nodes is None else np.sort(nodes)
    parts = [
        pa.table(_observations(attribution, estimates, at, frame, chosen))
        for at, estimates in enumerate(attribution.estimates)
    ]
    return pa.concat_tables(parts)


def _observations(
    attribution: Attribution, estimates: Estimates, at: int, frame: pd.DataFrame, chosen: Integers
) -> dict[str, Any]:
    """One estimator's rows, by node, prompt and metric."""
    names, status = attribution.metrics, attribution.status
    row, prompt = np.nonzero(status[chosen] != Status.ABSENT)
    node = np.repeat(chosen[row].astype(np.int32), len(names))
    prompt = np.repeat(prompt.astype(np.int32), len(names))
    metric = np.tile(np.arange(len(names), dtype=np.int32), len(row))
    numbers = _numbers(attribution, estimates, (metric, node, prompt))
    return {
        "trial": pa.array(node.astype(np.int64) + at * len(frame)),
        **{
            str(name): look_up(values, arrow_type(str(name)), node)
            for name, values in frame.drop(columns="block").items()
        },
        "prompt": pa.array(prompt),
        "cluster": look_up(attribution.clusters, pa.string(), prompt),
        "group": look_up(attribution.groups, pa.string(), prompt),
        "metric": look_up(list(names), pa.string(), metric),
        "estimator": pa.repeat(pa.scalar(estimates.name, pa.string()), len(node)),
        "steps": pa.repeat(pa.scalar(estimates.steps, pa.int32()), len(node)),
        **numbers,
    }


def _numbers(
    attribution: Attribution, estimates: Estimates, at: tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]
) -> dict[str, pa.Array]:
    """Value, effect, normalized, estimate, exact and status of single observations."""
    metric, node, prompt = at
    estimate = estimates.values[at]
    base = np.stack([scale.base for scale in attribution.scales])
    nothing = np.full(base.shape[1], np.nan)
    below = [scale.usable_denominators for scale in attribution.scales]
    denominators = np.stack([nothing if own is None else own for own in below])[metric, prompt]
    exact = np.full(len(node), np.nan)
    if attribution.exact is not None:
        place = np.full(len(attribution.nodes), -1)
        place[attribution.exact.choice.nodes] = np.arange(len(attribution.exact.choice.nodes))
        known = place[node] >= 0
        exact[known] = attribution.exact.values[metric[known], place[node[known]], prompt[known]]
    normalized, sizes = estimate / denominators, attribution.sizes(estimates)
    if sizes is not None:
        normalized = np.where(sizes[node], np.abs(normalized), normalized)
    undefined = np.isnan(denominators) & (attribution.scales[0].other is not None)
    status = np.where(undefined, int(Status.UNDEFINED), attribution.status[node, prompt]).astype(np.int8)
    return {
        "value": pa.array(base[metric, prompt] + estimate),
        "effect": pa.array(estimate),
        "estimate": pa.array(estimate),
        "normalized": _column(normalized),
        "exact": _column(exact),
        "exact_normalized": _column(exact / denominators),
        "status": look_up([Status(i).label for i in range(len(Status))], pa.string(), status),
    }


def _column(values: Floats) -> pa.Array:
    return pa.array(values, mask=np.isnan(values), from_pandas=False)


def subsets(attribution: Attribution) -> list[Row]:
    """One row per set of nodes that was patched together: its effect beside the sum of its nodes' estimates.

    Both are normalised where something normalises. Where an estimator gives sizes alone there is no such sum.
    """
    exact = attribution.exact
    if exact is None:
        return []
    rows = []
    for estimates in attribution.estimates:
        for metric, name in enumerate(attribution.metrics):
            scale, sets = attribution.scales[metric], exact.selection.subsets
            status = np.full((len(sets), len(attribution.clusters)), Status.OK, dtype=np.int8)
            sums = np.array([estimates.values[metric, nodes].sum(0) for nodes in sets]).reshape(status.shape)
            summed = Effects(sums, status, scale).best
            measured = Effects(exact.together[metric], status, scale).best
            for number, nodes in enumerate(sets):
                signed = not estimates.signless.intersection(attribution.nodes.kinds[nodes])
                about: Row = {**estimates.about, "metric": name, "subset": number, "size": len(nodes)}
                estimate = _known(summed[number]) if signed else None
                rows.append({**about, "estimate": estimate, "exact": _known(measured[number])})
    return rows


def _known(number: float) -> float | None:
    return float(number) if np.isfinite(number) else None


def strongest_nodes(attribution: Attribution, count: int) -> Integers:
    """The nodes with the largest estimates of the first metric, by any estimator.

    Args:
        attribution: The estimates.
        count: So many of each estimator.
    """
    best = [np.nan_to_num(np.abs(attribution.effects(estimates, 0).best)) for estimates in attribution.estimates]
    top = [np.argsort(-sizes, kind="stable")[:count] for sizes in best]
    return np.unique(np.concatenate(top)).astype(np.int64)
