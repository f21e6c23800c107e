"""Groups of rows: which parts of which trials are computed together."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Bucket, Edit, Rows, Site, Trial
from mechinterp_cli.engine.packed_attention import Shared
from mechinterp_cli.engine.sharing import Sharing


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
    """Parts that start at the same position on the same prompts and share rows alike, in the order of their admission.

    A part's *cells* are its (prompt, position) pairs, prompt by prompt. Each has a row of its own, or prompts that
    begin alike share rows. `state` is [parts, rows, d_model]; the first `active` parts are under way.

    Args:
        stream: What the parts started from.
        start: Their first position.
        prompts: Their prompts.
        shared: For every cell its row; None where each has its own.
        width: Positions from the start on.
    """

    def __init__(
        self, stream: str, start: int, prompts: tuple[int, ...], shared: tuple[int, ...] | None, width: int
    ) -> None:
        cells = range(len(prompts) * width)
        self.stream = stream
        self.start = start
        self.width = width
        self.prompts = torch.tensor(prompts)
        self.own_rows = None if shared is None else _first_cells(shared)
        """Where rows are shared, the first cell of each and the row."""
        self.row_of_cell = torch.tensor(cells if shared is None else shared)
        self.cell_of_row = first = torch.tensor(list(cells if self.own_rows is None else self.own_rows))
        self.prompt_of_row = self.prompts[first // width]
        self.position_of_row = first % width + start
        self.parts: list[Part] = []
        self.active = 0
        self.state = torch.empty(0)
        self.read_rows = torch.empty(0, dtype=torch.long)
        """Rows of a part whose logits are read."""

    @property
    def shared(self) -> Shared | None:
        """How cells and rows belong together, where prompts share rows."""
        return None if self.own_rows is None else Shared(self.row_of_cell, self.cell_of_row)

    @property
    def rows_per_part(self) -> int:
        """Rows that one part has."""
        return len(self.cell_of_row)

    def place(self, read: Tensor, like: Tensor) -> None:
        """Make room on the device of `like`, a hidden state; `read` is [prompts of the bucket, reads]."""
        for name in ("prompts", "row_of_cell", "cell_of_row", "prompt_of_row", "position_of_row"):
            setattr(self, name, getattr(self, name).to(like.device))
        self.state = like.new_empty(len(self.parts), self.rows_per_part, like.shape[-1])
        at = read[self.prompts]
        self.read_rows = torch.unique(self.rows_at(at)[at >= self.start])

    def rows_at(self, positions: Tensor) -> Tensor:
        """Rows [prompts, n] of some positions [prompts, n]; those before the start count as the start."""
        cells = torch.arange(len(self.prompts), device=positions.device)[:, None] * self.width
        return self.row_of_cell[cells + (positions - self.start).clamp(min=0)]


def _first_cells(shared: tuple[int, ...]) -> dict[int, int]:
    """For every row, in order, the first cell that has it; rows are numbered as they first come."""
    firsts: dict[int, int] = {}
    for cell, row in enumerate(shared):
        if row == len(firsts):
            firsts[cell] = row
    return firsts


def group_trials(trials: Sequence[Trial], bucket: Bucket, *, packed: bool) -> list[Group]:
    """Sort the trials' (trial, prompt) pairs into groups."""
    groups: dict[tuple[str, int, tuple[int, ...], tuple[int, ...]], Group] = {}
    sharing = Sharing(bucket)
    for slot, trial in enumerate(trials):
        starts: dict[int, list[int]] = defaultdict(list)
        for prompt in trial.prompts:
            starts[trial.start(prompt) if packed else 0].append(prompt)
        first = admission(trial)
        for start, prompts in starts.items():
            if start >= bucket.length:
                continue  # no edit touches these prompts
            shared = sharing.rows(trial, prompts, start) if packed else None
            key = (trial.stream, start, tuple(prompts), shared or ())
            if key not in groups:
                groups[key] = Group(trial.stream, start, tuple(prompts), shared, bucket.length - start)
            groups[key].parts.append(Part(trial, slot, first))
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
        """A view of the group's state, [parts, rows, d_model]."""
        return self.group.state[self.low : self.high]

    def prompt_of_rows(self) -> Tensor:
        """Prompt index of every row; of a shared one its first prompt."""
        return self.group.prompt_of_row.repeat(self.high - self.low)

    def position_of_rows(self) -> Tensor:
        """Absolute position of every row."""
        return self.group.position_of_row.repeat(self.high - self.low)

    def read_rows(self) -> Tensor:
        """The call's rows whose logits are read."""
        parts = torch.arange(self.high - self.low, device=self.group.read_rows.device)
        return (self.row + parts[:, None] * self.group.rows_per_part + self.group.read_rows).flatten()


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
            cell = i * group.width + position - group.start
            row = cell if group.own_rows is None else group.own_rows.get(cell)
            if row is None:
                continue  # shared with a prompt before, and edited there
            index.append(base + row)
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


def only_rows(
    edits: Mapping[Site, Sequence[tuple[Edit, Rows]]], kept: Tensor, rows: int
) -> dict[Site, list[tuple[Edit, Rows]]]:
    """The edits on a call of only these of the rows, [kept]."""
    place = torch.full((rows,), -1, device=kept.device)
    place[kept] = torch.arange(len(kept), device=kept.device)

    def cut(old: Rows) -> Rows:
        there = place[old.index] >= 0
        return Rows(place[old.index][there], old.prompt[there], old.position[there])

    return {site: [(edit, cut(old)) for edit, old in some] for site, some in edits.items()}
