"""Which predictions of a sequence can be made from its context alone: where in-context learning shows.

Position i predicts token i + 1, so all masks are [prompts, positions − 1].
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def repeated_positions(tokens: Int[Tensor, "prompts positions"]) -> Bool[Tensor, "prompts positions-1"]:
    """Predictions that repeat an earlier pair: some j < i has t_j = t_i and t_(j+1) = t_(i+1)."""
    return _seen_before(tokens[:, :-1] * (tokens.max() + 1) + tokens[:, 1:])


def first_positions(tokens: Int[Tensor, "prompts positions"]) -> Bool[Tensor, "prompts positions-1"]:
    """Predictions of a token that has not occurred: t_(i+1) is none of t_0 … t_i."""
    return ~_seen_before(tokens)[:, 1:]


def _seen_before(values: Int[Tensor, "prompts n"]) -> Bool[Tensor, "prompts n"]:
    """Whether a value equals an earlier one of its row."""
    ordered, order = values.sort(dim=1, stable=True)  # stable: equal values stay in order of position
    repeats = torch.zeros_like(values, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeats).scatter_(1, order, repeats)
