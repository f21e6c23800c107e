"""Seeded draws that are the same on every platform and Python version.

Only `random.Random.random()` is used: it is the one method whose sequence Python promises to keep for a
given integer seed. `sample`, `shuffle` and numpy's generators may change between versions.
"""

from collections.abc import Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")
_LISTED = 100_000
"""Up to this many outcomes are listed and shuffled; more are drawn until they differ."""


class Draw:
    """A source of seeded choices."""

    def __init__(self, seed: int) -> None:
        """Start the sequence of a seed, any non-negative integer."""
        self._random = Random(seed)

    def below(self, n: int) -> int:
        """An integer in 0..n-1."""
        return int(self._random.random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in a random order (Fisher and Yates)."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """`k` items of different places, in random order."""
        return [items[i] for i in self.distinct(len(items), k)]

    def few(self, items: Sequence[T], k: int) -> list[T]:
        """As `sample`, another draw for the same seed, in time that grows with `k` and not with the items.

        Raises:
            ValueError: There are fewer than `k` of them.
        """
        if k > len(items):
            raise ValueError(f"{k} different draws from {len(items)}")
        # Fisher and Yates from the other end; only the places that changed are kept.
        moved: dict[int, int] = {}
        drawn = []
        for i in range(k):
            j = i + self.below(len(items) - i)
            drawn.append(items[moved.get(j, j)])
            moved[j] = moved.get(i, i)
        return drawn

    def distinct(self, space: int, k: int) -> list[int]:
        """`k` different integers in 0..space-1, in random order.

        Raises:
            ValueError: There are fewer than `k` of them.
        """
        if k > space:
            raise ValueError(f"{k} different draws from {space}")
        if space <= _LISTED:
            return self.shuffled(range(space))[:k]
        drawn: dict[int, None] = {}
        while len(drawn) < min(k, space // 2):
            drawn[self.below(space)] = None
        # Beyond half of the space waiting for a new draw gets slow; the rest is taken from what is left.
        left = [] if len(drawn) == k else [i for i in range(space) if i not in drawn]
        return [*drawn, *self.shuffled(left)[: k - len(drawn)]]
