"""What the page shows of single prompts: tokens side by side, and effects on that prompt alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.page.circuitmaps import circuit_maps
from mechinterp_cli.report.page.pack import plain
from mechinterp_cli.report.page.probemaps import labels_of, probe_maps
from mechinterp_cli.report.page.promptmaps import PromptMap, effect_maps, score_maps, show_name, token_maps
from mechinterp_cli.runs.manifest import Manifest

USES = ("results", "summary", "sequences", "inputs", "predictions", "labels", "evaluations", "baselines")
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
    maps = [*_maps(manifest, tables)]
    cells = sum(len(one.cells) for one in maps)
    kept = [] if cells > MAX_VALUES else maps
    numbers = _that_fit(prompts, sum(len(one.cells) for one in kept))
    labels = labels_of(tables)
    chosen = prompts[prompts["prompt"].isin(numbers)]
    listed = [_prompt(rows, labels.get(int(number(at)), {})) for at, rows in chosen.groupby("prompt", sort=True)]
    return {
        "prompts": listed,
        "maps": [_map(one, numbers) for one in kept],
        "note": _note(prompts, numbers, maps, kept),
    }


def _maps(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """Those of the run's method: of the others there are no tables."""
    yield from effect_maps(manifest, tables)
    yield from score_maps(tables)
    yield from token_maps(manifest, tables)
    yield from probe_maps(tables)
    yield from circuit_maps(manifest, tables)


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


def _prompt(rows: pd.DataFrame, labelled: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its streams, clean first, and with what it is labelled with."""
    order = rows.sort_values("stream").to_dict("records")
    first = order[0]
    words = [show_token(str(token), longest=LONGEST) for token in first["tokens"]]
    group = text(first.get("group"))
    start = show_text(text(first["text"])[:60])
    return {
        "prompt": int(first["prompt"]),
        "name": " ".join(filter(None, (start, f"({show_text(group)})" if group else ""))),
        "spans": {show_name(name): positions for name, positions in _spans(first.get("spans")).items()}
        | dict(labelled.get("spans", {})),
        "streams": [
            {
                "name": str(row["stream"]),
                "tokens": words
                if row is first
                else [show_token(str(token), longest=LONGEST) for token in row["tokens"]],
                "answer": _shown(row.get("answer")),
                "wrong": _shown(row.get("wrong_answer")),
                "label": labelled.get("label") if row is first else None,
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
    """A map as the page's script reads it, with the values of these prompts."""
    there = [number for number in numbers if number in one.values]
    words = _words(one, there)
    at = {name: {word: at for at, word in enumerate(own)} for name, own in words.items()}
    return {
        "title": one.title,
        "quantity": one.quantity,
        "signed": one.signed,
        "axis": one.axis,
        "side": one.side,
        "rows": list(one.rows),
        "columns": list(one.columns),
        "cells": [list(cell) for cell in one.cells],
        "scale": one.scale,
        "stream": one.stream,
        "absent": one.absent,
        "values": {str(number): [plain(float(value)) for value in one.values[number]] for number in there},
        "words": words,
        "told": {
            str(number): {
                name: [at[name][cell] if isinstance(cell, str) else plain(cell) for cell in cells]
                for name, cells in one.told[number].items()
            }
            for number in there
            if number in one.told
        },
        "wrong": {str(number): np.flatnonzero(one.wrong[number]).tolist() for number in there if number in one.wrong},
        "about": {str(number): one.about[number] for number in there if number in one.about},
    }


def _words(one: PromptMap, numbers: Sequence[int]) -> dict[str, list[str]]:
    """Texts that are told of cells, each once: cells have their places in this list."""
    found: dict[str, dict[str, None]] = {}
    for prompt in numbers:
        for name, cells in one.told.get(prompt, {}).items():
            texts = [cell for cell in cells if isinstance(cell, str)]
            if texts:
                found.setdefault(name, {}).update(dict.fromkeys(texts))
    return {name: list(words) for name, words in found.items()}
