"""What is measured of whole texts: every next token's prediction, and means of it over each prompt.

Three numbers are taken of the logits at each position (`BASE`): the loss, the divergence from the unedited model, and
whether the first choice is the unedited model's. Metrics are their means over the positions of a prompt, or over those
predictions that repeat an earlier pair of tokens, or are of tokens that have not occurred; and, where asked for, each
number at each position, named by the position of the token that is predicted (`loss@17`; the first is 1).

Position i predicts token i + 1, so masks and numbers of a prompt are [prompts, positions − 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_cli.errors import UserError
from mechinterp_cli.metric_names import TOKEN_METRICS
from mechinterp_cli.metrics import Reference, at_least_float32, log_partition

BASE = ("loss", "kl", "top1")
"""What is measured at each position."""
TOKEN_LABELS: Mapping[str, str] = {
    "loss": "loss (nats)",
    "kl": "KL to clean (nats)",
    "top1": "agreement of the first choice",
    "repeated_loss": "loss where a pair repeats (nats)",
    "first_loss": "loss at first occurrences (nats)",
    "loss_gap": "loss gap (nats)",
}
"""For axes and captions."""
CPU_CHUNK_BYTES = 3 * 2**23
"""Logits that are measured at once, as many as the engine unembeds at once."""
GPU_CHUNK_BYTES = 2**27


def repeated_positions(tokens: Int[Tensor, "prompts positions"]) -> Bool[Tensor, "prompts positions-1"]:
    """Predictions that repeat an earlier pair: some j < i has t_j = t_i and t_(j+1) = t_(i+1)."""
    return _seen_before(tokens[:, :-1] * (tokens.max() + 1) + tokens[:, 1:])


def first_positions(tokens: Int[Tensor, "prompts positions"]) -> Bool[Tensor, "prompts positions-1"]:
    """Predictions of a token that has not occurred: t_(i+1) is none of t_0 … t_i."""
    return ~_seen_before(tokens)[:, 1:]


def _seen_before(values: Int[Tensor, "prompts n"]) -> Bool[Tensor, "prompts n"]:
    """Whether a value equals an earlier one of its row."""
    ordered, order = values.sort(dim=1, stable=True)  # stable: equal values stay in order of position
    repeats = torch.zeros_like(values, dtype=torch.bool)
    repeats[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(repeats).scatter_(1, order, repeats)


def both_kinds(tokens: Sequence[int]) -> bool:
    """Whether a prompt has predictions that repeat a pair and predictions of tokens that have not occurred."""
    row = torch.tensor([list(tokens)])
    return bool(repeated_positions(row).any() and first_positions(row).any())


def next_token_losses(
    logits: Float[Tensor, "items vocab"], following: Int[Tensor, " items"]
) -> Float[Tensor, " items"]:
    """Cross-entropy of the token that follows, nats, in float32 (float64 where the logits are)."""
    wide = at_least_float32(logits)
    return wide.logsumexp(-1) - wide.gather(1, following[:, None])[:, 0]


class CleanPredictions(Protocol):
    """The unedited model's predictions of a bucket; `engine.clean.CleanLogits` makes them."""

    def reference(self, prompt: Int[Tensor, " items"], position: Int[Tensor, " items"]) -> Reference:
        """Its whole distribution at some positions of some prompts: one row per item."""

    def first_choice(
        self, prompt: Int[Tensor, " items"], position: Int[Tensor, " items"]
    ) -> tuple[Int[Tensor, " items"], Float[Tensor, " items"]]:
        """Its first choice there, and by how much rounding alone may put another token above it."""


def first_choice_kept(
    logits: Float[Tensor, "items vocab"], choice: Int[Tensor, " items"], slack: Float[Tensor, " items"]
) -> Float[Tensor, " items"]:
    """1 where no token's logit is more than `slack` above that of `choice`, else 0; NaN where a logit is NaN."""
    top = logits.amax(-1)
    behind = top - logits.gather(1, choice[:, None])[:, 0]
    # Where both are infinite the difference says nothing.
    kept = (behind <= slack) | (logits.gather(1, choice[:, None])[:, 0] == top)
    return torch.where(top.isnan() | slack.isnan(), torch.nan, kept.to(logits.dtype))


def metric_names(names: Sequence[str], longest: int, *, per_position: bool) -> tuple[str, ...]:
    """Names along the last axis of what `TokenMeasurer.reduce` gives.

    Args:
        names: Of `TOKEN_METRICS`.
        longest: Tokens of the longest prompt of all buckets.
        per_position: Whether each position's numbers follow.
    """
    every = [f"{name}@{position}" for name in names if name in BASE for position in range(1, longest)]
    return (*names, *every) if per_position else tuple(names)


def split_name(name: str) -> tuple[str, int | None]:
    """`loss@17` as the number and the position of the token that is predicted; None for means over positions."""
    base, _, position = name.partition("@")
    return base, int(position) if position else None


def check_token_metrics(names: Sequence[str]) -> None:
    """Refuse names that are none of `TOKEN_METRICS`.

    Raises:
        UserError: There is one.
    """
    for name in names:
        if name not in TOKEN_METRICS:
            problem = f"metrics: {name!r} is not a metric of whole texts"
            raise UserError(problem, f"Choose from {', '.join(TOKEN_METRICS)}.")


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of prompts of one length: which predictions repeat a pair, which are of tokens that have not occurred."""

    repeated: Bool[Tensor, "prompts reads"]
    first: Bool[Tensor, "prompts reads"]

    @classmethod
    def of(cls, tokens: Int[Tensor, "prompts positions"]) -> "Predictions":
        """Of ids."""
        return cls(repeated_positions(tokens), first_positions(tokens))

    def mean(self, metric: str, losses: Float[Tensor, "*trials prompts reads"]) -> Float[Tensor, "*trials prompts"]:
        """`repeated_loss`, `first_loss` or `loss_gap` of each prompt; NaN where it has no such prediction."""
        if metric == "loss_gap":
            return self.mean("repeated_loss", losses) - self.mean("first_loss", losses)
        return _mean(losses, {"repeated_loss": self.repeated, "first_loss": self.first}[metric])


def _mean(losses: Tensor, chosen: Bool[Tensor, "prompts reads"]) -> Tensor:
    count = chosen.sum(-1)
    total = torch.where(chosen, losses, 0.0).sum(-1)
    # Where a loss is NaN that was computed, so is the mean; where nothing is chosen, too.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


class TokenMeasurer:
    """Token metrics of one bucket: what the engine measures at each position, and the metrics that come of it.

    Rounding: the engine computes even the unedited stream in other batches than the reference was computed in, so its
    last bits differ. Its `kl` is therefore 0 within rounding (and may be below 0 by as much). `top1` compares with the
    first choice (argmax) of the reference's logits, and takes for a tie what rounding can turn round: it is 1 where no
    token is above that choice by more than 1e-4 of the row's largest logit, or three units of the model's precision
    where they are more. The unedited stream then has exactly 1, as long as its noise is within that. In bfloat16 the
    ties reach half a logit and raise `top1` visibly (0.98 where float32 gives 0.94): compare it within one precision.

    Args:
        names: Of `TOKEN_METRICS`, in the order of the metrics.
        tokens: Ids of the bucket's prompts, as the engine has them (copies for draws included).
        clean: The unedited model's predictions of the same prompts, for `kl` and `top1`; None where neither is wanted,
            or where nothing will be measured (`--dry-run`).
        longest: Tokens of the longest prompt of all buckets, so that all give as many metrics; None for this one's.
        per_position: Whether each position's numbers follow the means.

    Raises:
        UserError: A name is unknown.
        ValueError: `longest` is shorter than the prompts.
    """

    def __init__(
        self,
        names: Sequence[str],
        tokens: Int[Tensor, "prompts positions"],
        clean: CleanPredictions | None = None,
        *,
        longest: int | None = None,
        per_position: bool = False,
    ) -> None:
        check_token_metrics(names)
        self.names = tuple(names)
        self.measured = tuple(name for name in BASE if name in names or (name == "loss" and set(names) - set(BASE)))
        self.longest = tokens.shape[1] if longest is None else longest
        if self.longest < tokens.shape[1]:
            raise ValueError(f"prompts of {tokens.shape[1]} tokens are longer than the longest, {self.longest}")
        self.per_position = per_position
        self._tokens = tokens
        self._predictions = Predictions.of(tokens)
        self._clean = clean

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names along the last axis of what `reduce` gives."""
        return metric_names(self.names, self.longest, per_position=self.per_position)

    @property
    def read(self) -> Int[Tensor, "prompts reads"]:
        """The positions whose logits are measured, for the engine's `Bucket`: all but the last."""
        prompts, length = self._tokens.shape
        return torch.arange(length - 1).expand(prompts, -1)

    @torch.no_grad()
    def measure(
        self, logits: Float[Tensor, "items vocab"], prompt: Int[Tensor, " items"], read: Int[Tensor, " items"]
    ) -> Float[Tensor, "items numbers"]:
        """What is wanted of `BASE`, in its order, for any rows in any order.

        Args:
            logits: Of any floating type.
            prompt: Each row's prompt in the bucket.
            read: Each row's place in `read`, which is its position.

        Returns:
            Float64, on the device of the logits.

        Raises:
            ValueError: `kl` or `top1` is wanted and the unedited model's predictions were not given.
        """
        budget = CPU_CHUNK_BYTES if logits.device.type == "cpu" else GPU_CHUNK_BYTES
        rows = max(1, budget // (logits.shape[1] * 4))
        chunks = zip(*(torch.split(part, rows) for part in (logits, prompt, read)), strict=True)
        return torch.cat([self._numbers(*chunk) for chunk in chunks])

    def _numbers(self, logits: Tensor, prompt: Tensor, read: Tensor) -> Tensor:
        wide = at_least_float32(logits)
        return torch.stack([self._number(name, wide, prompt, read).double() for name in self.measured], dim=-1)

    def _number(self, name: str, logits: Tensor, prompt: Tensor, read: Tensor) -> Tensor:
        if name == "loss":
            return next_token_losses(logits, self._tokens.to(logits.device)[prompt, read + 1])
        if self._clean is None:
            raise ValueError(f"{name} needs the unedited model's predictions")
        if name == "top1":
            choice, slack = self._clean.first_choice(prompt, read)
            return first_choice_kept(logits, choice, slack)
        reference = self._clean.reference(prompt, read)
        drop = reference.expected_drop(logits, torch.arange(len(logits), device=logits.device))
        return drop + log_partition(logits) - reference.log_partition

    def reduce(
        self, values: Float[Tensor, "*trials prompts reads numbers"]
    ) -> Float[Tensor, "*trials prompts metrics"]:
        """The metrics of each prompt, in the order of `metrics`.

        NaN where a prompt has no such prediction, where a number is NaN, and at positions that the prompts do not have.
        """
        numbers = {name: values[..., place] for place, name in enumerate(self.measured)}
        means = [self._metric(name, numbers) for name in self.names]
        found = torch.stack(means, dim=-1)
        if not self.per_position:
            return found
        absent = (0, self.longest - self._tokens.shape[1])
        every = [torch.nn.functional.pad(numbers[name], absent, value=torch.nan) for name in self.names if name in BASE]
        return torch.cat([found, *every], dim=-1)

    def _metric(self, name: str, numbers: Mapping[str, Tensor]) -> Tensor:
        if name in BASE:
            return numbers[name].mean(-1)
        return self._predictions.mean(name, numbers["loss"])
