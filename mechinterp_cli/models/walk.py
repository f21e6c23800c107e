"""Walking a decoder layer by layer with the model's own code before, between and after the layers."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

MISSING = object()


def first_tensor(output: Any) -> Tensor:
    """The hidden state in a module's output: the tensor itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def with_tensor(output: Any, hidden: Tensor) -> Any:
    """A module's output with another hidden state in it."""
    return hidden if isinstance(output, Tensor) else type(output)((hidden, *output[1:]))


def map_tensors(value: Any, change: Callable[[Tensor, str], Any], path: str = "") -> Any:
    """`value` with every tensor in its tuples, lists and mappings replaced by `change(tensor, path)`."""
    if isinstance(value, Tensor):
        return change(value, path)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change, f"{path}.{i}") for i, item in enumerate(value))
    if type(value) is dict:
        return {key: map_tensors(item, change, f"{path}.{key}") for key, item in value.items()}
    return value


@dataclass(frozen=True)
class LayerCall:
    """What the model hands to one decoder layer, the hidden state apart."""

    hidden: Tensor
    slot: int | str
    """Where the hidden state stands among the arguments: an index or a keyword."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "LayerCall":
        """Read a call off its arguments; the hidden state is the first tensor or `hidden_states`."""
        slot: int | str = "hidden_states" if "hidden_states" in kwargs else 0
        return cls(kwargs[slot] if isinstance(slot, str) else args[slot], slot, args, dict(kwargs))

    def with_hidden(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of the same call on another hidden state."""
        if isinstance(self.slot, str):
            return self.args, {**self.kwargs, self.slot: hidden}
        return (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]), dict(self.kwargs)

    def change(self, change: Callable[[Tensor, str], Any]) -> "LayerCall":
        """The same call with every tensor but the hidden state changed."""
        args = tuple(a if i == self.slot else map_tensors(a, change, f".{i}") for i, a in enumerate(self.args))
        kwargs = {k: a if k == self.slot else map_tensors(a, change, f".{k}") for k, a in self.kwargs.items()}
        return LayerCall(self.hidden, self.slot, args, kwargs)


@contextmanager
def stubs(layers: list[nn.Module], replacement: Callable[[int, LayerCall], Any]) -> Iterator[None]:
    """Replace every layer's forward; what stood in the instance (accelerate's hooks) is put back."""
    kept = [layer.__dict__.get("forward", MISSING) for layer in layers]

    def stub(index: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: replacement(index, LayerCall.of(args, kwargs))

    try:
        for index, layer in enumerate(layers):
            layer.__dict__["forward"] = stub(index)
        yield
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            layer.__dict__.pop("forward", None)
            if forward is not MISSING:
                layer.__dict__["forward"] = forward


def accepts(model: nn.Module, keyword: str) -> bool:
    """Whether the model's forward names this keyword."""
    return keyword in inspect.signature(type(model).forward).parameters


def passes_on(model: nn.Module, keyword: str) -> bool:
    """Whether the model's forward names this keyword or takes any and hands them on."""
    parameters = inspect.signature(type(model).forward).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def forward(model: nn.Module, tokens: Tensor, *, last_only: bool = False) -> Tensor:
    """Native logits [batch, positions, vocab] (one position if `last_only` and the model can).

    No attention mask and no position ids are given: prompts are never padded.
    """
    keywords: dict[str, Any] = {"use_cache": False} if passes_on(model, "use_cache") else {}
    if last_only and accepts(model, "logits_to_keep"):
        keywords["logits_to_keep"] = 1
    logits: Tensor = model(input_ids=tokens, **keywords).logits
    return logits[:, -1:] if last_only else logits


class Walker:
    """The model's own code around its decoder layers.

    Args:
        model: The model, in evaluation mode.
        layers: Its decoder layers in order.
        tuple_sizes: For each layer the length of the tuple that it returns, 0 for a bare tensor.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module], tuple_sizes: tuple[int, ...]) -> None:
        self.model = model
        self.layers = layers
        self.tuple_sizes = tuple_sizes

    def _shape(self, index: int, hidden: Tensor) -> Any:
        size = self.tuple_sizes[index]
        return hidden if size == 0 else (hidden, *(None,) * (size - 1))

    def calls(self, tokens: Tensor) -> list[LayerCall]:
        """What enters layer 0 and what the model hands to every layer; no layer is computed."""
        seen: dict[int, LayerCall] = {}

        def record(index: int, call: LayerCall) -> Any:
            seen[index] = call
            return self._shape(index, call.hidden)

        with stubs(self.layers, record), torch.no_grad():
            forward(self.model, tokens, last_only=True)
        return [seen[i] for i in range(len(self.layers))]

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab] of final hidden states [n, d_model]: the model's norm, head, caps and scales."""
        last = len(self.layers) - 1
        state = hidden[:, None]

        def replace(index: int, call: LayerCall) -> Any:
            return self._shape(index, state if index == last else call.hidden)

        tokens = torch.zeros(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
        with stubs(self.layers, replace), torch.no_grad():
            return forward(self.model, tokens)[:, -1]

    def run(self, index: int, call: LayerCall, hidden: Tensor) -> Tensor:
        """One decoder layer on a hidden state, with the arguments of `call`."""
        args, kwargs = call.with_hidden(hidden)
        return first_tensor(self.layers[index](*args, **kwargs))
