"""What can be taken away: from a block of the config to one unit per head, neuron, block, direction or edge."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from mechinterp_cli.methods.ablate.options import UnitKind
from mechinterp_cli.methods.directions import joined
from mechinterp_cli.methods.specs import Place


@dataclass(frozen=True)
class Part:
    """What is edited at one site.

    Args:
        kind: Kind of site: `z`, `neuron`, `attn_out`, `mlp_out`, `resid_post`, `scores`, ...
        layer: Its layer.
        units: Query heads or neurons; None for all features.
    """

    kind: str
    layer: int
    units: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Unit:
    """One thing that can be ablated, somewhere in every prompt.

    Args:
        index: Its place among the experiment's units.
        block: The block of the config that it came from.
        kind: What it is.
        layer: The layer that it is reported under (the centre of a window).
        number: The head, key/value head or neuron, where it is a single one.
        name: Short, and another for every unit: `5.1`, `kv5.0`, `neuron5.17`, `attention5`, `mlp5`, `layer5`.
        parts: What is edited; several for a layer, or for a window of layers.
        place: The positions of every prompt (queries, for an edge).
        keys: For an edge: the keys of every prompt; None is all.
        basis: For a direction: orthonormal rows [directions, d_model].
    """

    index: int
    block: int
    kind: UnitKind
    layer: int
    number: int | None
    name: str
    parts: tuple[Part, ...]
    place: Place
    keys: Place | None = None
    basis: Tensor | None = None


@dataclass(frozen=True)
class Ablation:
    """One trial: some units, and why these.

    Args:
        index: Its number.
        design: Which design it belongs to (`single`, `cumulative`, `set`, `keep`, `everything`, `pairs`).
        units: Indices of the units that are ablated.
        k: How many of a ranking.
        ranking: Number of the random ranking; None for the config's.
        set: Name of the set (that is removed, or kept).
    """

    index: int
    design: str
    units: tuple[int, ...]
    k: int | None = None
    ranking: int | None = None
    set: str | None = None


@dataclass(frozen=True, eq=False)
class Merged:
    """Parts of several units that one edit can make: one site, one place."""

    part: Part
    place: Place
    keys: Place | None
    basis: Tensor | None


def merge(units: Sequence[Unit]) -> list[Merged]:
    """The edits that ablating some units together takes, by layer; units of one site and place become one edit.

    Directions of one site become one subspace wherever they meet: taken out one after the other, what is left would
    still have a component along the first. Where their places meet in part, each part has the subspace of its own.
    """
    found: dict[tuple[object, ...], Merged] = {}
    directions: dict[Part, list[Unit]] = defaultdict(list)
    for unit in units:
        for part in unit.parts:
            if unit.basis is not None:
                directions[part].append(unit)
                continue
            key = (part.kind, part.layer, part.units is None, unit.place.positions, id(unit.keys))
            before = found.get(key)
            if before is None:
                found[key] = Merged(part, unit.place, unit.keys, None)
            elif part.units is not None and before.part.units is not None:
                both = tuple(sorted({*before.part.units, *part.units}))
                found[key] = Merged(Part(part.kind, part.layer, both), unit.place, unit.keys, None)
    subspaces = [
        Merged(part, place, None, _basis(together))
        for part, chosen in directions.items()
        for together, place in _regions(chosen)
    ]
    return sorted([*found.values(), *subspaces], key=lambda merged: merged.part.layer)


def place_label(place: Place | None) -> str:
    """A place in a word: `S2`, `3`, `all`; None is all keys."""
    if place is None:
        return "all"
    if place.span is not None:
        return place.span
    return "all" if place.position is None else str(place.position)


def _regions(units: Sequence[Unit]) -> list[tuple[tuple[Unit, ...], Place]]:
    """Positions of all prompts, split by which of the units stand there."""
    if len({unit.place.positions for unit in units}) == 1:
        return [(tuple(units), units[0].place)]
    regions: dict[tuple[Unit, ...], list[set[int]]] = {}
    prompts = len(units[0].place.positions)
    for prompt in range(prompts):
        there: dict[int, list[Unit]] = defaultdict(list)
        for unit in units:
            for position in sorted(set(unit.place.positions[prompt] or ())):
                there[position].append(unit)
        for position, chosen in there.items():
            regions.setdefault(tuple(chosen), [set() for _ in range(prompts)])[prompt].add(position)
    return [(chosen, _region(chosen, units, found)) for chosen, found in regions.items()]


def _region(chosen: Sequence[Unit], units: Sequence[Unit], found: Sequence[set[int]]) -> Place:
    """Where only the chosen ones stand; their own place where that is all of it."""
    positions = tuple(tuple(sorted(at)) for at in found)
    for unit in chosen:
        if positions == tuple(at or () for at in unit.place.positions):
            return unit.place
    inside = dict.fromkeys(place_label(unit.place) for unit in chosen)
    outside = dict.fromkeys(place_label(unit.place) for unit in units if unit not in chosen)
    words = " and ".join(inside) + (f" without {', '.join(outside)}" if outside else "")
    return Place(positions, span=words)


@lru_cache(maxsize=256)
def _basis(units: tuple[Unit, ...]) -> Tensor:
    """What the directions of some units span; one object for the same units, so that their edits are made together."""
    bases = [unit.basis for unit in units if unit.basis is not None]
    return bases[0] if len(bases) == 1 else joined(bases)
