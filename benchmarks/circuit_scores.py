"""What scoring every edge costs, beside a hand-written version for models shaped like Llama.

The hand-written version knows the model: it takes each head's gradient through that head's rows of the projection
alone, and through the norm by its formula. No code of the engine is used but the graph's names and numbers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.ablate_heads import _say
from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_prompts import Pairs as Prompts
from mechinterp_cli.engine.circuit_graph import Graph, Target
from mechinterp_cli.engine.edge_scores import EdgeScores, Pairs, edge_scores
from mechinterp_cli.engine.target_gradients import groups_of
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.errors import UserError

TOLERANCE = 1e-4
"""Largest difference from the hand-written version, in parts of the largest score: rounding in float32."""
SECONDS, GIB = 8.0, 1.4
"""What it may cost on two cores, the model included."""


def _difference(logits: Tensor, answers: Tensor) -> Tensor:
    own = logits.gather(1, answers.to(logits.device))
    return own[:, :1] - own[:, 1:]


def ours(wiring: Wiring, prompts: Prompts, steps: int) -> EdgeScores:
    """EAP-IG-inputs on the engine, everything but the proof included."""
    read = torch.full((prompts.size,), prompts.length - 1)
    return edge_scores(
        wiring,
        Pairs(prompts.clean, prompts.corrupt, read),
        lambda logits, prompt: _difference(logits, prompts.answers[prompt.cpu()]),
        method="eap_ig_inputs",
        steps=steps,
    )


class ByHand:
    """EAP-IG-inputs on a model shaped like Llama.

    Args:
        model: The model.
        graph: Its graph.
        prompts: The clean prompts are the base.
    """

    def __init__(self, model: Any, graph: Graph, prompts: Prompts) -> None:
        self.model, self.graph, self.prompts = model, graph, prompts
        self.layers: list[Any] = list(getattr(getattr(model, "model", None), "layers", []))
        if not self.layers or not all(hasattr(getattr(x, "self_attn", None), "o_proj") for x in self.layers):
            raise UserError(
                f"--model: {type(model).__name__} has no model.layers[…].self_attn.o_proj",
                "The hand-written version of this benchmark is written for models shaped like Llama.",
            )

    def values(self, steps: int) -> Tensor:
        """Estimates [prompts, edges]."""
        with torch.no_grad():
            clean, corrupt = (self._run(tokens)[0] for tokens in (self.prompts.clean, self.prompts.corrupt))
            changes = torch.stack(self._written(corrupt), 1) - torch.stack(self._written(clean), 1)
        gradients = changes.new_zeros(len(self.graph.targets), *clean["embed"].shape)
        for k in range(1, steps + 1):
            embed = corrupt["embed"] + k / steps * (clean["embed"] - corrupt["embed"])
            for target, gradient in self._gradients(embed):
                gradients[target] += gradient / steps
        found = changes.new_zeros(len(changes), self.graph.n_edges)
        for group in groups_of(self.graph):
            own = gradients[group.first : group.first + group.size].transpose(0, 1).flatten(2)
            first, edges = int(self.graph.first[group.first]), group.size * group.reads
            product = own @ changes[:, : group.reads].flatten(2).transpose(1, 2)
            found[:, first : first + edges] = product.flatten(1)
        return found

    def _run(self, tokens: Tensor, embed: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
        kept: dict[str, Tensor] = {}
        with self._hooks(kept, embed):
            logits = self.model(input_ids=tokens.to(self.model.device), use_cache=False, logits_to_keep=1).logits
        return kept, logits[:, -1]

    def _written(self, kept: dict[str, Tensor]) -> list[Tensor]:
        found = [kept["embed"]]
        for index, layer in enumerate(self.layers):
            weight = layer.self_attn.o_proj.weight
            size = layer.self_attn.head_dim
            for head in range(weight.shape[1] // size):
                own = slice(head * size, (head + 1) * size)
                found.append(kept[f"z{index}"][..., own] @ weight[:, own].T)
            found.append(kept[f"m{index}"])
        return found

    def _gradients(self, embed: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Index of each target and ∂M/∂(the stream that it reads)."""
        with torch.enable_grad():
            kept, logits = self._run(self.prompts.clean, embed.detach().requires_grad_())
            names = [name for name in kept if name[0] in "qkvn" or name == "last"]
            total = _difference(logits, self.prompts.answers).sum()
            slopes = dict(zip(names, torch.autograd.grad(total, [kept[name] for name in names]), strict=True))
        for index, layer in enumerate(self.layers):
            norm, attention = layer.input_layernorm, layer.self_attn
            for kind in "qkv":
                weight, gradient = getattr(attention, f"{kind}_proj").weight, slopes[f"{kind}{index}"]
                for head in range(weight.shape[0] // attention.head_dim):
                    own = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
                    target = self.graph.target_index[Target(kind, index, head)]  # type: ignore[arg-type]
                    yield target, _through(norm, kept[f"x{index}"], gradient[..., own] @ weight[own])
            middle = _through(layer.post_attention_layernorm, kept[f"y{index}"], slopes[f"n{index}"])
            yield self.graph.target_index[Target("mlp", index)], middle
        yield len(self.graph.targets) - 1, slopes["last"]

    @contextmanager
    def _hooks(self, kept: dict[str, Tensor], embed: Tensor | None) -> Iterator[None]:
        handles = []

        def given(module: Any, name: str) -> None:
            def hook(_module: Any, args: Any) -> None:
                kept[name] = args[0]

            handles.append(module.register_forward_pre_hook(hook))

        def gives(module: Any, name: str) -> None:
            def hook(_module: Any, _args: Any, output: Tensor) -> None:
                kept[name] = output

            handles.append(module.register_forward_hook(hook))

        def enters(_module: Any, args: Any) -> Any:
            kept["embed"] = args[0] if embed is None else embed
            return (kept["embed"], *args[1:])

        try:
            handles.append(self.layers[0].register_forward_pre_hook(enters))
            for index, layer in enumerate(self.layers):
                attention = layer.self_attn
                given(layer.input_layernorm, f"x{index}")
                given(layer.post_attention_layernorm, f"y{index}")
                gives(layer.post_attention_layernorm, f"n{index}")
                given(attention.o_proj, f"z{index}")
                gives(layer.mlp, f"m{index}")
                for kind in "qkv":
                    gives(getattr(attention, f"{kind}_proj"), f"{kind}{index}")
            given(self.model.model.norm, "last")
            yield
        finally:
            for handle in handles:
                handle.remove()


def _through(norm: Any, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient before an RMS norm, from the one behind it."""
    x = x.detach()
    own: Tensor = gradient * norm.weight
    rms: Tensor = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return own / rms - x * (own * x).mean(-1, keepdim=True) / rms**3


@dataclass(frozen=True)
class Scored:
    """What was measured of scoring all edges.

    Args:
        prompts: Pairs.
        tokens: Of every prompt.
        steps: Of the Riemann sum.
        sources: Of the graph.
        targets: Of the graph: keys and values by key/value head.
        targets_by_query_head: The same, were they counted once for every query head that shares them.
        edges: Of the graph.
        seconds: The best of all rounds; the proof that the stream is a sum, once per run, is not in it.
        processor_seconds: Of that which took fewest.
        hand_seconds: The hand-written version.
        hand_processor_seconds: Of that.
        proof_seconds: The proof.
        peak_bytes: Memory beyond that before.
        peak_total_bytes: Memory of the whole process, the model included.
        difference: Largest difference from the hand-written version, in parts of the largest estimate.
    """

    prompts: int
    tokens: int
    steps: int
    sources: int
    targets: int
    targets_by_query_head: int
    edges: int
    seconds: float
    processor_seconds: float
    hand_seconds: float
    hand_processor_seconds: float
    proof_seconds: float
    peak_bytes: int
    peak_total_bytes: int
    difference: float

    @property
    def equal(self) -> bool:
        """Whether the scores are those of the hand-written version."""
        return self.difference <= TOLERANCE


def score(
    wiring: Wiring, prompts: Prompts, *, steps: int, rounds: int, proof_seconds: float
) -> tuple[Scored, np.ndarray]:
    """Score all edges on the engine and by hand, taking turns, after a warm-up; also gives the scores.

    Args:
        wiring: The model as a graph; it is shaped like Llama.
        prompts: Pairs.
        steps: Of the Riemann sum.
        rounds: Timings of each, the best of which counts.
        proof_seconds: What the wiring took.
    """
    graph, hand = wiring.graph, ByHand(wiring.model, wiring.graph, prompts)
    device = next(wiring.model.parameters()).device
    watch, memory = Stopwatch(device), PeakMemory(device)
    with memory.watch():
        found = ours(wiring, prompts, steps)
    wanted = hand.values(steps).cpu().numpy()
    difference = float(np.nan_to_num(np.abs(found.by_prompt - wanted), nan=np.inf).max() / np.abs(wanted).max())
    for number in range(1, rounds + 1):
        watch.time("ours", lambda: ours(wiring, prompts, steps))
        watch.time("hand", lambda: hand.values(steps))
        _say(f"round {number} of {rounds}: best so far {watch.best['ours']:.2f} s, by hand {watch.best['hand']:.2f} s")
    shared = [sum(t.kind == kind for t in graph.targets) for kind in ("q", "k")]
    result = Scored(
        prompts=prompts.size,
        tokens=prompts.length,
        steps=steps,
        sources=len(graph.sources),
        targets=len(graph.targets),
        targets_by_query_head=len(graph.targets) + 2 * (shared[0] - shared[1]),
        edges=graph.n_edges,
        seconds=watch.best["ours"],
        processor_seconds=watch.least["ours"],
        hand_seconds=watch.best["hand"],
        hand_processor_seconds=watch.least["hand"],
        proof_seconds=proof_seconds,
        peak_bytes=memory.above,
        peak_total_bytes=memory.absolute,
        difference=difference,
    )
    return result, found.scores


HEAD = (
    "prompts", "steps", "sources × targets", "edges", "proof s", "engine s", "processor s", "by hand s", "processor s",
    "peak MiB over base", "peak MiB", "difference",
)  # fmt: skip


def row(result: Scored) -> Sequence[str]:
    """One row of a Markdown table under `HEAD`."""
    return (
        f"{result.prompts} of {result.tokens} tokens",
        f"{result.steps}",
        f"{result.sources} × {result.targets} ({result.targets_by_query_head} by query head)",
        f"{result.edges:,}",
        f"{result.proof_seconds:.2f}",
        f"**{result.seconds:.2f}**",
        f"{result.processor_seconds:.2f}",
        f"{result.hand_seconds:.2f}",
        f"{result.hand_processor_seconds:.2f}",
        f"{result.peak_bytes / 2**20:.0f}",
        f"{result.peak_total_bytes / 2**20:.0f}",
        f"{result.difference:.1e}",
    )
