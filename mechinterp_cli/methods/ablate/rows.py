"""Values of many rows that trials share: constants by group of prompts, and noise."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from mechinterp_cli.engine.edits import RowValues


class Table(RowValues):
    """Constants of a bucket's prompts, looked up by group.

    Args:
        table: [groups, positions or 1, *features].
        groups: For every prompt its group.
    """

    def __init__(self, table: Tensor, groups: Sequence[int]) -> None:
        self.table = table
        self.groups = torch.tensor(groups)

    @property
    def shape(self) -> tuple[int, ...]:
        """[prompts, positions or 1, *features]."""
        return len(self.groups), *self.table.shape[1:]

    def at(self, prompt: Tensor, position: Tensor, units: tuple[int, ...] | None) -> Tensor:
        """The constants of rows."""
        # Moved once: the engine asks for the rows of a site many times, on one device.
        self.table, self.groups = self.table.to(prompt.device), self.groups.to(prompt.device)
        if self.table.shape[1] == 1:
            position = torch.zeros_like(position)
        return _chosen(self.table[self.groups[prompt], position], units)

    def alike(self, prompt: int) -> int:
        """The prompt's group."""
        return int(self.groups[prompt])

    def of(self, prompts: Sequence[int]) -> "Table":
        """Of some of the prompts."""
        return Table(self.table, self.groups[list(prompts)].tolist())


class Held:
    """Noise that was drawn, as much of it as fits; the least recently used goes first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._bytes = 0

    def get(self, seed: int, shape: tuple[int, ...]) -> Tensor:
        """Unit Gaussian noise of a seed."""
        key = (seed, *shape)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        self._known[key] = noise
        self._bytes += noise.nbytes
        while self._bytes > self.most:
            self._bytes -= self._known.popitem(last=False)[1].nbytes
        return noise


class Drawn(RowValues):
    """Noise of a bucket's prompts at one site.

    Args:
        seeds: For every prompt and draw its seed.
        length: Positions of each.
        spread: Standard deviation [*features].
        held: Where noise is held.
    """

    def __init__(self, seeds: tuple[int, ...], length: int, spread: Tensor, held: Held) -> None:
        self.seeds = seeds
        self.length = length
        self.spread = spread
        self.held = held

    @property
    def shape(self) -> tuple[int, ...]:
        """[prompts, positions, *features]."""
        return len(self.seeds), self.length, *self.spread.shape

    def at(self, prompt: Tensor, position: Tensor, units: tuple[int, ...] | None) -> Tensor:
        """The noise of rows."""
        prompts, positions = prompt.cpu(), position.cpu()
        spread = self.spread if units is None else self.spread[list(units)]
        out = torch.empty(len(prompts), *spread.shape)
        for row in sorted(set(prompts.tolist())):
            here = (prompts == row).nonzero()[:, 0]
            noise = self.held.get(self.seeds[row], self.shape[1:])
            out[here] = _chosen(noise[positions[here]], units) * spread
        return out.to(prompt.device)

    def of(self, prompts: Sequence[int]) -> "Drawn":
        """Of some of the prompts."""
        return Drawn(tuple(self.seeds[i] for i in prompts), self.length, self.spread, self.held)


def _chosen(x: Tensor, units: tuple[int, ...] | None) -> Tensor:
    return x if units is None else x[:, list(units)]
