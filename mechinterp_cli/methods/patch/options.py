"""`patch`: put activations of one run into another, and see how far the answer follows.

Activation patching (Vig et al. 2020; Meng et al. 2202.05262; conventions of Heimersheim & Nanda 2404.15255):
*denoise* puts clean activations into the corrupted prompt, *noise* the other way. Causal tracing
(2202.05262) is denoising into a run whose subject tokens carry Gaussian noise.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import pyarrow as pa
import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.types import Count, Number, Seed, Text
from mechinterp_cli.engine.edits import Bucket
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import interchange
from mechinterp_cli.methods.interchange import Interchange, InterchangeOptions
from mechinterp_cli.methods.patch.paths import PathBlock
from mechinterp_cli.methods.places import SiteBlock
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.runs.schema import column, register_columns
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


class PatchBlock(SiteBlock):
    """A family of trials: one kind of site over layers, heads or neurons, and positions."""

    directions: Text | None = None
    """For the residual stream: a .safetensors file of tensors [directions, d_model] named `SITE.LAYER`, such as
    `directions.safetensors` of a `probe` run. Only what lies along them is put there: x + BᵀB (x' − x), B their
    orthonormal rows. `layers: all` is then all layers of the file."""


def _kind_of_block(block: Any) -> str:
    """Which of the two kinds a block is meant to be."""
    return "paths" if isinstance(block, PathBlock) or (isinstance(block, dict) and "path" in block) else "places"


Block = Annotated[
    Annotated[PatchBlock, Tag("places")] | Annotated[PathBlock, Tag("paths")], Discriminator(_kind_of_block)
]
"""Activations at one kind of site, or paths."""


class PatchOptions(InterchangeOptions):
    """The `patch:` section."""

    method_name: ClassVar[str] = "patch"
    tracing: TracingOptions | None = None
    """Causal tracing instead of a corrupted prompt."""
    sites: Annotated[tuple[Block, ...], Field(min_length=1)]
    """Blocks of trials: activations at a kind of site, or a `path` from senders to receivers."""


def bind(loaded: LoadedConfig, options: PatchOptions, anatomy: Anatomy, prompts: PromptSet) -> Interchange:
    """Check a patch section against the prompts; with causal tracing a span is what differs.

    Raises:
        UserError: Something is not there, or options contradict each other; names file, line and key.
    """
    tracing = options.tracing
    if tracing is None:
        return interchange.bind(loaded, options, anatomy, prompts)
    if options.direction != "denoise" or options.source != "pair":
        problem = "causal tracing restores clean activations: direction denoise, source pair"
        raise loaded.error(("patch", "tracing"), problem, "Leave out direction and source.")
    if not all(prompt.answer for prompt in prompts.prompts):
        problem = f"causal tracing needs the answers of its prompts, and task {prompts.task} has none"
        raise loaded.error(("patch", "tracing"), problem, "Use a task such as capitals, or prompts with answers.")
    try:
        differs = tuple(frozenset(span) for span in resolve_span(prompts, tracing.span))
    except UserError as error:
        raise loaded.error(("patch", "tracing", "span"), error.cause, error.remedy) from error
    return Interchange(options, prompts, differs, anatomy.causal, anatomy.embeds_alone, tracing.draws)


def make_bucket(
    bound: Interchange, tracing: TracingOptions | None, members: Sequence[int], spread: float, d_model: int
) -> Bucket:
    """The token ids (and the noise) of some prompts of one length, each prompt once per draw.

    Args:
        bound: The experiment.
        tracing: Causal tracing, if it is that.
        members: Indices of the prompts.
        spread: Standard deviation of the noise, for causal tracing.
        d_model: Size of the residual stream.
    """
    if tracing is None:
        return Bucket.of(bound.tokens(members))
    spans = resolve_span(bound.prompts, tracing.span)
    noise = torch.cat([_noise(tracing, i, spans[i], bound.prompts.prompts[i].length, d_model) for i in members])
    clean = torch.tensor([bound.prompts.prompts[i].clean_tokens for i in bound.expanded(members)])
    return Bucket.of({"clean": clean, "corrupt": clean}, noise={"corrupt": noise * spread})


def _noise(tracing: TracingOptions, prompt: int, span: Sequence[int], length: int, d_model: int) -> Tensor:
    """Unit Gaussian noise on the span, [draws, positions, d_model]; a prompt's draws depend on nothing else."""
    generator = torch.Generator().manual_seed(tracing.seed * 1_000_003 + prompt)
    noise = torch.zeros(tracing.draws, length, d_model)
    noise[:, list(span)] = torch.randn(tracing.draws, len(span), d_model, generator=generator)
    return noise
