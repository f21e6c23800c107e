"""Scores, circuits and what they were measured to do, as tidy tables."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import t as student

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit.choose import Topology, best_first, first_sizes
from mechinterp_cli.methods.circuit.circuits import Circuit
from mechinterp_cli.methods.circuit.faithfulness import Ends, band, trapezoid
from mechinterp_cli.methods.circuit.options import RANKS, Rank
from mechinterp_cli.methods.tables import look_up
from mechinterp_cli.stats import choose_units
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scored:
    """One score of all edges.

    Args:
        name: Which.
        values: [edges], means over the training prompts; higher helps more.
        by_prompt: [edges, training prompts], where the score is a mean over prompts.
        steps: Of integrated gradients.
    """

    name: str
    values: Floats
    by_prompt: npt.NDArray[np.floating[Any]] | None = None
    steps: int | None = None


class EdgeColumns:
    """Where edges come from and lead to, as columns.

    Args:
        graph: The model's graph.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @property
    def count(self) -> int:
        """How many rows there can be."""
        return self.graph.n_edges

    @cached_property
    def unlisted(self) -> npt.NDArray[np.bool_]:
        """[edges] those that are in every circuit, and not listed among its members: none."""
        return np.zeros(self.count, dtype=bool)

    @cached_property
    def _ends(self) -> tuple[list[Row], list[Row]]:
        """What is said of every source and of every target."""
        shared = {t.layer: 0 for t in self.graph.targets}
        queries = dict(shared)
        for target in self.graph.targets:
            shared[target.layer] += target.kind == "k"
            queries[target.layer] += target.kind == "q"
        sources: list[Row] = [
            {
                "source": source.name,
                "source_layer": None if source.kind == "embed" else source.layer,
                "source_head": source.head if source.kind == "head" else None,
            }
            for source in self.graph.sources
        ]
        targets: list[Row] = []
        for target in self.graph.targets:
            within = target.kind in ("q", "k", "v")
            own = target.kind == "q" or (within and shared[target.layer] == queries[target.layer])
            targets.append(
                {
                    "target": target.name,
                    "target_layer": None if target.kind == "logits" else target.layer,
                    "target_head": target.head if own else None,
                    "target_kv_head": target.head if within and target.kind != "q" else None,
                    "input": target.kind if within else None,
                }
            )
        return sources, targets

    def of(self, edges: Integers) -> dict[str, Any]:
        """The columns of some edges."""
        columns: dict[str, Any] = {"edge": pa.array(edges.astype(np.int32))}
        for rows, index in zip(self._ends, (self.graph.edge_source, self.graph.edge_target), strict=True):
            for name in rows[0]:
                kind = pa.string() if name in ("source", "target", "input") else pa.int32()
                columns[name] = look_up([row[name] for row in rows], kind, index[edges])
        if len(self.graph.spans) > 1:
            columns["span"] = look_up(list(self.graph.spans), pa.string(), self.graph.edge_span[edges])
        return columns

    def row(self, edge: int) -> Row:
        """The columns of one edge."""
        sources, targets = self._ends
        graph = self.graph
        ends: Row = {"edge": edge, **sources[graph.edge_source[edge]], **targets[graph.edge_target[edge]]}
        return ends if len(graph.spans) == 1 else ends | {"span": graph.spans[graph.edge_span[edge]]}


def edges_table(
    columns: EdgeColumns, scores: Sequence[Scored], metric: str, clusters: Sequence[str], level: float
) -> pa.Table:
    """One row per score and edge, or head and neuron.

    Args:
        columns: Of the graph.
        scores: The scores.
        metric: That they are of.
        clusters: Of the training prompts.
        level: Of the intervals.
    """
    every = np.arange(columns.count)
    shared = columns.of(every)
    parts = []
    for score in scores:
        low, high = mean_intervals(score, clusters, level)
        known = np.isfinite(low)
        parts.append(
            pa.table(
                {
                    "score": _repeated(score.name, len(every)),
                    "metric": _repeated(metric, len(every)),
                    **shared,
                    "value": _nullable(score.values),
                    "ci_low": _nullable(low),
                    "ci_high": _nullable(high),
                    "ci_method": look_up(["none", "t"], pa.string(), known.astype(np.int64)),
                    **{str(rank): pa.array(_places(score.values, rank), pa.int32()) for rank in RANKS},
                    "n": pa.array(np.full(len(every), len(clusters)), pa.int32()),
                }
            )
        )
    return pa.concat_tables(parts)


def _places(values: Floats, rank: Rank) -> Integers:
    """[edges] each one's place in a ranking, from 1."""
    places = np.empty(len(values), dtype=np.int64)
    places[best_first(values, rank)] = np.arange(1, len(values) + 1)
    return places


def mean_intervals(score: Scored, clusters: Sequence[str], level: float) -> tuple[Floats, Floats]:
    """Student's interval of each edge's mean over prompts, from the spread between clusters; NaN where there is none.

    There are too many edges for resampling. With few clusters the spread is between prompts within clusters, as it is
    everywhere (`stats.resampling`).

    Args:
        score: The score.
        clusters: Of the prompts.
        level: Coverage.
    """
    none = np.full(len(score.values), np.nan)
    if score.by_prompt is None or len(clusters) < 2:
        return none, none
    units = choose_units(np.asarray(clusters))
    freedom = units.count - len(units.strata)
    if freedom < 1:
        return none, none
    counts = units.sums(np.ones((1, len(clusters))))[0]
    variance = np.zeros(len(score.values))
    for first in range(0, len(none), _CHUNK):
        rows = slice(first, first + _CHUNK)
        values = score.by_prompt[rows].astype(np.float64)
        residuals = units.sums(values) - values.mean(1)[:, None] * counts
        for stratum in units.strata:
            size, own = len(stratum), residuals[:, stratum]
            if size > 1:
                spread = ((own - own.mean(1, keepdims=True)) ** 2).sum(1)
                variance[rows] += size / (size - 1) * spread
    reach = student.ppf((1 + level) / 2, freedom) * np.sqrt(variance) / len(clusters)
    return score.values - reach, score.values + reach


_CHUNK = 1 << 15
"""Edges whose prompts are looked at together."""


def members_table(columns: EdgeColumns, circuits: Sequence[Circuit], scores: Mapping[str, Floats]) -> pa.Table:
    """The edges of every circuit: of a ranking each edge once, with the smallest size that holds it.

    Args:
        columns: Of the graph.
        circuits: All of them; those of one ranking smallest first.
        scores: By name, [edges].
    """
    parts = []
    for group in _rankings(circuits):
        first = group[0]
        sizes = first_sizes([circuit.size or 0.0 for circuit in group], [circuit.kept for circuit in group])
        edges = np.flatnonzero(np.isfinite(sizes) & ~columns.unlisted)
        values = scores.get(first.score)
        count, ranked = len(edges), first.size is not None
        parts.append(
            pa.table(
                {
                    "score": _repeated(first.score, count),
                    "rank": _repeated(first.rank, count),
                    "size": pa.array(sizes[edges]) if ranked else pa.nulls(count, pa.float64()),
                    "threshold": pa.array([first.threshold] * count, pa.float64()),
                    **columns.of(edges),
                    "value": pa.nulls(count, pa.float64()) if values is None else _nullable(values[edges]),
                }
            )
        )
    return pa.concat_tables(parts)


def _rankings(circuits: Sequence[Circuit]) -> Iterator[list[Circuit]]:
    """Circuits of one score, ranking and threshold together."""
    groups: dict[tuple[str, str | None, float | None], list[Circuit]] = {}
    for circuit in circuits:
        groups.setdefault((circuit.score, circuit.rank, circuit.threshold), []).append(circuit)
    yield from groups.values()


def faithfulness_rows(
    topology: Topology,
    circuits: Sequence[Circuit],
    values: Floats,
    ends: Sequence[Ends],
    metrics: Sequence[str],
    random: Floats,
    sizes: Sequence[float],
) -> list[Row]:
    """One row per circuit and metric.

    Args:
        topology: The graph.
        circuits: The circuits.
        values: [circuits, prompts, metrics].
        ends: By metric.
        metrics: Names.
        random: [draws, sizes, prompts, metrics].
        sizes: Of the random circuits.
    """
    rows = []
    for at, (metric, own) in enumerate(zip(metrics, ends, strict=True)):
        bands = [band(own.faithfulness(random[:, place, :, at])) for place in range(len(sizes))]
        by_size = dict(zip(sizes, bands, strict=True)) if len(random) else {}
        for circuit, found, measured in zip(circuits, own.curve(values[..., at]), values[..., at], strict=True):
            row = circuit.about() | circuit.counts(topology) | {"metric": metric}
            row |= {"value": float(measured.mean()), "full": float(own.full.mean()), "empty": float(own.empty.mean())}
            row |= found.columns("faithfulness") | by_size.get(circuit.size or 0.0, {})
            rows.append(row | {"draws": len(random), "n": len(own.full), "clusters": own.units.clusters})
    return rows


def area_rows(
    circuits: Sequence[Circuit],
    values: Floats,
    ends: Sequence[Ends],
    metrics: Sequence[str],
    random: Floats,
    sizes: Sequence[float],
) -> list[Row]:
    """CPR and CMD of every ranking; both are given of both rankings, and `rank` says of which.

    Args:
        circuits: The circuits.
        values: [circuits, prompts, metrics].
        ends: By metric.
        metrics: Names.
        random: [draws, sizes, prompts, metrics].
        sizes: Of the grid.
    """
    rows: list[Row] = []
    if len(sizes) < 2:
        return rows
    weights = trapezoid(sizes)
    place = {id(circuit): number for number, circuit in enumerate(circuits)}
    for group in _rankings([circuit for circuit in circuits if circuit.size is not None]):
        chosen = values[[place[id(circuit)] for circuit in group]]
        about = {"score": group[0].score, "rank": group[0].rank}
        for at, (metric, own) in enumerate(zip(metrics, ends, strict=True)):
            curves = np.array([own.faithfulness(draw[..., at]) for draw in random]).reshape(-1, len(sizes))
            measures = {
                "cpr": (own.cpr(sizes, chosen[..., at]), curves @ weights),
                "cmd": (own.cmd(sizes, chosen[..., at]), np.abs(1 - curves) @ weights),
            }
            for measure, (found, drawn) in measures.items():
                rows.append(about | {"metric": metric, "measure": measure} | found.columns() | band(drawn))
    return rows


def evaluation_table(
    circuits: Sequence[Circuit], values: Floats, metrics: Sequence[str], prompts: PromptSet, chosen: Sequence[int]
) -> pa.Table:
    """One row per circuit, evaluation prompt and metric.

    Args:
        circuits: The circuits.
        values: [circuits, prompts, metrics].
        metrics: Names.
        prompts: The set.
        chosen: The evaluation prompts.
    """
    at, row, metric = np.indices(values.shape, dtype=np.int32).reshape(3, -1)
    kinds = {"score": pa.string(), "rank": pa.string(), "size": pa.float64(), "threshold": pa.float64()}
    abouts = [circuit.about() for circuit in circuits]
    texts = {name: [getattr(prompts.prompts[i], name) for i in chosen] for name in ("cluster", "group")}
    return pa.table(
        {
            **{name: look_up([about[name] for about in abouts], kind, at) for name, kind in kinds.items()},
            "prompt": look_up(list(chosen), pa.int32(), row),
            **{name: look_up(own, pa.string(), row) for name, own in texts.items()},
            "metric": look_up(list(metrics), pa.string(), metric),
            "value": pa.array(values.reshape(-1)),
        }
    )


def _repeated(value: str | None, count: int) -> pa.Array:
    return pa.nulls(count, pa.string()) if value is None else pa.repeat(pa.scalar(value, pa.string()), count)


def _nullable(values: Floats) -> pa.Array:
    return pa.array(values, mask=np.isnan(values), from_pandas=False)
