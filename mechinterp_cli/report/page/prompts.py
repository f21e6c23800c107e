"""What the page shows of single prompts: tokens side by side, and effects on that prompt alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mechinterp_cli.report.cells import missing, text
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.page.pack import plain
from mechinterp_cli.report.page.promptmaps import PromptMap, effect_maps, score_maps, show_name, token_maps
from mechinterp_cli.runs.manifest import Manifest

USES = ("results", "summary", "sequences", "inputs")
"""Tables that effects on single prompts are read from; a run may lack any."""
MAX_VALUES = 100_000
"""Values of all maps together."""
MAX_TOKENS = 60_000
LONGEST = 200
"""Letters of a token, of which some are whole files."""


def prompt_content(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> dict[str, Any] | None:
    """The prompts as far as the page has room for them, and their maps.

    Args:
        manifest: The run's.
        tables: `prompts` and those of `USES` that there are.

    Returns:
        `prompts`, `maps`, and `note`, what was left out; None where the run has no prompts.
    """
    prompts = tables.get("prompts")
    if prompts is None or prompts.empty:
        return None
    maps = [*effect_maps(manifest, tables), *score_maps(tables), *token_maps(manifest, tables)]
    cells = sum(len(one.cells) for one in maps)
    kept = [] if cells > MAX_VALUES else maps
    numbers = _that_fit(prompts, sum(len(one.cells) for one in kept))
    listed = [_prompt(rows) for _, rows in prompts[prompts["prompt"].isin(numbers)].groupby("prompt", sort=True)]
    return {
        "prompts": listed,
        "maps": [_map(one, numbers) for one in kept],
        "note": _note(prompts, numbers, maps, kept),
    }


def _that_fit(prompts: pd.DataFrame, cells: int) -> list[int]:
    """The first prompts, as long as the page does not grow too large; one at least."""
    lengths = prompts["tokens"].map(len).groupby(prompts["prompt"]).sum().sort_index()
    most = max(1, MAX_VALUES // cells) if cells else len(lengths)
    within = (lengths.cumsum() <= MAX_TOKENS).to_numpy(dtype=bool)
    return [int(number) for at, number in enumerate(lengths.index) if at == 0 or (at < most and within[at])]


def _note(prompts: pd.DataFrame, numbers: Sequence[int], maps: Sequence[PromptMap], kept: Sequence[PromptMap]) -> str:
    count = prompts["prompt"].nunique()
    parts = [f"The first {len(numbers)} of {count} prompts; the table prompts has all."] if len(numbers) < count else []
    if len(kept) < len(maps):
        trials = sum(len(one.cells) for one in maps)
        parts.append(
            f"Single prompts have no map: {trials:,} trials are too many for this page; the table results has all."
        )
    return " ".join(parts)


def _prompt(rows: pd.DataFrame) -> dict[str, Any]:
    """A prompt with its streams, clean first."""
    order = rows.sort_values("stream").to_dict("records")
    first = order[0]
    words = [show_token(str(token), longest=LONGEST) for token in first["tokens"]]
    group = text(first.get("group"))
    start = show_text(text(first["text"])[:60])
    return {
        "prompt": int(first["prompt"]),
        "name": " ".join(filter(None, (start, f"({show_text(group)})" if group else ""))),
        "spans": {show_name(name): positions for name, positions in _spans(first.get("spans")).items()},
        "streams": [
            {
                "name": str(row["stream"]),
                "tokens": words
                if row is first
                else [show_token(str(token), longest=LONGEST) for token in row["tokens"]],
                "answer": _shown(row.get("answer")),
                "wrong": _shown(row.get("wrong_answer")),
            }
            for row in order
        ],
    }


def _spans(value: object) -> dict[str, list[int]]:
    spans: dict[str, list[int]] = {} if missing(value) else json.loads(str(value))
    return spans


def _shown(value: object) -> str | None:
    return None if missing(value) else show_token(text(value), longest=LONGEST)


def _map(one: PromptMap, numbers: Sequence[int]) -> dict[str, Any]:
    return {
        "title": one.title,
        "quantity": one.quantity,
        "signed": one.signed,
        "axis": one.axis,
        "side": one.side,
        "rows": list(one.rows),
        "columns": list(one.columns),
        "cells": [list(cell) for cell in one.cells],
        "values": {
            str(number): [plain(float(value)) for value in one.values[number]]
            for number in numbers
            if number in one.values
        },
    }
