"""`circuit` on one model: edges scored on some prompts, circuits run on others, and tests of one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mechinterp_cli.engine.neuron_wiring import NeuronWiring, neurons_wired
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import tables as common
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.circuit import tables
from mechinterp_cli.methods.circuit.checks import check_options, graph_of, topology_of
from mechinterp_cli.methods.circuit.circuits import Circuit, handmade, of_ranking, ranked
from mechinterp_cli.methods.circuit.engines import Parts
from mechinterp_cli.methods.circuit.evaluating import Evaluator
from mechinterp_cli.methods.circuit.exchange import NO_NEURONS, exportable, to_json
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.nodes import node_summary
from mechinterp_cli.methods.circuit.options import CircuitOptions
from mechinterp_cli.methods.circuit.planning import plan_of
from mechinterp_cli.methods.circuit.running import Running
from mechinterp_cli.methods.circuit.scoring import Scoring
from mechinterp_cli.methods.circuit.sets import Handmade, resolve
from mechinterp_cli.methods.circuit.splitting import split
from mechinterp_cli.methods.circuit.stability import stability_rows
from mechinterp_cli.methods.circuit.tables import Floats, Scored
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares


class CircuitExperiment(Experiment):
    """A search for circuits: everything is checked, nothing is computed.

    Args:
        layout: Config, model, graph, prompts.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout.setting)
        self.layout = layout

    def seeds(self) -> dict[str, int]:
        """Of the split, random circuits, tests and resampled prompts."""
        options = self.layout.options
        parts = {"split": options.split, "tests": options.tests, "stability": options.stability}
        seeds = {f"circuit.{name}": part.seed for name, part in parts.items() if part is not None}
        return seeds | {"circuit.random": options.random.seed}

    def display(self) -> dict[str, str]:
        """The task, and what 0 and 1 mean."""
        part = "edge" if self.layout.topology.level == "edges" else "head and neuron"
        scale = f"0: every {part} patched, 1: the whole model."
        return {"title": f"{self.prompts.task}, circuits of {self.layout.options.granularity}", "scale": scale}

    def facts(self) -> dict[str, Any]:
        """Which prompts were used for what."""
        return {"train": self.layout.chosen("train"), "evaluate": self.layout.chosen("evaluate")}

    @cached_property
    def parts(self) -> Parts:
        """The model as a graph, proved.

        Raises:
            UserError: Its residual stream is not the sum of its parts; names the model.
        """
        topology = self.layout.topology
        try:
            wiring = wired(self.model.model, self.model.anatomy, self.layout.graph)
            return neurons_wired(wiring, topology.items) if isinstance(topology, ItemTopology) else wiring
        except UserError as error:
            raise self.loaded.error(("model", "id"), error.cause, error.remedy) from error

    def compute(self, bench: Bench) -> Tables:
        """Score, choose, run, test."""
        layout = self.layout
        for warning in (*layout.split.warnings, *(note for given in layout.sets for note in _notes(given))):
            bench.warn(warning)
        bench.stage("proving that the residual stream is the sum of its parts")
        parts = self.parts
        if isinstance(parts, NeuronWiring):
            bench.note({"residual_sum": parts.wiring.deviation, "neuron_sum": parts.deviation})
        else:
            bench.note({"residual_sum": parts.deviation})
        streams = layout.streams()
        scores, circuits = Scoring(layout, parts, bench).run()
        means = {score.name: score.values for score in scores if score.name != "acdc"}
        for name, rank, chosen in ranked(layout.topology, layout.options, means):
            circuits += of_ranking(name, rank, chosen)
        circuits += handmade(layout.sets)
        if layout.options.files:
            self._write_files(bench, circuits, means)
        evaluator = Evaluator(self.setting, parts, layout.chosen("evaluate"), layout.measured(), bench)
        written = Running(layout, evaluator, streams, circuits, means, bench).written()
        bench.stage("working out statistics")
        written |= self._of_scores(scores, streams)
        written["baselines"] = self._baselines(streams)
        return {name: data for name, data in written.items() if len(data)}

    def _of_scores(self, scores: Sequence[Scored], streams: Mapping[str, Floats]) -> dict[str, Any]:
        """Edges, nodes, and how far other prompts would change them."""
        layout, config = self.layout, self.loaded.config
        found: dict[str, Any] = {"summary": node_summary(layout, scores, streams)}
        if config.output.rows == "all":
            clusters = layout.clusters("train")
            found["edges"] = tables.edges_table(layout.columns, scores, layout.metric, clusters, config.stats.ci)
        if layout.options.stability is not None:
            found["stability"] = stability_rows(layout, scores, layout.options.stability)
        return found

    def _write_files(self, bench: Bench, circuits: Sequence[Circuit], scores: Mapping[str, Floats]) -> None:
        """Every circuit below size 1 of the chosen ranking as JSON, and all scores where that is asked for."""
        graph, anatomy, options = self.layout.graph, self.model.anatomy, self.layout.options
        reason = NO_NEURONS if isinstance(self.layout.topology, ItemTopology) else exportable(graph)
        if reason is not None:
            bench.warn(f"circuits are not written as JSON, since the graph cannot be told in that form: {reason}")
            return
        folder = "circuits/" + ("" if self.setting.moment.name is None else f"{self.setting.moment.name}/")
        for circuit in circuits:
            if circuit.rank in (None, options.rank) and circuit.size != 1 and circuit.kept.any():
                data = to_json(graph, anatomy, circuit.kept, scores.get(circuit.score))
                bench.run.write_file(f"{folder}{circuit.file}.json", data)
        every = np.ones(graph.n_edges, dtype=bool)
        for name, values in scores.items() if options.importances else ():
            data = to_json(graph, anatomy, every, values, every=True)
            bench.run.write_file(f"{folder}importances-{name.replace('_', '-')}.json", data)

    def _baselines(self, streams: dict[str, Floats]) -> list[dict[str, Any]]:
        nothing, status, metrics = np.zeros((0, 0, 1, 0)), np.zeros((0, 0), dtype=np.int8), self.layout.metrics
        return common.baseline_rows(common.Sweep(self.prompts, (), metrics, nothing, status, streams, "clean", None))

    def plan(self) -> dict[str, Any]:
        """Edges, passes and circuits."""
        return plan_of(self.layout)


def _notes(given: Handmade) -> list[str]:
    """What a reader must know of a circuit that was given."""
    lost = f"circuit.{given.name}: {given.dropped} of its edges lie on no path from the embedding to the logits"
    return [*given.notes, *([lost] if given.dropped and not given.by_nodes else [])]


@prepares(CircuitOptions)
def prepare(options: CircuitOptions, setting: Setting) -> CircuitExperiment:
    """Check everything, choose the prompts, and lay out the graph.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    loaded = setting.loaded
    check_options(options, setting)
    graph = graph_of(options, setting)
    topology = topology_of(options, setting, graph)
    given = {"given": options.given, "reference": options.reference}
    sets = tuple(resolve(loaded, name, one, graph, topology) for name, one in given.items() if one is not None)
    split(loaded, options.split, setting.prompts)
    prompts, logits = measuring.select(setting)
    chosen = split(loaded, options.split, prompts)
    return CircuitExperiment(Layout(replace(setting, prompts=prompts), options, graph, topology, sets, chosen, logits))
