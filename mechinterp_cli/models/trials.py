"""Parts of a decoder run by themselves on chosen inputs, with the model's own code.

Every row is a prompt of one token, so it is at position 0, where rotary embeddings turn nothing, and it
attends to itself alone. A pass is cut short as soon as what was asked for has been seen.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.models.anatomy import Anatomy, LayerAnatomy, device_of, probe_tokens
from mechinterp_cli.models.interface import AttentionCall, intercepted
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import LayerCall, first_tensor, forward

ROWS_PER_CALL = 2048
"""Rows that a part is run on at once."""
_PROBE_LENGTH = 12

T = TypeVar("T")


class _SeenError(Exception):
    """What was asked for has been seen: the rest of the pass is not needed."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def _until_seen(run: Callable[[], Any]) -> Any:
    try:
        run()
    except _SeenError as seen:
        return seen.value
    return None


@contextmanager
def no_logits(head: nn.Module | None) -> Iterator[None]:
    """Let the output head compute one row only, whatever it is given."""

    def cut(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:1, :1], *args[1:])

    with hooked([] if head is None else [head.register_forward_pre_hook(cut)]):
        yield


@dataclass(frozen=True, eq=False)
class Sample:
    """What an ordinary pass over random tokens computes; rows are all tokens of all prompts."""

    logits: Float[Tensor, "rows vocab"]
    streams: list[Float[Tensor, "rows d_model"]]
    """What enters each layer, then what leaves the last."""
    z: dict[int, Float[Tensor, "rows heads d_value"]] = field(default_factory=dict)
    v: dict[int, Float[Tensor, "rows kv_heads d_value"]] = field(default_factory=dict)
    """Of the layers that go through the attention interface."""
    attn_out: dict[int, Float[Tensor, "rows d_model"]] = field(default_factory=dict)


class Trials:
    """Runs parts of one model.

    Args:
        model: The model, in evaluation mode; its weights are not changed.
        anatomy: Its anatomy; layers must be chained.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.anatomy = anatomy
        self.walker = anatomy.walker(model)
        get_head: Any = getattr(model, "get_output_embeddings", None)
        self.head: nn.Module | None = get_head() if get_head is not None else None
        self._calls: dict[int, list[LayerCall]] = {}

    def sample(self) -> Sample:
        """One ordinary pass over seeded random tokens."""
        length = min(_PROBE_LENGTH, self.anatomy.max_length or _PROBE_LENGTH)
        tokens = probe_tokens(self.anatomy.vocab_size, length, torch.Generator().manual_seed(1))
        return record_sample(self, tokens.to(device_of(self.model)))

    def calls(self, tokens: Int[Tensor, "rows positions"]) -> list[LayerCall]:
        """What the model hands to each layer for some tokens; no layer and next to no logits are computed."""
        with no_logits(self.head):
            return self.walker.calls(tokens)

    def _single(self, index: int, hidden: Float[Tensor, "rows d_model"]) -> LayerCall:
        """A layer's call for prompts of one token each, with these hidden states."""
        call = self._of_rows(hidden.shape[0])[index]
        return replace(call, hidden=hidden[:, None].to(call.hidden.dtype))

    def _of_rows(self, rows: int) -> list[LayerCall]:
        if rows not in self._calls:
            self._calls[rows] = self.calls(torch.zeros(rows, 1, dtype=torch.long, device=device_of(self.model)))
        return self._calls[rows]

    @torch.no_grad()
    def _by_rows(self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        parts = [function(part) for part in torch.split(x, ROWS_PER_CALL)]
        return tuple(torch.cat(same) for same in zip(*parts, strict=True))

    def entering_head(self, hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_head_in"] | None:
        """What the output head is given for final hidden states; None where no head module is called."""
        if self.head is None:
            return None
        head, dtype = self.head, self._of_rows(1)[-1].hidden.dtype

        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            raise _SeenError(args[0].reshape(args[0].shape[0], -1))

        def run(rows: Tensor) -> tuple[Tensor, ...]:
            with hooked([head.register_forward_pre_hook(see)]):
                seen = _until_seen(lambda: self.walker.unembed(rows.to(dtype)))
            return () if seen is None else (seen,)

        seen = self._by_rows(run, hidden)
        return seen[0] if seen else None

    def attention_inputs(
        self, index: int, hidden: Float[Tensor, "rows d_model"]
    ) -> tuple[Float[Tensor, "rows heads d_head"], ...]:
        """q, k and v of one layer for tokens whose residual stream is `hidden`, by heads.

        A layer that bypasses the attention interface gives z alone: a token that attends only to itself.
        """
        layer = self.anatomy.layers[index]

        def see(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            raise _SeenError(tuple(x[:, :, 0] for x in (call.q, call.k, call.v)))

        def see_z(_module: nn.Module, args: tuple[Any, ...]) -> None:
            assert layer.heads is not None
            raise _SeenError((args[0].reshape(-1, layer.heads.query, layer.heads.d_value),))

        def run(rows: Tensor) -> tuple[Tensor, ...]:
            layer_call = self._single(index, rows)  # before anything stands in the model's way
            with ExitStack() as stack:
                if layer.by_interface:
                    stack.enter_context(intercepted(self.model, see))
                elif layer.z:
                    stack.enter_context(hooked([self.model.get_submodule(layer.z).register_forward_pre_hook(see_z)]))
                seen: tuple[Tensor, ...] = _until_seen(lambda: self.walker.run(index, layer_call, layer_call.hidden))
            return seen

        return self._by_rows(run, hidden)

    def written(self, index: int, z: Float[Tensor, "rows heads d_value"]) -> Float[Tensor, "rows d_model"]:
        """What one layer's attention adds to the residual stream for given z."""
        layer = self.anatomy.layers[index]
        addition = layer.attn_out
        assert addition is not None

        def see(_module: nn.Module, _args: Any, output: Any) -> None:
            raise _SeenError((first_tensor(output).reshape(-1, self.anatomy.d_model) * addition.scale,))

        def run(rows: Tensor) -> tuple[Tensor, ...]:
            nothing = torch.zeros(rows.shape[0], self.anatomy.d_model, dtype=rows.dtype, device=rows.device)
            layer_call = self._single(index, nothing)
            with ExitStack() as stack:
                stack.enter_context(hooked([self.model.get_submodule(addition.module).register_forward_hook(see)]))
                stack.enter_context(self._replacing_z(layer, rows.to(layer_call.hidden.dtype)))
                seen: tuple[Tensor, ...] = _until_seen(lambda: self.walker.run(index, layer_call, layer_call.hidden))
            return seen

        return self._by_rows(run, z)[0]

    @contextmanager
    def _replacing_z(self, layer: LayerAnatomy, z: Tensor) -> Iterator[None]:
        def answer(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            return z[:, None].contiguous(), None

        def put(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (z.reshape(args[0].shape), *args[1:])

        if layer.by_interface:
            with intercepted(self.model, answer):
                yield
        elif layer.z:
            with hooked([self.model.get_submodule(layer.z).register_forward_pre_hook(put)]):
                yield


@torch.no_grad()
def record_sample(trials: Trials, tokens: Tensor) -> Sample:
    """Streams, z and attn_out of every layer that has them, in one ordinary pass."""
    model, anatomy = trials.model, trials.anatomy
    streams: dict[int, Tensor] = {}
    z: dict[int, Tensor] = {}
    v: dict[int, Tensor] = {}
    attn_out: dict[int, Tensor] = {}
    layer_of = {id(m): layer.index for layer in anatomy.layers for m in model.get_submodule(layer.module).modules()}

    def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        out, weights = call.native(call.q, call.k, call.v, call.mask)
        index = layer_of.get(id(call.module), -1)
        z[index], v[index] = out.flatten(0, 1).clone(), call.v.transpose(1, 2).flatten(0, 1).clone()
        return out, weights

    with ExitStack() as stack:
        stack.enter_context(intercepted(model, attend))
        for layer in anatomy.layers:
            stack.enter_context(hooked(_recorders(model, layer, streams, z, attn_out)))
        logits = forward(model, tokens)
    ordered = [streams[i] for i in range(anatomy.n_layers + 1)]
    return Sample(logits.flatten(0, 1), ordered, z, v, attn_out)


def _recorders(
    model: nn.Module, layer: LayerAnatomy, streams: dict[int, Tensor], z: dict[int, Tensor], attn_out: dict[int, Tensor]
) -> list[Any]:
    """Hooks on one layer; what they keep is [tokens, features]."""
    index, addition, heads = layer.index, layer.attn_out, layer.heads
    whole = model.get_submodule(layer.module)

    def enters(_module: nn.Module, args: Any, kwargs: Any) -> None:
        streams[index] = LayerCall.of(args, kwargs).hidden.flatten(0, 1).clone()

    def leaves(_module: nn.Module, _args: Any, output: Any) -> None:
        streams[index + 1] = first_tensor(output).flatten(0, 1).clone()

    def adds(_module: nn.Module, _args: Any, output: Any) -> None:
        assert addition is not None
        attn_out[index] = first_tensor(output).reshape(-1, first_tensor(output).shape[-1]) * addition.scale

    def projects(_module: nn.Module, args: tuple[Any, ...]) -> None:
        assert heads is not None
        z[index] = args[0].reshape(-1, heads.query, heads.d_value).clone()

    handles: list[Any] = [
        whole.register_forward_pre_hook(enters, with_kwargs=True),
        whole.register_forward_hook(leaves),
    ]
    if addition is not None:
        handles.append(model.get_submodule(addition.module).register_forward_hook(adds))
    if layer.z is not None:
        handles.append(model.get_submodule(layer.z).register_forward_pre_hook(projects))
    return handles
