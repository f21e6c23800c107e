"""Passes whose edges carry what a routing says: many of them together, layer by layer, as differences from an anchor.

Every target's input is the anchor's + Σ over live edges (source − anchor's) + Σ over other edges (other − anchor's):
matrix products of weights [targets, sources] and differences [sources, cells × d_model]. Targets of one pass that are
given the same input share its rows. A source that is live to all that it matters to is kept in one running sum only.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.edge_layers import EdgeLayers, Side
from mechinterp_cli.engine.edge_routing import LayerSlots, Needs, Routing, Slots
from mechinterp_cli.engine.wavefront import check_finite

Inputs = Mapping[int, Float[Tensor, "prompts positions d_model"]]
"""Target to the difference of its input from the anchor's."""

Asked = tuple[Routing, Needs]
"""A pass: what its edges carry, and what of it is computed."""


@dataclass(frozen=True, eq=False)
class Cells:
    """The (prompt, position) cells of a pass, by the span of positions that each is in.

    Args:
        order: The cells sorted by span, or None where there is one span.
        inverse: Takes sorted cells back.
        bounds: Of each span among the sorted cells.
    """

    order: Tensor | None
    inverse: Tensor | None
    bounds: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, span_of: Int[Tensor, "prompts positions"], spans: int) -> "Cells":
        """The cells of a graph with that many spans.

        Args:
            span_of: The span of every position.
            spans: How many there are.
        """
        flat = span_of.flatten()
        if spans == 1:
            return cls(None, None, ((0, len(flat)),))
        order = torch.argsort(flat, stable=True)
        ends = torch.bincount(flat, minlength=spans).cumsum(0).tolist()
        return cls(order, torch.argsort(order), tuple(zip([0, *ends[:-1]], ends, strict=True)))

    def sorted(self, x: Float[Tensor, "n cells d_model"]) -> Float[Tensor, "n cells d_model"]:
        """By span."""
        return x if self.order is None else x[:, self.order]

    def restored(self, x: Float[Tensor, "n cells d_model"]) -> Float[Tensor, "n cells d_model"]:
        """As prompts and positions have them."""
        return x if self.inverse is None else x[:, self.inverse]


@dataclass(eq=False)
class _Pass:
    """One pass under way.

    Args:
        routing: What its edges carry.
        needs: What is computed.
        weights: Of the sources that are kept apart, [spans, targets, apart].
        differences: Theirs from the anchor, cells sorted by span, [apart, cells, d_model]; `filled` of them are known.
        slot: Source to its place among them.
    """

    routing: Routing
    needs: Needs
    weights: Tensor
    differences: Tensor
    slot: Mapping[int, int]
    filled: int = 0
    shared: Tensor | None = None
    """Sum of the differences of the sources that are live to everything, [cells, d_model]."""
    fresh: Tensor | None = None
    """What this layer's heads gave to that sum."""
    found: dict[int, Tensor] = field(default_factory=dict)

    def groups(self, targets: np.ndarray) -> dict[bytes, list[int]]:
        """Those of some targets of one layer that are computed, by what their edges carry."""
        found: dict[bytes, list[int]] = {}
        for target in targets[self.needs.targets[targets]].tolist():
            found.setdefault(self._key(target), []).append(target)
        return found

    def _key(self, target: int) -> bytes:
        if target in self.routing.pinned:
            return target.to_bytes(8, "little")
        own = np.concatenate([self.routing.live[:, target][:, self.needs.apart], self.routing.other[:, target]], axis=1)
        return np.packbits(own).tobytes() + b"assembled"


@dataclass(frozen=True, eq=False)
class Base:
    """What passes start from.

    Args:
        layers: Runs parts of the layers.
        slots: Of the graph.
        anchor: The stream whose numbers are known.
        other: Each source as the other stream has it less the anchor's, cells sorted by span; None where no edge
            carries it.
        embed: What enters layer 0 less the anchor's, [cells, d_model]; None where it is the anchor's.
        cells: The cells.
        read: Of each prompt the cell that is read.
        read_span: Its span.
    """

    layers: EdgeLayers
    slots: Slots
    anchor: Side
    other: Float[Tensor, "sources cells d_model"] | None
    embed: Float[Tensor, "cells d_model"] | None
    cells: Cells
    read: Int[Tensor, " prompts"]
    read_span: Int[Tensor, " prompts"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Prompts, positions, d_model."""
        prompts, positions, d_model = self.anchor.entering[0].shape
        return prompts, positions, d_model

    def bytes_of(self, needs: Needs) -> int:
        """About what one pass takes."""
        prompts, positions, d_model = self.shape
        most = max(int(needs.targets[layer.attention].sum()) for layer in self.slots.layers)
        return (int(needs.apart.sum()) + 4 * most + 12) * prompts * positions * d_model * 4


def final_states(base: Base, some: Sequence[Asked]) -> Float[Tensor, "passes prompts d_model"]:
    """What the final norm and head are given in each pass, where each prompt is read."""
    passes = _carried_out(base, some)
    anchor = base.anchor.entering[-1].flatten(0, 1)[base.read]
    logits = base.slots.logits
    return torch.stack([anchor + _read(base, one) if one.needs.targets[logits] else anchor for one in passes])


def inputs_of(base: Base, some: Sequence[Asked]) -> list[Inputs]:
    """The difference of the wanted targets' inputs from the anchor's in each pass, of those that differ.

    Args:
        base: What passes start from.
        some: The passes; `logits` is none of their wanted targets.
    """
    return [one.found for one in _carried_out(base, some)]


def _carried_out(base: Base, some: Sequence[Asked]) -> list[_Pass]:
    with base.layers.open():
        passes = [_begun(base, *one) for one in some]
        for layer, slots in enumerate(base.slots.layers):
            _through(base, layer, slots, passes)
    return passes


def _begun(base: Base, routing: Routing, needs: Needs) -> _Pass:
    prompts, positions, d_model = base.shape
    apart = np.flatnonzero(needs.apart)
    device = base.anchor.entering[0].device
    weights = torch.from_numpy(routing.live[:, :, apart].astype(np.float32)).to(device)
    differences = torch.empty(len(apart), prompts * positions, d_model, device=device)
    one = _Pass(routing, needs, weights, differences, {int(source): i for i, source in enumerate(apart)})
    if base.embed is not None and routing.alters_embed and needs.sources[0]:
        _add(base, one, 0, base.embed)
    return one


def _add(base: Base, one: _Pass, source: int, difference: Float[Tensor, "cells d_model"]) -> None:
    """Let what is to come know what a source adds; sources come in their order."""
    slot = one.slot.get(source)
    if slot is not None:
        one.differences[slot] = base.cells.sorted(difference[None])[0]
        one.filled = slot + 1
        return
    one.shared = difference.clone() if one.shared is None else one.shared.add_(difference)
    one.fresh = difference.clone() if one.fresh is None else one.fresh.add_(difference)


def _apart(base: Base, one: _Pass, targets: Sequence[int], first: int) -> Float[Tensor, "n cells d_model"]:
    """What the sources kept apart, from the `first` on, give to some targets; cells sorted by span."""
    known = one.differences[first : one.filled]
    given = known.new_zeros(len(targets), *known.shape[1:])
    if len(known):
        for span, (low, high) in enumerate(base.cells.bounds):
            weights = one.weights[span, list(targets), first : one.filled]
            given[:, low:high] = _weighed(weights, known[:, low:high])
    return given


def _weighed(weights: Float[Tensor, "n m"], x: Float[Tensor, "m cells d_model"]) -> Float[Tensor, "n cells d_model"]:
    return torch.unflatten(weights @ x.flatten(1), 1, x.shape[1:])


def _assembled(base: Base, one: _Pass, targets: Sequence[int]) -> Float[Tensor, "n cells d_model"]:
    """The difference of some targets' inputs from the anchor's, by all sources so far and all of the other stream."""
    given = _apart(base, one, targets, 0)
    if base.other is not None:
        for span, (low, high) in enumerate(base.cells.bounds):
            carried = one.routing.other[span, list(targets)]
            used = np.flatnonzero(carried.any(0))
            if len(used):  # sources stand in their order: what the targets read is a slice
                own = slice(int(used[0]), int(used[-1]) + 1)
                weights = torch.from_numpy(carried[:, own].astype(np.float32)).to(given.device)
                given[:, low:high] += _weighed(weights, base.other[own, low:high])
    given = base.cells.restored(given)
    return given if one.shared is None else given + one.shared


def _through(base: Base, layer: int, slots: LayerSlots, passes: Sequence[_Pass]) -> None:
    """Pass what differs through one layer."""
    shape = base.shape
    blocks, places, mlps = list[Tensor](), list[tuple[int, int, int]](), dict[int, tuple[Tensor, int]]()
    for number, one in enumerate(passes):
        one.fresh = None
        groups = list(one.groups(slots.attention).values())
        reads_mlp = slots.mlp_input is not None and bool(one.needs.targets[slots.mlp_input])
        first = [own[0] for own in groups] + ([slots.mlp_input] if reads_mlp and slots.mlp_input is not None else [])
        if not first:
            continue
        given = torch.unflatten(_assembled(base, one, first), 1, shape[:2])
        for at, own in enumerate(groups):
            difference = one.routing.pinned.get(own[0], given[at])
            one.found.update({target: difference for target in own if target in one.needs.wanted})
            places += [(number, target, len(blocks)) for target in own]
            blocks.append(difference)
        if reads_mlp:
            mlps[number] = (given[-1], one.filled)
    if blocks:
        _attention(base, layer, slots, passes, torch.stack(blocks), places)
    if mlps:
        _mlp(base, layer, slots, passes, mlps)


def _attention(
    base: Base,
    layer: int,
    slots: LayerSlots,
    passes: Sequence[_Pass],
    blocks: Float[Tensor, "blocks prompts positions d_model"],
    places: Sequence[tuple[int, int, int]],
) -> None:
    """What a layer's heads add, given to all that comes after.

    Args:
        base: What passes start from.
        layer: The layer.
        slots: Its slots.
        passes: All of them.
        blocks: Distinct inputs, less the anchor's.
        places: Pass, target and block of every target that is computed.
    """
    side = base.anchor
    found = {number for number, _, _ in places if passes[number].needs.sources[slots.heads].any()}
    if not found:
        return
    numbers = sorted(found)
    heads = _projected(base, layer, slots, numbers, blocks, places)
    z, before = base.layers.attend(layer, side, *heads), side.z[layer]
    check_finite(z, layer, "a patched pass")
    before = base.layers.scaled(layer, before, side.scale[layer])
    if slots.joint:
        z = base.layers.scaled(layer, z, base.layers.scale(layer, z))
    writes = base.layers.writes(layer, z)
    for head, source in enumerate(slots.heads.tolist()):
        own = [i for i, number in enumerate(numbers) if passes[number].needs.sources[source]]
        if own:
            added = ((z[own, :, :, head] - before[:, :, head]) @ writes[head]).flatten(1, 2)
            for difference, i in zip(added, own, strict=True):
                _add(base, passes[numbers[i]], source, difference)


def _projected(
    base: Base,
    layer: int,
    slots: LayerSlots,
    numbers: Sequence[int],
    blocks: Float[Tensor, "blocks prompts positions d_model"],
    places: Sequence[tuple[int, int, int]],
) -> list[Float[Tensor, "passes prompts positions heads d"]]:
    """q, k and v of some passes: of each target its own block's, and the anchor's of all others."""
    side, item_of = base.anchor, {number: i for i, number in enumerate(numbers)}
    reads = [list[int]() for _ in blocks]
    for _, target, block in places:
        reads[block].append(target - int(slots.q[0]))
    order = sorted(range(len(reads)), key=reads.__getitem__)  # blocks that are read alike are projected together
    rank = {block: i for i, block in enumerate(order)}
    rows = base.layers.front(layer, side.entering[layer] + blocks[order], [reads[block] for block in order])
    found, call = list[Tensor](), side.calls[layer]
    for x, own, new in zip((call.q, call.k, call.v), (slots.q, slots.k, slots.v), rows, strict=True):
        anchor = x[:, :, base.layers.start :].transpose(1, 2)
        whole = anchor.expand(len(numbers), *anchor.shape).clone()
        at = [(item_of[n], t - own[0], rank[b]) for n, t, b in places if n in item_of and own[0] <= t <= own[-1]]
        if at:
            items, own_heads, own_blocks = (torch.tensor(index, device=x.device) for index in zip(*at, strict=True))
            whole[items, :, :, own_heads] = new[own_blocks, :, :, own_heads]
        found.append(whole)
    return found


def _mlp(
    base: Base, layer: int, slots: LayerSlots, passes: Sequence[_Pass], begun: Mapping[int, tuple[Tensor, int]]
) -> None:
    """What a layer's MLP adds, given to all that comes after.

    Args:
        base: What passes start from.
        layer: The layer.
        slots: Its slots.
        passes: All of them.
        begun: Pass to its MLP's input without this layer's heads, less the anchor's, and how many sources that knew.
    """
    assert slots.mlp is not None and slots.mlp_input is not None
    inputs = []
    for number, (given, known) in begun.items():
        one = passes[number]
        if slots.mlp_input in one.routing.pinned:
            given = one.routing.pinned[slots.mlp_input]
        elif not slots.parallel:
            own = base.cells.restored(_apart(base, one, [slots.mlp_input], known))[0]
            own = own if one.fresh is None else own + one.fresh
            given = given + own.view(given.shape)
        if slots.mlp_input in one.needs.wanted:
            one.found[slots.mlp_input] = given
        inputs.append(given)
    chosen = [number for number in begun if passes[number].needs.sources[slots.mlp]]
    if not chosen:
        return
    before = base.anchor.mlp[layer]
    assert before is not None
    kept = [given for number, given in zip(begun, inputs, strict=True) if number in chosen]
    added = base.layers.mlp(layer, base.anchor.mid[layer] + torch.stack(kept)) - before
    check_finite(added, layer, "a patched pass")
    for number, difference in zip(chosen, added.flatten(1, 2), strict=True):
        _add(base, passes[number], slots.mlp, difference)


def _read(base: Base, one: _Pass) -> Float[Tensor, "prompts d_model"]:
    """The difference of what is read at the end from the anchor's."""
    logits, read = base.slots.logits, base.read
    pinned = one.routing.pinned.get(logits)
    if pinned is not None:
        return pinned.flatten(0, 1)[read]
    place = read if base.cells.inverse is None else base.cells.inverse[read]
    weights = one.weights[base.read_span, logits, : one.filled]
    given = torch.einsum("pn,npd->pd", weights, one.differences[: one.filled, place])
    if base.other is not None:
        other = torch.from_numpy(one.routing.other[:, logits]).to(given)[base.read_span]
        given = given + torch.einsum("pn,npd->pd", other, base.other[:, place])
    return given if one.shared is None else given + one.shared[read]


def batches(base: Base, asked: Iterable[Asked], memory: int) -> Iterator[list[Asked]]:
    """Passes that fit into memory together, in their order.

    Args:
        base: What passes start from.
        asked: The passes.
        memory: Bytes that some of them may take.
    """
    some, taken = list[Asked](), 0
    for routing, needs in asked:
        size = base.bytes_of(needs) + 2 * routing.live.nbytes
        if some and taken + size > memory:
            yield some
            some, taken = [], 0
        some.append((routing, needs))
        taken += size
    if some:
        yield some
