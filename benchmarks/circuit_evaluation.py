"""What running circuits costs, beside plain hooks that add up every target's input edge by edge.

The plain version is what one writes for a model shaped like Llama: one pass per circuit, in which hooks give every
head's query, key and value, every MLP and the final norm an input of their own. Each head's projection is computed for
that head alone. Every edge that is not kept adds its source's difference, one after the other.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablate_heads import _say
from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_prompts import Pairs as Prompts
from mechinterp_cli.engine.circuit_graph import Graph, Target
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs
from mechinterp_cli.engine.edge_routing import Bools
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.errors import UserError

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges: MIB's grid."""
TOLERANCE = 1e-4
"""Largest difference from plain hooks, in parts of the largest logit difference: rounding in float32."""


def top_circuits(scores: np.ndarray) -> list[Bools]:
    """The edges with the largest scores, at every size.

    Args:
        scores: [edges].
    """
    order = np.argsort(-scores, kind="stable")
    circuits = []
    for size in SIZES:
        kept = np.zeros(len(scores), dtype=np.bool_)
        kept[order[: int(size * len(scores))]] = True
        circuits.append(kept)
    return circuits


class Ours:
    """Circuits on the engine.

    Args:
        wiring: The model as a graph.
        prompts: Edges of a circuit carry the clean run, all others the corrupted one.
    """

    def __init__(self, wiring: Wiring, prompts: Prompts) -> None:
        self.wiring, self.prompts = wiring, prompts

    def values(self, circuits: Sequence[Bools]) -> Tensor:
        """Logit differences [circuits, prompts]; both streams' passes and the proof included."""
        answers = self.prompts.answers
        patching = EdgePatching(self.wiring, Pairs.of(self.prompts.clean, self.prompts.corrupt))
        found = patching.run(
            circuits, lambda logits, prompt, _read: _difference(logits, answers[prompt.cpu()])[:, None]
        )
        return found[..., 0]


def _difference(logits: Tensor, answers: Tensor) -> Tensor:
    own = logits.gather(1, answers.to(logits.device))
    return own[:, 0] - own[:, 1]


class PlainHooks:
    """Circuits by hooks on a model shaped like Llama; no code of the engine is used but the graph's names.

    Args:
        model: The model.
        graph: Its graph.
        prompts: As for `Ours`.
    """

    def __init__(self, model: Any, graph: Graph, prompts: Prompts) -> None:
        self.model, self.graph, self.prompts = model, graph, prompts
        inner = getattr(model, "model", None)
        self.layers: list[Any] = list(getattr(inner, "layers", []))
        if not self.layers or not all(hasattr(getattr(x, "self_attn", None), "o_proj") for x in self.layers):
            raise UserError(
                f"--model: {type(model).__name__} has no model.layers[…].self_attn.o_proj",
                "The plain hooks of this benchmark are written for models shaped like Llama.",
            )
        self.norm: Any = inner.norm  # type: ignore[union-attr]
        self.size = int(
            getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
        )
        self._kept: dict[Target, frozenset[int]] = {}
        self._mine: list[Tensor] = []
        self._other: list[Tensor] = []
        self._differences: list[Tensor] = []

    @torch.no_grad()
    def values(self, circuits: Sequence[Bools], tick: Callable[[int], None] = lambda done: None) -> Tensor:
        """Logit differences [circuits, prompts]; the passes of the other stream included."""
        everything = np.ones(self.graph.n_edges, dtype=np.bool_)
        self._run(everything, self.prompts.corrupt)
        self._other = self._mine
        found = []
        for done, kept in enumerate(circuits, start=1):
            found.append(_difference(self._run(kept, self.prompts.clean), self.prompts.answers).double().cpu())
            tick(done)
        self._other = []
        return torch.stack(found)

    def _run(self, kept: Bools, tokens: Tensor) -> Tensor:
        self._mine, self._differences = [], []
        removed: dict[int, list[int]] = {}
        for edge in np.flatnonzero(~kept).tolist():
            removed.setdefault(int(self.graph.edge_target[edge]), []).append(int(self.graph.edge_source[edge]))
        with self._hooks(removed):
            logits: Tensor = self.model(
                input_ids=tokens.to(self.model.device), use_cache=False, logits_to_keep=1
            ).logits
        return logits[:, -1]

    def _wrote(self, output: Tensor) -> None:
        self._mine.append(output)
        if self._other:
            self._differences.append(self._other[len(self._mine) - 1] - output)

    def _input(self, stream: Tensor, sources: Sequence[int]) -> Tensor:
        """A target's input: the stream, and edge by edge what the other stream has in place of a source."""
        stream = stream.clone()
        for source in sources:
            stream += self._differences[source]
        return stream

    @contextmanager
    def _hooks(self, removed: Mapping[int, list[int]]) -> Iterator[None]:
        handles = []
        streams: dict[int, Tensor] = {}

        def enters(layer: int, _module: Any, args: Any, kwargs: Any) -> None:
            streams[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                self._wrote(streams[0])

        def projects(layer: int, kind: str, module: Any, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for head in range(output.shape[-1] // self.size):
                sources = removed.get(self.graph.target_index[Target(kind, layer, head)])  # type: ignore[arg-type]
                if sources:
                    own = slice(head * self.size, (head + 1) * self.size)
                    normed = self.layers[layer].input_layernorm(self._input(streams[layer], sources))
                    output[..., own] = normed @ module.weight[own].T
            return output

        def writes(layer: int, module: Any, args: Any) -> None:
            for head in range(args[0].shape[-1] // self.size):
                own = slice(head * self.size, (head + 1) * self.size)
                self._wrote(args[0][..., own] @ module.weight[:, own].T)

        def middle(layer: int, _module: Any, args: Any) -> None:
            streams[layer] = args[0]

        def mlp(layer: int, module: Any, _args: Any, output: Tensor) -> Tensor:
            sources = removed.get(self.graph.target_index[Target("mlp", layer)])
            if sources:
                normed = self.layers[layer].post_attention_layernorm.forward(self._input(streams[layer], sources))
                output = module.forward(normed)
            self._wrote(output)
            return output

        def last(_module: Any, args: Any) -> Any:
            sources = removed.get(len(self.graph.targets) - 1)
            return (self._input(args[0], sources), *args[1:]) if sources else None

        try:
            for index, layer in enumerate(self.layers):
                attention = layer.self_attn
                handles.append(layer.register_forward_pre_hook(partial(enters, index), with_kwargs=True))
                for kind in ("q", "k", "v"):
                    module = getattr(attention, f"{kind}_proj")
                    handles.append(module.register_forward_hook(partial(projects, index, kind)))
                handles.append(attention.o_proj.register_forward_pre_hook(partial(writes, index)))
                handles.append(layer.post_attention_layernorm.register_forward_pre_hook(partial(middle, index)))
                handles.append(layer.mlp.register_forward_hook(partial(mlp, index)))
            handles.append(self.norm.register_forward_pre_hook(last))
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Evaluated:
    """What was measured of running the circuits of all sizes.

    Args:
        circuits: How many.
        edges: Of the graph.
        kept: Edges that each circuit keeps.
        ours_seconds: All circuits on the engine, both streams' passes and the proof included.
        hooks_seconds: The same by plain hooks, edge by edge.
        peak_bytes: Memory of ours beyond that before.
        difference: Largest difference between the two, in parts of the largest logit difference.
    """

    circuits: int
    edges: int
    kept: tuple[int, ...]
    ours_seconds: float
    hooks_seconds: float
    peak_bytes: int
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster than plain hooks."""
        return self.hooks_seconds / self.ours_seconds

    @property
    def equal(self) -> bool:
        """Whether the circuits do what they do by plain hooks."""
        return self.difference <= TOLERANCE


def evaluate(wiring: Wiring, prompts: Prompts, scores: np.ndarray, rounds: int) -> Evaluated:
    """Run the top circuits of all sizes on the engine and by plain hooks, taking turns, after a warm-up.

    Args:
        wiring: The model as a graph; it is shaped like Llama.
        prompts: Pairs.
        scores: Of every edge, [edges].
        rounds: Timings of each, the best of which counts.
    """
    circuits, graph = top_circuits(scores), wiring.graph
    ours, hooks = Ours(wiring, prompts), PlainHooks(wiring.model, graph, prompts)
    watch, memory = (
        Stopwatch(next(wiring.model.parameters()).device),
        PeakMemory(next(wiring.model.parameters()).device),
    )
    with memory.watch():
        found = ours.values(circuits)
    wanted = hooks.values(circuits, lambda done: _say(f"plain hooks: circuit {done} of {len(circuits)}"))
    for number in range(1, rounds + 1):
        watch.time("ours", lambda: ours.values(circuits))
        watch.time("hooks", lambda: hooks.values(circuits))
        _say(f"round {number} of {rounds}: best so far {watch.best['hooks'] / watch.best['ours']:.1f} times faster")
    return Evaluated(
        circuits=len(circuits),
        edges=graph.n_edges,
        kept=tuple(int(kept.sum()) for kept in circuits),
        ours_seconds=watch.best["ours"],
        hooks_seconds=watch.best["hooks"],
        peak_bytes=memory.above,
        difference=float((found - wanted).abs().max() / wanted.abs().max()),
    )


HEAD = ("circuits", "edges kept", "engine s", "plain hooks s", "times faster", "peak MiB", "difference")


def row(result: Evaluated) -> tuple[str, ...]:
    """One row of a Markdown table under `HEAD`."""
    return (
        f"{result.circuits} of {result.edges:,} edges",
        f"{result.kept[0]:,} to {result.kept[-1]:,}",
        f"{result.ours_seconds:.2f}",
        f"{result.hooks_seconds:.2f}",
        f"**{result.ratio:.1f}**",
        f"{result.peak_bytes / 2**20:.0f}",
        f"{result.difference:.1e}",
    )
