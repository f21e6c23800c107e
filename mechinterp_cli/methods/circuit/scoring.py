"""Scores of edges on the training prompts: bucket by bucket, each saved as it ends."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp_cli.engine.acdc import acdc
from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edge_patching import Pairs
from mechinterp_cli.engine.edge_scores import Method
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.circuit.choose import Bools, Topology
from mechinterp_cli.methods.circuit.circuits import Circuit, random_scores
from mechinterp_cli.methods.circuit.engines import Parts, Patching, estimated, exact, patching
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
        parts: The model as a graph.
        bench: Keeps what is finished.
    """

    def __init__(self, layout: Layout, parts: Parts, bench: Bench) -> None:
        self.layout, self.parts, self.bench = layout, parts, bench
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
        by_prompt = np.empty((len(self.layout.topology), len(self.train)), dtype=np.float32)
        for number, bucket in enumerate(self.buckets):
            by_prompt[:, list(bucket.rows)] = self._bucket(name, number, bucket)
        steps = self.layout.options.steps if name in STEPPED else None
        return Scored(name, by_prompt.mean(1, dtype=np.float64), by_prompt, steps)

    def _bucket(self, name: ScoreName, number: int, bucket: Bucket) -> Values:
        """[edges, prompts of the bucket], as they were saved or computed now."""
        shape = (len(self.layout.topology), len(bucket.members))
        key = f"score-{name.replace('_', '-')}-{number:03d}"
        saving = Saving(self.bench, key, {"shape": json.dumps(shape)})
        values = saving.read()
        if values is None:
            values = self.layout.sign * self._computed(name, number, bucket)
            saving.write(values)
        return values.reshape(shape)

    def _computed(self, name: ScoreName, number: int, bucket: Bucket) -> Values:
        """[edges, prompts] of effects on the first metric: what patching the edge alone does, or would do."""
        pairs = self._pairs(bucket)
        if name == "exact":
            tick = self._ticker(number, len(self.layout.topology))
            with self._named(name):
                found = exact(self.parts, pairs, self.metrics.on(bucket.members), tick)
            return found[..., 0].numpy().astype(np.float32)
        index, options, done = torch.tensor(bucket.members), self.layout.options, 0

        def metric(logits: Tensor, prompts: Tensor) -> Tensor:
            return self.metrics.measurer.differentiable(logits, index.to(prompts.device)[prompts])[..., :1]

        def tick_passes(items: int) -> None:
            nonlocal done
            done += items
            report(done)

        report = self._ticker(number, len(bucket.members) * _places(name, options, self.layout.graph))
        with self._named(name):
            method = cast(Method, name)
            estimates = estimated(self.parts, pairs, metric, method, options.steps, tick_passes)
        return estimates.by_prompt.T

    @contextmanager
    def _named(self, name: ScoreName) -> Iterator[None]:
        """What the engine refuses is said of a key of the section."""
        try:
            yield
        except UserError as error:
            path = ("circuit", "scores", self.layout.options.scores.index(name))
            raise self.layout.loaded.error(path, error.cause, error.remedy) from error

    def _pairs(self, bucket: Bucket) -> Pairs:
        return pairs_of(self.layout.prompts, bucket.members, self.layout.graph.spans, base=self.layout.base)

    def _ticker(self, number: int, total: int) -> Callable[[int], None]:
        def tick(done: int) -> None:
            self.bench.progress.advance(number * total + min(done, total), len(self.buckets) * total)

        return tick

    def _acdc(self) -> list[Circuit]:
        """What is left at every threshold; edges that are taken away carry the corrupted prompt."""
        circuits, engines = list[Circuit](), list[Patching]()
        assert isinstance(self.parts, Wiring)  # neurons are refused

        def evaluate(masks: Sequence[Bools]) -> Floats:
            if not engines:
                spans = self.layout.graph.spans
                with self._named("acdc"):
                    engines.extend(
                        patching(self.parts, pairs_of(self.layout.prompts, b.members, spans)) for b in self.buckets
                    )
            total = np.zeros(len(masks))
            for engine, bucket in zip(engines, self.buckets, strict=True):
                total += engine.run(masks, self.metrics.on(bucket.members))[..., 0].sum(1).numpy()
            return -self.layout.better * total / len(self.train)

        thresholds = self.layout.options.acdc.thresholds
        for number, threshold in enumerate(thresholds):
            saving = Saving(self.bench, f"score-acdc-{number:03d}", {"threshold": repr(threshold)})
            kept = saving.read()
            if kept is None:
                tick = partial(self._tell, number, len(thresholds))
                kept = acdc(self.parts, evaluate, threshold, tick=tick).kept
                saving.write(kept)
            kept = np.asarray(kept, dtype=bool)
            circuits.append(Circuit("acdc", self.layout.topology.connected(kept), threshold=threshold))
        return circuits

    def _tell(self, number: int, count: int, decided: int) -> None:
        edges = self.layout.graph.n_edges
        self.bench.progress.advance(number * edges + decided, count * edges)


def _largest_thresholds(circuits: list[Circuit]) -> Floats:
    """[edges] the largest threshold at which an edge stays; 0 where it goes at every one."""
    found = np.zeros(len(circuits[0].kept))
    for circuit in circuits:
        assert circuit.threshold is not None
        found[circuit.kept] = circuit.threshold
    return found


def _places(name: ScoreName, options: CircuitOptions, graph: Graph) -> int:
    """Backward passes over each prompt."""
    blocks = 1 + 2 * graph.targets[-1].layer
    return {"eap": 1, "clean_corrupted": 2, "eap_ig_inputs": options.steps}.get(name, blocks * options.steps)


def passes(name: ScoreName, options: CircuitOptions, topology: Topology, graph: Graph) -> int:
    """Forward passes that a score is worth, a backward pass counted as one."""
    if name in LINEAR:
        return 2 + 2 * _places(name, options, graph)
    return {"exact": len(topology), "acdc": graph.n_edges * len(options.acdc.thresholds)}.get(name, 0)
