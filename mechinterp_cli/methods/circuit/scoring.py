"""Scores of edges on the training prompts: bucket by bucket, each saved as it ends."""

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs, exact_edge_effects
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.circuit.circuits import Circuit, random_scores
from mechinterp_cli.methods.circuit.evaluating import Bucket, buckets, pairs_of
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.options import LINEAR, STEPPED, CircuitOptions, ScoreName
from mechinterp_cli.methods.circuit.saving import Saving
from mechinterp_cli.methods.circuit.tables import Floats, Scored

Values = npt.NDArray[np.float32]


class Scoring:
    """All scores of one search.

    Args:
        layout: Config, model, prompts.
        wiring: The model as a graph.
        bench: Keeps what is finished.
    """

    def __init__(self, layout: Layout, wiring: Wiring, bench: Bench) -> None:
        self.layout, self.wiring, self.bench = layout, wiring, bench
        self.train = layout.chosen("train")
        self.buckets = buckets(layout.prompts, self.train)
        self.metrics = layout.measured()

    def run(self) -> tuple[list[Scored], list[Circuit]]:
        """Every score, and the circuits that ACDC gives at its thresholds."""
        scores, circuits = list[Scored](), list[Circuit]()
        for name in self.layout.options.scores:
            self.bench.stage(f"scoring edges: {name}")
            if name == "random":
                values = random_scores(self.layout.topology, self.layout.options.random.seed, 0)
                scores.append(Scored(name, values))
            elif name == "acdc":
                circuits = self._acdc()
                scores.append(Scored(name, _largest_thresholds(circuits)))
            else:
                scores.append(self._scored(name))
        return scores, circuits

    def _scored(self, name: ScoreName) -> Scored:
        """A score that every prompt has."""
        by_prompt = np.empty((self.layout.graph.n_edges, len(self.train)), dtype=np.float32)
        for number, bucket in enumerate(self.buckets):
            by_prompt[:, list(bucket.rows)] = self._bucket(name, number, bucket)
        steps = self.layout.options.steps if name in STEPPED else None
        return Scored(name, by_prompt.mean(1, dtype=np.float64), by_prompt, steps)

    def _bucket(self, name: ScoreName, number: int, bucket: Bucket) -> Values:
        """[edges, prompts of the bucket], as they were saved or computed now."""
        shape = (self.layout.graph.n_edges, len(bucket.members))
        key = f"score-{name.replace('_', '-')}-{number:03d}"
        saving = Saving(self.bench, key, {"shape": json.dumps(shape)})
        values = saving.read()
        if values is None:
            values = self.layout.sign * self._computed(name, number, bucket)
            saving.write(values)
        return values.reshape(shape)

    def _computed(self, name: ScoreName, number: int, bucket: Bucket) -> Values:
        """[edges, prompts] of effects on the first metric: what patching the edge alone does, or would do."""
        engine = EdgePatching(self.wiring, self._pairs(bucket))
        edges = np.arange(self.layout.graph.n_edges)
        tick = self._ticker(number, len(edges))
        effects = exact_edge_effects(engine, edges, self.metrics.on(bucket.members), tick)
        return effects[..., 0].numpy().astype(np.float32)

    def _pairs(self, bucket: Bucket) -> Pairs:
        return pairs_of(self.layout.prompts, bucket.members, self.layout.graph.spans, base=self.layout.base)

    def _ticker(self, number: int, total: int) -> Callable[[int], None]:
        def tick(done: int) -> None:
            self.bench.progress.advance(number * total + min(done, total), len(self.buckets) * total)

        return tick

    def _acdc(self) -> list[Circuit]:
        raise NotImplementedError


def _largest_thresholds(circuits: list[Circuit]) -> Floats:
    """[edges] the largest threshold at which an edge stays; 0 where it goes at every one."""
    found = np.zeros(len(circuits[0].kept))
    for circuit in circuits:
        assert circuit.threshold is not None
        found[circuit.kept] = circuit.threshold
    return found


def passes(name: ScoreName, options: CircuitOptions, graph: Graph) -> int:
    """Forward passes that a score is worth, a backward pass counted as one."""
    if name in LINEAR:
        return 2 + 2 * (options.steps if name in STEPPED else 2 if name == "clean_corrupted" else 1)
    return {"exact": graph.n_edges, "acdc": graph.n_edges * len(options.acdc.thresholds)}.get(name, 0)
