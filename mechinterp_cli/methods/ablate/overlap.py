"""Units that get into each other's way: their joint effect would not be what it is called."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mechinterp_cli.methods.ablate.units import Part, Unit
from mechinterp_cli.methods.specs import Place

_BLOCK = {"scores": "attention", "z": "attention", "attn_out": "attention", "neuron": "mlp", "mlp_out": "mlp"}
_ORDER = ("scores", "z", "attn_out", "neuron", "mlp_out")
"""Within a block, from first to last: an edit does nothing where all that is made of it is edited later."""
_ANY, _WHOLE = "any", "whole"
"""In place of a head or neuron: claims on any of them, and claims on all of them."""


@dataclass(frozen=True, eq=False)
class _Claim:
    """What a unit takes: one part, with its positions of all prompts as bits of one number."""

    unit: Unit
    part: Part
    bits: int
    keys: Place | None


def overlapping(units: Sequence[Unit]) -> tuple[Unit, Unit] | None:
    """Two units that cannot be ablated together, or None.

    Two units overlap where, at some position of some prompt, they edit the same feature of the same site (head 5.1 and
    key/value head kv5.0, layer5 and mlp5, one unit twice), or where one edits all that is made of what the other edits:
    the heads of an attention block that is ablated do nothing (attention5 and 5.1), nor do the neurons of such an MLP,
    nor the edges into a head. Removing directions from a block's output leaves the rest of it, so that counts only
    beside another edit of that output; directions of one site never overlap, as their span is removed.

    Args:
        units: The units, all of one prompt set.
    """
    taken: dict[tuple[object, ...], list[_Claim]] = defaultdict(list)
    for claim in _claims(units):
        block = (claim.part.layer, _BLOCK.get(claim.part.kind, claim.part.kind))
        numbers = claim.part.units
        for number in (_ANY,) if numbers is None else (*numbers, _WHOLE):
            for other in taken[*block, number]:
                if _meet(claim, other):
                    return other.unit, claim.unit
        for number in (_ANY, *((_WHOLE,) if numbers is None else numbers)):
            taken[*block, number].append(claim)
    return None


def _claims(units: Sequence[Unit]) -> Iterator[_Claim]:
    places = {unit.place.positions: unit.place for unit in units}
    offsets = _offsets(list(places.values()))
    bits = {positions: _as_bits(place, offsets) for positions, place in places.items()}
    for unit in units:
        for part in unit.parts:
            yield _Claim(unit, part, bits[unit.place.positions], unit.keys)


def _offsets(places: Sequence[Place]) -> list[int]:
    """Where each prompt's positions begin in the number: after those of the prompts before it."""
    by_prompt = zip(*(place.positions for place in places), strict=True)
    lengths = [max((max(at) + 1 for at in found if at), default=0) for found in by_prompt]
    return [0, *accumulate(lengths)]


def _as_bits(place: Place, offsets: Sequence[int]) -> int:
    return sum(1 << (offsets[prompt] + at) for prompt, found in enumerate(place.positions) for at in set(found or ()))


def _meet(a: _Claim, b: _Claim) -> bool:
    """Whether two claims on one block of features and numbers come together at a position."""
    if not a.bits & b.bits:
        return False
    if a.part.kind == b.part.kind == "scores":
        return _share_keys(a, b)
    if a.part.kind == b.part.kind:
        directions = a.unit.basis is not None and b.unit.basis is not None
        return a.unit is b.unit or not directions
    later = max((a, b), key=lambda claim: _ORDER.index(claim.part.kind) if claim.part.kind in _ORDER else -1)
    return later.unit.basis is None


def _share_keys(a: _Claim, b: _Claim) -> bool:
    """Whether two edges have a query and a key in common on some prompt."""
    if a.keys is None or b.keys is None or a.keys is b.keys:
        return True
    rows = zip(a.unit.place.positions, b.unit.place.positions, a.keys.positions, b.keys.positions, strict=True)
    return any(set(qa or ()) & set(qb or ()) and set(ka or ()) & set(kb or ()) for qa, qb, ka, kb in rows)
