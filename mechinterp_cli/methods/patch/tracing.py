"""The streams of `patch`: clean and corrupted prompts, or a clean prompt and one with noise on its subject.

Activation patching (Vig et al. 2020; Meng et al. 2202.05262; conventions of Heimersheim & Nanda 2404.15255):
*denoise* puts clean activations into the corrupted prompt, *noise* the other way. Causal tracing
(2202.05262) is denoising into a run whose subject tokens carry Gaussian noise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.edits import Bucket
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import interchange
from mechinterp_cli.methods.interchange import Interchange
from mechinterp_cli.methods.patch.options import PatchOptions, TracingOptions
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.tasks.spans import resolve_span


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
