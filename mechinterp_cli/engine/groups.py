"""Groups of rows: which parts of which trials are computed together."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Edit, Rows, Site, Trial


def first_layer(edit: Edit) -> int:
    """The layer before which a trial with this edit must be under way."""
    return edit.site.layer + (edit.site.kind == "resid_post")


def admission(trial: Trial) -> int:
    """The layer before which a trial must be under way."""
    return min((first_layer(edit) for edit in trial.edits), default=0)


@dataclass(frozen=True, eq=False)
class Part:
    """The prompts of a trial that start at one position."""

    trial: Trial
    slot: int
    """Row of the trial in the unit's results."""
    first: int
    """The layer before which it is admitted."""


class Group:
    """Parts that start at the same position on the same prompts, in the order of their admission.

    `state` is [parts, prompts, width, d_model]; the first `active` parts are under way.
    """

    def __init__(self, stream: str, start: int, prompts: tuple[int, ...], width: int) -> None:
        self.stream = stream
        self.start = start
        self.prompts = torch.tensor(prompts)
        self.width = width
        self.parts: list[Part] = []
        self.active = 0
        self.state = torch.empty(0)

    @property
    def rows_per_part(self) -> int:
        """Rows that one part has."""
        return len(self.prompts) * self.width


def group_trials(trials: Sequence[Trial], length: int, *, packed: bool) -> list[Group]:
    """Sort the trials' (trial, prompt) pairs into groups."""
    groups: dict[tuple[str, int, tuple[int, ...]], Group] = {}
    for slot, trial in enumerate(trials):
        starts: dict[int, list[int]] = defaultdict(list)
        for prompt in trial.prompts:
            starts[trial.start(prompt) if packed else 0].append(prompt)
        first = admission(trial)
        for start, prompts in starts.items():
            if start >= length:
                continue  # no edit touches these prompts
            key = (trial.stream, start, tuple(prompts))
            group = groups.setdefault(key, Group(*key, length - start))
            group.parts.append(Part(trial, slot, first))
    for group in groups.values():
        group.parts.sort(key=lambda part: (part.first, part.slot))
    return [groups[key] for key in sorted(groups)]


@dataclass(frozen=True, eq=False)
class Piece:
    """Some active parts of a group inside one layer call."""

    group: Group
    low: int
    high: int
    row: int
    """Its first row in the call."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return (self.high - self.low) * self.group.rows_per_part

    @property
    def state(self) -> Tensor:
        """A view of the group's state, [parts, prompts, width, d_model]."""
        return self.group.state[self.low : self.high]

    def prompt_of_rows(self) -> Tensor:
        """Prompt index of every row."""
        group = self.group
        return group.prompts[None, :, None].expand(self.high - self.low, -1, group.width).reshape(-1)

    def position_of_rows(self) -> Tensor:
        """Absolute position of every row."""
        group = self.group
        positions = torch.arange(group.start, group.start + group.width, device=group.prompts.device)
        return positions.expand(self.high - self.low, len(group.prompts), -1).reshape(-1)


def pieces_of(groups: Sequence[Group], rows_per_call: int) -> Iterator[list[Piece]]:
    """Cut the active parts into calls of about `rows_per_call` rows; small groups share a call."""
    call: list[Piece] = []
    rows = 0
    for group in groups:
        low = 0
        while low < group.active:
            room = max(1, (rows_per_call - rows) // group.rows_per_part)
            if call and rows + group.rows_per_part > rows_per_call:
                yield call
                call, rows = [], 0
                continue
            high = min(group.active, low + room)
            call.append(Piece(group, low, high, rows))
            rows += call[-1].rows
            low = high
    if call:
        yield call


def rows_of(edit: Edit, piece: Piece, part: int) -> tuple[list[int], list[int], list[int]]:
    """Row, prompt and position of everything that an edit touches in one part of a piece."""
    group = piece.group
    base = piece.row + (part - piece.low) * group.rows_per_part
    index, prompt_of, position_of = [], [], []
    for i, prompt in enumerate(group.prompts.tolist()):
        for position in edit.positions[prompt]:
            index.append(base + i * group.width + position - group.start)
            prompt_of.append(prompt)
            position_of.append(position)
    return index, prompt_of, position_of


def _likeness(edit: Edit) -> tuple[Any, ...]:
    """What two edits must share to differ only in their rows."""
    likeness = (edit.site, edit.op, edit.units, edit.source, edit.source_prompts, id(edit.values), id(edit.offset))
    return (*likeness, None if edit.keys is None else id(edit))


def edits_in(
    pieces: Sequence[Piece], sites: frozenset[Site], device: torch.device
) -> dict[Site, list[tuple[Edit, Rows]]]:
    """The edits at these sites with their rows, those that differ only in their rows joined into one.

    Edits of one trial at one site come in the trial's order, also where another trial has them the other way round.
    """
    joined: dict[tuple[Any, ...], tuple[Edit, list[list[int]]]] = {}
    for piece in pieces:
        for part in range(piece.low, piece.high):
            for order, edit in enumerate(piece.group.parts[part].trial.edits):
                if edit.site not in sites:
                    continue
                rows = joined.setdefault((order, *_likeness(edit)), (edit, [[], [], []]))[1]
                for total, new in zip(rows, rows_of(edit, piece, part), strict=True):
                    total.extend(new)
    found: dict[Site, list[tuple[Edit, Rows]]] = defaultdict(list)
    for _, (edit, rows) in sorted(joined.items(), key=lambda item: item[0][0]):
        found[edit.site].append((edit, Rows(*(torch.tensor(r, device=device, dtype=torch.long) for r in rows))))
    return found
