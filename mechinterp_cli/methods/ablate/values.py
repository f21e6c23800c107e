"""What stands in place of an ablated part: zero, means, other prompts' activations, noise, fitted constants."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp_cli.engine.activations import feature_shape
from mechinterp_cli.engine.edits import Edit, Op, RowValues, Site
from mechinterp_cli.methods.ablate.averages import Average, averages
from mechinterp_cli.methods.ablate.options import AblateOptions, ValueName
from mechinterp_cli.methods.ablate.rows import Drawn, Held, Table
from mechinterp_cli.methods.ablate.sources import Donors, donors, every_prompt, mean_set
from mechinterp_cli.methods.ablate.units import Merged
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.tasks.prompts import PromptSet

OTHER = "other"
"""The stream of the prompts that `resample` reads."""
HELD_NOISE_BYTES = 256 * 2**20
"""Noise that is held at once; what is dropped is drawn again, the same."""
Members = Sequence[int]
"""The prompts of a bucket, each once."""


class Values(ABC):
    """What stands in place of ablated parts.

    In a bucket each prompt stands `draws` times in a row, in its tokens and in every edit.

    Args:
        prompts: The experiment's prompts.
        reference: In words, for the trials table.
        draws: Copies of each prompt.
        notes: What a reader of the numbers must know.
    """

    def __init__(self, prompts: PromptSet, reference: str, draws: int = 1, notes: tuple[str, ...] = ()) -> None:
        self.prompts = prompts
        self.reference = reference
        self.draws = draws
        self.notes = notes
        self._shared: dict[tuple[object, ...], RowValues] = {}

    def tokens(self, members: Members) -> dict[str, Tensor]:
        """Streams of a bucket besides `clean` that the edits read, ids [prompts × draws, positions]."""
        return {}

    def facts(self, trial: int) -> dict[str, float]:
        """What else the trials table says of a trial, by column."""
        return {}

    @abstractmethod
    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """What is done to one merged part on a bucket, in this order.

        Args:
            merged: The part; one of those that the values were made for.
            members: The bucket's prompts.
        """

    def _edit(self, merged: Merged, members: Members, op: Op, **how: Any) -> Edit:
        positions = self._rows(merged.place.positions, members)
        return Edit(_site(merged), op, positions, merged.part.units, **how)

    def _rows(self, positions: Sequence[tuple[int, ...] | None], members: Members) -> tuple[tuple[int, ...], ...]:
        return tuple(positions[i] or () for i in members for _ in range(self.draws))

    def _once(self, make: Callable[[], RowValues], *key: object) -> RowValues:
        """One object for all trials that need the same: they are then edited together."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


class Zero(Values):
    """Nothing: zero, no component along directions, attention that is masked."""

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """One edit: `mask` of an edge, `project` of directions, else `zero`."""
        if merged.part.kind == "scores":
            keys = None if merged.keys is None else self._rows(merged.keys.positions, members)
            return (self._edit(merged, members, "mask", keys=keys),)
        if merged.basis is not None:
            return (self._edit(merged, members, "project", values=merged.basis),)
        return (self._edit(merged, members, "zero"),)


class Constant(Values):
    """A constant by site and group of prompts; directions are left with its component along them.

    Args:
        prompts: The experiment's prompts.
        reference: In words.
        tables: Site to constants [groups, positions or 1, *features].
        group_of: For every prompt its group.
    """

    def __init__(
        self, prompts: PromptSet, reference: str, tables: Mapping[Site, Tensor], group_of: Sequence[int]
    ) -> None:
        super().__init__(prompts, reference)
        self.tables = tables
        self.group_of = group_of

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """`constant`; for directions `project` and `add`."""
        site, basis, bucket = _site(merged), merged.basis, tuple(members)
        if basis is None:
            values = self._once(lambda: self._table(self.tables[site], members), site, bucket)
            return (self._edit(merged, members, "constant", values=values),)
        # The basis itself is part of the key, so that it lives as long as what was made from it.
        values = self._once(lambda: self._table(_along(self.tables[site], basis), members), site, bucket, basis)
        project = self._edit(merged, members, "project", values=basis)
        return project, self._edit(merged, members, "add", values=values)

    def _table(self, table: Tensor, members: Members) -> "Table":
        return Table(table, tuple(self.group_of[i] for i in members))


class Resample(Values):
    """The activations of other prompts, a stream of their own; of directions the component along them."""

    def __init__(self, prompts: PromptSet, reference: str, drawn: Donors) -> None:
        few = f"resample: {drawn.draws} draws of {drawn.wanted}: a template has no more other prompts of one length"
        super().__init__(prompts, reference, drawn.draws, (few,) if drawn.draws < drawn.wanted else ())
        self.drawn = drawn

    def tokens(self, members: Members) -> dict[str, Tensor]:
        """The other prompts' tokens."""
        return {OTHER: torch.tensor([tokens for i in members for tokens in self.drawn.tokens[i]])}

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """`replace` or `swap` from the stream `other`."""
        if merged.basis is not None:
            return (self._edit(merged, members, "swap", source=OTHER, values=merged.basis),)
        return (self._edit(merged, members, "replace", source=OTHER),)


class Noise(Values):
    """Gaussian noise that is added, in standard deviations of each feature.

    Args:
        prompts: The experiment's prompts.
        reference: In words.
        draws: Of each prompt.
        seed: Of the noise.
        spreads: Site to the standard deviation of the noise [*features].
    """

    def __init__(
        self, prompts: PromptSet, reference: str, draws: int, seed: int, spreads: Mapping[Site, Tensor]
    ) -> None:
        super().__init__(prompts, reference, draws)
        self.spreads = spreads
        self.seed = seed
        self.held = Held(HELD_NOISE_BYTES)

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """`add`."""
        site = _site(merged)
        values = self._once(lambda: self._noise(site, members), site, tuple(members))
        return (self._edit(merged, members, "add", values=values),)

    def _noise(self, site: Site, members: Members) -> "Drawn":
        length = self.prompts.prompts[members[0]].length
        names = [(self.prompts.prompts[i].clean_tokens, draw) for i in members for draw in range(self.draws)]
        seeds = [_seed(self.seed, site, draw, tokens) for tokens, draw in names]
        return Drawn(tuple(seeds), length, self.spreads[site], self.held)


class Optimal(Values):
    """Constants that were fitted elsewhere, for one ablation (of a set they are fitted together).

    Args:
        prompts: The experiment's prompts.
        constants: Site to [*features], all of the site's; those that an ablation edits are used.
    """

    def __init__(self, prompts: PromptSet, constants: Mapping[Site, Tensor]) -> None:
        super().__init__(prompts, "fitted constant")
        self.constants = constants

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """`constant`; for directions `project` and `add`."""
        units, whole = merged.part.units, self.constants[_site(merged)].detach()
        constant = (whole if units is None else whole[list(units)])[None, None]
        if merged.basis is None:
            return (self._edit(merged, members, "constant", values=constant),)
        project = self._edit(merged, members, "project", values=merged.basis)
        return project, self._edit(merged, members, "add", values=_along(constant, merged.basis))


def values_of(name: ValueName, options: AblateOptions, setting: Setting, parts: Sequence[Merged]) -> Values:
    """What stands in place of parts; everything that it needs of the model is captured here, in one pass.

    Args:
        name: Which value; for `optimal` zeros, as for a plan.
        options: The section.
        setting: Config, model and prompts; without `setting.compute` means and spreads are zero.
        parts: Everything that any trial edits.

    Raises:
        UserError: The value makes no sense for a part, or the prompts it needs are not there; names the key.
    """
    check_parts(name, options, setting, parts)
    prompts, model = setting.prompts, setting.model
    sites = {_site(merged) for merged in parts if merged.part.kind != "scores"}
    match name:
        case "zero":
            return Zero(prompts, "zero")
        case "project":
            return Zero(prompts, "projected out")
        case "mean":
            over = mean_set(options.mean, setting)
            found = averages(model, sites, over.sample, compute=setting.compute)
            return Constant(prompts, over.words, _means(found), over.group_of)
        case "mean_of_prompt":
            each = range(len(prompts.prompts))
            found = averages(model, sites, every_prompt(setting, each), compute=setting.compute)
            return Constant(prompts, "mean over the prompt's own positions", _means(found), each)
        case "resample":
            asked = options.resample
            return Resample(prompts, f"other prompts ({asked.stream}), seed {asked.seed}", donors(asked, setting))
        case "noise":
            asked_noise = options.noise
            words = f"noise of {asked_noise.scale:g} standard deviations, seed {asked_noise.seed}"
            found = averages(model, sites, every_prompt(setting), compute=setting.compute)
            spreads = {site: average.spread[0, 0] * asked_noise.scale for site, average in found.items()}
            return Noise(prompts, words, asked_noise.draws, asked_noise.seed, spreads)
        case "optimal":
            return Optimal(prompts, {site: torch.zeros(feature_shape(model.anatomy, site)) for site in sites})


def check_parts(name: ValueName, options: AblateOptions, setting: Setting, parts: Sequence[Merged]) -> None:
    """Refuse values that make no sense for a part.

    Raises:
        UserError: Names the value's place in `ablate.values`.
    """
    path = ("ablate", "values", options.values.index(name)) if name in options.values else ("ablate", "values")
    if name != "zero" and any(merged.part.kind == "scores" for merged in parts):
        problem = f"{name}: an edge is masked, nothing stands in its place"
        raise setting.loaded.error(path, problem, "Use values: [zero].")
    directions = [merged.basis is not None for merged in parts]
    if name == "project" and not all(directions):
        part = parts[directions.index(False)].part
        problem = f"project takes directions out of a stream, and {part.kind} in layer {part.layer} is none"
        raise setting.loaded.error(path, problem, "Use units of kind direction, or values: [zero].")
    if name == "noise" and any(directions):
        problem = "noise: its size is measured feature by feature, which says nothing of a direction"
        raise setting.loaded.error(path, problem, "Use zero, project, mean, mean_of_prompt or resample for directions.")


def _means(found: Mapping[Site, Average]) -> dict[Site, Tensor]:
    return {site: average.mean for site, average in found.items()}


def _site(merged: Merged) -> Site:
    return Site(merged.part.kind, merged.part.layer)


def _along(x: Tensor, basis: Tensor) -> Tensor:
    """The part of x [..., features] in the span of orthonormal rows."""
    rows = basis.to(x)
    return (x @ rows.T) @ rows


def _seed(seed: int, site: Site, draw: int, tokens: Sequence[int]) -> int:
    """A generator's seed; by the prompt's tokens, so that neither batching nor the order of prompts matters."""
    text = f"{seed} {site.kind}.{site.layer} {draw} {' '.join(map(str, tokens))}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
