"""Activations of one stream put into another: what `patch` does and `attribute` estimates.

*Denoise* puts clean activations into the corrupted prompt, *noise* the other way (conventions of Heimersheim & Nanda
2404.15255).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.capture import Means, group_means
from mechinterp_cli.engine.edits import Edit, Site, Trial
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.interchange_options import InterchangeOptions
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import PromptSet

_OPERATIONS = {"pair": "replace", "other": "replace", "mean": "mean", "zero": "zero"}


@dataclass(frozen=True, eq=False)
class Interchange:
    """Streams and sources of an experiment, checked against model and prompts.

    Args:
        options: The section.
        prompts: The prompts.
        differs: For every prompt the positions at which the two streams' embeddings differ; none at all where nothing
            is corrupted.
        causal: Whether paired trials before the first of these are known to do nothing.
        embeds_alone: Whether paired trials on what enters layer 0 are known to do nothing anywhere else.
        draws: Copies of each prompt in a bucket.
    """

    options: InterchangeOptions
    prompts: PromptSet
    differs: tuple[frozenset[int], ...]
    causal: bool
    embeds_alone: bool
    draws: int = 1

    @property
    def base_stream(self) -> str:
        """The stream that is patched into."""
        return self.options.base_stream

    @property
    def source_stream(self) -> str:
        """The stream that is patched from: where nothing is corrupted, that of the other prompts."""
        return self.options.source_stream if self.has_corrupt else self.base_stream

    @property
    def has_corrupt(self) -> bool:
        """Whether there is a corrupted stream to normalise by."""
        return self.differs != ()

    @property
    def operation(self) -> str:
        """The edit's name in the trials table."""
        return _OPERATIONS[self.options.source]

    @property
    def source_name(self) -> str:
        """What is put there, in the trials table: a stream, or `mean` or `zero`."""
        return self.source_stream if self.options.source in ("pair", "other") else self.options.source

    def positions(self, spec: TrialSpec, prompt: int) -> tuple[int, ...] | None:
        """Positions that are really edited: none where the streams cannot differ, None where the trial is absent."""
        positions = spec.place.positions[prompt]
        if positions is None or self.options.source != "pair":
            return positions
        differs = self.differs[prompt]
        if self.embeds_alone and spec.enters_first_layer:
            return tuple(p for p in positions if p in differs)
        if not differs:
            return ()
        return tuple(p for p in positions if p >= min(differs)) if self.causal else positions

    def status(self, specs: Sequence[TrialSpec]) -> npt.NDArray[np.int8]:
        """[trials, prompts] of `Status`: to be computed, known to do nothing, or absent."""
        status = np.full((len(specs), len(self.prompts.prompts)), Status.OK, dtype=np.int8)
        for row, spec in enumerate(specs):
            for prompt in range(len(self.prompts.prompts)):
                positions = self.positions(spec, prompt)
                if positions is None:
                    status[row, prompt] = Status.ABSENT
                elif not positions:
                    status[row, prompt] = Status.TRIVIAL
        return status

    def expanded(self, members: Iterable[int]) -> list[int]:
        """A bucket's prompts, each once per draw."""
        return [i for i in members for _ in range(self.draws)]

    def tokens(self, members: Sequence[int]) -> dict[str, Tensor]:
        """Stream to ids [prompts × draws, positions] of a bucket."""
        chosen = [self.prompts.prompts[i] for i in self.expanded(members)]
        streams = {"clean": torch.tensor([prompt.clean_tokens for prompt in chosen])}
        if self.has_corrupt:
            streams["corrupt"] = torch.tensor([prompt.corrupt_tokens or prompt.clean_tokens for prompt in chosen])
        return streams

    def others(self, members: Sequence[int]) -> tuple[int, ...] | None:
        """For every prompt of a bucket the one whose activations it gets, for `source: other`; else None."""
        if self.options.source != "other":
            return None
        templates = [self.prompts.prompts[i].template for i in self.expanded(members)]
        return _other_prompts(type(self.options).method_name, self.options.seed, templates)

    def trials(self, specs: Sequence[TrialSpec], members: Sequence[int], means: Means | None) -> tuple[Trial, ...]:
        """The trials of one bucket; those that are known to do nothing on all of its prompts are left out.

        Args:
            specs: What is patched; a trial's `index` is its spec's.
            members: The bucket's prompts, each once.
            means: From `means_of`, for `source: mean`.
        """
        expanded, others = self.expanded(members), self.others(members)
        trials = []
        for spec in specs:
            computed = tuple(i for i, prompt in enumerate(expanded) if self.positions(spec, prompt))
            if computed:
                edits = tuple(self._edit(spec, layer, expanded, means, others) for layer in spec.layers)
                trials.append(Trial(spec.index, self.base_stream, edits, computed))
        return tuple(trials)

    def _edit(
        self,
        spec: TrialSpec,
        layer: int,
        members: Sequence[int],
        means: Means | None,
        others: tuple[int, ...] | None,
    ) -> Edit:
        site = Site(spec.kind, layer)
        positions = tuple(self.positions(spec, prompt) or () for prompt in members)
        keys = None if spec.keys is None else tuple(spec.keys.positions[prompt] or () for prompt in members)
        if self.options.source == "zero":
            return Edit(site, "zero", positions, spec.units, keys)
        if self.options.source == "mean":
            assert means is not None
            values = means.at(site, members)
            if spec.units is not None:
                values = values[:, :, list(spec.units)]
            return Edit(site, "constant", positions, spec.units, keys, values=values)
        return Edit(site, "replace", positions, spec.units, keys, source=self.source_stream, source_prompts=others)

    def means_of(
        self, model: LoadedModel, sites: set[Site], members: Sequence[Sequence[int]], *, compute: bool
    ) -> Means | None:
        """Data-set means of the source stream by template and length, for `source: mean`; else None.

        Args:
            model: The model.
            sites: Where.
            members: By bucket, the prompts.
            compute: Whether forward passes may be made; else means are zero.
        """
        if self.options.source != "mean":
            return None
        keys = [(prompt.template, prompt.length) for prompt in self.prompts.prompts]
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        group_of = [order[key] for key in keys]
        if not compute:
            return Means({site: torch.zeros(len(order), 1, 1) for site in sites}, group_of)
        stream = self.options.source_stream if self.has_corrupt else "clean"
        tokens = [self.tokens(part)[stream] for part in members]
        return group_means(model.model, model.anatomy, sites, tokens, members, group_of)


def bind(loaded: LoadedConfig, options: InterchangeOptions, anatomy: Anatomy, prompts: PromptSet) -> Interchange:
    """Check the section against the prompts.

    Raises:
        UserError: A prompt lacks the twin that is needed; names the section.
    """
    return Interchange(options, prompts, _differences(loaded, options, prompts), anatomy.causal, anatomy.embeds_alone)


def _differences(loaded: LoadedConfig, options: InterchangeOptions, prompts: PromptSet) -> tuple[frozenset[int], ...]:
    if any(p.corrupt_tokens is None for p in prompts.prompts):
        if options.direction == "denoise" or options.source == "pair":
            index = next(i for i, p in enumerate(prompts.prompts) if p.corrupt_tokens is None)
            problem = f"prompt {index} has no corrupted twin"
            remedy = "Give every prompt a `corrupt`, or use direction: noise with source: other, mean or zero."
            raise loaded.error((type(options).method_name,), problem, remedy)
        return ()
    return tuple(_different(p.clean_tokens, p.corrupt_tokens or ()) for p in prompts.prompts)


def _different(a: Sequence[int], b: Sequence[int]) -> frozenset[int]:
    return frozenset(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def refuse_mean_of_keys(loaded: LoadedConfig, options: InterchangeOptions, specs: Iterable[TrialSpec]) -> None:
    """Refuse the mean of chosen keys, which is not defined.

    Raises:
        UserError: As said.
    """
    if options.source == "mean" and any(spec.keys is not None for spec in specs):
        path = (type(options).method_name, "source")
        raise loaded.error(path, "mean of chosen keys is not defined", "Leave out keys.")


def _other_prompts(section: str, seed: int, templates: Sequence[str]) -> tuple[int, ...]:
    """For every prompt of a bucket another one of the same template, seeded.

    Raises:
        UserError: A template has a single prompt of this length.
    """
    draw = Draw(seed)
    chosen = list(range(len(templates)))
    for template in dict.fromkeys(templates):
        members = [i for i, name in enumerate(templates) if name == template]
        if len(members) < 2:
            raise UserError(
                f"{section}.source: other needs two prompts of each template and length, {template!r} has one",
                "Raise task.n, or use another source.",
            )
        order = draw.shuffled(members)
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            chosen[here] = there
    return tuple(chosen)
