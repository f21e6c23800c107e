"""What a change of a query or of a key really does to attention, through the softmax.

Everything is computed in float32 at least, with the mask, the soft-cap and the sinks of the layer's own call; logits
of the keys that are not replaced are never lost beside a large one.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from mechinterp_cli.engine.instrument import layer_of
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.interface import AttentionCall, SoftmaxRule, intercepted, masked_scores


def widened(x: Tensor) -> Tensor:
    """In float32, or float64 where it is: half precision is raised before anything is subtracted or summed."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, eq=False)
class Attention:
    """What one layer's attention was given in a pass."""

    rule: SoftmaxRule
    q: Float[Tensor, "n heads queries d_head"]
    k: Float[Tensor, "n kv_heads keys d_head"]
    mask: Tensor | None

    @classmethod
    def of(cls, call: AttentionCall) -> "Attention":
        """A call's, without its graph."""
        rule = SoftmaxRule.of(call)
        return cls(rule, widened(call.q.detach()), widened(call.k.detach()), call.mask)

    def scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "n heads queries keys"]:
        """Masked logits of other queries or keys."""
        return masked_scores(self.rule, q, k, self.mask)

    def _pattern(self, q: Tensor) -> Tensor:
        """Probabilities of the keys; zeros where all are masked."""
        logits = _with_sink(self.scores(q, self.k), self.rule.sinks)
        return torch.softmax(logits, -1).nan_to_num()[..., : self.k.shape[2]]

    def query_effects(
        self, source: Float[Tensor, "n queries heads d_head"], gradient: Float[Tensor, "n queries heads keys"]
    ) -> Float[Tensor, "n queries heads"]:
        """Q-fix: (pattern with the source's query − pattern) · ∂M/∂pattern, query by query.

        Args:
            source: What is put in place of q.
            gradient: ∂M/∂pattern.
        """
        query = _as_given(source, self.q)
        change = self._pattern(query) - self._pattern(self.q)
        return torch.einsum("nhqk,nqhk->nqh", change, gradient.to(change.dtype))

    def key_effects(
        self, source: Float[Tensor, "n keys kv_heads d_head"], gradient: Float[Tensor, "n queries heads keys"]
    ) -> Float[Tensor, "n keys kv_heads"]:
        """K-fix: for each key, the change of all queries' patterns when its logit alone is replaced, · ∂M/∂pattern.

        It is summed over the queries, and over the query heads that share the key.

        Args:
            source: What is put in place of k.
            gradient: ∂M/∂pattern.
        """
        old, new = self.scores(self.q, self.k), self.scores(self.q, _as_given(source, self.k))
        effects = one_logit(old, new, gradient.transpose(1, 2).to(old.dtype), self.rule.sinks).sum(2)
        return torch.unflatten(effects, 1, (self.k.shape[1], -1)).sum(2).transpose(1, 2)


def _as_given(source: Tensor, like: Tensor) -> Tensor:
    """[n or 1, positions or more, heads, d_head] or a number as q or k are given to attention."""
    source = source.to(like)
    placed = source[:, : like.shape[2]].transpose(1, 2) if source.ndim == like.ndim else source
    return placed.expand_as(like)


def one_logit(
    old: Float[Tensor, "n heads queries keys"],
    new: Float[Tensor, "n heads queries keys"],
    gradient: Float[Tensor, "n heads queries keys"],
    sinks: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "n heads queries keys"]:
    """Gradient · (softmax with key t's logit replaced by its new one − softmax), for every key t by itself.

    With L the log-sum-exp of all other logits, key t has probability σ(s_t − L), and the others share the rest in
    fixed proportions: so what is gained at t is lost at their mean.

    Args:
        old: Masked logits s.
        new: Those that take their places, one at a time.
        gradient: ∂M/∂pattern.
        sinks: One more logit per head, whose probability counts for nothing.
    """
    keys = old.shape[-1]
    logits = _with_sink(old, sinks)
    weights = pad(gradient, (0, logits.shape[-1] - keys))
    lowest = weights.amin(-1, keepdim=True)
    above = weights - lowest
    others = _without_each(logits)
    mean = (_without_each(logits + above.log()) - others).exp()
    gained = _sigmoid_change((logits - others)[..., :keys], new - others[..., :keys])
    effect = gained * (above - mean)[..., :keys]
    alone = others[..., :keys].isinf() | old.isinf()
    return torch.where(alone, 0, effect)


def _with_sink(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """A head's sink is one more key."""
    if sinks is None:
        return scores
    return torch.cat([scores, sinks.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)


def _without_each(logits: Tensor) -> Tensor:
    """Log-sum-exp over the last axis without each entry in turn."""
    before = logits.logcumsumexp(-1)
    after = logits.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.logaddexp(
        pad(before[..., :-1], (1, 0), value=-torch.inf), pad(after[..., 1:], (0, 1), value=-torch.inf)
    )


def _sigmoid_change(x: Tensor, y: Tensor) -> Tensor:
    """σ(y) − σ(x), to all digits where they are close or both near 0 or 1."""
    low, high = torch.minimum(x, y), torch.maximum(x, y)
    return high.sigmoid() * (-low).sigmoid() * -torch.expm1(low - high) * torch.sign(y - x)


@contextmanager
def noting(model: nn.Module, anatomy: Anatomy, layers: Collection[int], noted: dict[int, Attention]) -> Iterator[None]:
    """Note what attention is given in some layers, as the model itself gives it.

    Args:
        model: The model.
        anatomy: Its anatomy.
        layers: Which layers.
        noted: Takes the layers' attention.
    """
    index_of = layer_of(model, anatomy)

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer = index_of.get(id(call.module), -1)
        if layer in layers:
            noted[layer] = Attention.of(call)
        return call.native(call.q, call.k, call.v, call.mask)

    with intercepted(model, handler):
        yield
