"""Whether an executor may compute some tokens' logits alone: tried on the plan's own prompts and tokens at every load.

A narrower product may end in other last bits, so whether it is used is part of the plan.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.proof import BROKEN, NOISE_FACTOR, PROOF_PROMPTS, Proof, checks, logits_measure, pick
from mechinterp_cli.engine.wavefront import Settings, Values
from mechinterp_cli.errors import RunError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.head import whole_head_reason

LARGEST_SHARE = 1 / 4
"""Of the vocabulary: above it little is saved."""
TRIALS = 3
"""Of the proof's own checks: an edit that changes nothing, all of the last layer's output replaced, and zeroed."""


@dataclass(frozen=True)
class Head:
    """What became of the wish to compute some tokens' logits alone, for the manifest.

    Args:
        columns: How many tokens' logits are computed; None for the whole vocabulary.
        vocabulary: How many there are.
        deviation: Largest difference from the same columns of the whole, as a share of the logits' scale.
        reason: Why all are computed.
    """

    columns: int | None
    vocabulary: int
    deviation: float | None = None
    reason: str | None = None


def whole_reason(model: nn.Module, anatomy: Anatomy, tokens: Sequence[int] | None, executor: str) -> str | None:
    """Why all logits are computed, known without trying; None where some tokens' can be tried.

    Args:
        model: The model.
        anatomy: Its anatomy.
        tokens: Ids that all that is measured looks at, in order; None where it may look at any.
        executor: That is used.
    """
    vocabulary = anatomy.vocab_size
    if tokens is None:
        return "a metric looks at the whole vocabulary"
    if executor == "hooks":
        return "plain hooks make whole passes"
    if not tokens or tokens[-1] >= vocabulary:
        return "an answer is outside the model's vocabulary"
    if len(tokens) > LARGEST_SHARE * vocabulary:
        return f"{len(tokens)} of {vocabulary} tokens are looked at"
    return whole_head_reason(model, vocabulary)


def prove_head(
    model: nn.Module,
    anatomy: Anatomy,
    works: Sequence[Work],
    tokens: tuple[int, ...] | None,
    proof: Proof,
    settings: Settings,
) -> Head:
    """Try some tokens' logits against the same columns of the whole, in the run's dtype.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        works: The plan's trials by bucket.
        tokens: As in `whole_reason`.
        proof: The executor's; its tolerance is this one's.
        settings: Sizes.
    """
    vocabulary = anatomy.vocab_size
    reason = whole_reason(model, anatomy, tokens, proof.executor)
    if reason is not None or tokens is None:
        return Head(None, vocabulary, reason=reason)
    try:
        deviation = _deviation(model, anatomy, works, tokens, proof.executor, settings)
    except RunError as error:
        return Head(None, vocabulary, reason=error.cause)
    except BROKEN as error:
        return Head(None, vocabulary, reason=f"{type(error).__name__}: {str(error)[:200]}")
    wide = next(model.parameters()).dtype in (torch.float32, torch.float64)
    tolerance = proof.tolerance if wide else NOISE_FACTOR * proof.noise
    if deviation > tolerance:
        reason = f"some tokens' logits alone deviate by {deviation:.1e} of the logits' scale, {tolerance:.0e} allowed"
        return Head(None, vocabulary, deviation, reason)
    return Head(len(tokens), vocabulary, deviation)


def _deviation(
    model: nn.Module,
    anatomy: Anatomy,
    works: Sequence[Work],
    tokens: tuple[int, ...],
    executor: str,
    settings: Settings,
) -> float:
    """Largest difference of streams and checks on the longest prompts."""
    longest = max(works, key=lambda work: (bool(work.trials), work.bucket.length)).bucket
    bucket = pick(longest, list(range(min(PROOF_PROMPTS, longest.size))))

    def run(tokens: tuple[int, ...] | None) -> Values:
        worker = executor_named(executor, model, anatomy, replace(settings, tokens=tokens))
        return worker.run(bucket, checks(bucket, anatomy)[:TRIALS], logits_measure)

    whole, narrow = run(None), run(tokens)
    pairs = [(whole.trials, narrow.trials), *((whole.streams[name], narrow.streams[name]) for name in whole.streams)]
    if any(some.shape[-1] != len(tokens) for _, some in pairs):
        raise ValueError("the head's width is not that of the logits")
    differences = torch.cat([(every[..., list(tokens)] - some).flatten() for every, some in pairs])
    if not differences.isfinite().all():
        raise ValueError("some tokens' logits alone are not finite")
    scale = max(float(x.abs().max()) for x in whole.streams.values()) or 1.0
    return float(differences.abs().max()) / scale
