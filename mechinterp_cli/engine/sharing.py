"""Rows that prompts share: what came before a token is the same, so everything at the token is the same.

Prompts of one template begin alike. Where the models are causal and a trial's edits do the same to two prompts up to
a position, the trial's activations there are the same numbers, and one row stands for both.
"""

from collections.abc import Sequence

from mechinterp_cli.engine.edits import Bucket, Edit, RowValues, Trial
from mechinterp_cli.models.kinds import KEY_KINDS

LEAST_SAVING = 0.04
"""Share of the rows below which nothing is shared: fewer groups are worth as much."""


class Sharing:
    """Finds the rows that a trial's prompts share.

    Args:
        bucket: Prompts and streams.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._tokens: dict[str, list[list[int]]] = {name: ids.tolist() for name, ids in bucket.tokens.items()}
        self._noise = frozenset(bucket.noise)
        self._length = bucket.length
        self._known: dict[object, tuple[int, ...] | None] = {}

    def rows(self, trial: Trial, prompts: Sequence[int], start: int) -> tuple[int, ...] | None:
        """For every (prompt, position from `start` on), prompt by prompt, its row, numbered as they first come.

        None where every pair has a row of its own, or where too few rows would be saved.
        """
        streams = {trial.stream} | {e.source for e in trial.edits if e.source and e.source_prompts is None}
        # An edited pattern may look ahead, and keys differ from prompt to prompt.
        if len(prompts) < 2 or streams & self._noise or any(e.site.kind in KEY_KINDS for e in trial.edits):
            return None
        marks = tuple(tuple((edit.positions[p], _alike(edit, p)) for edit in trial.edits) for p in prompts)
        key = (tuple(sorted(streams)), tuple(prompts), start, marks)
        if key not in self._known:
            texts = [list(zip(*(self._tokens[name][p] for name in sorted(streams)), strict=True)) for p in prompts]
            rows = _numbered(texts, marks, start, self._length)
            self._known[key] = None if max(rows) + 1 > (1 - LEAST_SAVING) * len(rows) else rows
        return self._known[key]


def _alike(edit: Edit, prompt: int) -> int | None:
    """Prompts with the same number get the same from this edit where their streams are the same."""
    if edit.source_prompts is not None:
        return edit.source_prompts[prompt]
    if isinstance(edit.values, RowValues):
        return edit.values.alike(prompt)
    varies = edit.op in ("constant", "add") and edit.values is not None and edit.values.shape[0] > 1
    return prompt if varies else None


Marks = tuple[tuple[tuple[int, ...], int | None], ...]
"""Of one prompt: each edit's positions, and what is alike there."""


def _numbered(
    texts: Sequence[Sequence[tuple[int, ...]]], marks: Sequence[Marks], start: int, length: int
) -> tuple[int, ...]:
    nodes: dict[object, int] = {}
    row_of: dict[int, int] = {}
    rows: list[int] = []
    for text, edits in zip(texts, marks, strict=True):
        node = -1
        edited = [(frozenset(positions), alike) for positions, alike in edits]
        for position in range(length):
            done = tuple(
                (position in positions, alike if position in positions else None) for positions, alike in edited
            )
            node = nodes.setdefault((node, text[position], done), len(nodes))
            if position >= start:
                rows.append(row_of.setdefault(node, len(row_of)))
    return tuple(rows)
