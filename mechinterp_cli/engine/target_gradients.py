"""The gradient of a metric with respect to the residual stream that each single target of a circuit reads.

One backward pass gives the gradients at q, k, v and `mlp_out`. Each head's is then taken back, by itself, through the
layer's own way from the stream to q, k or v, norms included: what the stream's other readers make of it is left out.
Where the MLP's norm is the only reader of its stream, the gradient at that reader is the MLP's own already.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp_cli.engine.circuit_graph import ATTENTION_TARGETS, Graph, Target, is_parallel
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import Context, Differentiable, Pass, graph
from mechinterp_cli.engine.sliced_linear import SlicedLinear
from mechinterp_cli.engine.softmax_fix import widened
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import LayerCall

GroupKind = Literal["attention", "mlp", "logits"]


@dataclass(frozen=True)
class Group:
    """Neighbouring targets that read the same stream: those of a layer's attention, an MLP, or the logits.

    Args:
        kind: Which of these.
        layer: The layer; the number of layers for `logits`.
        first: Index of the first target.
        size: How many targets.
        reads: How many sources each reads.
    """

    kind: GroupKind
    layer: int
    first: int
    size: int
    reads: int


def groups_of(circuit: Graph) -> list[Group]:
    """The groups of a graph's targets, in order."""
    found, first = [], 0
    for (kind, layer), same in groupby(circuit.targets, lambda target: (_kind(target), target.layer)):
        size = len(list(same))
        found.append(Group(kind, layer, first, size, circuit.reads[first]))
        first += size
    return found


def _kind(target: Target) -> GroupKind:
    return target.kind if target.kind == "mlp" or target.kind == "logits" else "attention"


def target_gradients(
    wiring: Wiring,
    prompts: Pass,
    metric: Differentiable,
    *,
    above: int = 0,
    rules: Context = nullcontext,
    checkpointing: bool = False,
) -> Iterator[tuple[Group, Float[Tensor, "n targets positions d_model"]]]:
    """∂M/∂(the stream that a target reads) for all targets that read a source, from the last to the first.

    Args:
        wiring: Of the model.
        prompts: What is run.
        metric: M, of which each prompt has its own.
        above: Index of the source.
        rules: What holds during the pass, such as an activation put in place of another.
        checkpointing: Keep nothing inside layers, and compute them again in the backward pass.

    Yields:
        Targets that read one stream, and their gradients; float32 at least.

    Raises:
        UserError: Nothing can be differentiated at a target.
    """
    groups = [group for group in groups_of(wiring.graph) if group.reads > above]
    sites = _sites(wiring.anatomy, groups)
    kept: dict[Site, Tensor] = {}
    readers: dict[int, Tensor] = {}

    def use(site: Site, _metric: int, activation: Tensor, gradient: Tensor) -> None:
        kept[site] = activation if site.kind == "resid_pre" else gradient

    sequential = [g.layer for g in groups if g.kind == "mlp" and not is_parallel(wiring.anatomy.layers[g.layer])]
    with graph(
        wiring.model,
        wiring.anatomy,
        prompts,
        metric,
        sites,
        rules=rules,
        inside=partial(_mlp_readers, wiring, sequential, readers),
        checkpointing=checkpointing,
    ) as found:
        found.backward(0, use, last=True)
    yield from _Paths(wiring, wiring.calls(prompts.tokens), kept, readers).walk(groups)


def _sites(anatomy: Anatomy, groups: Sequence[Group]) -> set[Site]:
    """Where gradients or streams are wanted."""
    sites: set[Site] = set()
    with_attention = {group.layer for group in groups if group.kind == "attention"}
    for group in groups:
        if group.kind == "attention":
            sites |= {Site(kind, group.layer) for kind in ("resid_pre", *ATTENTION_TARGETS)}
        elif group.kind == "logits":
            sites.add(Site("resid_post", group.layer - 1))
        elif is_parallel(anatomy.layers[group.layer]):
            sites |= {Site(kind, group.layer) for kind in ("resid_pre", "mlp_out")}
        elif group.layer not in with_attention:
            sites.add(Site("resid_mid", group.layer))  # nothing below asks for a gradient, so the graph begins here
    return sites


@contextmanager
def _mlp_readers(wiring: Wiring, layers: Sequence[int], gradients: dict[int, Tensor]) -> Iterator[None]:
    """Let the MLPs of sequential blocks read copies of their stream, whose gradients are noted."""

    def copy(index: int, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        stream = args[0].clone()
        if stream.requires_grad:
            stream.register_hook(partial(gradients.__setitem__, index))
        return (stream, *args[1:])

    handles = []
    for index in layers:
        mid = wiring.anatomy.layers[index].mid
        assert mid is not None
        handles.append(wiring.model.get_submodule(mid).register_forward_pre_hook(partial(copy, index)))
    with hooked(handles):
        yield


@dataclass(frozen=True, eq=False)
class _Paths:
    """The ways back from what targets give to the streams that they read.

    `kept` holds streams at `resid_pre` and gradients elsewhere; both are let go of when they have been used.
    """

    wiring: Wiring
    calls: Sequence[LayerCall]
    kept: dict[Site, Tensor]
    readers: dict[int, Tensor]

    @torch.enable_grad()
    def walk(self, groups: Sequence[Group]) -> Iterator[tuple[Group, Tensor]]:
        """The gradients of each group of targets, from the last."""
        for group in reversed(groups):
            if group.kind == "logits":
                found = self.kept.pop(Site("resid_post", group.layer - 1))[None]
            elif group.kind == "attention":
                found = self._attention(group)
            else:
                found = self._mlp(group.layer)[None]
            yield group, widened(found.detach()).transpose(0, 1)

    def _mlp(self, layer: int) -> Tensor:
        if layer in self.readers:
            gradient = self.readers.pop(layer)
            return gradient.reshape(self.calls[layer].hidden.shape)
        stream = self.kept[Site("resid_pre", layer)].detach().requires_grad_()
        output = self.wiring.mlp_output(layer, self.calls[layer], stream)
        return torch.autograd.grad(output, stream, self.kept.pop(Site("mlp_out", layer)))[0]

    def _attention(self, group: Group) -> Tensor:
        """[targets, n, positions, d_model]."""
        layer = group.layer
        stream = self.kept.pop(Site("resid_pre", layer)).detach().requires_grad_()
        with SlicedLinear():
            given = self.wiring.attention_inputs(layer, self.calls[layer], stream)
        found = stream.new_zeros(group.size, *stream.shape)
        target = iter(found)
        for kind in ATTENTION_TARGETS:
            gradient = self.kept.pop(Site(kind, layer))
            for head in range(gradient.shape[2]):
                own, back = given[kind][:, :, head], gradient[:, :, head]
                row = next(target)
                if own.requires_grad:
                    row.copy_(torch.autograd.grad(own, stream, back, retain_graph=True)[0])
        return found.detach()
