"""From blocks of the config to units, each with a name that sets, pairs and rankings use.

Names: `5.1` is head 1 of layer 5; `kv5.0`, `neuron5.17`, `attention5`, `mlp5`, `layer5`, `edge5`, `edge5.1`; groups are
joined with a plus (`5.1+5.2`), all heads of a layer are `5.all`; a window of 3 layers around layer 5 is `attention5w3`;
a direction has the name of its tensor (`resid_post.12`). Where a block has several places, or two blocks have the same
units, a name carries the place: `5.1@S2`, `5.1@3`, `5.1@all`; an edge its query and its keys: `edge5@end<S2`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.problems import nearest
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.ablate.options import UnitBlock, UnitKind
from mechinterp_cli.methods.ablate.overlap import overlapping
from mechinterp_cli.methods.ablate.units import Part, Unit, place_label
from mechinterp_cli.methods.binder import Binder, KeyPath
from mechinterp_cli.methods.directions import Direction, read_directions
from mechinterp_cli.methods.places import LayerWindow
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.tasks.prompts import PromptSet

__all__ = ["expand", "find", "names", "overlapping", "place_label"]

_NEEDS: Mapping[UnitKind, tuple[str, ...]] = {
    "head": ("z",),
    # Where k is not seen, nobody knows which query heads share a key/value head.
    "kv_head": ("z", "k"),
    "neuron": ("neuron",),
    "attention": ("attn_out",),
    "mlp": ("mlp_out",),
    "layer": ("attn_out", "mlp_out"),
    "edge": ("scores",),
}
"""Sites that a layer must have."""
_FIELDS: Mapping[UnitKind, frozenset[str]] = {
    "head": frozenset({"heads"}),
    "kv_head": frozenset({"heads"}),
    "neuron": frozenset({"neurons"}),
    "edge": frozenset({"heads", "keys"}),
    "direction": frozenset({"file"}),
}
_PREFIX: Mapping[UnitKind, str] = {"head": "", "kv_head": "kv"}
_LISTED = 8
_ORDER = "A token sees itself and those before it; `positions` are the tokens that look, `keys` those they look at."


@dataclass(frozen=True, eq=False)
class _Member:
    """What a block ablates in one layer or window, before it is brought to places."""

    layer: int
    number: int | None
    name: str
    parts: tuple[Part, ...]
    basis: Tensor | None = None


def expand(loaded: LoadedConfig, anatomy: Anatomy, prompts: PromptSet, blocks: Sequence[UnitBlock]) -> list[Unit]:
    """One unit per thing that can be ablated, in the order block, layer, head or neuron, place.

    Args:
        loaded: The config, for errors with file and line; its units stand at `ablate.units`.
        anatomy: The model.
        prompts: The task's prompts.
        blocks: The section's `units`.

    Raises:
        UserError: A layer, head, neuron, direction, position or span that is not there, an edge that looks forward in
            time, or the same unit twice; names the key.
    """
    units: list[Unit] = []
    binder = Binder(loaded, "ablate", anatomy, prompts)
    for number, block in enumerate(blocks):
        path: KeyPath = ("ablate", "units", number)
        _check_fields(loaded, block, path)
        members = list(_members(binder, block, path))
        places, keys = _places(binder, block, path)
        for member in members:
            for place in places:
                units.append(
                    Unit(
                        index=len(units),
                        block=number,
                        kind=block.kind,
                        layer=member.layer,
                        number=member.number,
                        name=member.name,
                        parts=member.parts,
                        place=place,
                        keys=keys,
                        basis=member.basis,
                    )
                )
    return _named(loaded, units, blocks)


def _check_fields(loaded: LoadedConfig, block: UnitBlock, path: KeyPath) -> None:
    kind, allowed = block.kind, _FIELDS.get(block.kind, frozenset())
    for name in ("heads", "neurons", "keys", "file"):
        if getattr(block, name) is not None and name not in allowed:
            raise loaded.error((*path, name), f"{kind} has no {name}", f"Leave out {name} for {kind}.")
    if kind == "edge" and block.keys is None:
        remedy = "Name the positions or spans that are no longer seen, or `keys: all`."
        raise loaded.error(path, "an edge needs keys", remedy)
    if kind == "direction" and block.file is None:
        raise loaded.error(path, "a direction needs a file", "Name a .safetensors file of directions.")


def _members(binder: Binder, block: UnitBlock, path: KeyPath) -> Iterator[_Member]:
    if block.kind == "direction":
        yield from _directions(binder, block, path)
        return
    window = f"w{block.layers.window}" if isinstance(block.layers, LayerWindow) else ""
    needs = _NEEDS[block.kind]
    for layer, layers in binder.layers(needs, block.layers, path, block.kind):
        stem = f"{_PREFIX.get(block.kind, block.kind)}{layer}{window}"
        if block.kind in ("attention", "mlp", "layer"):
            yield _Member(layer, None, stem, tuple(Part(kind, at) for at in layers for kind in needs))
            continue
        for numbers in _numbers(binder, block, layers, path):
            parts = tuple(Part(needs[0], at, _features(binder.anatomy, block.kind, at, numbers)) for at in layers)
            single = numbers[0] if numbers is not None and len(numbers) == 1 else None
            yield _Member(layer, single, _name(block.kind, stem, numbers), parts)


def _numbers(
    binder: Binder, block: UnitBlock, layers: Sequence[int], path: KeyPath
) -> Iterator[tuple[int, ...] | None]:
    """Heads, key/value heads or neurons of each unit, each once; None is all."""
    if block.kind == "neuron":
        chosen = binder.units("neuron", block.neurons or "all", layers, path)
    elif block.kind == "edge":
        chosen = binder.units("scores", block.heads or "all", layers, path)
    else:
        chosen = binder.units("k" if block.kind == "kv_head" else "z", block.heads or "each", layers, path)
    for numbers in chosen:
        yield None if numbers is None else tuple(dict.fromkeys(numbers))


def _features(anatomy: Anatomy, kind: UnitKind, layer: int, numbers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """What is edited: query heads or neurons, sorted."""
    if numbers is None:
        return None
    if kind != "kv_head":
        return tuple(sorted(numbers))
    heads = anatomy.layers[layer].heads
    assert heads is not None
    return tuple(head for head in range(heads.query) if heads.shared_by(head) in numbers)


def _name(kind: UnitKind, stem: str, numbers: tuple[int, ...] | None) -> str:
    if numbers is None:
        return stem if kind == "edge" else f"{stem}.all"
    return "+".join(f"{stem}.{number}" for number in numbers)


def _directions(binder: Binder, block: UnitBlock, path: KeyPath) -> Iterator[_Member]:
    if isinstance(block.layers, LayerWindow):
        problem = "a direction has no window: its tensor's name says the layer"
        raise binder.loaded.error((*path, "layers"), problem, "Use all, or list layers.")
    assert block.file is not None
    try:
        found = read_directions(block.file, binder.anatomy)
    except UserError as error:
        raise binder.loaded.error((*path, "file"), error.cause, error.remedy) from error
    if block.layers != "all":
        found = _of_layers(binder, block.layers, found, path)
    for one in found:
        yield _Member(one.layer, None, one.name, (Part(one.site, one.layer),), one.basis)


def _of_layers(binder: Binder, layers: Sequence[int], found: Sequence[Direction], path: KeyPath) -> list[Direction]:
    have = sorted({one.layer for one in found})
    for place, layer in enumerate(layers):
        if layer not in have:
            names = ", ".join(one.name for one in found)
            problem = f"{layer}: the file has no direction of this layer"
            raise binder.loaded.error((*path, "layers", place), problem, f"It holds {names}.")
    return [one for layer in dict.fromkeys(layers) for one in found if one.layer == layer]


def _places(binder: Binder, block: UnitBlock, path: KeyPath) -> tuple[list[Place], Place | None]:
    """The positions of the block's units; for edges the keys, too."""
    places = list(binder.places(block.positions, path))
    if block.keys is None or block.keys == "all":
        return places, None
    keys = binder.together(block.keys, (*path, "keys"))
    if not binder.anatomy.causal:
        return places, keys
    if block.positions == "each":
        places = [seeing for place in places if (seeing := _seeing(place, keys)) is not None]
    else:
        for number, place in enumerate(places):
            where = (*path, "positions", number) if isinstance(block.positions, tuple) else (*path, "positions")
            _check_forward(binder, place, keys, where)
    if not places:
        raise binder.loaded.error((*path, "keys"), f"no token sees {place_label(keys)}", _ORDER)
    return places, keys


def _seeing(query: Place, keys: Place) -> Place | None:
    """A query position on those prompts where it sees a key; None where there is no such prompt."""
    pairs = zip(query.positions, keys.positions, strict=True)
    positions = tuple(q if q and k and min(k) <= max(q) else None for q, k in pairs)
    return None if all(position is None for position in positions) else replace(query, positions=positions)


def _check_forward(binder: Binder, query: Place, keys: Place, path: KeyPath) -> None:
    """Refuse keys that come after every query: no token sees them."""
    for prompt, (q, k) in enumerate(zip(query.positions, keys.positions, strict=True)):
        if q and k and max(k) > max(q):
            problem = f"the edge from {place_label(query)} to {place_label(keys)} looks forward in time: "
            problem += f"in prompt {prompt} key {max(k)} comes after the last query, {max(q)}"
            raise binder.loaded.error(path, problem, _ORDER)


def _named(loaded: LoadedConfig, units: Sequence[Unit], blocks: Sequence[UnitBlock]) -> list[Unit]:
    """The units with names that differ: with the file, with the place, where they would not."""
    units = [replace(unit, name=name) for unit, name in zip(units, _with_files(units, blocks), strict=True)]
    counts = Counter(unit.name for unit in units)
    templates = len({unit.place.template for unit in units if unit.place.template is not None}) > 1
    named = [
        replace(unit, name=f"{unit.name}@{_place_name(unit, templates)}") if counts[unit.name] > 1 else unit
        for unit in units
    ]
    seen: dict[str, Unit] = {}
    for unit in named:
        if unit.name in seen:
            problem = f"{unit.name} is there already (ablate.units[{seen[unit.name].block}])"
            raise loaded.error(("ablate", "units", unit.block), problem, "Leave it out in one place.")
        seen[unit.name] = unit
    return named


def _with_files(units: Sequence[Unit], blocks: Sequence[UnitBlock]) -> Iterator[str]:
    """Names, with the file's in front where two files have directions of the same name."""
    files: dict[str, set[str]] = defaultdict(set)
    for unit in units:
        if unit.kind == "direction":
            files[unit.name].add(_stem(blocks, unit))
    for unit in units:
        yield f"{_stem(blocks, unit)}:{unit.name}" if len(files[unit.name]) > 1 else unit.name


def _stem(blocks: Sequence[UnitBlock], unit: Unit) -> str:
    return Path(blocks[unit.block].file or "").stem


def _place_name(unit: Unit, templates: bool) -> str:
    label = place_label(unit.place)
    if templates and unit.place.template is not None:
        label = f"{label}/{unit.place.template}"
    return f"{label}<{place_label(unit.keys)}" if unit.kind == "edge" else label


def names(units: Iterable[Unit]) -> dict[str, Unit]:
    """Every unit by its name."""
    return {unit.name: unit for unit in units}


def find(units: Mapping[str, Unit], text: str, loaded: LoadedConfig, path: KeyPath) -> Unit:
    """The unit of a name that the config gives.

    Args:
        units: What `names` gives.
        text: The name.
        loaded: The config.
        path: Where the name stands (`("ablate", "sets", "name movers", 2)`).

    Raises:
        UserError: There is no such unit; says the nearest.
    """
    if text in units:
        return units[text]
    known = list(units)
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    places = [name for name in known if name.partition("@")[0] == text]
    remedy = f"Say where: {', '.join(places[:_LISTED])}." if places else nearest(text, known)
    problem = f"{text!r} is not among the units: {', '.join(known[:_LISTED])}{more}"
    raise loaded.error(path, problem, remedy or "Add it to ablate.units, or name another.")
