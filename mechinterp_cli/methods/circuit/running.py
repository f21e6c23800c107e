"""Circuits run on the evaluation prompts, and the tables that come of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.circuit import tables
from mechinterp_cli.methods.circuit.circuits import Circuit, random_circuits
from mechinterp_cli.methods.circuit.evaluating import Evaluator
from mechinterp_cli.methods.circuit.faithfulness import Ends
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.options import HypothesisOptions
from mechinterp_cli.methods.circuit.overlap import Reference, overlaps
from mechinterp_cli.methods.circuit.testing import CircuitTests

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Running:
    """Circuits on the evaluation prompts.

    Args:
        layout: Config, model, prompts.
        evaluate: Runs circuits.
        streams: Stream to [prompts, 1, metrics].
        circuits: What is run.
        scores: By name, [edges].
        bench: Where to tell.
    """

    layout: Layout
    evaluate: Evaluator
    streams: Mapping[str, Floats]
    circuits: Sequence[Circuit]
    scores: dict[str, Floats]
    bench: Bench

    @cached_property
    def ends(self) -> list[Ends]:
        """By metric: the whole model, and everything patched."""
        layout, chosen = self.layout, self.layout.chosen("evaluate")
        clusters, stats = layout.clusters("evaluate"), layout.loaded.config.stats
        clean, corrupt = (self.streams[name][chosen, 0] for name in ("clean", "corrupt"))
        return [Ends(clean[:, at], corrupt[:, at], clusters, stats) for at in range(len(layout.metrics))]

    def written(self) -> dict[str, Any]:
        """Members, faithfulness, areas, overlaps, tests."""
        layout, circuits, sizes = self.layout, self.circuits, self.layout.options.sizes
        self.bench.stage(f"running {len(circuits)} circuits")
        values = self.evaluate("circuits", [circuit.kept for circuit in circuits])
        self._check_ends()
        random = self._random()
        shared = (self.ends, layout.metrics, random, sizes)
        columns = layout.columns
        written: dict[str, Any] = {
            "members": tables.members_table(columns, circuits, self.scores),
            "faithfulness": tables.faithfulness_rows(layout.topology, circuits, values, *shared),
            "quality": [*tables.area_rows(circuits, values, *shared), *self._overlaps()],
        }
        if layout.loaded.config.output.rows == "all":
            evaluate = layout.chosen("evaluate")
            written["evaluations"] = tables.evaluation_table(circuits, values, layout.metrics, layout.prompts, evaluate)
        if layout.options.tests is not None:
            written |= self._tests(layout.options.tests, columns)
        return written

    def _check_ends(self) -> None:
        """Everything kept must be the model, nothing kept the corrupted prompt: how far they are is noted."""
        edges = len(self.layout.topology)
        full, empty = self.evaluate("ends", [np.ones(edges, dtype=bool), np.zeros(edges, dtype=bool)])
        found = {}
        for at, (name, ends) in enumerate(zip(self.layout.metrics, self.ends, strict=True)):
            off = np.abs(full[:, at] - ends.full).max(), np.abs(empty[:, at] - ends.empty).max()
            found[name] = float(max(off))
        self.bench.note({"ends_deviation": found})

    def _random(self) -> Floats:
        """[draws, sizes, prompts, metrics] of random circuits."""
        options = self.layout.options
        drawn = random_circuits(self.layout.topology, options)
        if drawn:
            self.bench.stage(f"running circuits of {len(drawn)} random rankings")
        values = self.evaluate("random", [one.kept for chosen in drawn for one in chosen])
        return values.reshape(len(drawn), len(options.sizes), *values.shape[1:])

    def _overlaps(self) -> list[dict[str, Any]]:
        layout = self.layout
        given = next((own for own in layout.sets if own.name == "reference"), None)
        reference = None if given is None else Reference(layout.topology, given)
        compared = [circuit for circuit in self.circuits if circuit.score != "reference"]
        return overlaps(reference, layout.metric, self.scores, compared)

    def _tests(self, asked: HypothesisOptions, columns: tables.EdgeColumns) -> dict[str, Any]:
        """Rows of the tests of one circuit, of every metric."""
        circuit = self._tested(asked)
        topology = self.layout.topology
        if not (circuit.kept & ~topology.fixed).any():
            what = "edge" if topology.level == "edges" else "head or neuron"
            told = f"circuit.tests: no {what} of the circuit of size {asked.size} is connected"
            self.bench.warn(f"{told}, so that it is not tested; raise tests.size")
            return {}
        self.bench.stage("testing a circuit")
        stats, scores = self.layout.loaded.config.stats, self.scores.get(circuit.score)
        found: dict[str, list[dict[str, Any]]] = {"tests": [], "minimality": [], "completeness": []}
        for at, metric in enumerate(self.layout.metrics):
            rows = CircuitTests(topology, circuit, scores, self.ends[at], metric, at, self.evaluate, asked, stats).run()
            found["tests"] += rows.tests
            found["minimality"] += [columns.row(row["edge"]) | row for row in rows.minimality]
            found["completeness"] += rows.completeness
        return found

    def _tested(self, asked: HypothesisOptions) -> Circuit:
        """The circuit that is tested: one that was given, or one of the first score."""
        first, options = self.layout.options.scores[0], self.layout.options
        name = asked.size if isinstance(asked.size, str) else first
        if isinstance(asked.size, str) or first not in self.scores:
            return next(circuit for circuit in self.circuits if circuit.score == name)
        chosen = self.layout.ranking(self.scores[first]).at(asked.size)
        return Circuit(first, chosen.kept, options.rank, asked.size, None, chosen.asked)
