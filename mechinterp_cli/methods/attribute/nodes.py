"""Nodes: the places whose effects are estimated, laid out as numbers; none of them is an object of its own.

All neurons of a small model at all positions are 645,000 nodes, so what is known of them is an array, grid by grid
(`methods.specs.Grid`: a block's nodes in one layer, every unit at every place).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.interchange import Interchange
from mechinterp_cli.methods.specs import Grid, TrialSpec
from mechinterp_cli.models.kinds import KEY_KINDS

Floats = npt.NDArray[np.float64]


class Nodes:
    """All nodes of an experiment, in the order block, layer, unit, place.

    Args:
        grids: From `Binder.grids`, one layer each.
        bound: Streams and sources.
    """

    def __init__(self, grids: Sequence[Grid], bound: Interchange) -> None:
        self.grids = tuple(grids)
        self.bound = bound
        self.offsets = np.cumsum([0, *map(len, self.grids)])
        self._masks: dict[tuple[object, ...], Tensor] = {}
        self._statuses: dict[tuple[object, ...], npt.NDArray[np.int8]] = {}

    def __len__(self) -> int:
        """How many nodes there are."""
        return int(self.offsets[-1])

    @property
    def sites(self) -> set[Site]:
        """Where the nodes are."""
        return {Site(grid.kind, grid.layer) for grid in self.grids}

    @cached_property
    def kinds(self) -> npt.NDArray[np.object_]:
        """Kind of site of each node."""
        return np.repeat(np.array([grid.kind for grid in self.grids], dtype=object), [len(grid) for grid in self.grids])

    @cached_property
    def layers(self) -> npt.NDArray[np.int64]:
        """Layer of each node."""
        return np.repeat(np.array([grid.layer for grid in self.grids]), [len(grid) for grid in self.grids])

    def spec(self, node: int, index: int) -> TrialSpec:
        """A node as a trial of `patch`.

        Args:
            node: Which.
            index: The trial's number.
        """
        at = int(np.searchsorted(self.offsets, node, side="right")) - 1
        return self.grids[at].spec(node - int(self.offsets[at]), index)

    def blocks(self) -> Iterator[tuple[Grid, slice]]:
        """Every grid and where its nodes are."""
        for grid, start in zip(self.grids, self.offsets[:-1].tolist(), strict=True):
            yield grid, slice(start, start + len(grid))

    def status(self) -> npt.NDArray[np.int8]:
        """[nodes, prompts] of `Status`: to be estimated, known to be 0, or absent."""
        return np.concatenate([np.tile(self._status(grid), (len(grid.units), 1)) for grid in self.grids])

    def _places(self, grid: Grid) -> list[TrialSpec]:
        """The first unit's trials: one per place."""
        return [grid.spec(at, at) for at in range(len(grid.places))]

    def _key(self, grid: Grid) -> tuple[object, ...]:
        """Grids that agree in this are edited at the same positions."""
        return grid.places, grid.spec(0, 0).enters_first_layer

    def _status(self, grid: Grid) -> npt.NDArray[np.int8]:
        key = self._key(grid)
        if key not in self._statuses:
            self._statuses[key] = self.bound.status(self._places(grid))
        return self._statuses[key]

    def _mask(self, grid: Grid, members: Sequence[int]) -> Float[Tensor, "prompts places positions"]:
        """1 where a place has a position that is edited."""
        key = (*self._key(grid), tuple(members))
        if key not in self._masks:
            length = self.bound.prompts.prompts[members[0]].length
            mask = torch.zeros(len(members), len(grid.places), length, dtype=torch.float64)
            for at, spec in enumerate(self._places(grid)):
                for row, prompt in enumerate(members):
                    mask[row, at, list(self.bound.positions(spec, prompt) or ())] = 1
            self._masks[key] = mask
        return self._masks[key]

    def gather(self, found: Mapping[Site, Tensor], members: Sequence[int]) -> Iterator[tuple[slice, Floats]]:
        """Estimates of some prompts by node: what a trial edits together is the sum of what it edits.

        To first order that is right, as nodes of one site do not act through each other.

        Args:
            found: By site, [metrics, prompts, positions, *units]; of `scores` and `pattern` the last axis is keys.
            members: The prompts, of one length.

        Yields:
            (nodes, estimates [metrics, nodes, prompts]).
        """
        for grid, where in self.blocks():
            by_unit = self._units(grid, found[Site(grid.kind, grid.layer)].double().cpu(), members)
            placed = torch.einsum("mptu,pat->muap", by_unit, self._mask(grid, members))
            yield where, placed.reshape(len(placed), len(grid), len(members)).numpy()

    def _units(self, grid: Grid, x: Tensor, members: Sequence[int]) -> Float[Tensor, "metrics prompts positions units"]:
        """Summed over the keys and the units of each of the grid's units."""
        if grid.kind in KEY_KINDS:
            x = x.sum(-1) if grid.keys is None else torch.einsum("mpthk,pk->mpth", x, self._keys(grid, x, members))
        if x.ndim == 3:
            return x[..., None]
        if grid.units == tuple((unit,) for unit in range(x.shape[-1])):
            return x
        return torch.stack([x.sum(-1) if u is None else x[..., list(u)].sum(-1) for u in grid.units], dim=-1)

    def _keys(self, grid: Grid, x: Tensor, members: Sequence[int]) -> Float[Tensor, "prompts keys"]:
        assert grid.keys is not None
        mask = torch.zeros(len(members), x.shape[-1], dtype=x.dtype)
        for row, prompt in enumerate(members):
            mask[row, list(grid.keys.positions[prompt] or ())] = 1
        return mask
