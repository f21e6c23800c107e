"""Scores as maps: layer against token, against where a probe reads, or against head."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mechinterp_cli.report.cells import number
from mechinterp_cli.report.grid import MAX_PANELS, ColourScale, Heatmap, Panel, build_panel
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.probe_scores import Scores
from mechinterp_cli.report.rows import distinct, having, records

Tokens = Mapping[str, Sequence[str]]
"""Decoded tokens of each template's first prompt."""


def score_maps(scores: Scores, tokens: Tokens) -> Iterator[tuple[str, Heatmap]]:
    """Of every kind of site that is read at several places of a layer: (file name, map).

    Args:
        scores: All.
        tokens: Decoded tokens by template; the one template of a set also under ``""``.
    """
    for kind in distinct(scores.own, "site"):
        rows = having(scores.own, site=kind)
        column = _column(rows)
        if column is not None:
            yield f"map-{kind}", _map(scores, kind, rows, column, tokens)


def _column(rows: pd.DataFrame) -> str | None:
    """What stands on the axis: heads, positions, or views of any other kind."""
    for name in ("head", "kv_head"):
        if rows[name].nunique() > 1:
            return name
    if rows["position"].notna().all() and rows["position"].nunique() > 1:
        return "position"
    return "view" if rows["view"].nunique() > 1 else None


def _map(scores: Scores, kind: str, rows: pd.DataFrame, column: str, tokens: Tokens) -> Heatmap:
    along = {"position": "template", "view": None}.get(column, "view")
    keys = [name for name in ("probe", along) if name == "probe" or (name and rows[name].nunique() > 1)]
    parts = list(rows.groupby(keys, sort=False, dropna=False))
    notes = [scores.scale, f"White: {_chance_name(scores)}."]
    if len(parts) > MAX_PANELS:
        first = distinct(rows, "probe")[0]
        parts = [(key, part) for key, part in parts if key[0] == first]
        notes.append(f"Of the first probe, {first}.")
    if len(parts) > MAX_PANELS:
        parts = [((first, ""), having(rows, probe=first))]
        notes.append("Each cell is the best of all views.")
    if column == "position":
        notes.append("Tokens are those of the first prompt.")
    layers = tuple(sorted({int(layer) for layer in rows["layer"]}))
    panels = [_panel(part, ", ".join(_names(key)), column, layers, tokens) for key, part in parts]
    return Heatmap(
        title=f"{scores.about[0]}, {kind}",
        subtitle=", ".join(scores.about[1:]),
        caption=" ".join(notes),
        quantity=scores.measure,
        panels=tuple(panels),
        scale=_colours(scores),
        numbers=True,
    )


def _names(key: object) -> Iterator[str]:
    for name in key if isinstance(key, tuple) else (key,):
        if isinstance(name, str) and name:
            yield show_text(name)[:60]


def _chance_name(scores: Scores) -> str:
    return "the mean" if scores.measure == "R²" else "the commonest class" if _majority(scores) else "0.5"


def _majority(scores: Scores) -> list[float]:
    rows = records(having(scores.rows, baseline="majority"))
    return [number(row["score"]) for row in rows if np.isfinite(number(row["score"]))]


def _colours(scores: Scores) -> ColourScale:
    """White where nothing is read, blue up to 1, red as far below."""
    if scores.measure == "R²":
        return ColourScale(low=-1.0, middle=0.0, high=1.0)
    found = _majority(scores)
    chance = min(sum(found) / len(found), 0.95) if found else 0.5
    return ColourScale(low=max(0.0, 2 * chance - 1), middle=chance, high=1.0)


def _panel(rows: pd.DataFrame, title: str, column: str, layers: tuple[int, ...], tokens: Tokens) -> Panel:
    templates = distinct(rows, "template")
    known = tokens.get(templates[0] if len(templates) == 1 else "", ())
    placed = rows.assign(status="ok", span=rows["view"])
    panel = build_panel(
        placed,
        title=title,
        column="span" if column == "view" else column,
        layers=layers,
        quantity="score",
        tokens=known if column == "position" else (),
    )
    if column != "view":
        return panel
    return replace(panel, column_title="read at", columns=tuple(map(show_text, distinct(rows, "view"))))
