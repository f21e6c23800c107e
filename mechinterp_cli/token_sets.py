"""Sets of token ids, one per prompt, and what is read of logits at them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TokenSets:
    """One set of token ids per prompt, padded to the largest set."""

    ids: Int[Tensor, "prompts size"]
    """Padding is 0 and is masked."""
    mask: Bool[Tensor, "prompts size"]

    @classmethod
    def of(cls, sets: Sequence[Sequence[int]], device: torch.device) -> Self:
        """Pads the sets; an empty set has no true entry in its mask."""
        size = max((len(tokens) for tokens in sets), default=0)
        rows = [[*tokens, *[0] * (size - len(tokens))] for tokens in sets]
        masks = [[i < len(tokens) for i in range(size)] for tokens in sets]
        shape = (len(sets), size)
        return cls(
            torch.tensor(rows, dtype=torch.long, device=device).reshape(shape),
            torch.tensor(masks, dtype=torch.bool, device=device).reshape(shape),
        )

    def at(self, prompt_index: Int[Tensor, " items"]) -> Self:
        """The sets of the items' prompts."""
        return type(self)(self.ids[prompt_index], self.mask[prompt_index])

    def gather(self, logits: Float[Tensor, "items vocab"]) -> Float[Tensor, "items size"]:
        """The sets' logits, minus infinity at the padding."""
        return logits.gather(1, self.ids).masked_fill(~self.mask, -torch.inf)

    def tokens(self) -> Int[Tensor, " tokens"]:
        """All ids of all sets, each once, in order."""
        tokens: Tensor = torch.unique(self.ids[self.mask])
        return tokens

    def among(self, tokens: Int[Tensor, " tokens"]) -> Self:
        """The same sets as places in `tokens`, ids in order: for logits of these tokens alone.

        An id that is not among them points behind the last, so that looking there fails.
        """
        places = torch.searchsorted(tokens, self.ids)
        found = tokens[places.clamp(max=len(tokens) - 1)] == self.ids
        places = places.masked_fill(~found, len(tokens)).masked_fill(~self.mask, 0)
        return type(self)(places, self.mask)
