"""The parts of decoder layers, each run alone on rows of its own input, by the model's own code.

A row is one position of one prompt of one pass. A layer is called whole and listened to: its front gives q, k and v to
the attention interface and is ended there, its MLP runs with nothing added by attention before it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.early import ending_in_attention, run_until
from mechinterp_cli.engine.edge_columns import Columns, find_columns
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gather import NotGatherable, RowIndex, axis_roles, packed_call
from mechinterp_cli.engine.instrument import Reader, layer_of, module_hooks
from mechinterp_cli.engine.packed_attention import Segment, StreamAttention, merged_attention, native_attention
from mechinterp_cli.engine.wavefront import check_finite
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.interface import AttentionCall, Handler, intercepted
from mechinterp_cli.models.walk import first_tensor

ROWS_PER_CALL = 1024
"""Rows that a layer is called on at once: as many as keep a CPU's caches warm."""


@dataclass(frozen=True, eq=False)
class Side:
    """One unedited stream: what its parts read and add, by layer, from the first position of interest on.

    Args:
        entering: What enters each layer, and what leaves the last.
        mid: What each layer's MLP reads.
        calls: Each layer's attention call, on all positions.
        z: What each layer's attention gives.
        scale: Of the norm after attention, 1 where there is none.
        mlp: What each layer's MLP adds; None where there is no MLP.
    """

    entering: list[Float[Tensor, "prompts positions d_model"]]
    mid: list[Float[Tensor, "prompts positions d_model"]]
    calls: list[AttentionCall]
    z: list[Float[Tensor, "prompts positions heads d_value"]]
    scale: list[Float[Tensor, "prompts positions"]]
    mlp: list[Float[Tensor, "prompts positions d_model"] | None]


class EdgeLayers:
    """Runs parts of one model's layers on packed rows of prompts of one length.

    Args:
        wiring: The model's parts.
        tokens: The prompts' ids in one of the streams.
        start: The first position of interest: rows are of the positions from there on.
        columns: What is known of each layer's projections, and will be.

    Raises:
        UserError: The layers cannot be called row by row.
    """

    def __init__(
        self,
        wiring: Wiring,
        tokens: Int[Tensor, "prompts positions"],
        start: int,
        columns: dict[int, Columns | None],
    ) -> None:
        self.wiring, self.start, self._columns = wiring, start, columns
        self.model, self.anatomy = model, anatomy = wiring.model, wiring.anatomy
        self.device = device_of(model)
        self.walker = anatomy.walker(model)
        self.prompts, self.length = tokens.shape
        self.width = self.length - start
        self._given = self.walker.calls(tokens.to(self.device))
        self._roles = axis_roles(self.walker, self.length, anatomy.vocab_size, self.device)
        self._layer_of = layer_of(model, anatomy)
        self._handler: Handler | None = None
        self._check()

    def _check(self) -> None:
        try:
            for layer in range(self.anatomy.n_layers):
                packed_call(self._given[layer], self._roles[layer], self._index(1))
        except NotGatherable as error:
            raise UserError(
                f"edges cannot be patched: this model's layers cannot be called row by row ({error})",
                "Take another model, or patch whole sites with patch.",
            ) from error

    @contextmanager
    def open(self) -> Iterator[None]:
        """Stand at the attention interface; everything below works inside only."""
        try:
            with torch.no_grad(), intercepted(self.model, self._attend):
                yield
        finally:
            self._handler = None

    def _attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        if self._handler is None or id(call.module) not in self._layer_of:
            return call.native(call.q, call.k, call.v, call.mask)
        return self._handler(call)

    @contextmanager
    def _answering(self, handler: Handler) -> Iterator[None]:
        self._handler = handler
        try:
            yield
        finally:
            self._handler = None

    def side(self, tokens: Int[Tensor, "prompts positions"]) -> Side:
        """One unedited pass.

        Args:
            tokens: The prompts' ids.
        """
        given = self.walker.calls(tokens.to(self.device))
        hidden, cut = given[0].hidden, slice(self.start, None)
        side = Side([hidden[:, cut]], [], [], [], [], [])
        for layer, anatomy in enumerate(self.anatomy.layers):
            reader, seen = Reader(), list[tuple[AttentionCall, Tensor]]()

            def handler(call: AttentionCall, seen: list[tuple[AttentionCall, Tensor]] = seen) -> Any:
                z, weights = call.native(call.q, call.k, call.v, call.mask)
                seen.append((call, z))
                return z, weights

            kinds = frozenset({"attn_out", "mlp_out"})
            with self._answering(handler), module_hooks(self.model, anatomy, kinds, reader, layer_ends=False):
                entering, hidden = hidden, self.walker.run(layer, given[layer], hidden)
            check_finite(hidden, layer, "an unedited pass")
            added, mlp = reader.seen[Site("attn_out", layer)], reader.seen.get(Site("mlp_out", layer))
            ((call, z),) = seen
            side.calls.append(call)
            side.z.append(z[:, cut])
            side.scale.append(self._scale(layer, z[:, cut], added[:, cut]))
            side.mid.append((entering if anatomy.mid is None else entering + added)[:, cut])
            side.mlp.append(None if mlp is None else mlp[:, cut])
            side.entering.append(hidden[:, cut])
        return side

    def writes(self, layer: int, like: Tensor) -> Float[Tensor, "heads d_value d_model"]:
        """What one unit of each head's z adds, the scale of a norm after attention apart."""
        heads = self.anatomy.layers[layer].heads
        assert heads is not None
        return torch.unflatten(self.wiring.outputs[layer].matrix[0], 0, (heads.query, heads.d_value)).to(like)

    def scaled(
        self, layer: int, z: Float[Tensor, "*n prompts positions heads d_value"], scale: Tensor
    ) -> Float[Tensor, "*n prompts positions heads d_value"]:
        """Z by the scale of the norm after attention, where there is one: `writes` of it is what heads add."""
        return z / scale[..., None, None] if self.wiring.normed[layer] else z

    def heads_of(self, side: Side, layer: int) -> Float[Tensor, "heads prompts positions d_model"]:
        """What each head of a layer adds in an unedited stream."""
        z = self.scaled(layer, side.z[layer], side.scale[layer])
        return torch.einsum("pwhv,hvd->hpwd", z, self.writes(layer, z))

    def _scale(self, layer: int, z: Tensor, added: Tensor) -> Tensor:
        """Of the norm after attention, [prompts, positions]."""
        output = self.wiring.outputs[layer]
        flat = output.scale(z.reshape(-1, output.matrix.shape[1]), added.reshape(-1, 1, added.shape[-1]))
        return flat.view(z.shape[:2])

    def _index(self, blocks: int) -> RowIndex:
        """Prompt and position of the rows of some blocks, each [prompts, width]."""
        prompt = torch.arange(self.prompts, device=self.device).repeat_interleave(self.width).repeat(blocks)
        position = torch.arange(self.start, self.length, device=self.device).repeat(self.prompts * blocks)
        return RowIndex(prompt, position, self.length)

    def _by_blocks(self, function: Callable[[Tensor], tuple[Tensor, ...]], blocks: Tensor) -> tuple[Tensor, ...]:
        """`function` of [blocks, rows, features], some blocks at a time; its results along the first axis."""
        parts = [function(part) for part in torch.split(blocks, self._step)]
        return tuple(torch.cat(same) for same in zip(*parts, strict=True))

    @property
    def _step(self) -> int:
        """How many blocks a layer is called on at once."""
        return max(1, ROWS_PER_CALL // (self.prompts * self.width))

    def _run(self, layer: int, blocks: Tensor) -> Tensor:
        """A layer's output on blocks of rows, [1, rows, d_model]."""
        call = packed_call(self._given[layer], self._roles[layer], self._index(len(blocks)))
        return self.walker.run(layer, call, blocks.reshape(1, -1, blocks.shape[-1]))

    def front(
        self, layer: int, inputs: Float[Tensor, "blocks prompts positions d_model"], reads: Sequence[Sequence[int]]
    ) -> tuple[Float[Tensor, "blocks prompts positions heads d"], ...]:
        """q, k and v of rows that stand before a layer's attention; anything where they are not read.

        Args:
            layer: The layer.
            inputs: The rows.
            reads: Of every block who reads it: queries, keys and values of the layer's heads, counted in that order.
        """
        blocks = inputs.flatten(1, 2)
        columns = self._columns_of(layer, blocks, reads)
        if columns is None:
            found = self._by_blocks(partial(self._front, layer), blocks)
        else:
            parts = []
            for first in range(0, len(blocks), self._step):
                own = slice(first, first + self._step)
                with columns.restricted(reads[own]):
                    parts.append(self._front(layer, blocks[own]))
            found = tuple(torch.cat(same) for same in zip(*parts, strict=True))
        return tuple(torch.unflatten(x, 1, inputs.shape[1:3]) for x in found)

    def _front(self, layer: int, blocks: Float[Tensor, "blocks rows d_model"]) -> tuple[Tensor, ...]:
        """q, k and v, [blocks, rows, heads, d]."""
        seen: list[tuple[Tensor, ...]] = []

        def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            seen.append(tuple(x[0].transpose(0, 1) for x in (call.q, call.k, call.v)))
            return call.q, None

        with ending_in_attention(attend) as known, self._answering(known.handler):
            self._run(layer, blocks)
        return tuple(torch.unflatten(x.contiguous(), 0, blocks.shape[:2]) for x in seen[0])

    def _columns_of(self, layer: int, blocks: Tensor, reads: Sequence[Sequence[int]]) -> Columns | None:
        """What targets depend on, where most of each row's projections would be computed for nothing."""
        heads = self.anatomy.layers[layer].heads
        assert heads is not None
        if 2 * sum(map(len, reads)) > len(reads) * (heads.query + 2 * heads.key_value):
            return None
        if layer not in self._columns:
            module = self.model.get_submodule(self.anatomy.layers[layer].module)
            self._columns[layer] = find_columns(module, partial(self._front, layer), blocks[0])
        return self._columns[layer]

    def attend(
        self,
        layer: int,
        side: Side,
        q: Float[Tensor, "blocks prompts positions heads d_head"],
        k: Float[Tensor, "blocks prompts positions kv_heads d_head"],
        v: Float[Tensor, "blocks prompts positions kv_heads d_value"],
    ) -> Float[Tensor, "blocks prompts positions heads d_value"]:
        """A layer's z; what lies before the first position of interest is the side's own."""
        known, stream = self.anatomy.layers[layer].known_softmax, side.calls[layer]
        rows = [x.flatten(0, 2).transpose(0, 1)[None] for x in (q, k, v)]
        call = replace(stream, q=rows[0], k=rows[1], v=rows[2])
        prompts = torch.arange(self.prompts, device=self.device)
        segment = Segment(0, rows[0].shape[2], len(q), self.start, prompts, self.width)
        attention = StreamAttention(stream.k, stream.v, stream.mask)
        z = (merged_attention if known else native_attention)(call, attention, [segment])
        return torch.unflatten(z[0], 0, q.shape[:3])

    def scale(
        self, layer: int, z: Float[Tensor, "blocks prompts positions heads d_value"]
    ) -> Float[Tensor, "blocks prompts positions"]:
        """The scale of the norm after attention, of z that attention might have given."""
        addition = self.anatomy.layers[layer].attn_out
        assert addition is not None
        module, heads = self.model.get_submodule(addition.module), z.shape[-2:]

        def function(blocks: Tensor) -> tuple[Tensor, ...]:
            rows, seen = blocks.reshape(1, -1, *heads).contiguous(), list[Tensor]()
            nothing = blocks.new_zeros(*blocks.shape[:2], self.anatomy.d_model)

            def keep(output: Any) -> bool:
                seen.append(first_tensor(output).reshape(nothing.shape) * addition.scale)
                return True

            with self._answering(lambda _call: (rows, None)):
                run_until(lambda: self._run(layer, nothing), module, keep)
            return (self._scale(layer, blocks, seen[0]),)

        flat = z.flatten(1, 2).flatten(2, 3)
        return torch.unflatten(self._by_blocks(function, flat)[0], 1, z.shape[1:3])

    def mlp(
        self, layer: int, inputs: Float[Tensor, "blocks prompts positions d_model"]
    ) -> Float[Tensor, "blocks prompts positions d_model"]:
        """What a layer's MLP adds on rows that stand before it."""
        site, anatomy = Site("mlp_out", layer), self.anatomy.layers[layer]

        def function(blocks: Tensor) -> tuple[Tensor, ...]:
            seen: list[Tensor] = []

            def visit(at: Site, activation: Tensor) -> Tensor | None:
                if at == site:
                    seen.append(activation.view(len(blocks), -1, activation.shape[-1]).clone())
                    return None
                return torch.zeros_like(activation)

            hooks = module_hooks(self.model, anatomy, frozenset({"attn_out", "mlp_out"}), visit, layer_ends=False)
            with hooks, self._answering(_nothing):
                self._run(layer, blocks)
            return (seen[0],)

        return torch.unflatten(self._by_blocks(function, inputs.flatten(1, 2))[0], 1, inputs.shape[1:3])


def _nothing(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Attention that gives zeros."""
    return call.v.new_zeros(1, call.q.shape[2], call.q.shape[1], call.v.shape[-1]), None
