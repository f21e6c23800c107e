"""What can be taken away: from a block of the config to one unit per head, neuron, block, direction or edge."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mechinterp_cli.methods.ablate.options import UnitKind
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
    """The edits that ablating some units together takes, by layer; units of one site and place become one edit."""
    found: dict[tuple[object, ...], Merged] = {}
    for unit in units:
        for part in unit.parts:
            key = (part.kind, part.layer, part.units is None, unit.place.positions, id(unit.keys), id(unit.basis))
            before = found.get(key)
            if before is None:
                found[key] = Merged(part, unit.place, unit.keys, unit.basis)
            elif part.units is not None and before.part.units is not None:
                joined = tuple(sorted({*before.part.units, *part.units}))
                found[key] = Merged(Part(part.kind, part.layer, joined), unit.place, unit.keys, unit.basis)
    return sorted(found.values(), key=lambda merged: merged.part.layer)
