"""Online code length: how many bits the labels take when a probe learns them block by block."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the samples: where blocks end (Voita & Titov 2020)."""
NextBlock = Callable[[int, int], Tensor]
"""Fits on samples 0..t−1 and gives log-probabilities of samples t..end−1, [..., classes, end − t], nats."""


@dataclass(frozen=True)
class CodeLength:
    """In bits.

    Args:
        bits: [...]: L.
        blocks: Ends of the blocks; the first is sent with the uniform code.
        uniform: N log₂ K.
        block_bits: [blocks, ...] bits of each block, the first one's too.
    """

    bits: Tensor
    blocks: tuple[int, ...]
    uniform: float
    block_bits: Tensor

    @property
    def compression(self) -> Tensor:
        """N log₂ K / L, [...]: 1 where nothing is learnt."""
        return self.uniform / self.bits


def block_ends(labels: Sequence[int], classes: int, fractions: Sequence[float] = FRACTIONS) -> tuple[int, ...]:
    """Ends of the blocks, first ones merged until every class has occurred.

    Args:
        labels: [n] classes in the order in which they are sent.
        classes: How many.
        fractions: Growing, the last 1.
    """
    n = len(labels)
    ends = sorted({max(1, math.floor(fraction * n + 1e-9)) for fraction in fractions})
    first = 1 + max((list(labels).index(one) for one in range(classes) if one in labels), default=0)
    return tuple(end for end in ends if end >= first)


def code_length(
    labels: Sequence[int], next_block: NextBlock, *, classes: int, fractions: Sequence[float] = FRACTIONS
) -> CodeLength:
    """`L = t₁ log₂ K − Σᵢ Σ log₂ p_θᵢ(y)` (Voita & Titov 2020, equation 3), θᵢ fitted on all samples before block i.

    Args:
        labels: [n] classes from 0 on, in the order in which they are sent (shuffle first, or keep groups together).
        next_block: Fits, and gives log-probabilities in nats.
        classes: K.
        fractions: Where blocks end.
    """
    ends = block_ends(labels, classes, fractions)
    each = math.log2(classes)
    bits = []
    for begin, end in zip(ends, ends[1:], strict=False):
        found = next_block(begin, end).double()
        own = torch.as_tensor(labels[begin:end], device=found.device).expand(*found.shape[:-2], 1, -1)
        bits.append(-found.gather(-2, own).sum((-2, -1)) / math.log(2))
    shape = bits[0].shape if bits else ()
    first = torch.full(shape, ends[0] * each, dtype=torch.float64)
    whole = torch.stack([first, *(part.cpu() for part in bits)])
    return CodeLength(whole.sum(0), ends, len(labels) * each, whole)
