"""The unedited model's predictions at every position, without the logits of all of them in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.capture import TOKENS_PER_PASS, UNEMBED_TOLERANCE, last_hidden, last_hidden_suffices
from mechinterp_cli.engine.wavefront import logits_chunk
from mechinterp_cli.errors import RunError
from mechinterp_cli.metrics import Reference, log_partition
from mechinterp_cli.models.anatomy import Anatomy, device_of
from mechinterp_cli.models.walk import Walker, forward

HOLD_BYTES = 2**28
"""Logits of unedited streams that are held; beyond it they are made again from the last hidden states."""


class _Source(Protocol):
    """Where logits come from."""

    def rows(self, prompt: Tensor, position: Tensor) -> Tensor:
        """Logits [n, vocab] at some positions of some prompts."""


@dataclass(frozen=True, eq=False)
class _Held:
    """Logits [prompts, reads, vocab] that are there."""

    logits: Tensor

    def rows(self, prompt: Tensor, position: Tensor) -> Tensor:
        return self.logits[prompt, position]


@dataclass(frozen=True, eq=False)
class _Unembedded:
    """Logits from what leaves the last layer, [prompts, reads, d_model]."""

    walker: Walker
    hidden: Tensor

    def rows(self, prompt: Tensor, position: Tensor) -> Tensor:
        return self.walker.unembed(self.hidden[prompt, position])


@dataclass(frozen=True, eq=False)
class _Passed:
    """Logits from whole passes over the prompts in question."""

    model: nn.Module
    tokens: Tensor

    def rows(self, prompt: Tensor, position: Tensor) -> Tensor:
        which, row = torch.unique(prompt, return_inverse=True)
        return forward(self.model, self.tokens[which])[row, position]


class CleanLogits:
    """What the unedited model predicts at every position but the last of prompts of one length.

    Logits are held where they are small. Otherwise what leaves the last layer is held, and the rows that are asked
    for go through the model's own norm and head again. A model that looks back at earlier layers after the last one
    (tried on the first prompt) makes whole passes instead; no executor but plain hooks is right for such a model,
    and within that one whole passes are the model's own.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids; prompts that are the same are computed once.
        hold: Bytes of logits that may be held.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, anatomy: Anatomy, tokens: Int[Tensor, "prompts positions"], *, hold: int = HOLD_BYTES
    ) -> None:
        device = device_of(model)
        distinct, row = torch.unique(tokens, dim=0, return_inverse=True)
        self._row, distinct = row.to(device), distinct.to(device)
        self._chunk = logits_chunk(device, anatomy.vocab_size)
        self._tolerance = max(UNEMBED_TOLERANCE, 3 * torch.finfo(next(model.parameters()).dtype).eps)
        self._source = _source(model, anatomy, distinct)
        self._partition, self._choice, self._slack = self._look(distinct, hold)

    @property
    def held_bytes(self) -> int:
        """Bytes of logits that are held."""
        return self._source.logits.nbytes if isinstance(self._source, _Held) else 0

    def _look(self, tokens: Tensor, hold: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-partition, first choice and slack [prompts, reads] of every row; logits are held where they fit."""
        shape = (tokens.shape[0], tokens.shape[1] - 1)
        prompt, position = (x.flatten() for x in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
        found, logits = [], None
        for start in range(0, len(prompt), self._chunk):
            part = slice(start, start + self._chunk)
            rows = self._source.rows(prompt[part].to(tokens.device), position[part].to(tokens.device))
            if start == 0 and len(prompt) * rows[0].nbytes <= hold:
                logits = rows.new_empty(len(prompt), rows.shape[1])
            if logits is not None:
                logits[part] = rows
            found.append(self._facts(rows))
        if logits is not None:
            self._source = _Held(torch.unflatten(logits, 0, shape))
        if not found:
            empty = torch.zeros(shape, device=tokens.device)
            return empty, empty.long(), empty
        partition, choice, slack = (torch.cat(parts).view(shape) for parts in zip(*found, strict=True))
        return partition, choice, slack

    def _facts(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = rows if rows.dtype == torch.float64 else rows.float()
        scale = torch.where(wide.isinf(), 0.0, wide.abs()).amax(-1)
        return log_partition(wide), wide.argmax(-1), self._tolerance * scale

    @torch.no_grad()
    def reference(self, prompt: Int[Tensor, " items"], position: Int[Tensor, " items"]) -> Reference:
        """The whole distribution at some positions of some prompts: one row per item.

        Raises:
            RunError: Logits that are made again are not those that were seen at first.
        """
        row = self._row[prompt]
        found = Reference.of(self._source.rows(row, position))
        if not isinstance(self._source, _Held):
            moved = (found.log_partition - self._partition[row, position]).abs()
            if bool((moved > self._slack[row, position]).any()):
                raise RunError(
                    f"the unedited model's logits moved by {float(moved.nan_to_num().max()):.1e} when they were made "
                    "again",
                    "Leave out kl, or set engine.executor: hooks.",
                )
        return found

    def first_choice(
        self, prompt: Int[Tensor, " items"], position: Int[Tensor, " items"]
    ) -> tuple[Int[Tensor, " items"], Float[Tensor, " items"]]:
        """The first choice there, and by how much rounding alone may put another token above it."""
        row = self._row[prompt]
        return self._choice[row, position], self._slack[row, position]


def clean_logits_of(
    model: nn.Module, anatomy: Anatomy, buckets: Sequence[Int[Tensor, "prompts positions"]], *, hold: int = HOLD_BYTES
) -> list[CleanLogits]:
    """The unedited model's predictions of several buckets, which share what may be held.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        buckets: Ids of each; prompts of a bucket have one length.
        hold: Bytes of logits that may be held in all.
    """
    found: list[CleanLogits] = []
    for tokens in buckets:
        found.append(CleanLogits(model, anatomy, tokens, hold=hold))
        hold -= found[-1].held_bytes
    return found


def _source(model: nn.Module, anatomy: Anatomy, tokens: Tensor) -> _Source:
    if not last_hidden_suffices(model, anatomy, tokens[:1]):
        return _Passed(model, tokens)
    step = max(1, TOKENS_PER_PASS // tokens.shape[1])
    hidden = [last_hidden(model, anatomy, part)[:, :-1] for part in torch.split(tokens, step)]
    return _Unembedded(anatomy.walker(model), torch.cat(hidden))
