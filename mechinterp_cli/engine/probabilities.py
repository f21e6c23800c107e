"""Attention probabilities of some heads of one attention call, made by blocks of queries and compared with its z."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.models.interface import AttentionCall, SoftmaxRule, masked_scores, softmax, weigh


@dataclass(frozen=True)
class Errors:
    """Of a pattern, as a share of each head's largest |z|: against the model, and between two ways of rounding."""

    deviation: float
    rounding: float


@dataclass(frozen=True, eq=False)
class PatternMaker:
    """Some heads of an attention call, ready to have their probabilities computed by blocks of queries.

    Args:
        rule: How scores become probabilities, for these heads.
        q: Queries [prompts, heads, queries, d].
        k: Keys [prompts, heads, keys, d], one per query head.
        v: Values [prompts, heads, keys, dv], one per query head.
        mask: The call's mask for these heads.
        in_own_dtype: Whether scores are rounded to the model's dtype, as eager attention rounds them; sdpa
            keeps them in float32.
    """

    rule: SoftmaxRule
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    in_own_dtype: bool

    @classmethod
    def of(cls, call: AttentionCall, heads: slice, *, in_own_dtype: bool) -> "PatternMaker":
        """Cut some query heads out of a call."""
        rule = SoftmaxRule.of(call)
        if rule.sinks is not None:
            rule = replace(rule, sinks=rule.sinks[heads])
        shared = torch.arange(call.q.shape[1], device=call.q.device)[heads] // (call.q.shape[1] // call.k.shape[1])
        mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, heads]
        return cls(rule, call.q[:, heads], call.k[:, shared], call.v[:, shared], mask, in_own_dtype)

    def pattern(self, z: Float[Tensor, "b q h dv"], block: int, smallest: float) -> tuple[Tensor, Errors]:
        """The pattern [prompts, heads, queries, keys] and how far what it gives is from `z`.

        Args:
            z: What the model's own attention gave for these heads.
            block: Bytes of a block of scores.
            smallest: The least that a head's errors are compared with.
        """
        prompts, heads, queries, _ = self.q.shape
        keys = self.k.shape[2]
        scale = z.abs().amax((0, 1, 3)).float().clamp(min=max(smallest, torch.finfo(torch.float32).tiny))
        step = max(1, block // (prompts * heads * keys * 4))
        parts = [slice(lo, min(lo + step, queries)) for lo in range(0, queries, step)]
        narrow = z.dtype.itemsize < 4
        pattern: Tensor | None = None
        deviation, rounding = torch.zeros(()), torch.zeros(())
        for rows in parts:
            part = self._rows(rows, own_dtype=self.in_own_dtype)
            deviation = torch.maximum(deviation, self._gap(part, z[:, rows], scale).cpu())
            if narrow:
                other = self._rows(rows, own_dtype=not self.in_own_dtype)
                rounding = torch.maximum(rounding, self._gap(other, weigh(part.to(self.v.dtype), self.v), scale).cpu())
            if len(parts) == 1:
                pattern = part
            else:
                pattern = part.new_empty(prompts, heads, queries, keys) if pattern is None else pattern
                pattern[:, :, rows] = part
        assert pattern is not None
        return pattern, Errors(float(deviation), float(rounding))

    def _gap(self, part: Float[Tensor, "b h q k"], z: Float[Tensor, "b q h dv"], scale: Tensor) -> Tensor:
        """Largest |pattern · v − z| as a share of each head's scale."""
        own = weigh(part.to(self.v.dtype), self.v).float()
        return ((own - z.float()).abs().amax((0, 1, 3)) / scale).max()

    def _rows(self, rows: slice, *, own_dtype: bool) -> Float[Tensor, "b h q k"]:
        """Probabilities of some queries over all keys."""
        q = self.q[:, :, rows]
        q, k = (q, self.k) if own_dtype else (q.float(), self.k.float())
        return softmax(self.rule, masked_scores(self.rule, q, k, mask_rows(self.mask, rows, self.q, self.k)))


def mask_rows(mask: Tensor | None, rows: slice, q: Tensor, k: Tensor) -> Tensor:
    """The rows of a call's mask for some of its queries [batch or 1, heads or 1, queries, keys]; None is causal.

    Args:
        mask: As the layer got it.
        rows: Which queries, with a start and a stop.
        q: All queries [prompts, heads, queries, d].
        k: All keys [prompts, kv_heads, keys, d].
    """
    if mask is not None:
        return mask if mask.shape[-2] == 1 else mask[..., rows, :]
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(rows.stop - rows.start, keys, dtype=torch.bool, device=q.device)
    return visible.tril(keys - queries + rows.start)[None, None]
