"""Losses of logits that can be differentiated, one number per prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Batch:
    """The prompts of one bucket that a loss is taken on."""

    bucket: int
    """Index of the bucket."""
    prompts: Int[Tensor, " n"]
    """Indices of the prompts in the bucket."""
    tokens: Int[Tensor, "n positions"]
    read: Int[Tensor, "n reads"]
    """Positions whose logits are read."""
    unedited: Callable[[], Tensor]

    @cached_property
    def clean(self) -> Float[Tensor, "n reads vocab"]:
        """Logits of the unedited model at the positions that are read."""
        return self.unedited()


Loss = Callable[[Tensor, Batch], Tensor]
"""(logits [n, reads, vocab], batch) to losses [n]: one number per prompt, differentiable in the logits."""


def kl_to_clean(logits: Tensor, batch: Batch) -> Tensor:
    """Σ_vocab p_clean (log p_clean − log p), nats, the mean over the positions that are read; [n]."""
    clean = torch.log_softmax(_wide(batch.clean), -1)
    difference = clean - torch.log_softmax(_wide(logits), -1)
    # a token that the unedited model forbids (minus infinity) weighs nothing: 0 · ∞ is 0 here
    return (clean.exp() * difference.masked_fill(clean == -torch.inf, 0)).sum(-1).mean(-1)


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of the next tokens of a prompt, nats, the mean over the positions that are read; [n].

    The last position of a prompt, which has no next token, is left out.
    """
    inside = batch.read + 1 < batch.tokens.shape[1]
    following = batch.tokens.gather(1, (batch.read + 1).clamp(max=batch.tokens.shape[1] - 1))
    losses = nn.functional.cross_entropy(_wide(logits).flatten(0, 1), following.flatten(), reduction="none")
    return (losses.view_as(following) * inside).sum(1) / inside.sum(1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
