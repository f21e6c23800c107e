"""Edits, trials and the arithmetic of an edit on selected rows.

A *row* is one (trial, prompt, position). Every executor brings the site's activations into the shape
[rows, *features] and hands the rows that an edit touches to `edited`; so an edit means the same thing
wherever it is computed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechinterp_cli.models.kinds import HEAD_KINDS, KEY_KINDS, NEURON_KINDS

Op = Literal["replace", "zero", "constant", "add", "scale", "project", "affine", "swap", "mask"]
"""What is done; `mean`, `resample` and noise are `constant`, `replace` from other prompts, and `add`."""

OPS: tuple[Op, ...] = ("replace", "zero", "constant", "add", "scale", "project", "affine", "swap", "mask")
STREAM_OPS = ("replace", "swap")
UNTOUCHED = 10**9
"""Start of a trial on a prompt that none of its edits touches."""


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network: a kind (`resid_pre`, `z`, …) in a layer."""

    kind: str
    layer: int


class RowValues(ABC):
    """Values of `constant` or `add` that are looked up or drawn when rows are edited.

    Trials that share one object hold no numbers of their own, and are edited together.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """[prompts or 1, positions or 1, *features] of all units, as a tensor of them would have."""

    @abstractmethod
    def at(self, prompt: Tensor, position: Tensor, units: tuple[int, ...] | None) -> Tensor:
        """The values [rows, *features] of some rows, of these units only.

        Args:
            prompt: For every row its prompt in the bucket.
            position: For every row its position.
            units: Heads or features; None for all.
        """

    def alike(self, prompt: int) -> int:
        """A number that prompts share only if their values are the same at every position."""
        return prompt

    @abstractmethod
    def of(self, prompts: Sequence[int]) -> "RowValues":
        """The values of a bucket of only these of the prompts."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One edit at one site.

    Args:
        site: Where.
        op: What is done.
        positions: For every prompt of the bucket the token positions that are edited (query positions for
            `scores` and `pattern`).
        units: Heads (key/value heads for `k`, `v`) or neurons or residual features; None for all.
        keys: For `scores` and `pattern`, for every prompt the key positions; None for all.
        source: Stream that `replace` and `swap` read, at the same site.
        source_prompts: For every prompt the prompt of the bucket that is read; None for the same one.
        values: `constant`, `add`: what is put there or added, broadcastable to [prompts, positions, *features]
            after selecting `units`, indexed by prompt and absolute position where those axes are longer than 1;
            or `RowValues`, which select the units themselves.
            `scale`: a factor. `project`, `swap`: orthonormal rows [k, features]. `affine`: the matrix A of
            x → A x + b.
        offset: `affine`: b.
    """

    site: Site
    op: Op
    positions: tuple[tuple[int, ...], ...]
    units: tuple[int, ...] | None = None
    keys: tuple[tuple[int, ...], ...] | None = None
    source: str | None = None
    source_prompts: tuple[int, ...] | None = None
    values: Tensor | RowValues | None = None
    offset: Tensor | None = None

    @property
    def reads(self) -> Site | None:
        """The site of the source stream that is read, if one is."""
        return self.site if self.op in STREAM_OPS else None


@dataclass(frozen=True, eq=False)
class Trial:
    """A stream plus the edits made to it in one forward pass.

    `prompts` are those of the bucket that are computed; on the others the effect is known to be zero.
    """

    index: int
    stream: str
    edits: tuple[Edit, ...]
    prompts: tuple[int, ...]

    def start(self, prompt: int) -> int:
        """First position that any edit touches on this prompt; beyond every prompt where none does."""
        return min((min(edit.positions[prompt], default=UNTOUCHED) for edit in self.edits), default=UNTOUCHED)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Prompts of one exact length, as token ids per stream.

    Args:
        tokens: Stream name to ids [prompts, positions].
        noise: Stream name to what is added at `embed`, [prompts, positions, d_model] (causal tracing).
        read: For every prompt the positions whose logits are measured, [prompts, reads].
    """

    tokens: Mapping[str, Tensor]
    read: Tensor
    noise: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        tokens: Mapping[str, Tensor],
        read: Tensor | None = None,
        noise: Mapping[str, Tensor] | None = None,
    ) -> "Bucket":
        """A bucket that is read at the last position unless told otherwise."""
        first = next(iter(tokens.values()))
        last = torch.full((first.shape[0], 1), first.shape[1] - 1)
        return cls(tokens, last if read is None else read, noise or {})

    @property
    def size(self) -> int:
        """Number of prompts."""
        return next(iter(self.tokens.values())).shape[0]

    @property
    def length(self) -> int:
        """Number of tokens of every prompt."""
        return next(iter(self.tokens.values())).shape[1]


@dataclass(frozen=True, eq=False)
class Rows:
    """Where an edit's rows are in a flat activation, and which prompt and position each one is."""

    index: Tensor
    prompt: Tensor
    position: Tensor


StreamActivations = Mapping[tuple[str, Site], Tensor]
"""(stream, site) to activations [prompts, positions, *features]."""


def edited(flat: Tensor, edit: Edit, rows: Rows, streams: StreamActivations) -> None:
    """Apply an edit in place to the selected rows of `flat`, [all rows, *features].

    Features are [d], [heads, d_head] or, for `scores` and `pattern`, [heads, keys].
    """
    if rows.index.numel() == 0:
        return
    if edit.site.kind in KEY_KINDS and edit.keys is not None:
        _edit_keys(flat, edit, rows, streams)
        return
    old = flat[rows.index]
    source = _source(edit, rows, streams)
    if edit.units is None:
        flat[rows.index] = _new(old, edit, rows, source)
        return
    units = torch.tensor(edit.units, device=flat.device)
    new = _new(old[:, units], edit, rows, None if source is None else source[:, units])
    flat[rows.index[:, None], units[None]] = new


def _source(edit: Edit, rows: Rows, streams: StreamActivations) -> Tensor | None:
    if edit.reads is None:
        return None
    assert edit.source is not None
    prompt = rows.prompt
    if edit.source_prompts is not None:
        prompt = torch.tensor(edit.source_prompts, device=prompt.device)[prompt]
    return streams[edit.source, edit.site][prompt, rows.position]


def _values(edit: Edit, rows: Rows) -> Tensor:
    """The edit's values for each row: [rows or 1, *features]."""
    values = edit.values
    assert values is not None
    if isinstance(values, RowValues):
        return values.at(rows.prompt, rows.position, edit.units)
    values = values.to(rows.prompt.device)
    prompt = rows.prompt if values.shape[0] > 1 else torch.zeros_like(rows.prompt)
    position = rows.position if values.shape[1] > 1 else torch.zeros_like(rows.position)
    return values[prompt, position]


def _new(old: Tensor, edit: Edit, rows: Rows, source: Tensor | None) -> Tensor:
    """What stands in the selected rows and units after the edit."""
    match edit.op:
        case "replace":
            assert source is not None
            return source.to(old)
        case "zero":
            return torch.zeros_like(old)
        case "constant":
            return _values(edit, rows).to(old).expand_as(old)
        case "add":
            return old + _values(edit, rows).to(old)
        case "scale":
            assert isinstance(edit.values, Tensor)
            return old * edit.values.to(old)
        case "mask":
            return torch.full_like(old, -torch.inf)
        case "swap":
            assert source is not None
            return old + _onto(source.to(old) - old, edit)
        case "project":
            return old - _onto(old, edit)
        case "affine":
            assert isinstance(edit.values, Tensor)
            flat = old.flatten(1) @ edit.values.to(old).T
            return (flat if edit.offset is None else flat + edit.offset.to(old)).view_as(old)


def _onto(x: Tensor, edit: Edit) -> Tensor:
    """The part of x [rows, *features] in the span of the edit's orthonormal rows."""
    assert isinstance(edit.values, Tensor)
    basis = edit.values.to(x)
    return ((x.flatten(1) @ basis.T) @ basis).view_as(x)


def _edit_keys(flat: Tensor, edit: Edit, rows: Rows, streams: StreamActivations) -> None:
    """Edit chosen keys of `scores` or `pattern` rows [rows, heads, keys]."""
    assert edit.keys is not None
    heads = torch.tensor(range(flat.shape[1]) if edit.units is None else edit.units, device=flat.device)
    source = _source(edit, rows, streams)
    for prompt in sorted(set(rows.prompt.tolist())):
        chosen = (rows.prompt == prompt).nonzero()[:, 0]
        keys = torch.tensor(edit.keys[prompt], dtype=torch.long, device=flat.device)
        at = (rows.index[chosen][:, None, None], heads[None, :, None], keys[None, None])
        part = Rows(rows.index[chosen], rows.prompt[chosen], rows.position[chosen])
        other = None if source is None else source[chosen[:, None, None], at[1], at[2]]
        flat[at] = _new(flat[at], edit, part, other)


def shared_features(kind: str) -> bool:
    """Whether units of this kind are heads or neurons rather than single residual features."""
    return kind in HEAD_KINDS + KEY_KINDS + NEURON_KINDS


def needed(trials: Sequence[Trial]) -> set[tuple[str, Site]]:
    """(stream, site) pairs that the trials' edits read."""
    return {(edit.source or "", edit.site) for trial in trials for edit in trial.edits if edit.reads is not None}
