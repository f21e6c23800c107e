"""Attention over packed rows: each group of rows attends to its stream's prefix and to itself.

A group is [parts, prompts, width] rows that start at one position. Keys and values before the start are
the stream's own and are shared by all parts of a prompt: they are attended once per prompt, never copied
per trial. The two parts of the softmax are merged by their log-sum-exp (with a shared maximum), which is
the softmax over the whole.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.models.interface import (
    AttentionCall,
    SoftmaxRule,
    additive,
    masked_scores,
    softmax,
    weigh,
)


@dataclass(frozen=True, eq=False)
class StreamAttention:
    """What a stream's own attention call in a layer was: `k`, `v` [prompts, kv_heads, positions, d] and mask."""

    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class Shared:
    """Which rows of a part stand for its (prompt, position) cells: `row` by cell, the first `cell` by row."""

    row: Tensor
    cell: Tensor


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows `lo` to `hi` of a packed call: parts × (prompt, position) cells from position `start` on.

    Where prompts share rows, the rows are laid out as cells for attention and taken back afterwards.
    """

    lo: int
    hi: int
    parts: int
    start: int
    prompts: Tensor
    width: int
    shared: Shared | None = None

    def cells(self, rows: Float[Tensor, "rows ..."]) -> Float[Tensor, "parts prompts width ..."]:
        """This segment's rows by cell."""
        rows = torch.unflatten(rows[self.lo : self.hi], 0, (self.parts, -1))
        rows = rows if self.shared is None else rows[:, self.shared.row]
        return torch.unflatten(rows, 1, (len(self.prompts), self.width))

    def rows(self, cells: Float[Tensor, "cells ..."]) -> Float[Tensor, "rows ..."]:
        """The rows of all its cells."""
        if self.shared is None:
            return cells
        return torch.unflatten(cells, 0, (self.parts, -1))[:, self.shared.cell].flatten(0, 1)

    def cut(self, x: Float[Tensor, "1 heads rows d"]) -> Float[Tensor, "heads parts prompts width d"]:
        """This segment's rows of a packed q, k or v."""
        return self.cells(x[0].transpose(0, 1)).permute(3, 0, 1, 2, 4)

    def prefix(self, x: Tensor) -> Float[Tensor, "prompts heads start d"]:
        """The stream's keys or values before the segment's first position."""
        return x[self.prompts, :, : self.start]

    def mask(self, stream: StreamAttention, like: Tensor) -> Float[Tensor, "prompts heads width keys"] | None:
        """The stream's additive mask for this segment's queries; None where it is plainly causal."""
        if stream.mask is None:
            return None
        mask = stream.mask[..., self.start :, : self.start + self.width]
        mask = mask if mask.shape[0] == 1 else mask[self.prompts]
        return additive(mask, self.width, self.start + self.width, like)


def merged_attention(
    call: AttentionCall, stream: StreamAttention, segments: list[Segment]
) -> Float[Tensor, "1 rows heads dv"]:
    """Z of every packed row, for layers whose softmax follows the known rule."""
    rule = SoftmaxRule.of(call)
    z = call.q.new_empty(1, call.q.shape[2], call.q.shape[1], call.v.shape[-1])
    for segment in segments:
        z[0, segment.lo : segment.hi] = _merged_segment(rule, call, stream, segment)
    return z


def _merged_segment(
    rule: SoftmaxRule, call: AttentionCall, stream: StreamAttention, segment: Segment
) -> Float[Tensor, "rows heads dv"]:
    kv_heads = call.k.shape[1]
    share = call.q.shape[1] // kv_heads
    # [prompts, kv_heads, parts, share × width, d]: one batch of queries per key/value head and prompt
    q = torch.unflatten(segment.cut(call.q), 0, (kv_heads, share)).permute(3, 0, 2, 1, 4, 5).flatten(3, 4)
    k, v = (segment.cut(x).permute(2, 0, 1, 3, 4) for x in (call.k, call.v))
    mask = segment.mask(stream, call.q)
    own = rule.scores(q, k).float()
    own = own + _mask_part(mask, segment, kv_heads, share, own=True, like=own)
    top = own.amax(-1, keepdim=True)
    before = None
    if segment.start:
        keys = segment.prefix(stream.k)
        before = torch.unflatten(rule.scores(q.flatten(2, 3), keys).float(), 2, (segment.parts, -1))
        if mask is not None:
            before = before + _mask_part(mask, segment, kv_heads, share, own=False, like=before)
        top = torch.maximum(top, before.amax(-1, keepdim=True))
    sinks = _sinks(rule, kv_heads, share, segment.width)
    top = top if sinks is None else torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0.0)
    own = own.sub_(top).exp_()
    total = own.sum(-1, keepdim=True)
    z = own.to(v.dtype) @ v
    if before is not None:
        before = before.sub_(top).exp_()
        total = total + before.sum(-1, keepdim=True)
        values = segment.prefix(stream.v)
        z = z + torch.unflatten(before.to(v.dtype).flatten(2, 3) @ values, 2, (segment.parts, -1))
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    # a row with every key masked has total 0 and z 0
    z = (z / total.clamp(min=torch.finfo(torch.float32).tiny)).to(v.dtype)
    z = torch.unflatten(z, 3, (share, segment.width)).permute(2, 0, 4, 1, 3, 5)
    return segment.rows(z.reshape(-1, kv_heads * share, z.shape[-1]))


def _sinks(rule: SoftmaxRule, kv_heads: int, share: int, width: int) -> Tensor | None:
    """Sink logits as [1, kv_heads, 1, share × width, 1]."""
    if rule.sinks is None:
        return None
    return rule.sinks.float().view(1, kv_heads, 1, share, 1, 1).expand(-1, -1, -1, -1, width, 1).flatten(3, 4)


def _mask_part(mask: Tensor | None, segment: Segment, kv_heads: int, share: int, *, own: bool, like: Tensor) -> Tensor:
    """The mask over the own keys or over the prefix, as [prompts or 1, kv_heads or 1, 1, share × width, keys]."""
    if mask is None:
        mask = additive(None, segment.width, segment.width, like)
        own_or_prefix = mask
    else:
        own_or_prefix = mask[..., segment.start :] if own else mask[..., : segment.start]
    by_head = own_or_prefix.float()
    if by_head.shape[1] == 1:
        by_head = by_head[:, :, None].expand(-1, -1, share, -1, -1)
    else:
        by_head = torch.unflatten(by_head, 1, (kv_heads, share))
    return by_head.flatten(2, 3)[:, :, None]


def whole_keys(call: AttentionCall, stream: StreamAttention, segment: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [parts × prompts, heads, …] and mask of a segment, with the prefix copied to every part."""
    q, k, v = (segment.cut(x).permute(1, 2, 0, 3, 4) for x in (call.q, call.k, call.v))
    if segment.start:
        k = torch.cat([segment.prefix(stream.k).expand(segment.parts, -1, -1, -1, -1), k], dim=3)
        v = torch.cat([segment.prefix(stream.v).expand(segment.parts, -1, -1, -1, -1), v], dim=3)
    mask = segment.mask(stream, call.q)
    if mask is None:
        mask = additive(None, segment.width, segment.start + segment.width, call.q)
    elif mask.shape[0] > 1:
        mask = mask.repeat(segment.parts, 1, 1, 1)
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask


def native_attention(
    call: AttentionCall, stream: StreamAttention, segments: list[Segment]
) -> Float[Tensor, "1 rows heads dv"]:
    """Z of every packed row by the model's own attention function, for layers whose rule is not known."""
    parts = [s.rows(call.native(*whole_keys(call, stream, s))[0].flatten(0, 1)) for s in segments]
    return torch.cat(parts)[None]


class OpenAttention:
    """Attention over packed rows with scores and pattern in the open, so that they can be edited."""

    def __init__(self, call: AttentionCall, stream: StreamAttention, segments: list[Segment]) -> None:
        self.rule = SoftmaxRule.of(call)
        self.segments = segments
        pieces = [whole_keys(call, stream, segment) for segment in segments]
        self.values = [v for _, _, v, _ in pieces]
        self.scores = self._rows([masked_scores(self.rule, q, k, mask) for q, k, _, mask in pieces])

    def _rows(self, pieces: list[Tensor]) -> Float[Tensor, "1 rows heads keys"]:
        rows = (s.rows(p.transpose(1, 2).flatten(0, 1)) for s, p in zip(self.segments, pieces, strict=True))
        return torch.cat(list(rows))[None]

    def _pieces(self, rows: Tensor) -> list[Tensor]:
        return [s.cells(rows[0]).flatten(0, 1).transpose(1, 2) for s in self.segments]

    def pattern(self, scores: Float[Tensor, "1 rows heads keys"]) -> Float[Tensor, "1 rows heads keys"]:
        """Probabilities of these scores."""
        return self._rows([softmax(self.rule, piece) for piece in self._pieces(scores)])

    def z(self, pattern: Float[Tensor, "1 rows heads keys"]) -> Float[Tensor, "1 rows heads dv"]:
        """The values weighed by the pattern."""
        pieces = zip(self.segments, self._pieces(pattern), self.values, strict=True)
        return torch.cat([s.rows(weigh(p, v).flatten(0, 1)) for s, p, v in pieces])[None]
