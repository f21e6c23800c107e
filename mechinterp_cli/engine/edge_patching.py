"""Exact edge patching: a model run with chosen edges of its graph carrying another stream.

A *circuit* is a set of edges. In its run every target's input is assembled anew: edges that are kept carry their
source's output of this very run, all others its output in the other stream (Conmy et al. 2304.14997; Hanna et al.
2403.17806; MIB 2504.13151). Nothing is frozen: every part, the final norm and the head are the model's own code on what
they are given. A head's output is its share of what attention adds; where a norm follows attention, through that norm
with the scale of the pass that the output is taken from.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edge_columns import Columns
from mechinterp_cli.engine.edge_layers import EdgeLayers, Side
from mechinterp_cli.engine.edge_passes import Base, Cells, batches, final_states
from mechinterp_cli.engine.edge_routing import AllButOne, Bools, Integers, Masks, Slots
from mechinterp_cli.engine.entering import acts_through_embed
from mechinterp_cli.engine.proof import FLOAT32_TOLERANCE
from mechinterp_cli.engine.wavefront import Measure, logits_chunk
from mechinterp_cli.engine.wiring import Wiring, wired
from mechinterp_cli.errors import ProofError, UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.walk import forward

MEMORY = 2**29
"""Bytes that passes under way may take."""

NEARLY_ALL = 0.98
"""Circuits with a larger share of the edges are near to the stream that is run."""

Anchor = Literal["own", "other"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts of one length in two streams.

    Args:
        own: Ids of the stream that is run; edges that are kept carry what becomes of it.
        other: Ids of the stream that all other edges carry.
        read: Of each prompt the position whose logits are measured.
        span_of: The span of every position, as an index into the graph's; all 0 where None.
        ablation: What other edges carry in place of the other stream, by source: means, zeros, …; then `other` is
            not looked at.
    """

    own: Int[Tensor, "prompts positions"]
    other: Int[Tensor, "prompts positions"]
    read: Int[Tensor, " prompts"]
    span_of: Int[Tensor, "prompts positions"] | None = None
    ablation: Float[Tensor, "sources #prompts #positions d_model"] | None = None

    @classmethod
    def of(cls, own: Tensor, other: Tensor) -> "Pairs":
        """Pairs that are read at their last position.

        Raises:
            UserError: The two are not of one shape.
        """
        if own.shape != other.shape:
            shapes = f"{tuple(own.shape)} and {tuple(other.shape)}"
            raise UserError(
                f"edges are patched between prompts of one length, these are {shapes}",
                "Give each prompt a corrupted twin of as many tokens.",
            )
        return cls(own, other, torch.full((len(own),), own.shape[1] - 1))

    def part(self, low: int, high: int) -> "Pairs":
        """Some of the prompts."""
        span_of = None if self.span_of is None else self.span_of[low:high]
        ablation = self.ablation
        if ablation is not None and ablation.shape[1] > 1:
            ablation = ablation[:, low:high]
        return Pairs(self.own[low:high], self.other[low:high], self.read[low:high], span_of, ablation)

    @property
    def start(self) -> int:
        """The first position at which anything can differ, or is read."""
        if self.ablation is not None:
            return 0
        differs = (self.own != self.other).any(0).nonzero()
        first = int(differs[0]) if len(differs) else self.own.shape[1] - 1
        return min(first, int(self.read.min()))


def refuse_unpatchable(wiring: Wiring, tokens: Int[Tensor, "prompts positions"], parts: str) -> None:
    """Refuse what makes patched parts other than they seem.

    Args:
        wiring: Of the model.
        tokens: Ids to try it on.
        parts: What is patched, for the message.

    Raises:
        UserError: As said.
    """
    model, anatomy = wiring.model, wiring.anatomy
    reason = None
    if not anatomy.causal:
        reason = "a later token changes earlier logits"
    elif next(model.parameters()).dtype != torch.float32:
        reason = "it is not in float32, and differences of outputs would be lost in rounding"
    elif not acts_through_embed(model, anatomy, tokens):
        reason = "its tokens act on layers in other ways than through what enters layer 0"
    if reason is not None:
        raise UserError(
            f"{parts} of this model cannot be patched: {reason}",
            "Take another model (or model.dtype: float32), or patch whole sites with patch.",
        )


def refuse_deviation(deviation: float, parts: str) -> None:
    """Refuse a model whose parts do not give its own logits.

    Args:
        deviation: Largest difference, in parts of the largest logit.
        parts: What is patched, for the message.

    Raises:
        ProofError: It is too large.
    """
    if not deviation <= FLOAT32_TOLERANCE:
        raise ProofError(
            f"{parts} of this model cannot be patched: its parts give logits that are {deviation:.2g} of their scale "
            f"from its own, {FLOAT32_TOLERANCE:g} is allowed",
            "Nothing was computed. Take another model, or patch whole sites with patch.",
        )


class EdgePatching:
    """Runs circuits of one model on pairs of prompts.

    Args:
        wiring: The model's parts; the model is in float32.
        graph: Which edges there are, by span of positions or not; that of the wiring where None.
        pairs: The prompts.
        memory: Bytes that passes under way may take.

    Raises:
        UserError: Edges of this model cannot be patched; says why.
        ProofError: The parts do not give this model's own logits.
    """

    def __init__(self, wiring: Wiring, pairs: Pairs, *, graph: Graph | None = None, memory: int = MEMORY) -> None:
        self.wiring, self.pairs, self.memory = wiring, pairs, memory
        self.graph = graph or wiring.graph
        self.columns: dict[int, Columns | None] = {}
        refuse_unpatchable(wiring, pairs.own[:1], "edges")
        cells = pairs.own.shape[1] - pairs.start
        per_prompt = cells * len(self.graph.sources) * wiring.anatomy.d_model * 4
        step = max(1, memory // (2 * per_prompt))
        self.parts = [Part(self, low, pairs.part(low, low + step)) for low in range(0, len(pairs.own), step)]
        self.deviation = self._proved()

    def run(
        self, masks: Masks, measure: Measure, tick: Callable[[int], None] = lambda done: None
    ) -> Float[Tensor, "circuits prompts metrics"]:
        """Each circuit's metrics on each prompt; float64 on the CPU.

        Args:
            masks: The circuits.
            measure: Logits to metrics.
            tick: Called with the number of circuits that are done.

        Raises:
            RunError: NaN or infinity in a layer.
        """
        by_part = []
        for number, part in enumerate(self.parts):
            before, found = number * len(masks), dict[int, Tensor]()
            for numbers, values in part.circuits(masks, measure):
                found.update(zip(numbers, values, strict=True))
                tick((before + len(found)) // len(self.parts))
            by_part.append(torch.stack([found[i] for i in range(len(masks))]))
        return torch.cat(by_part, dim=1)

    def streams(self, measure: Measure) -> Float[Tensor, "2 prompts metrics"]:
        """Metrics of the stream that is run and of the other; float64 on the CPU.

        Where vectors are put in place of the other stream, the second is the pass in which no edge is kept.
        """
        kept = np.zeros((2, self.graph.n_edges), dtype=np.bool_)
        kept[0] = True
        return self.run(kept, measure)

    def _proved(self) -> float:
        """Largest error of logits of the first prompt, everything kept and nothing kept, each from the far stream."""
        part = Part(self, 0, Pairs.of(self.pairs.own[:1], self.pairs.other[:1]))
        everything = np.ones(self.graph.n_edges, dtype=np.bool_)
        far: tuple[tuple[Bools, Anchor], ...] = ((everything, "other"), (~everything, "own"))
        states = [next(part.states([kept], anchor)) for kept, anchor in far]
        got = part.layers.walker.unembed(torch.cat([one[0] for one in states])).float()
        tokens = torch.cat([self.pairs.own[:1], self.pairs.other[:1]]).to(got.device)
        native = forward(self.wiring.model, tokens)[:, -1].float()
        deviation = float((got - native).abs().max() / native.abs().max())
        refuse_deviation(deviation, "edges")
        return deviation


class Part:
    """Some of the prompts, with what both streams are there."""

    def __init__(self, whole: EdgePatching, low: int, pairs: Pairs) -> None:
        self.low, self.pairs, self.graph, self.memory = low, pairs, whole.graph, whole.memory
        self.start = pairs.start
        self.layers = EdgeLayers(whole.wiring, pairs.own, self.start, whole.columns)
        with self.layers.open():
            self.own = self.layers.side(pairs.own)
            self.other = self.own if pairs.ablation is not None else self.layers.side(pairs.other)
        self.slots = Slots.of(whole.graph, whole.wiring.normed)
        self._bases: dict[Anchor, Base] = {}

    def base(self, anchor: Anchor) -> Base:
        """What passes start from that are anchored in one of the streams."""
        if anchor not in self._bases:
            self._bases[anchor] = self._base(anchor)
        return self._bases[anchor]

    def _base(self, anchor: Anchor) -> Base:
        pairs, device = self.pairs, self.layers.device
        span_of = torch.zeros_like(pairs.own) if pairs.span_of is None else pairs.span_of
        span_of = span_of[:, self.start :].to(device)
        cells = Cells.of(span_of, len(self.graph.spans))
        read = torch.arange(len(pairs.own), device=device) * self.layers.width + pairs.read.to(device) - self.start
        span = span_of.flatten()[read]
        if anchor == "own":
            return Base(self.layers, self.slots, self.own, self._difference(cells), None, cells, read, span)
        embed = (self.own.entering[0] - self.other.entering[0]).flatten(0, 1)
        return Base(self.layers, self.slots, self.other, None, embed, cells, read, span)

    def _difference(self, cells: Cells) -> Float[Tensor, "sources cells d_model"]:
        """Each source in the other stream less its output in the stream that is run."""
        own, ablation = self._sources(self.own), self.pairs.ablation
        other = self._sources(self.other) if ablation is None else ablation.to(own)
        return cells.sorted((other - own).flatten(1, 2))

    def _sources(self, side: Side) -> Float[Tensor, "sources prompts positions d_model"]:
        """What every source adds in a stream."""
        found = side.entering[0].new_empty(len(self.graph.sources), *side.entering[0].shape)
        found[0] = side.entering[0]
        for layer, slots in enumerate(self.slots.layers):
            found[slots.heads[0] : slots.heads[-1] + 1] = self.layers.heads_of(side, layer)
            mlp = side.mlp[layer]
            if slots.mlp is not None and mlp is not None:
                found[slots.mlp] = mlp
        return found

    def circuits(self, masks: Masks, measure: Measure) -> Iterator[tuple[list[int], Tensor]]:
        """Numbers of some circuits and their metrics [circuits, prompts, metrics], until all are done."""
        chosen: dict[Anchor, list[int]] = {"own": [], "other": []}
        for number in range(len(masks)):
            chosen[self._anchor(masks[number])].append(number)
        for anchor, numbers in chosen.items():
            done = 0
            for states in self.states((masks[number] for number in numbers), anchor):
                yield numbers[done : done + len(states)], self.measured(states, measure)
                done += len(states)

    def _anchor(self, kept: Bools) -> Anchor:
        """The stream from which less has to be computed."""
        share = float(kept.mean())
        if self.pairs.ablation is not None or share > NEARLY_ALL:
            return "own"
        if share < 1 - NEARLY_ALL:
            return "other"
        wanted = [self.slots.logits]
        own, other = (
            self.slots.needs(self.slots.circuit(kept, anchored_in_other=far), wanted).targets.sum()
            for far in (False, True)
        )
        return "own" if own < other else "other"

    def states(self, kept: Iterable[Bools], anchor: Anchor) -> Iterator[Float[Tensor, "circuits prompts d_model"]]:
        """What the final norm and head are given in some circuits at a time, where each prompt is read."""
        base = self.base(anchor)
        routings = (self.slots.circuit(one, anchored_in_other=anchor == "other") for one in kept)
        asked = ((routing, self.slots.needs(routing, [self.slots.logits])) for routing in routings)
        for some in batches(base, asked, self.memory):
            yield final_states(base, some)

    def measured(self, states: Float[Tensor, "n prompts d_model"], measure: Measure) -> Float[Tensor, "n prompts m"]:
        """Metrics of final states, by the model's own norm and head; float64 on the CPU."""
        prompt = torch.arange(self.low, self.low + states.shape[1], device=states.device).repeat(len(states))
        chunk, flat = logits_chunk(states.device, self.layers.anatomy.vocab_size), states.flatten(0, 1)
        found = [
            measure(self.layers.walker.unembed(flat[i : i + chunk]), own, torch.zeros_like(own)).cpu().double()
            for i, own in zip(range(0, len(flat), chunk), torch.split(prompt, chunk), strict=True)
        ]
        return torch.unflatten(torch.cat(found), 0, states.shape[:2])


def run_circuits(
    model: nn.Module,
    anatomy: Anatomy,
    graph: Graph,
    clean: Int[Tensor, "prompts positions"],
    corrupt: Int[Tensor, "prompts positions"],
    masks: Masks,
    measure: Measure,
    *,
    base: Literal["clean", "corrupt"] = "clean",
    tick: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "circuits prompts metrics"]:
    """Run circuits on prompts of one length that are read at their last position; float64 on the CPU.

    Args:
        model: The model, in evaluation mode and in float32.
        anatomy: Its anatomy.
        graph: Its graph.
        clean: Ids of the clean prompts.
        corrupt: Ids of the corrupted ones.
        masks: Which edges each circuit keeps.
        measure: Logits to metrics.
        base: The stream that edges of the circuit carry; all others carry the other one.
        tick: Called with the number of circuits that are done.

    Raises:
        UserError: Edges of this model cannot be patched; says why.
        ProofError: The parts do not give this model's own logits.
    """
    own, other = (clean, corrupt) if base == "clean" else (corrupt, clean)
    return EdgePatching(wired(model, anatomy, graph), Pairs.of(own, other)).run(masks, measure, tick)


def exact_edge_effects(
    patching: EdgePatching,
    edges: Sequence[int] | Integers,
    measure: Measure,
    tick: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "edges prompts metrics"]:
    """M(patched) − M(base) of each edge alone: it carries the other stream, all else the stream that is run.

    Everything before the edge's target is that stream's own and is not computed again. Float64 on the CPU.

    Args:
        patching: The model on pairs of prompts; `own` is the base.
        edges: Numbers of the edges.
        measure: Logits to metrics.
        tick: Called with the number of edges that are done.
    """
    masks = AllButOne(patching.graph.n_edges, edges)
    return patching.run(masks, measure, tick) - patching.streams(measure)[:1]
