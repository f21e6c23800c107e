"""Circuits of heads and neurons run by real interventions: what is not in the circuit carries the other stream's value.

In a circuit's run every head and every neuron that is not kept has its activation of the other stream put in place, at
`z` and `neuron`, for all that reads it; so do embeddings where `embed` is not kept. Everything else is the model's own
code on what it is given. Behind a norm after attention or after an MLP the parts are put together after the norm: kept
ones with its scale in this run, all others with its scale in the other stream, as edges are.

Items have no readers of their own, so that one pass of the whole model runs a circuit; several run side by side.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Source
from mechinterp_cli.engine.circuit_items import Items, mlp_of
from mechinterp_cli.engine.edge_layers import ROWS_PER_CALL
from mechinterp_cli.engine.edge_patching import MEMORY, Pairs, refuse_deviation, refuse_unpatchable
from mechinterp_cli.engine.edge_routing import Bools, Masks
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Pass
from mechinterp_cli.engine.instrument import kinds_by_layer, read_sites, visiting
from mechinterp_cli.engine.neuron_wiring import NeuronWiring
from mechinterp_cli.engine.wavefront import Measure, check_finite, logits_chunk
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.walk import forward

_GPU_ROWS = 16
"""So many times the rows of a CPU's pass."""


class NeuronPatching:
    """Runs circuits of one model's heads and neurons on pairs of prompts.

    Args:
        wiring: The model's parts; the model is in float32.
        pairs: The prompts; without `ablation`.
        memory: Bytes that activations of the other stream may take.

    Raises:
        UserError: Parts of this model cannot be patched; says why.
        ProofError: The parts do not give this model's own logits.
        ValueError: Vectors are to be put in place of the other stream.
    """

    def __init__(self, wiring: NeuronWiring, pairs: Pairs, *, memory: int = MEMORY) -> None:
        if pairs.ablation is not None:
            raise ValueError("items carry the other stream; vectors cannot be put in its place")
        self.wiring, self.pairs = wiring, pairs
        refuse_unpatchable(wiring.wiring, pairs.own[:1], "neurons")
        step = max(1, memory // (2 * self._bytes_per_prompt()))
        self.parts = [_Part(wiring, low, pairs.part(low, low + step)) for low in range(0, len(pairs.own), step)]
        self.deviation = self._proved()

    def _bytes_per_prompt(self) -> int:
        anatomy = self.wiring.wiring.anatomy
        heads = sum(layer.heads.query * layer.heads.d_value for layer in anatomy.layers if layer.heads is not None)
        neurons = sum(layer.d_mlp for layer in anatomy.layers)
        return self.pairs.own.shape[1] * (heads + neurons + anatomy.d_model) * 4

    def run(
        self, masks: Masks, measure: Measure, tick: Callable[[int], None] = lambda done: None
    ) -> Float[Tensor, "circuits prompts metrics"]:
        """Each circuit's metrics on each prompt; float64 on the CPU.

        Args:
            masks: The circuits, bool [items] each.
            measure: Logits to metrics.
            tick: Called with the number of circuits that are done.

        Raises:
            RunError: NaN or infinity in a layer.
        """
        by_part = []
        for number, part in enumerate(self.parts):
            found, before = list[Tensor](), number * len(masks)
            for logits in part.logits(masks):
                found.append(part.measured(logits, measure))
                tick((before + sum(map(len, found))) // len(self.parts))
            by_part.append(torch.cat(found))
        return torch.cat(by_part, dim=1)

    def streams(self, measure: Measure) -> Float[Tensor, "2 prompts metrics"]:
        """Metrics of the stream that is run and of the other; float64 on the CPU."""
        kept = np.zeros((2, len(self.wiring.items)), dtype=np.bool_)
        kept[0] = True
        return self.run(kept, measure)

    def _proved(self) -> float:
        """Largest error of logits of the first prompt, nothing kept, in either direction."""
        first, nothing = self.pairs.part(0, 1), np.zeros((1, len(self.wiring.items)), dtype=np.bool_)
        ways = (first, Pairs(first.other, first.own, first.read, first.span_of))
        got = torch.cat([next(_Part(self.wiring, 0, way).logits(nothing))[0] for way in ways]).float()
        tokens = torch.cat([way.other for way in ways]).to(got.device)
        native = forward(self.wiring.wiring.model, tokens)[torch.arange(2), first.read.repeat(2).to(got.device)].float()
        deviation = float((got - native).abs().max() / native.abs().max())
        refuse_deviation(deviation, "neurons")
        return deviation


class _Part:
    """Some of the prompts, with what the other stream is there."""

    def __init__(self, wiring: NeuronWiring, low: int, pairs: Pairs) -> None:
        self.wiring, self.low, self.pairs = wiring, low, pairs
        self.model, self.anatomy = wiring.wiring.model, wiring.wiring.anatomy
        tokens = pairs.other.to(device_of(self.model))
        seen = read_sites(self.model, self.anatomy, set(wiring.sites), lambda: forward(self.model, tokens))
        self.other: dict[Site, Tensor] = {EMBED: seen[EMBED]}
        for layer in range(self.anatomy.n_layers):
            self.other[Site("z", layer)] = wiring.heads(layer, seen)
            if layer in wiring.ways:
                self.other[Site("neuron", layer)] = wiring.neurons(layer, seen)

    @torch.no_grad()
    def logits(self, masks: Masks) -> Iterator[Float[Tensor, "circuits prompts vocab"]]:
        """Logits of some circuits at a time, where each prompt is read."""
        prompts, length = self.pairs.own.shape
        device = device_of(self.model)
        rows = ROWS_PER_CALL if device.type == "cpu" else _GPU_ROWS * ROWS_PER_CALL
        step = max(1, min(rows // (prompts * length), logits_chunk(device, self.anatomy.vocab_size) // prompts))
        for first in range(0, len(masks), step):
            yield self._passed([masks[i] for i in range(first, min(first + step, len(masks)))])

    def _passed(self, masks: Sequence[Bools]) -> Float[Tensor, "circuits prompts vocab"]:
        """Logits of circuits that are run side by side."""
        items, pairs, count = self.wiring.items, self.pairs, len(masks)
        kept = torch.from_numpy(np.stack(masks)).to(device_of(self.model))
        visitor = _Visitor(self.wiring, self.other, kept.view(count, len(items.graph.spans), -1), self._span_of())
        run = Pass(pairs.own.repeat(count, 1), pairs.read.repeat(count), torch.arange(len(pairs.own)).repeat(count))
        with visiting(self.model, self.anatomy, kinds_by_layer(set(self.wiring.sites)), visitor):
            logits = run.logits(self.model)
        check_finite(logits, self.anatomy.n_layers - 1, "a patched pass")
        return torch.unflatten(logits, 0, (count, -1))

    def _span_of(self) -> Tensor | None:
        return None if self.pairs.span_of is None else self.pairs.span_of.to(device_of(self.model))

    def measured(self, logits: Float[Tensor, "n prompts vocab"], measure: Measure) -> Float[Tensor, "n prompts m"]:
        """Metrics of logits; float64 on the CPU."""
        count, prompts = logits.shape[:2]
        prompt = torch.arange(self.low, self.low + prompts, device=logits.device).repeat(count)
        values = measure(logits.flatten(0, 1), prompt, torch.zeros_like(prompt)).cpu().double()
        return torch.unflatten(values, 0, (count, prompts))


@dataclass(eq=False)
class _Visitor:
    """Puts the other stream's activations in place of items that are not kept.

    Args:
        wiring: The model's parts.
        other: What the items of every block are in the other stream, [prompts, positions, units, ...].
        kept: Which items each circuit keeps, [circuits, spans, items].
        span_of: The span of every position, [prompts, positions]; None where there is one span.
    """

    wiring: NeuronWiring
    other: dict[Site, Tensor]
    kept: Bool[Tensor, "circuits spans items"]
    span_of: Tensor | None

    seen: dict[Site, Tensor] = field(default_factory=dict)
    """What this run has at sites whose scale a norm makes later."""

    def __call__(self, site: Site, activation: Tensor) -> Tensor | None:
        """What stands at a site from now on; None where nothing of it is replaced."""
        block = _BLOCKS.get(site.kind, site.kind)
        kept = self._kept(block, site.layer)
        if kept is None:
            return None
        own = Site(block, site.layer)
        if block == "embed" or not self._normed(own):
            return torch.where(kept, self._by_circuit(activation), self.other[own].to(activation)).flatten(0, 1)
        self.seen[site] = activation  # the norm's scale is that of what this run has here
        return None if site == own else self._assembled(own, kept, activation)

    def _kept(self, block: str, layer: int) -> Bool[Tensor, "circuits #prompts #positions units #features"] | None:
        """Which of a block's units each circuit keeps; None where all are."""
        own = self.kept[:, :, _items_of(self.wiring.items, block, layer)]
        if bool(own.all()):
            return None
        found = own[:, 0, None, None] if self.span_of is None else own[:, self.span_of]
        return found[..., None] if block == "z" else found

    def _normed(self, own: Site) -> bool:
        wiring = self.wiring
        return wiring.wiring.normed[own.layer] if own.kind == "z" else wiring.ways[own.layer].normed

    def _by_circuit(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 0, (len(self.kept), -1))

    def _assembled(self, own: Site, kept: Tensor, added: Tensor) -> Tensor:
        """What a block adds after its norm, with the other stream's parts in place of those that are not kept."""
        wiring, layer = self.wiring, own.layer
        live = (wiring.heads if own.kind == "z" else wiring.neurons)(layer, self.seen)
        change = torch.where(kept, 0, self.other[own] - self._by_circuit(live)).flatten(0, 1)
        self.seen.pop(own)
        if own.kind == "neuron":
            return added + wiring.ways[layer].written(change)
        return added + change.flatten(2) @ wiring.output(layer, change)


_BLOCKS = {"attn_out": "z", "mlp_out": "neuron"}
"""Where a norm's output stands, to where the units are that it is made of."""


def _items_of(items: Items, block: str, layer: int) -> slice:
    """Where a block's items are among those of a span."""
    sources = items.graph.source_index
    if block == "neuron":
        return items.within(sources[mlp_of(layer)])
    if block == "embed":
        return items.within(sources[Source("embed")])
    first = items.within(sources[Source("head", layer, 0)]).start
    return slice(first, first + sum(s.kind == "head" and s.layer == layer for s in items.graph.sources))
