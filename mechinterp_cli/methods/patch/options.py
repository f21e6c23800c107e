"""`patch`: put activations of one run into another, and see how far the answer follows.

Activation patching (Vig et al. 2020; Meng et al. 2202.05262; conventions of Heimersheim & Nanda 2404.15255):
*denoise* puts clean activations into the corrupted prompt, *noise* the other way. Causal tracing
(2202.05262) is denoising into a run whose subject tokens carry Gaussian noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from mechinterp_cli.config.base import BaseConfig, MethodOptions
from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.types import Count, Number, Seed, Text
from mechinterp_cli.engine.capture import Means
from mechinterp_cli.engine.edits import Bucket, Edit, Site
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.places import Binder, SiteBlock, TrialSpec
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.runs.schema import column, register_columns
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.tasks.spans import resolve_span

register_columns("patch", "trials", [column("template", pa.string())])
_WHERE = [column("kv_head", pa.int32()), column("template", pa.string())]
register_columns("patch", "results", _WHERE)
register_columns("patch", "summary", [*_WHERE, column("block", pa.int32())])


class TracingOptions(BaseConfig):
    """Causal tracing: the corrupted run is the clean prompt with noise on a span's embeddings."""

    span: Text
    """The span that is corrupted: the subject."""
    scale: Annotated[Number, Field(gt=0)] = 3.0
    """Noise in standard deviations of the span tokens' embeddings over the data set (σ = scale × that)."""
    draws: Count = 10
    """Noisy copies of each prompt; all trials of a prompt share them."""
    seed: Seed = 0
    """Seed of the noise."""


class PatchOptions(MethodOptions):
    """The `patch:` section."""

    method_name: ClassVar[str] = "patch"
    direction: Literal["denoise", "noise"] = "denoise"
    """`denoise` puts clean activations into the corrupted prompt, `noise` corrupted ones into the clean prompt."""
    source: Literal["pair", "other", "mean", "zero"] = "pair"
    """What is put there: the paired prompt's activation, another prompt's (seeded), the data set's mean at the same
    position of the same template, or zero."""
    seed: Seed = 0
    """Seed of the choice of other prompts."""
    tracing: TracingOptions | None = None
    """Causal tracing instead of a corrupted prompt."""
    sites: Annotated[tuple[SiteBlock, ...], Field(min_length=1)]
    """Blocks of trials."""

    @property
    def base_stream(self) -> str:
        """The stream that is patched into."""
        return "corrupt" if self.direction == "denoise" else "clean"

    @property
    def source_stream(self) -> str:
        """The stream that is patched from."""
        return "clean" if self.direction == "denoise" else "corrupt"

    @property
    def draws(self) -> int:
        """Noisy copies of each prompt."""
        return self.tracing.draws if self.tracing else 1


@dataclass(frozen=True)
class BoundPatch:
    """A patch experiment checked against model and task: everything but activations is known."""

    options: PatchOptions
    specs: tuple[TrialSpec, ...]
    differs: tuple[frozenset[int], ...]
    """For every prompt the positions at which the two streams' embeddings differ."""
    causal: bool
    """Whether paired trials before the first of these are known to do nothing."""
    embeds_alone: bool
    """Whether paired trials on what enters layer 0 are known to do nothing anywhere else."""

    @property
    def base_stream(self) -> str:
        """The stream that is patched into."""
        return self.options.base_stream

    @property
    def source_stream(self) -> str:
        """The stream that is patched from: where nothing is corrupted, that of the other prompts."""
        return self.options.source_stream if self.has_corrupt else self.base_stream

    @property
    def draws(self) -> int:
        """Noisy copies of each prompt."""
        return self.options.draws

    @property
    def has_corrupt(self) -> bool:
        """Whether there is a corrupted stream to normalise by."""
        return self.differs != ()

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

    def operation(self) -> str:
        """The edit's name in the trials table."""
        return {"pair": "replace", "other": "replace", "mean": "mean", "zero": "zero"}[self.options.source]

    def edit(
        self,
        spec: TrialSpec,
        layer: int,
        members: Sequence[int],
        means: Means | None,
        others: tuple[int, ...] | None,
    ) -> Edit:
        """The edit of one layer of a trial on a bucket.

        Args:
            spec: The trial.
            layer: Which of its layers.
            members: The bucket's prompts, as indices of the prompt set, each once per draw.
            means: Data-set means, for `source: mean`.
            others: For every prompt of the bucket the prompt that is read, for `source: other`.
        """
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


def bind(loaded: LoadedConfig, options: PatchOptions, anatomy: Anatomy, prompts: PromptSet) -> BoundPatch:
    """Check a patch section against the model and the prompts, and expand it into trials.

    Raises:
        UserError: Something is not there, or options contradict each other; names file, line and key.
    """
    differs = _differences(loaded, options, prompts)
    specs = Binder(loaded, "patch", anatomy, prompts).expand(options.sites)
    if options.source == "mean" and any(spec.keys is not None for spec in specs):
        raise loaded.error(("patch", "source"), "mean of chosen keys is not defined", "Leave out keys.")
    if not specs:
        raise loaded.error(("patch", "sites"), "there is no trial", "Name at least one site.")
    return BoundPatch(options, tuple(specs), differs, anatomy.causal, anatomy.embeds_alone)


def _differences(loaded: LoadedConfig, options: PatchOptions, prompts: PromptSet) -> tuple[frozenset[int], ...]:
    if options.tracing is not None:
        if options.direction != "denoise" or options.source != "pair":
            problem = "causal tracing restores clean activations: direction denoise, source pair"
            raise loaded.error(("patch", "tracing"), problem, "Leave out direction and source.")
        if not all(prompt.answer for prompt in prompts.prompts):
            problem = f"causal tracing needs the answers of its prompts, and task {prompts.task} has none"
            raise loaded.error(("patch", "tracing"), problem, "Use a task such as capitals, or prompts with answers.")
        try:
            return tuple(frozenset(span) for span in resolve_span(prompts, options.tracing.span))
        except UserError as error:
            raise loaded.error(("patch", "tracing", "span"), error.cause, error.remedy) from error
    if any(p.corrupt_tokens is None for p in prompts.prompts):
        if options.direction == "denoise" or options.source == "pair":
            index = next(i for i, p in enumerate(prompts.prompts) if p.corrupt_tokens is None)
            problem = f"prompt {index} has no corrupted twin"
            remedy = "Give every prompt a `corrupt`, or use direction: noise with source: other, mean or zero."
            raise loaded.error(("patch",), problem, remedy)
        return ()
    return tuple(_different(p.clean_tokens, p.corrupt_tokens or ()) for p in prompts.prompts)


def _different(a: Sequence[int], b: Sequence[int]) -> frozenset[int]:
    return frozenset(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)


def make_bucket(bound: BoundPatch, prompts: PromptSet, members: Sequence[int], spread: float, d_model: int) -> Bucket:
    """The token ids (and the noise) of some prompts of one length, each prompt once per draw.

    Args:
        bound: The experiment.
        prompts: The prompt set.
        members: Indices of the prompts.
        spread: Standard deviation of the noise, for causal tracing.
        d_model: Size of the residual stream.
    """
    draws = bound.draws
    chosen = [prompts.prompts[i] for i in members]
    clean = torch.tensor([p.clean_tokens for p in chosen]).repeat_interleave(draws, 0)
    tracing = bound.options.tracing
    if tracing is not None:
        spans = resolve_span(prompts, tracing.span)
        noise = torch.cat([_noise(tracing, i, spans[i], prompts.prompts[i].length, d_model) for i in members])
        return Bucket.of({"clean": clean, "corrupt": clean}, noise={"corrupt": noise * spread})
    if not bound.has_corrupt:
        return Bucket.of({"clean": clean})
    corrupt = torch.tensor([p.corrupt_tokens for p in chosen])
    return Bucket.of({"clean": clean, "corrupt": corrupt})


def _noise(tracing: TracingOptions, prompt: int, span: Sequence[int], length: int, d_model: int) -> Tensor:
    """Unit Gaussian noise on the span, [draws, positions, d_model]; a prompt's draws depend on nothing else."""
    generator = torch.Generator().manual_seed(tracing.seed * 1_000_003 + prompt)
    noise = torch.zeros(tracing.draws, length, d_model)
    noise[:, list(span)] = torch.randn(tracing.draws, len(span), d_model, generator=generator)
    return noise


def other_prompts(seed: int, templates: Sequence[str]) -> tuple[int, ...]:
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
                f"patch.source: other needs two prompts of each template and length, {template!r} has one",
                "Raise task.n, or use another source.",
            )
        order = draw.shuffled(members)
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            chosen[here] = there
    return tuple(chosen)
