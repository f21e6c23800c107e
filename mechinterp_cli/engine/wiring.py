"""A model as a graph of parts: proof that its residual stream is their sum, what they write, and what each reads.

What writes: `embed` enters layer 0. A head writes its z through the output projection, through the norm after attention
with its scale *of the same pass* (that scale depends on all heads together), and through the residual's multiplier. An
MLP writes `mlp_out`. Biases of the output projection belong to no head: they are constants, and cancel in differences.

What reads is computed by the model's own layer on any residual stream: q, k and v before attention from what enters
the layer, `mlp_out` from what enters the MLP's norm. So one target can be given a stream of its own, and be
differentiated with respect to it, while everything else in the layer stays.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.circuit_graph import Graph, is_parallel
from mechinterp_cli.engine.early import ending_in_attention, run_until
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED
from mechinterp_cli.engine.instrument import kinds_by_layer, read_sites, visiting
from mechinterp_cli.engine.softmax_fix import widened
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, device_of, probe_tokens
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.linear import linear_maps
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.scaled import ScaledMap
from mechinterp_cli.models.trials import Trials
from mechinterp_cli.models.walk import LayerCall, first_tensor, forward

ADDITIVE = 1e-4
"""The parts must add up to the residual stream within this part of the largest element of the stream."""
_LENGTH = 12
_UNSCALED = 1e-5
"""A norm after attention is known by a scale that varies by more than this."""


@dataclass(frozen=True, eq=False)
class Wiring:
    """What writes to a model's residual stream and what reads it; make it with `wired`.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        graph: Its sources and targets.
        outputs: By layer the map from all heads' z to what attention adds.
        normed: By layer whether a norm scales what attention adds.
        deviation: Largest error of the sum of all parts, in parts of the largest element of the stream.
    """

    model: nn.Module
    anatomy: Anatomy
    graph: Graph
    outputs: tuple[ScaledMap, ...]
    normed: tuple[bool, ...]
    deviation: float

    @property
    def sites(self) -> frozenset[Site]:
        """What `written` looks at."""
        layers = self.anatomy.layers
        found = {EMBED, *(Site("z", layer.index) for layer in layers)}
        found |= {Site("mlp_out", layer.index) for layer in layers if layer.mlp_out is not None}
        return frozenset(found | {Site("attn_out", i) for i, normed in enumerate(self.normed) if normed})

    def written(self, seen: Mapping[Site, Tensor]) -> Float[Tensor, "n sources positions d_model"]:
        """What every source adds to the residual stream, in the graph's order; float32 at least.

        Args:
            seen: Activations [n, positions, *features] of one pass at `sites`.
        """
        embed = widened(seen[EMBED])
        found = embed.new_empty(len(embed), len(self.graph.sources), *embed.shape[1:])
        for index, source in enumerate(self.graph.sources):
            if source.kind == "embed":
                found[:, index] = embed
            elif source.kind == "mlp":
                found[:, index] = seen[Site("mlp_out", source.layer)]
            elif source.head == 0:
                added = seen.get(Site("attn_out", source.layer))
                heads = self.head_outputs(source.layer, seen[Site("z", source.layer)], added)
                found[:, index : index + heads.shape[1]] = heads
        return found

    def changed(
        self, base: Mapping[Site, Tensor], source: Mapping[Site, Tensor]
    ) -> Float[Tensor, "n sources positions d_model"]:
        """`written(source)` − `written(base)`.

        Args:
            base: Activations of one pass at `sites`.
            source: Those of another.
        """
        return self.written(source).sub_(self.written(base))

    def head_outputs(
        self, layer: int, z: Float[Tensor, "n positions heads d_value"], attn_out: Tensor | None
    ) -> Float[Tensor, "n heads positions d_model"]:
        """What every head of a layer adds to the residual stream; biases are left out.

        Args:
            layer: The layer.
            z: Its heads' z in some pass.
            attn_out: What its attention adds in the same pass, [n, positions, d_model]; looked at only where the
                layer is `normed`.
        """
        output, wide = self.outputs[layer], widened(z)
        writes = torch.unflatten(output.matrix[0], 0, z.shape[2:]).to(wide)
        found = torch.matmul(wide.transpose(1, 2), writes)
        if not self.normed[layer]:
            return found
        assert attn_out is not None
        scale = output.scale(wide.flatten(2).flatten(0, 1), widened(attn_out).flatten(0, 1)[:, None])
        return found / scale.view(len(z), 1, -1, 1)

    def constant(self, before: int) -> Float[Tensor, " d_model"]:
        """What attention's biases add to the stream that enters a layer."""
        return torch.stack([self.outputs[0].offset[0] * 0, *(o.offset[0] for o in self.outputs[:before])]).sum(0)

    def calls(self, tokens: Int[Tensor, "n positions"]) -> list[LayerCall]:
        """What the model hands to each layer for these tokens: give it to `attention_inputs` and `mlp_output`."""
        return Trials(self.model, self.anatomy).calls(tokens.to(device_of(self.model)))

    def attention_inputs(
        self, layer: int, call: LayerCall, stream: Float[Tensor, "n positions d_model"]
    ) -> dict[str, Float[Tensor, "n positions heads d_head"]]:
        """q, k and v as they enter attention where `stream` enters the layer, with gradients if they are on.

        Args:
            layer: The layer.
            call: What the model hands to it for prompts of the same number and length.
            stream: Any residual stream.
        """
        seen: list[AttentionCall] = []

        def attend(given: AttentionCall) -> tuple[Tensor, Tensor | None]:
            seen.append(given)
            return given.q, None

        with ending_in_attention(attend) as known, intercepted(self._module(layer), known.handler):
            self.anatomy.walker(self.model).run(layer, call, stream.to(call.hidden.dtype))
        given = seen[0]
        return {"q": given.q.transpose(1, 2), "k": given.k.transpose(1, 2), "v": given.v.transpose(1, 2)}

    def mlp_output(
        self, layer: int, call: LayerCall, stream: Float[Tensor, "n positions d_model"]
    ) -> Float[Tensor, "n positions d_model"]:
        """`mlp_out` where `stream` is what the MLP reads, with gradients if they are on; attention gives zeros.

        Args:
            layer: The layer.
            call: As for `attention_inputs`.
            stream: Any residual stream: of `resid_mid`, or `resid_pre` in a parallel block.
        """
        addition = self.anatomy.layers[layer].mlp_out
        assert addition is not None
        stream, seen = stream.to(call.hidden.dtype), list[Tensor]()

        def keep(output: Any) -> bool:
            seen.append(first_tensor(output).reshape(stream.shape) * addition.scale)
            return True

        with intercepted(self._module(layer), self._no_attention(layer)), self._entering_mlp(layer, stream) as entering:
            walker = self.anatomy.walker(self.model)
            module = self.model.get_submodule(addition.module)
            run_until(lambda: walker.run(layer, call, entering), module, keep)
        return seen[0]

    def _module(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.anatomy.layers[layer].module)

    def _no_attention(self, layer: int) -> Any:
        heads = self.anatomy.layers[layer].heads
        assert heads is not None

        def answer(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            n, _, positions, _ = call.q.shape
            return call.q.new_zeros(n, positions, heads.query, heads.d_value), None

        return answer

    @contextmanager
    def _entering_mlp(self, layer: int, stream: Tensor) -> Iterator[Tensor]:
        """Yields what must enter the layer, so that `stream` enters its MLP."""
        mid = self.anatomy.layers[layer].mid
        if mid is None:
            yield stream
            return

        def put(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (stream.reshape(args[0].shape), *args[1:])

        with hooked([self.model.get_submodule(mid).register_forward_pre_hook(put)]):
            yield stream.detach()


def wired(model: nn.Module, anatomy: Anatomy, graph: Graph | None = None) -> Wiring:
    """Prove that a model is the sum of its graph's parts, on random tokens in float32.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        graph: Its graph; that of single edges where it is not given.

    Raises:
        UserError: The residual stream is not that sum, or a part cannot be run by itself; says which layer and why.
    """
    graph = graph or Graph.of(anatomy)
    if not anatomy.chained:
        raise _refused("what leaves a layer is not what enters the next one")
    with linear_maps(model, anatomy) as maps:
        outputs = []
        for index in range(anatomy.n_layers):
            output = maps.output(index)
            if isinstance(output, str):
                raise _refused(f"layer {index}: {output}")
            outputs.append(output)
        return _Proof(model, anatomy, graph, tuple(outputs)).wiring()


def _refused(reason: str) -> UserError:
    return UserError(
        f"the residual stream of this model is not the sum of its heads and MLPs: {reason}",
        "Edges need that sum. Take another model, or patch whole sites with patch or attribute.",
    )


class _Proof:
    """One pass over random tokens, and what each part gives by itself."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, graph: Graph, outputs: tuple[ScaledMap, ...]) -> None:
        self.model, self.anatomy, self.graph, self.outputs = model, anatomy, graph, outputs
        length = min(_LENGTH, anatomy.max_length or _LENGTH)
        tokens = probe_tokens(anatomy.vocab_size, length, torch.Generator().manual_seed(2))
        self.tokens = tokens.to(device_of(model))
        kinds = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v")
        self.sites = {Site(kind, x.index) for x in anatomy.layers for kind in kinds if kind in x.sites}
        self.seen = read_sites(model, anatomy, self.sites, lambda: forward(model, self.tokens))

    def wiring(self) -> Wiring:
        """What is proved.

        Raises:
            UserError: It is not.
        """
        normed = tuple(self._is_normed(index) for index in range(self.anatomy.n_layers))
        bare = Wiring(self.model, self.anatomy, self.graph, self.outputs, normed, 0.0)
        deviation = self._deviation(bare)
        if not deviation <= ADDITIVE:
            raise _refused(f"what they write misses it by {deviation:.1e} of its largest element")
        self._check_reading(bare)
        return Wiring(self.model, self.anatomy, self.graph, self.outputs, normed, deviation)

    def _is_normed(self, layer: int) -> bool:
        z, added = self.seen[Site("z", layer)], self.seen[Site("attn_out", layer)]
        scale = self.outputs[layer].scale(z.flatten(2).flatten(0, 1), added.flatten(0, 1)[:, None])
        return bool((scale - 1).abs().max() > _UNSCALED)

    def _deviation(self, wiring: Wiring) -> float:
        """Largest error of the sums that targets read."""
        sums = wiring.written(self.seen).cumsum(1)
        worst = 0.0
        for target, reads in zip(self.graph.targets, self.graph.reads, strict=True):
            want = self.seen[self._read(target.kind, target.layer)]
            done = target.layer + (target.kind == "mlp" and not is_parallel(self.anatomy.layers[target.layer]))
            error = sums[:, reads - 1] + wiring.constant(done) - want
            worst = max(worst, float(error.abs().max() / want.abs().max()))
        return worst

    def _read(self, kind: str, layer: int) -> Site:
        if kind == "logits":
            return Site("resid_post", layer - 1)
        middle = kind == "mlp" and not is_parallel(self.anatomy.layers[layer])
        return Site("resid_mid" if middle else "resid_pre", layer)

    @torch.no_grad()
    def _check_reading(self, wiring: Wiring) -> None:
        """Whether a target by itself, on another stream, is what the whole layer makes of that stream."""
        calls = wiring.calls(self.tokens)
        for layer in self.anatomy.layers:
            mlp = self._read("mlp", layer.index)
            for place in {self._read("q", layer.index), mlp}:
                call, other = calls[layer.index], self.seen[place].flip(0) + self.seen[place].roll(1, 1)
                alone: dict[str, Tensor] = {}
                if place.kind == "resid_pre":
                    alone |= wiring.attention_inputs(layer.index, call, other)
                if layer.mlp_out is not None and place == mlp:
                    alone["mlp_out"] = wiring.mlp_output(layer.index, call, other)
                whole = self._layer_on(place, call, other, frozenset(alone))
                for kind, values in alone.items():
                    want = whole[Site(kind, layer.index)]
                    if not bool((values - want).abs().max() <= ADDITIVE * want.abs().max()):
                        raise _refused(f"{kind} of layer {layer.index} depends on more than the stream it reads")

    def _layer_on(self, place: Site, call: LayerCall, stream: Tensor, kinds: frozenset[str]) -> dict[Site, Tensor]:
        """What a whole layer gives where another stream stands at a place in it."""

        def put(_site: Site, _activation: Tensor) -> Tensor:
            return stream

        walker, layer = self.anatomy.walker(self.model), place.layer
        middle = {place} if place.kind == "resid_mid" else set[Site]()
        with visiting(self.model, self.anatomy, kinds_by_layer(middle), put):
            entering = call.hidden if middle else stream
            wanted = {Site(kind, layer) for kind in kinds}
            return read_sites(self.model, self.anatomy, wanted, lambda: walker.run(layer, call, entering))
