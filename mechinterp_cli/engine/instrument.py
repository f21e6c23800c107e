"""Reading and editing every kind of site while the model's own code runs.

A *visitor* is asked at each site of the wanted kinds: it gets the activation as [batch, positions,
*features] (heads × d_head, or heads × keys) and returns what stands there from then on. Streams are read,
trials edited, and plain hooks run through this one door.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.models.anatomy import Anatomy, LayerAnatomy
from mechinterp_cli.models.interface import (
    AttentionCall,
    SoftmaxRule,
    intercepted,
    masked_scores,
    softmax,
    weigh,
)
from mechinterp_cli.models.kinds import INTERFACE_KINDS
from mechinterp_cli.models.walk import LayerCall, first_tensor, with_tensor

Visitor = Callable[[Site, Tensor], Tensor | None]
"""Gets a site and its activation; returns the new activation, or None to leave it."""

Wanted = Mapping[int, frozenset[str]]
"""Layer to the kinds of site that are visited there."""


@contextmanager
def visiting(
    model: nn.Module, anatomy: Anatomy, wanted: Wanted, visit: Visitor, *, layer_ends: bool = True
) -> Iterator[None]:
    """Call `visit` at every wanted site of every forward pass inside.

    Args:
        model: The model.
        anatomy: Its anatomy.
        wanted: Which sites.
        visit: The visitor.
        layer_ends: Whether `embed`, `resid_pre` and `resid_post` are visited too; executors that hold the
            hidden state between layers themselves edit it there.
    """
    with ExitStack() as stack:
        for index, kinds in wanted.items():
            stack.enter_context(module_hooks(model, anatomy.layers[index], kinds, visit, layer_ends=layer_ends))
        inside = {i: kinds & {"z", *INTERFACE_KINDS} for i, kinds in wanted.items()}
        by_interface = {i: kinds for i, kinds in inside.items() if kinds and anatomy.layers[i].by_interface}
        if by_interface:
            stack.enter_context(intercepted(model, interface_handler(model, anatomy, by_interface, visit)))
        yield


@contextmanager
def module_hooks(
    model: nn.Module, layer: LayerAnatomy, kinds: frozenset[str], visit: Visitor, *, layer_ends: bool
) -> Iterator[None]:
    """Hooks for the sites of one layer that lie on module boundaries; removed at the end."""
    handles: list[Any] = []
    try:
        handles.extend(_register(model, layer, kinds, visit, layer_ends))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(
    model: nn.Module, layer: LayerAnatomy, kinds: frozenset[str], visit: Visitor, layer_ends: bool
) -> Iterator[Any]:
    module = model.get_submodule
    whole = module(layer.module)
    shape = _Shape()
    yield whole.register_forward_pre_hook(shape.note, with_kwargs=True)
    if layer_ends and kinds & {"embed", "resid_pre"}:
        yield whole.register_forward_pre_hook(_before(layer.index, kinds, visit), with_kwargs=True)
    if layer_ends and "resid_post" in kinds:
        yield whole.register_forward_hook(_output(Site("resid_post", layer.index), visit, 1.0, shape))
    for kind, addition in (("attn_out", layer.attn_out), ("mlp_out", layer.mlp_out)):
        if kind in kinds and addition:
            hook = _output(Site(kind, layer.index), visit, addition.scale, shape)
            yield module(addition.module).register_forward_hook(hook)
    if "resid_mid" in kinds and layer.mid:
        yield module(layer.mid).register_forward_pre_hook(_in_place(Site("resid_mid", layer.index), visit, shape))
    if "neuron" in kinds and layer.down:
        yield module(layer.down).register_forward_pre_hook(_input(Site("neuron", layer.index), visit, shape))
    if "z" in kinds and layer.z and layer.heads:
        hook = _input(Site("z", layer.index), visit, shape, layer.heads.query)
        yield module(layer.z).register_forward_pre_hook(hook)


class _Shape:
    """Batch and positions of the hidden state that the layer was called on.

    Some modules inside a layer get [batch × positions, features]; this is what brings them back.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = ()

    def note(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook of the layer."""
        self.shape = tuple(LayerCall.of(args, kwargs).hidden.shape[:2])

    def batched(self, x: Tensor) -> Tensor:
        """[batch, positions, features]."""
        return x.reshape(*self.shape, x.shape[-1])


def _before(index: int, kinds: frozenset[str], visit: Visitor) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = LayerCall.of(args, kwargs)
        hidden = call.hidden
        for kind in ("embed", "resid_pre"):
            if kind in kinds:
                new = visit(Site(kind, index), hidden)
                hidden = hidden if new is None else new
        return call.with_hidden(hidden)

    return hook


def _output(site: Site, visit: Visitor, scale: float, shape: _Shape) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = first_tensor(output)
        seen = shape.batched(hidden)
        new = visit(site, seen if scale == 1.0 else seen * scale)
        if new is None:
            return None
        return with_tensor(output, (new if scale == 1.0 else new / scale).reshape(hidden.shape))

    return hook


def _input(site: Site, visit: Visitor, shape: _Shape, heads: int = 0) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        x = shape.batched(args[0])
        new = visit(site, torch.unflatten(x, -1, (heads, -1)) if heads else x)
        return None if new is None else (new.reshape(args[0].shape), *args[1:])

    return hook


def _in_place(site: Site, visit: Visitor, shape: _Shape) -> Callable[..., Any]:
    """The residual branch keeps the tensor that the module reads, so the tensor itself is changed."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        new = visit(site, shape.batched(args[0]))
        if new is not None:
            args[0].copy_(new.reshape(args[0].shape))

    return hook


def layer_of(model: nn.Module, anatomy: Anatomy) -> dict[int, int]:
    """Module id to layer index, for every module inside a decoder layer."""
    return {
        id(module): layer.index for layer in anatomy.layers for module in model.get_submodule(layer.module).modules()
    }


def interface_handler(
    model: nn.Module, anatomy: Anatomy, wanted: Wanted, visit: Visitor
) -> Callable[[AttentionCall], tuple[Tensor, Tensor | None]]:
    """A handler that visits q, k, v, scores, pattern and z of ordinary (not packed) attention calls."""
    index_of = layer_of(model, anatomy)

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer = index_of.get(id(call.module), -1)
        kinds = wanted.get(layer, frozenset())
        q, k, v = (
            visit_heads(visit, Site(kind, layer), x) if kind in kinds else x
            for kind, x in (("q", call.q), ("k", call.k), ("v", call.v))
        )
        if kinds & {"scores", "pattern"}:
            z, weights = visit_softmax(call, q, k, v, call.mask, kinds, layer, visit), None
        else:
            z, weights = call.native(q, k, v, call.mask)
        new = visit(Site("z", layer), z) if "z" in kinds else None
        return (z if new is None else new), weights

    return handler


def visit_heads(visit: Visitor, site: Site, x: Tensor) -> Tensor:
    """Visit q, k or v, [batch, heads, positions, d_head], as [batch, positions, heads, d_head]."""
    new = visit(site, x.transpose(1, 2))
    return x if new is None else new.transpose(1, 2)


def visit_softmax(
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kinds: frozenset[str],
    layer: int,
    visit: Visitor,
) -> Tensor:
    """Attention with scores and pattern in the open: z [batch, positions, heads, d_value]."""
    rule = SoftmaxRule.of(call)
    scores = masked_scores(rule, q, k, mask)
    if "scores" in kinds:
        scores = visit_heads(visit, Site("scores", layer), scores)
    pattern = softmax(rule, scores)
    if "pattern" in kinds:
        pattern = visit_heads(visit, Site("pattern", layer), pattern)
    return weigh(pattern, v).contiguous()


class Reader:
    """A visitor that keeps what it sees: the activations of an unedited pass."""

    def __init__(self) -> None:
        self.seen: dict[Site, Tensor] = {}

    def __call__(self, site: Site, activation: Tensor) -> None:
        """Keep a copy, since later code may change the tensor in place."""
        self.seen[site] = activation.detach().clone()


def kinds_by_layer(sites: set[Site]) -> dict[int, frozenset[str]]:
    """Group sites by layer."""
    return {layer: frozenset(s.kind for s in sites if s.layer == layer) for layer in {s.layer for s in sites}}


def read_sites(model: nn.Module, anatomy: Anatomy, sites: set[Site], run: Callable[[], Any]) -> dict[Site, Tensor]:
    """Activations of the wanted sites while `run` runs a forward pass."""
    reader = Reader()
    with torch.no_grad(), visiting(model, anatomy, kinds_by_layer(sites), reader):
        run()
    return reader.seen
