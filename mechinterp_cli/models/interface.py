"""The attention interface of transformers: one place where every head of a model passes by.

A layer asks `AttentionInterface.get_interface` for the function that computes attention and calls it with
q, k, v, mask and keywords. Standing between the two gives access to every head without module names. The
implementation's name is left alone: several models test for "eager" and "sdpa" and drop sparse masks or
sinks under any other name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class AttentionCall:
    """What a layer hands to its attention function.

    `q` is [batch, heads, queries, d_head]; `k` and `v` are [batch, kv_heads, keys, d_head or d_value].
    `mask` is additive or boolean, [batch or 1, 1 or heads, queries, keys], or None where the
    implementation knows by itself what is masked (causal attention under sdpa).
    """

    module: nn.Module
    original: AttentionFunction
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    keywords: dict[str, Any]

    def native(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The model's own arithmetic; z is [batch, queries, heads, d_value]."""
        return self.original(self.module, q, k, v, mask, **self.keywords)


Handler = Callable[[AttentionCall], tuple[Tensor, Tensor | None]]


@contextmanager
def intercepted(model: nn.Module, handler: Handler) -> Iterator[None]:
    """Let `handler` answer every attention call of this model's modules, and of no other model's."""
    own = {id(module) for module in model.modules()}
    native_lookup = AttentionInterface.get_interface

    def lookup(self: AttentionInterface, implementation: str, default: AttentionFunction) -> AttentionFunction:
        original = native_lookup(self, implementation, default)

        def call(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **rest: Any
        ) -> tuple[Tensor, Tensor | None]:
            attention = AttentionCall(module, original, query, key, value, attention_mask, rest)
            return handler(attention) if id(module) in own else attention.native(query, key, value, attention_mask)

        return call

    interface: Any = AttentionInterface
    interface.get_interface = lookup
    try:
        yield
    finally:
        interface.get_interface = native_lookup


@dataclass(frozen=True)
class SoftmaxRule:
    """How one layer turns scores into probabilities, read off the keywords of its call.

    scores = softcap(q · k × scaling) + mask; a sink is one more logit per head that takes its share of
    the softmax and adds nothing (Gemma 2's soft-capping, GPT-OSS's sinks).
    """

    scaling: float
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @classmethod
    def of(cls, call: AttentionCall) -> "SoftmaxRule":
        """The rule that the call's keywords describe; whether it is the whole truth is tested elsewhere."""
        scaling = call.keywords.get("scaling")
        sinks = call.keywords.get("s_aux")
        return cls(
            scaling=call.q.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=call.keywords.get("softcap"),
            sinks=None if sinks is None else sinks.reshape(-1),
        )

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention logits before the mask, of q [..., queries, d] and k [..., keys, d]."""
        scores = (q @ k.transpose(-1, -2)) * self.scaling
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap


def additive(mask: Tensor | None, queries: int, keys: int, like: Tensor) -> Tensor:
    """A float mask, broadcastable to [batch, heads, queries, keys]; None is causal with the queries last."""
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=like.device).tril(keys - queries)[None, None]
    if mask.dtype != torch.bool:
        return mask[..., :keys]
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, -torch.inf)[..., :keys]


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads [batch, kv_heads, …] repeated to one per query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def masked_scores(rule: SoftmaxRule, q: Tensor, k: Tensor, mask: Tensor | None) -> Float[Tensor, "b h q k"]:
    """Attention logits after scaling, soft-cap and mask."""
    keys = repeat_heads(k, q.shape[1])
    return rule.scores(q, keys) + additive(mask, q.shape[2], k.shape[2], q)


def softmax(rule: SoftmaxRule, scores: Float[Tensor, "b h q k"]) -> Float[Tensor, "b h q k"]:
    """Probabilities over the keys, in float32 as transformers does it; a sink keeps the rest.

    A row with every key masked gives zeros.
    """
    wide = scores.float()
    if rule.sinks is not None:
        sink = rule.sinks.float().view(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
        wide = torch.cat([wide, sink], dim=-1)
    probabilities = torch.softmax(wide, dim=-1)[..., : scores.shape[-1]]
    return torch.nan_to_num(probabilities).to(scores.dtype) if rule.sinks is None else probabilities.to(scores.dtype)


def weigh(pattern: Float[Tensor, "b h q k"], v: Tensor) -> Float[Tensor, "b q h dv"]:
    """z: the values weighed by the pattern."""
    return (pattern @ repeat_heads(v, pattern.shape[1])).transpose(1, 2)
