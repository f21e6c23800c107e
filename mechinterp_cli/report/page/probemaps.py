"""Maps of single prompts of `probe`: what every place's probe says of that text, or of its labelled words."""

import json
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.grid import COLUMN_TITLES
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.page.pack import plain
from mechinterp_cli.report.page.promptmaps import PromptMap, show_name
from mechinterp_cli.report.rows import Row, distinct, having, records

WORD = "word"
"""Labelled words of a text are its spans on the page: `word 0`, `word 1`, …"""
EVEN = (0.0, 0.5, 1.0)
"""Colours of a probability; white is where a probe of two classes cannot say."""
ABSENT = "No probe reads this prompt."


def probe_maps(tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """A map per kind of site and probe; per view, too, where the columns are heads.

    Args:
        tables: `predictions`, where it is there.
    """
    table = tables.get("predictions")
    if table is None or table.empty:
        return
    rows = checkpoints_of(table).last(table)
    for site in distinct(rows, "site"):
        own = having(rows, site=site)
        column = _column(own)
        keys = ["probe", "view"] if column in ("head", "kv_head") else ["probe"]
        varied = [name for name in keys if own[name].nunique() > 1]
        for key, part in own.groupby(keys, sort=False):
            named = [show_text(text(value)) for name, value in zip(keys, key, strict=True) if name in varied]
            yield _map(", ".join([site, *named]), part, column)


def _column(rows: pd.DataFrame) -> str:
    """What the columns are: heads, labelled words, positions, or views of any other kind."""
    for name in ("head", "kv_head"):
        if rows[name].nunique() > 1:
            return name
    if rows["word"].notna().any():
        return WORD
    return "position" if rows["position"].notna().all() else "view"


def _map(title: str, rows: pd.DataFrame, column: str) -> PromptMap:
    """The map of one probe at one kind of site."""
    layers = sorted({int(layer) for layer in rows["layer"]})
    names = [_name(row, column) for row in records(rows[list({column, "span", "view"})])]
    columns = sorted(set(names)) if column == "position" else _in_order(names, column)
    at_column = {name: at for at, name in enumerate(columns)}
    at_row = {layer: at for at, layer in enumerate(layers)}
    places = [(at_row[int(layer)], at_column[name]) for layer, name in zip(rows["layer"], names, strict=True)]
    cells = sorted(set(places))
    at_cell = {cell: at for at, cell in enumerate(cells)}
    classes = rows["class"].notna().all()
    quantity, scale = _quantity(rows)
    by_prompt = dict(_by_prompt(rows.assign(cell=[at_cell[place] for place in places])))
    return PromptMap(
        title=title,
        quantity=quantity,
        axis={"view": "read at"}.get(column, COLUMN_TITLES.get(column, column)),
        side="layer",
        rows=[str(layer) for layer in layers],
        columns=columns,
        cells=cells,
        values={prompt: _spread(part, _values(part), len(cells)) for prompt, part in by_prompt.items()},
        scale=scale,
        told={prompt: _told(part, len(cells)) for prompt, part in by_prompt.items()},
        wrong={prompt: _wrong(part, len(cells)) for prompt, part in by_prompt.items()} if classes else {},
        about={prompt: _about(part) for prompt, part in by_prompt.items()} if classes else {},
        stream="clean",
        absent=ABSENT,
    )


def _name(row: Row, column: str) -> int | str:
    """A position as a number; a span by its name, so that its tokens are found; else what the tables call it."""
    if column == "position":
        return int(number(row[column]))
    if column == WORD:
        return f"{WORD} {int(number(row[WORD]))}"
    return show_name(row["span"]) if column == "view" and not missing(row["span"]) else show_text(text(row[column]))


def _in_order(names: Sequence[int | str], column: str) -> list[int | str]:
    found = list(dict.fromkeys(names))
    return found if column == "view" else sorted(found, key=lambda name: int(str(name).split()[-1]))


def _quantity(rows: pd.DataFrame) -> tuple[str, tuple[float, float, float] | None]:
    """What the values are, and their colours."""
    if rows["class"].isna().any():
        return "predicted minus true", None
    known = rows["probability"].notna().all()
    return ("probability of the true class" if known else "1 right, 0 wrong"), EVEN


def _values(rows: pd.DataFrame) -> pd.Series:
    if rows["class"].isna().any():
        return rows["predicted"] - rows["target"]
    return rows["probability"] if rows["probability"].notna().all() else _right(rows).astype(float)


def _right(rows: pd.DataFrame) -> pd.Series:
    return (rows["class"] == rows["predicted_class"]).astype(bool)


def _by_prompt(rows: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    for prompt, part in rows.groupby("prompt", sort=True):
        yield int(number(prompt)), part


def _spread(rows: pd.DataFrame, values: pd.Series, count: int) -> npt.NDArray[np.float64]:
    """Values as `[cells]`; NaN where there is none."""
    found = np.full(count, np.nan)
    found[rows["cell"].to_numpy(dtype=np.int64)] = values.to_numpy(dtype=np.float64, na_value=np.nan)
    return found


def _wrong(rows: pd.DataFrame, count: int) -> npt.NDArray[np.bool_]:
    return np.asarray(_spread(rows, (~_right(rows)).astype(float), count) == 1, dtype=np.bool_)


def _told(rows: pd.DataFrame, count: int) -> dict[str, list[object]]:
    """What the probe says and what is true, `[cells]`."""
    names = ("predicted", "target") if rows["class"].isna().any() else ("predicted_class", "class")
    found: dict[str, list[object]] = {}
    for name, told in zip(names, ("probe says", "truth"), strict=True):
        cells: list[object] = [None] * count
        for at, value in zip(rows["cell"], rows[name], strict=True):
            cells[int(at)] = None if missing(value) else show_text(value) if isinstance(value, str) else plain(value)
        found[told] = cells
    return found


def _about(rows: pd.DataFrame) -> str:
    right = int(_right(rows).sum())
    return f"{right} of {len(rows)} answers on this prompt are right; × marks the wrong ones."


def labels_of(tables: Mapping[str, pd.DataFrame]) -> dict[int, dict[str, object]]:
    """By prompt its `label`, and `spans`: where its labelled words stand, by their names on the page.

    Args:
        tables: `labels`, where it is there.
    """
    table = tables.get("labels")
    if table is None or table.empty:
        return {}
    rows = checkpoints_of(table).last(table)
    return {int(number(prompt)): _label(records(part)) for prompt, part in rows.groupby("prompt")}


def _label(rows: Sequence[Row]) -> dict[str, object]:
    told = [show_token(text(row["target"] if missing(row["class"]) else row["class"]), longest=60) for row in rows]
    words = [row for row in rows if not missing(row["word"])]
    if not words:
        return {"label": told[0], "spans": {}}
    spans = {f"{WORD} {int(number(row[WORD]))}": json.loads(text(row["positions"])) for row in words}
    return {"label": ", ".join(told), "spans": spans}
