"""Merged attention is the softmax over all keys: random masks, sinks, soft-caps, grouped queries, half precision."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mechinterp_cli.engine.packed_attention import (
    OpenAttention,
    Segment,
    StreamAttention,
    merged_attention,
    native_attention,
)
from mechinterp_cli.models.interface import AttentionCall

PROMPTS, LENGTH, KV_HEADS, SIZE = 3, 9, 2, 4


class Case:
    """Random streams, packed rows in several segments, and the answer by loops over single queries."""

    def __init__(self, seed: int, starts: tuple[int, ...], share: int, mask: str, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.share, self.dtype = share, dtype
        self.k, self.v = self.draw(PROMPTS, KV_HEADS, LENGTH, SIZE), self.draw(PROMPTS, KV_HEADS, LENGTH, SIZE + 1)
        self.mask = self._mask(mask)
        self.segments: list[Segment] = []
        row = 0
        for start in starts:
            prompts, parts, width = torch.tensor([2, 0][: 1 + start % 2]), 1 + start % 3, LENGTH - start
            rows = parts * len(prompts) * width
            self.segments.append(Segment(row, row + rows, parts, start, prompts, width))
            row += rows
        q = self.draw(1, KV_HEADS * share, row, SIZE)
        k, v = self.draw(1, KV_HEADS, row, SIZE), self.draw(1, KV_HEADS, row, SIZE + 1)
        self.call = AttentionCall(nn.Identity(), self._eager, q, k, v, None, {"scaling": 0.7})

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def _mask(self, kind: str) -> Tensor | None:
        """Causal with holes; under `prefix` the first four keys are hidden from all later queries."""
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        if kind == "none":
            return None
        heads = KV_HEADS * self.share if kind == "heads" else 1
        holes = torch.rand(PROMPTS, heads, LENGTH, LENGTH, generator=self.generator) > 0.4
        if kind == "prefix":
            holes[..., 4:, :4] = False
        if kind != "empty":
            holes = holes | torch.eye(LENGTH, dtype=torch.bool)
        mask = holes & causal
        return mask if kind in ("prefix", "heads", "empty") else torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)

    @staticmethod
    def _eager(_module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> tuple[Tensor, None]:
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        return (torch.softmax(q @ k.mT * scaling + mask, -1) @ v).transpose(1, 2), None

    def stream(self) -> StreamAttention:
        return StreamAttention(self.k, self.v, self.mask)

    def expected(self) -> Tensor:
        """z [rows, heads, d_value] in float64, one query at a time."""
        rows: list[Tensor] = []
        for segment in self.segments:
            for part in range(segment.parts):
                for i, prompt in enumerate(segment.prompts.tolist()):
                    low = segment.lo + (part * len(segment.prompts) + i) * segment.width
                    rows += [self._query(segment, prompt, low, t) for t in range(segment.width)]
        return torch.stack(rows)

    def _query(self, segment: Segment, prompt: int, low: int, offset: int) -> Tensor:
        end, position = low + segment.width, segment.start + offset
        heads = []
        for head in range(KV_HEADS * self.share):
            kv = head // self.share
            keys = torch.cat([self.k[prompt, kv, : segment.start], self.call.k[0, kv, low:end]]).double()
            values = torch.cat([self.v[prompt, kv, : segment.start], self.call.v[0, kv, low:end]]).double()
            scores = keys @ self.call.q[0, head, low + offset].double() * 0.7
            cap, sinks = self.call.keywords.get("softcap"), self.call.keywords.get("s_aux")
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            weights = torch.exp(scores) * self._seen(prompt, head, position)
            total = weights.sum() + (0.0 if sinks is None else sinks[head].double().exp())
            heads.append(weights @ values / total if total > 0 else torch.zeros(SIZE + 1, dtype=torch.float64))
        return torch.stack(heads)

    def _seen(self, prompt: int, head: int, position: int) -> Tensor:
        if self.mask is None:
            return torch.arange(LENGTH) <= position
        row = self.mask[prompt, head if self.mask.shape[1] > 1 else 0, position]
        return row if row.dtype == torch.bool else row == 0


@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    seed=st.integers(0, 10_000),
    starts=st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3).map(tuple),
    share=st.integers(1, 3),
    mask=st.sampled_from(["none", "float", "prefix", "heads", "empty"]),
    softcap=st.sampled_from([None, 1.5]),
    sinks=st.booleans(),
)
def test_merged_attention_is_the_softmax_over_all_keys(
    seed: int, starts: tuple[int, ...], share: int, mask: str, softcap: float | None, sinks: bool
) -> None:
    case = Case(seed, starts, share, mask, torch.float32)
    case.call.keywords.update(softcap=softcap, s_aux=case.draw(KV_HEADS * share) if sinks else None)
    want = case.expected()
    z = merged_attention(case.call, case.stream(), case.segments)[0]
    assert (z - want).abs().max() <= 2e-6 * want.abs().max()
    opened = OpenAttention(case.call, case.stream(), case.segments)
    z = opened.z(opened.pattern(opened.scores))[0]
    assert (z - want).abs().max() <= 2e-6 * want.abs().max()


@pytest.mark.parametrize("mask", ["none", "float", "prefix", "heads"])
def test_the_models_own_function_on_copied_prefixes_gives_the_same(mask: str) -> None:
    case = Case(3, (0, 4, 7), 2, mask, torch.float32)
    z = native_attention(case.call, case.stream(), case.segments)[0]
    assert (z - case.expected()).abs().max() <= 2e-6 * case.v.abs().max()


def test_half_precision_is_as_close_as_half_precision_can_be() -> None:
    case = Case(5, (0, 3, 5, 8), 2, "prefix", torch.bfloat16)
    case.call.keywords.update(s_aux=case.draw(KV_HEADS * 2))
    z = merged_attention(case.call, case.stream(), case.segments)[0]
    assert z.dtype == torch.bfloat16
    assert (z - case.expected()).abs().max() <= 0.02 * case.v.abs().max()


def test_a_prefix_that_is_masked_whole_adds_nothing_and_counts_for_nothing() -> None:
    case = Case(7, (5,), 1, "prefix", torch.float32)
    hidden = torch.zeros(PROMPTS, 1, LENGTH, LENGTH, dtype=torch.bool)
    hidden[..., 5:, 5:] = torch.ones(4, 4, dtype=torch.bool).tril()
    case.mask = hidden
    z = merged_attention(case.call, case.stream(), case.segments)
    case.k, case.v = case.k * 100, case.v * 100
    assert torch.equal(merged_attention(case.call, case.stream(), case.segments), z)
    case.mask = hidden | torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    assert (merged_attention(case.call, case.stream(), case.segments) - z).abs().max() > 1.0


def test_large_scores_do_not_overflow() -> None:
    case = Case(9, (0, 4), 2, "none", torch.float32)
    case.call.keywords["scaling"] = 400.0
    z = merged_attention(case.call, case.stream(), case.segments)
    assert z.isfinite().all()
    assert z.abs().max() <= case.call.v.abs().max().maximum(case.v.abs().max())


def test_a_row_that_may_attend_to_nothing_gives_zero() -> None:
    empty = 0
    for seed in range(8):
        case = Case(seed, (0, 1, 4), 2, "empty", torch.float32)
        want = case.expected()
        empty += int((want == 0).all(-1).sum())
        z = merged_attention(case.call, case.stream(), case.segments)[0]
        assert (z - want).abs().max() <= 2e-6 * want.abs().max()
    assert empty > 3
