"""One recorded forward pass: which modules ran, in which order, and what went in and came out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.interface import AttentionCall, SoftmaxRule, intercepted, masked_scores, softmax, weigh
from mechinterp_cli.models.walk import LayerCall, first_tensor, forward, with_tensor

KNOWN_SOFTMAX_TOLERANCE = 1e-5
CAUSAL_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ModuleRecord:
    """One call of one module inside a layer."""

    name: str
    """Qualified name."""
    order: int
    input: Tensor | None
    """Its first tensor argument, flattened to [tokens, features]."""
    output: Tensor | None
    """Its (first) output, flattened to [tokens, d_model]; None if it is not of the stream's size."""
    is_linear: bool


@dataclass
class LayerRecord:
    """One decoder layer during the recorded pass; tensors are [tokens, d_model], float32."""

    index: int
    name: str
    pre: Tensor
    post: Tensor
    tuple_size: int
    modules: list[ModuleRecord] = field(default_factory=list)
    interface: AttentionCall | None = None
    interface_name: str | None = None
    interface_z: Tensor | None = None
    interface_calls: int = 0
    known_softmax: bool = False

    @property
    def attention(self) -> str | None:
        """The attention module: the one that called the interface, or the first that is named so."""
        if self.interface_name is not None:
            return self.interface_name
        named = [m.name for m in self.modules if "attn" in m.name[len(self.name) :].lower()]
        named += [m.name for m in self.modules if "attention" in m.name[len(self.name) :].lower()]
        return min(named, key=lambda name: (name.count("."), len(name)), default=None)

    def single_calls(self) -> list[ModuleRecord]:
        """Modules that ran exactly once, in the order in which they ended."""
        names = [m.name for m in self.modules]
        return [m for m in self.modules if names.count(m.name) == 1]


@dataclass(frozen=True)
class Recording:
    """A recorded pass of a model."""

    layers: tuple[LayerRecord, ...]
    logits: Tensor
    causal: bool
    embeds_alone: bool


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happened."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def find_layers(model: nn.Module, tokens: Tensor, override: str | None) -> tuple[list[str], bool]:
    """Qualified names of the decoder layers, and whether each one's output is the next one's input.

    Among all lists of modules whose members ran once each, in order, on hidden states of one shape, it is the one
    with most parameters whose output reaches the logits (a patcher of bytes, say, only decides where patches end);
    of equals the later one.

    Raises:
        UserError: No list of modules behaves like a stack of layers.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if override is not None:
        if override not in lists:
            raise UserError(
                f"model.anatomy.layers: {override!r} is not a list of modules of this model",
                f"Lists it has: {', '.join(lists) or 'none'}.",
            )
        lists = {override: lists[override]}
    calls: dict[str, list[tuple[int, LayerCall, Any]]] = {}
    handles = []
    for name, module_list in lists.items():
        for index, child in enumerate(module_list):

            def hook(_m: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name, index: int = index) -> None:
                calls.setdefault(name, []).append((index, LayerCall.of(args, kwargs), out))

            handles.append(child.register_forward_hook(hook, with_kwargs=True))
    with hooked(handles):
        logits = forward(model, tokens)
    stacks = {name: seen for name, seen in calls.items() if _is_stack(seen, tokens)}
    if not stacks:
        raise UserError(
            "no stack of decoder layers was found in this model",
            "Name the list of layers in the config: model.anatomy.layers.",
        )
    ranked = sorted(reversed(stacks), key=lambda name: -sum(p.numel() for p in lists[name].parameters()))
    alone = len(ranked) == 1
    best = next((n for n in ranked if alone or _reaches_logits(model, lists[n][-1], tokens, logits)), ranked[0])
    seen = stacks[best]
    outputs = [first_tensor(out) for _, _, out in seen]
    chained = all(torch.equal(a, b[1].hidden) for a, b in zip(outputs, seen[1:], strict=False))
    return [f"{best}.{index}" for index, _, _ in seen], chained


def _reaches_logits(model: nn.Module, layer: nn.Module, tokens: Tensor, logits: Tensor) -> bool:
    """Whether other numbers from this layer give other logits."""

    def blank(_module: nn.Module, _args: Any, output: Any) -> Any:
        return with_tensor(output, torch.zeros_like(first_tensor(output)))

    with hooked([layer.register_forward_hook(blank)]):
        return not torch.equal(forward(model, tokens), logits)


def _is_stack(seen: list[tuple[int, LayerCall, Any]], tokens: Tensor) -> bool:
    """Whether these calls are one pass in order over layers that map hidden states to hidden states."""
    if [index for index, _, _ in seen] != list(range(len(seen))):
        return False
    for _, call, out in seen:
        hidden = call.hidden
        if not isinstance(hidden, Tensor) or hidden.shape[:2] != tokens.shape or hidden.ndim != 3:
            return False
        output = out if isinstance(out, Tensor) else out[0] if isinstance(out, (tuple, list)) and out else None
        if not isinstance(output, Tensor) or output.shape != hidden.shape:
            return False
    return True


def record(model: nn.Module, names: list[str], tokens: Tensor) -> Recording:
    """Run the model once on `tokens` with every module of every layer watched."""
    layers: dict[int, LayerRecord] = {}
    with ExitStack() as stack:
        for index, name in enumerate(names):
            stack.enter_context(hooked(_watch(model, index, name, layers)))
        stack.enter_context(intercepted(model, _interface_recorder(model, names, layers)))
        logits = forward(model, tokens)
    return Recording(
        layers=tuple(layers[i] for i in range(len(names))),
        logits=logits,
        causal=is_causal(model, tokens, logits),
        embeds_alone=is_embedded_alone(model, names[0], tokens, layers[0].pre),
    )


def is_embedded_alone(model: nn.Module, first: str, tokens: Tensor, entering: Tensor) -> bool:
    """Whether changing one token leaves what enters the layer `first` bit-identical at all other positions."""
    middle = tokens.shape[1] // 2
    seen: list[Tensor] = []

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append(_flat(LayerCall.of(args, kwargs).hidden))

    with hooked([model.get_submodule(first).register_forward_pre_hook(note, with_kwargs=True)]):
        forward(model, _with_other_token(tokens, middle))
    others = torch.arange(tokens.numel()) % tokens.shape[1] != middle
    return torch.equal(seen[0][others], entering[others])


def _with_other_token(tokens: Tensor, position: int) -> Tensor:
    changed = tokens.clone()
    changed[:, position] = torch.where(tokens[:, position] == tokens[:, 0], tokens[:, 1], tokens[:, 0])
    return changed


def is_causal(model: nn.Module, tokens: Tensor, logits: Tensor) -> bool:
    """Whether changing the last token leaves all earlier logits as they were."""
    changed = _with_other_token(tokens, -1)
    difference = (forward(model, changed)[:, :-1] - logits[:, :-1]).abs().max()
    return bool(difference <= CAUSAL_TOLERANCE * logits.abs().max())


def _watch(model: nn.Module, index: int, name: str, layers: dict[int, LayerRecord]) -> list[Any]:
    """Hooks on one layer and on everything inside it."""
    layer = model.get_submodule(name)
    order = iter(range(1_000_000))
    running = False  # a module that layers share (an activation) is called in the others too

    def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal running
        running = True
        hidden = _flat(LayerCall.of(args, kwargs).hidden)
        layers[index] = LayerRecord(index, name, hidden, hidden, 0)

    def end(_module: nn.Module, _args: Any, output: Any) -> None:
        nonlocal running
        running = False
        layers[index].post = _flat(first_tensor(output))
        layers[index].tuple_size = 0 if isinstance(output, Tensor) else len(output)

    def inner(module: nn.Module, args: Any, kwargs: Any, output: Any, inner_name: str) -> None:
        if not running:
            return
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
        out = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) and output else None
        size = layers[index].pre.numel()
        fits = isinstance(out, Tensor) and out.numel() == size and out.shape[-1] == layers[index].pre.shape[-1]
        stream_like = _flat(out) if isinstance(out, Tensor) and fits else None
        weight = getattr(module, "weight", None)
        is_linear = isinstance(weight, Tensor) and weight.ndim == 2
        source = _flat(tensors[0]) if tensors and tensors[0].ndim >= 2 else None
        layers[index].modules.append(ModuleRecord(inner_name, next(order), source, stream_like, is_linear))

    handles: list[Any] = [
        layer.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
        layer.register_forward_hook(end),
    ]
    for inner_name, module in layer.named_modules():
        if inner_name:

            def hook(m: nn.Module, a: Any, k: Any, o: Any, inner_name: str = f"{name}.{inner_name}") -> None:
                inner(m, a, k, o, inner_name)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    return handles


def _flat(x: Tensor) -> Tensor:
    """[…, features] as a float32 copy [tokens, features] that later in-place changes do not reach."""
    return x.detach().reshape(-1, x.shape[-1]).float().cpu().clone()


def _interface_recorder(model: nn.Module, names: list[str], layers: dict[int, LayerRecord]) -> Any:
    """A handler that notes each layer's attention call and whether the known rule explains it."""
    module_names = {id(module): name for name, module in model.named_modules()}

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        z, weights = call.native(call.q, call.k, call.v, call.mask)
        name = module_names[id(call.module)]
        index = next((i for i, layer in enumerate(names) if name.startswith(f"{layer}.")), None)
        if index is not None and index in layers:
            layer = layers[index]
            layer.interface, layer.interface_name, layer.interface_z = call, name, z
            layer.interface_calls += 1
            layer.known_softmax = explains(call, z)
        return z, weights

    return handler


def explains(call: AttentionCall, z: Tensor) -> bool:
    """Whether scaling, soft-cap, sinks and mask reproduce the model's own attention output."""
    rule = SoftmaxRule.of(call)
    if call.q.ndim != 4 or call.q.shape[1] % call.k.shape[1]:
        return False
    scores = masked_scores(rule, call.q, call.k, call.mask)
    own = weigh(softmax(rule, scores), call.v)
    if own.shape != z.shape:
        return False
    return bool((own - z).abs().max() <= KNOWN_SOFTMAX_TOLERANCE * z.abs().max().clamp(min=1e-6) * 10)
