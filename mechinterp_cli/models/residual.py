"""What each module adds to the residual stream, decided by arithmetic on one recorded layer."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from mechinterp_cli.models.record import LayerRecord, ModuleRecord

RELATIVE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Addition:
    """A module whose output, times `scale`, is added to the residual stream."""

    module: str
    scale: float


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes of a softmax attention layer."""

    query: int
    key_value: int
    d_head: int
    d_value: int

    def shared_by(self, head: int) -> int:
        """The key/value head that a query head shares with others, or has to itself."""
        return head // (self.query // self.key_value)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two recorded tensors are equal but for rounding."""
    if a is None or b is None or a.shape != b.shape:
        return False
    return bool(((a - b).abs() <= RELATIVE_TOLERANCE * (a.abs() + b.abs()) + 1e-7 * b.abs().max()).all())


def adds_up(layer: LayerRecord, parts: Iterable[tuple[Tensor, float]]) -> bool:
    """Whether pre + Σ scale · part = post, each element to a few roundings of its terms."""
    total, size = layer.pre.double(), layer.pre.abs().double() + layer.post.abs().double()
    for part, scale in parts:
        total = total + scale * part.double()
        size = size + abs(scale) * part.abs().double()
    error = (total - layer.post.double()).abs()
    return bool((error <= RELATIVE_TOLERANCE * size + 1e-9 * size.max()).all())


def attention_records(layer: LayerRecord) -> set[str]:
    """Modules whose output comes from attention alone: its own, and those fed by nothing but them."""
    if layer.attention is None:
        return set()
    related = {m.name for m in layer.modules if (m.name + ".").startswith(layer.attention + ".")}
    related |= {m.name for m in layer.modules if layer.attention.startswith(m.name + ".")}
    for module in layer.modules:
        outputs = [m.output for m in layer.modules if m.name in related and m.order < module.order]
        if module.name not in related and any(same(module.input, out) for out in outputs):
            related.add(module.name)
    return related


def find_additions(layer: LayerRecord, missing: dict[str, str]) -> tuple[Addition | None, Addition | None]:
    """The modules whose outputs are `attn_out` and `mlp_out`, outermost where several give the same."""
    related = attention_records(layer)
    candidates = sorted((m for m in layer.single_calls() if m.output is not None), key=_outermost)
    attention = _distinct(m for m in candidates if m.name in related)
    others = _distinct(m for m in candidates if m.name not in related)
    fit = _fit(layer, attention, others)
    if fit is None:
        reason = "resid_pre + attn_out + mlp_out = resid_post does not hold in this layer"
        missing.update(attn_out=reason, mlp_out=reason)
        return None, None
    if fit[0] is None:
        missing["attn_out"] = "this layer has no attention block of its own"
    if fit[1] is None:
        missing["mlp_out"] = "this layer has no MLP block of its own"
    return fit


def _outermost(module: ModuleRecord) -> tuple[int, int]:
    return module.name.count("."), module.order


def _distinct(modules: Iterable[ModuleRecord]) -> list[ModuleRecord]:
    """The first of each group of modules with equal outputs."""
    kept: list[ModuleRecord] = []
    for module in modules:
        if not any(same(module.output, other.output) for other in kept):
            kept.append(module)
    return kept


def _fit(
    layer: LayerRecord, attention: list[ModuleRecord], others: list[ModuleRecord]
) -> tuple[Addition | None, Addition | None] | None:
    """Two modules (or one) that add up to the layer, unscaled if possible, else with two constants."""
    for a, m in product(attention, others):
        if adds_up(layer, [(_out(a), 1.0), (_out(m), 1.0)]):
            return Addition(a.name, 1.0), Addition(m.name, 1.0)
    for a in attention:
        if adds_up(layer, [(_out(a), 1.0)]):
            return Addition(a.name, 1.0), None
    if not attention or layer.attention is None:
        return None
    for a, m in product(attention, others):
        scales = _scales(layer, [_out(a), _out(m)])
        if min(map(abs, scales)) > 1e-4 and adds_up(layer, zip([_out(a), _out(m)], scales, strict=True)):
            return Addition(a.name, scales[0]), Addition(m.name, scales[1])
    for m in others:
        if adds_up(layer, [(_out(m), 1.0)]):
            return None, Addition(m.name, 1.0)
    return None


def _out(module: ModuleRecord) -> Tensor:
    assert module.output is not None
    return module.output


def _scales(layer: LayerRecord, parts: list[Tensor]) -> list[float]:
    """Least-squares constants c with pre + Σ c · part = post."""
    design = torch.stack([part.flatten() for part in parts], dim=1).double()
    target = (layer.post.double() - layer.pre.double()).flatten()[:, None]
    exact = torch.linalg.lstsq(design, target).solution.flatten()
    return [float(f"{c:.6g}") for c in exact.tolist()]  # the constant of the config, without float32 noise


def find_mid(layer: LayerRecord, attn_out: Addition | None, missing: dict[str, str]) -> str | None:
    """The first module that reads resid_pre + attn_out; editing its input in place edits the stream."""
    if attn_out is None:
        missing["resid_mid"] = missing.get("attn_out", "this layer has no attention block of its own")
        return None
    part = next(m for m in layer.modules if m.name == attn_out.module)
    mid = layer.pre + attn_out.scale * _out(part)
    reader = next((m for m in layer.single_calls() if m.order > part.order and same(m.input, mid)), None)
    first = None if reader is None else _first_started(layer, reader)
    if first is None:
        missing["resid_mid"] = "attention and MLP read the same stream (parallel block), or nothing reads between them"
    return first


def _first_started(layer: LayerRecord, reader: ModuleRecord) -> str:
    """The outermost module with the same input: it is called first."""
    same_input = [m for m in layer.single_calls() if same(m.input, reader.input)]
    return min(same_input, key=_outermost).name


def find_down(layer: LayerRecord, mlp_out: Addition | None, missing: dict[str, str]) -> tuple[str | None, int]:
    """The MLP's down projection and its number of neurons."""
    if mlp_out is None:
        missing["neuron"] = missing.get("mlp_out", "this layer has no MLP block of its own")
        return None, 0
    block = next(m for m in layer.modules if m.name == mlp_out.module)
    related = attention_records(layer)
    for module in reversed(layer.single_calls()):
        linear = module.is_linear and module.output is not None and module.name not in related
        if linear and (same(module.output, block.output) or same(module.output, block.input)):
            assert module.input is not None
            return module.name, module.input.shape[-1]
    missing["neuron"] = "the MLP has no single down projection (mixture of experts); use mlp_out"
    return None, 0


def find_heads(
    layer: LayerRecord, config: Any, missing: dict[str, str], *, mixed: bool = False
) -> tuple[str | None, Heads | None]:
    """Head counts, and where z is read: at the interface (None), or at the output projection's input.

    Where other layers go through the interface (`mixed`), one that does not is another kind of layer, such as
    linear attention, and the config's number of heads is not its own.
    """
    if layer.interface is not None and layer.interface_calls == 1:
        call = layer.interface
        if not layer.known_softmax:
            reason = "this layer's attention does more than scaling, soft-cap, sinks and mask"
            missing.update(scores=reason, pattern=reason)
        return None, Heads(call.q.shape[1], call.k.shape[1], call.q.shape[-1], call.v.shape[-1])
    reason = "this layer's attention does not go through transformers' attention interface"
    if layer.interface_calls > 1:
        reason = "this layer calls the attention interface more than once"
    missing.update(dict.fromkeys(("q", "k", "v", "scores", "pattern"), reason))
    if mixed:
        missing["z"] = f"{reason}: it is another kind of layer"
        return None, None
    projection = _output_projection(layer, int(getattr(config, "num_attention_heads", 0) or 0))
    if projection is None or projection.input is None:
        missing["z"] = reason
        return None, None
    heads = int(config.num_attention_heads)
    size = projection.input.shape[-1] // heads
    return projection.name, Heads(heads, heads, size, size)


def _output_projection(layer: LayerRecord, heads: int) -> ModuleRecord | None:
    """The last linear map inside an attention module that makes its output, with whole heads as input."""
    if layer.attention is None or heads == 0 or layer.interface_calls:
        return None
    inside = [m for m in layer.single_calls() if m.name.startswith(layer.attention + ".") and m.is_linear]
    ends = [m for m in inside if m.output is not None and m.input is not None]
    last = ends[-1] if ends else None
    return last if last is not None and last.input is not None and last.input.shape[-1] % heads == 0 else None
