"""Where in the network a trial acts: from a site block of the config to one spec per trial."""

from collections.abc import Iterator, Sequence
from typing import Literal

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.places import LayerWindow, Positions, SiteBlock, Units
from mechinterp_cli.methods.specs import Grid, Place, TrialSpec
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS, NEURON_KINDS
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.tasks.spans import resolve_span

KeyPath = tuple[int | str, ...]


class Binder:
    """Brings layers, heads, neurons and positions of a config to a model and a prompt set, before any forward pass.

    Every error names file, line and key.

    Args:
        loaded: The config, for errors with file and line.
        section: The method's key (`patch`).
        anatomy: The model.
        prompts: The task's prompts.
    """

    def __init__(self, loaded: LoadedConfig, section: str, anatomy: Anatomy, prompts: PromptSet) -> None:
        self.loaded = loaded
        self.section = section
        self.anatomy = anatomy
        self.prompts = prompts

    def expand(self, blocks: Sequence[BaseConfig]) -> list[TrialSpec]:
        """One spec per trial, in the order block, layer, unit, position.

        Raises:
            UserError: As `grids`.
        """
        specs: list[TrialSpec] = []
        for grid in self.grids(blocks):
            specs += [grid.spec(at, len(specs) + at) for at in range(len(grid))]
        return specs

    def grids(self, blocks: Sequence[BaseConfig]) -> Iterator[Grid]:
        """The trials by block and layer; blocks of another kind are passed over.

        Raises:
            UserError: A layer, head, neuron, position or span that is not there; names the key.
        """
        for number, block in enumerate(blocks):
            if not isinstance(block, SiteBlock):
                continue
            path: KeyPath = (self.section, "sites", number)
            places = tuple(self.places(block.positions, path))
            keys = self._keys(block, path)
            for layer, layers in self.layers((block.kind,), block.layers, path, block.kind):
                units = tuple(self._units(block, layers, path))
                yield Grid(number, block.kind, layer, layers, units, places, keys)

    def _fail(self, path: KeyPath, problem: str, remedy: str = "") -> UserError:
        return self.loaded.error(path, problem, remedy)

    def layers(
        self,
        kinds: Sequence[str],
        chosen: Literal["all"] | tuple[int, ...] | LayerWindow,
        path: KeyPath,
        name: str,
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(reported layer, edited layers) of every trial.

        Args:
            kinds: Sites that a layer must have.
            chosen: The block's `layers`.
            path: Of the block.
            name: What the block calls its kind.

        Raises:
            UserError: A layer is not there or lacks a site; says why.
        """
        anatomy = self.anatomy
        lacking = [next((kind for kind in kinds if kind in layer.missing), None) for layer in anatomy.layers]
        have = [layer for layer, kind in enumerate(lacking) if kind is None]
        if not have:
            reason = anatomy.layers[-1].missing[lacking[-1] or ""]
            known = ", ".join(anatomy.sites)
            raise self._fail((*path, "kind"), f"{name}: {reason}", f"Sites of this model: {known}.")
        if isinstance(chosen, LayerWindow):
            yield from self._windows(chosen.window, have)
            return
        for place, layer in enumerate(have if chosen == "all" else chosen):
            if layer >= anatomy.n_layers:
                problem = f"{layer} is outside 0..{anatomy.n_layers - 1}"
                remedy = f"{self.loaded.config.model.id} has {anatomy.n_layers} layers, counted from 0."
                raise self._fail((*path, "layers", place), problem, remedy)
            kind = lacking[layer]
            if kind is not None:
                reason = anatomy.layers[layer].missing[kind]
                raise self._fail((*path, "layers", place), f"{layer}: {reason}", f"Layers with {name}: {have}.")
            yield int(layer), (int(layer),)

    def _windows(self, window: int, have: Sequence[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Every centre, with those layers of its window that have the site."""
        for centre in range(self.anatomy.n_layers):
            inside = range(max(0, centre - window // 2), min(self.anatomy.n_layers, centre + window - window // 2))
            layers = tuple(layer for layer in inside if layer in have)
            if layers:
                yield centre, layers

    def _units(self, block: SiteBlock, layers: Sequence[int], path: KeyPath) -> Iterator[tuple[int, ...] | None]:
        """The heads or neurons of every trial; None is all of them."""
        kind = block.kind
        by_head, by_neuron = kind in HEAD_KINDS + KEY_KINDS, kind in NEURON_KINDS
        for name, wanted in (("heads", by_head), ("neurons", by_neuron)):
            if getattr(block, name) is not None and not wanted:
                raise self._fail((*path, name), f"{kind} has no {name}", f"Leave out {name} for {kind}.")
        if by_head:
            yield from self.units(kind, block.heads or "each", layers, path)
        elif by_neuron:
            yield from self.units(kind, block.neurons or "all", layers, path)
        else:
            yield None

    def units(self, kind: str, chosen: Units, layers: Sequence[int], path: KeyPath) -> Iterator[tuple[int, ...] | None]:
        """The heads or neurons of every trial; None is all of them.

        Args:
            kind: The site; `k` and `v` count key/value heads.
            chosen: The block's `heads` or `neurons`.
            layers: The layers that are edited together.
            path: Of the block.

        Raises:
            UserError: A head or neuron that one of the layers does not have.
        """
        field = "neurons" if kind in NEURON_KINDS else "heads"
        counts = {layer: self.anatomy.layers[layer].features(kind, self.anatomy.d_model) for layer in layers}
        layer = min(counts, key=lambda layer: counts[layer])
        if chosen == "all":
            yield None
        elif chosen == "each":
            if len(set(counts.values())) > 1:
                problem = f"`each` needs layers with as many {field}, a window has {sorted(set(counts.values()))}"
                raise self._fail((*path, field), problem, f"Use all, or list {field}.")
            yield from ((unit,) for unit in range(counts[layer]))
        else:
            for place, item in enumerate(chosen):
                units = item if isinstance(item, tuple) else (int(item),)
                for unit in units:
                    if unit >= counts[layer]:
                        noun = "key/value heads" if kind in ("k", "v") else field
                        has = f"{self.loaded.config.model.id} has {counts[layer]} {noun} in layer {layer}"
                        problem = f"{unit} is outside 0..{counts[layer] - 1}"
                        raise self._fail((*path, field, place), problem, f"{has}, counted from 0.")
                yield units

    def places(self, positions: Positions, path: KeyPath) -> Iterator[Place]:
        """The positions of every trial.

        Args:
            positions: The block's `positions`.
            path: Of the block.

        Raises:
            UserError: A position or span that is not there.
        """
        prompts, path = self.prompts.prompts, (*path, "positions")
        if positions == "all":
            yield Place(tuple(tuple(range(p.length)) for p in prompts))
        elif positions == "last":
            yield Place(tuple((p.length - 1,) for p in prompts), span="end")
        elif positions == "each":
            yield from self._each(path)
        else:
            for number, item in enumerate(positions):
                spots = item if isinstance(item, tuple) else (item,)
                yield self.together(spots, (*path, number))

    def _each(self, path: KeyPath) -> Iterator[Place]:
        """One place per position of each template; positions mean the same only within one template."""
        prompts = self.prompts.prompts
        templates = list(dict.fromkeys(p.template for p in prompts))
        for template in templates:
            members = [p for p in prompts if p.template == template]
            lengths = sorted({p.length for p in members})
            if len(lengths) > 1:
                problem = f"`each` needs prompts of one length within a template, {template!r} has {lengths}"
                names = ", ".join(self.prompts.span_names)
                raise self._fail(path, problem, f"Name spans instead: {names}.")
            for position in range(lengths[0]):
                at = tuple((position,) if p.template == template else None for p in prompts)
                yield Place(at, position=position, template=template)

    def together(self, spots: Sequence[int | str], path: KeyPath) -> Place:
        """Some positions and spans as one place.

        Args:
            spots: Positions and names of spans.
            path: Of the list.

        Raises:
            UserError: One that is not there.
        """
        per_prompt: list[set[int]] = [set() for _ in self.prompts.prompts]
        for spot in spots:
            for positions, found in zip(per_prompt, self._spot(spot, path), strict=True):
                positions.update(found)
        single = spots[0] if len(spots) == 1 else None
        span = single if isinstance(single, str) else "+".join(map(str, spots)) if single is None else None
        position = single if isinstance(single, int) else None
        return Place(tuple(tuple(sorted(positions)) for positions in per_prompt), position=position, span=span)

    def _spot(self, spot: int | str, path: KeyPath) -> Sequence[tuple[int, ...]]:
        if isinstance(spot, str):
            try:
                return resolve_span(self.prompts, spot)
            except UserError as error:
                raise self._fail(path, error.cause, error.remedy) from error
        shortest = min(p.length for p in self.prompts.prompts)
        if spot >= shortest:
            problem = f"{spot} is outside 0..{shortest - 1}"
            raise self._fail(path, problem, f"The shortest prompt has {shortest} tokens, counted from 0.")
        if len({p.template for p in self.prompts.prompts}) > 1:
            problem = f"position {spot} means something else in each template"
            raise self._fail(path, problem, f"Name a span: {', '.join(self.prompts.span_names)}.")
        return [(spot,)] * len(self.prompts.prompts)

    def _keys(self, block: SiteBlock, path: KeyPath) -> Place | None:
        if block.keys == "all":
            return None
        if block.kind not in KEY_KINDS:
            raise self._fail((*path, "keys"), f"{block.kind} has no keys", "Leave out keys, or use scores or pattern.")
        return self.together(block.keys, (*path, "keys"))
