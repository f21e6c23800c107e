"""From summary rows to the grids that pictures are drawn from: one heat map per site block, one panel per template.

Rows are layers, columns are token positions of one template, spans, heads or neurons. Positions of different
templates never share a panel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.behind import INTERVAL, Behind, behind
from mechinterp_cli.report.labels import show_text, show_token

MAX_PANELS = 12
"""More combinations than this are not drawn apart: each cell then holds the strongest of them, and says so."""

LEAST_EFFECT = 0.02
"""Normalised effects that are smaller than this are pale, however small all others are: 1 is the whole difference."""
COLUMN_TITLES = {"position": "token", "span": "span", "head": "head", "kv_head": "key/value head", "neuron": "neuron"}
AGGREGATE_NAMES = {
    "ratio_of_means": "ratio of means",
    "mean_of_ratios": "mean of ratios",
    "mean": "mean effect in the metric's own unit",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One grid of cells."""

    title: str
    column_title: str
    columns: tuple[str, ...]
    """Labels, distinct."""
    layers: tuple[int | str, ...]
    """Ascending; drawn with the first at the bottom, as the network is. Names where the rows are no layers, distinct;
    drawn with the first at the top."""
    values: npt.NDArray[np.float64]
    """`[layers, columns]`; finite where `status` is `ok`."""
    status: npt.NDArray[np.object_]
    """`ok`, `trivial` (exactly 0, not computed), `undefined`, `nan`, or `absent` (no such trial)."""
    row_title: str = "layer"
    """What the rows are."""
    details: Mapping[tuple[int, int], Behind] = field(default_factory=dict)
    """By (row, column): what stands behind a cell's number, for those who point at it."""


@dataclass(frozen=True, kw_only=True)
class ColourScale:
    """Which values the colours stand for: white at the middle, red below it, blue above.

    With `low` at the middle there is no red: white to blue.
    """

    low: float
    middle: float
    high: float

    def share(self, value: float) -> float:
        """Where a value lies between the middle (0) and either end (±1)."""
        end = self.high if value >= self.middle else self.low
        reach = abs(end - self.middle)
        return max(-1.0, min(1.0, (value - self.middle) / reach)) if reach else 0.0


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """One picture, whatever draws it."""

    title: str
    subtitle: str
    caption: str
    quantity: str
    """What the colour stands for."""
    panels: tuple[Panel, ...]
    scale: ColourScale | None = None
    """Of all panels; where None, ± the largest magnitude about 0."""
    least: float = 0.0
    """Magnitude that the scale reaches at least, where it is made of the values: less is nothing, and looks like it."""
    numbers: bool = False
    """Values are printed, in cells that have room for them."""

    @property
    def colours(self) -> ColourScale:
        """The one colour scale of all panels."""
        return self.scale or ColourScale(low=-self.limit, middle=0.0, high=self.limit)

    @property
    def limit(self) -> float:
        """Largest magnitude of any cell, or what the scale reaches at least; 1 where nothing moved."""
        found = [np.abs(panel.values[panel.status == "ok"]) for panel in self.panels]
        largest = max((float(values.max()) for values in found if len(values)), default=0.0)
        return max(largest, self.least) if largest else 1.0

    @property
    def states(self) -> tuple[str, ...]:
        """Which kinds of cells without a colour there are."""
        seen = {state for panel in self.panels for state in panel.status.flat}
        return tuple(state for state in ("trivial", "undefined", "nan", "absent") if state in seen)


@dataclass(frozen=True, kw_only=True)
class HeatmapSpec:
    """What a picture says beside its cells.

    The rows of one block (one site block, one metric) are chosen by the caller; `aggregate` and `group` pick among
    them.
    """

    title: str
    """Such as `resid_pre, ioi, denoise`."""
    subtitle: str = ""
    """Model, metric, number of prompts."""
    normalization: str = ""
    """What 0 and 1 mean; the caption."""
    aggregate: str = "ratio_of_means"
    unit: str = ""
    """That of effects which nothing normalises, in brackets."""
    group: str = "all"
    tokens: Mapping[str, Sequence[str]] | None = None
    """Decoded tokens of each template's first prompt, by the label in the frame's `template` column (`""` where the
    frame has none)."""
    names_vary: bool = False
    """Other prompts of the template have other words in some places; the caption says so."""


def build_heatmap(summary: pd.DataFrame, spec: HeatmapSpec) -> Heatmap:
    """Arranges the rows of one site block and metric.

    Args:
        summary: Columns as in the run directory's summary: `layer`, at least one of `head`, `neuron`, `span`,
            `position`, and `aggregate, group, value, effect, normalized, status`. A column `template` makes a panel
            per template. Null stands for "all of them".
        spec: What to pick and to say.

    Raises:
        ValueError: No row is left, or positions of several templates would share a panel.
    """
    rows = summary[(summary["aggregate"] == spec.aggregate) & (summary["group"] == spec.group)]
    if rows.empty:
        raise ValueError(f"no summary rows of aggregate {spec.aggregate!r} and group {spec.group!r}")
    quantity = "effect" if spec.aggregate == "mean" else "normalized"
    column = _column_axis(rows)
    keys = [name for name in ("template", "head", "kv_head", "neuron", "span", "position") if _varies(rows, name)]
    # A query head's key/value head follows from the head.
    keys = [name for name in keys if name != column and not (column == "head" and name == "kv_head")]
    layers = tuple(sorted({int(layer) for layer in rows["layer"].dropna()})) or (0,)
    strongest = [name for name in keys if name != "template"] if _groups(rows, keys) > MAX_PANELS else []
    keys = [name for name in keys if name not in strongest]
    panels = [
        build_panel(
            part,
            title=_panel_title(keys, key),
            column=column,
            layers=layers,
            quantity=quantity,
            tokens=_tokens(spec, part),
        )
        for key, part in (rows.groupby(keys, dropna=False, sort=False) if keys else [((), rows)])
    ]
    return Heatmap(
        title=spec.title,
        subtitle=spec.subtitle,
        caption=_caption(spec, column, strongest),
        quantity=f"effect {spec.unit}".strip() if quantity == "effect" else "normalised effect",
        panels=tuple(panels),
        least=0.0 if quantity == "effect" else LEAST_EFFECT,
    )


def _varies(rows: pd.DataFrame, name: str) -> bool:
    return name in rows and rows[name].nunique(dropna=False) > 1


def _groups(rows: pd.DataFrame, keys: Sequence[str]) -> int:
    return len(rows[list(keys)].drop_duplicates()) if keys else 1


def _column_axis(rows: pd.DataFrame) -> str | None:
    """The finest thing that varies, heads before positions; else whatever is given at all."""
    names = ("neuron", "head", "kv_head", "span", "position")
    for name in names:
        if _varies(rows, name) and not rows[name].isna().all():
            return name
    return next((name for name in names if name in rows and rows[name].notna().any()), None)


def _tokens(spec: HeatmapSpec, rows: pd.DataFrame) -> Sequence[str]:
    templates = rows["template"].dropna().unique().tolist() if "template" in rows else []
    if len(templates) > 1 and rows["position"].notna().any():
        raise ValueError("positions of several templates cannot share a panel")
    known = spec.tokens or {}
    return known.get(str(templates[0]) if templates else "", ())


def _panel_title(keys: Sequence[str], key: object) -> str:
    values = key if isinstance(key, tuple) else (key,)
    named = [(name, value) for name, value in zip(keys, values, strict=True) if not pd.isna(value)]
    return ", ".join(
        show_text(str(value))[:60] if name == "template" else f"{COLUMN_TITLES[name]} {show_token(str(value))}"
        for name, value in named
    )


def _caption(spec: HeatmapSpec, column: str | None, strongest: Sequence[str]) -> str:
    parts = [spec.normalization, f"Aggregate: {AGGREGATE_NAMES.get(spec.aggregate, spec.aggregate)}."]
    if spec.group != "all":
        parts.append(f"Group: {spec.group}.")
    if strongest:
        parts.append(f"Each cell is the strongest over {' and '.join(COLUMN_TITLES[name] for name in strongest)}.")
    if spec.names_vary and column == "position":
        parts.append("Tokens are those of the first prompt.")
    return " ".join(part for part in parts if part)


def build_panel(
    rows: pd.DataFrame,
    *,
    title: str,
    column: str | None,
    layers: tuple[int, ...],
    quantity: str,
    tokens: Sequence[str],
) -> Panel:
    """Arranges rows into one grid.

    Args:
        rows: With columns `layer`, `status`, that of the values, and that of the grid's columns.
        title: What stands above the panel.
        column: Which column of the frame the grid's columns are; None for a grid of one column.
        layers: All layers of the picture, ascending.
        quantity: Which column of the frame holds the values.
        tokens: Decoded tokens by position, where the grid's columns are positions.
    """
    keys = _column_keys(rows, column)
    values = np.full((len(layers), len(keys)), np.nan)
    status = np.full(values.shape, "absent", dtype=object)
    row_of, column_of = {layer: i for i, layer in enumerate(layers)}, {key: i for i, key in enumerate(keys)}
    shown: dict[tuple[int, int], int] = {}
    cells = zip(rows["layer"], _places(rows, column), rows[quantity], rows["status"], strict=True)
    for index, (layer, place, value, state) in enumerate(cells):
        at = (row_of[0 if pd.isna(layer) else int(layer)], column_of[place])
        number = np.nan if pd.isna(value) else float(value)
        state = _cell_state(str(state), number)
        if (CELL_STANDING[state], abs(number)) > (CELL_STANDING[status[at]], abs(values[at])):
            values[at], status[at], shown[at] = number, state, index
    labels = _labels(keys, column, tokens)
    name = "position" if column == "position" and not tokens else COLUMN_TITLES.get(column or "", "")
    return Panel(
        title=title,
        column_title=name,
        columns=labels,
        layers=layers,
        values=values,
        status=status,
        details=_details(rows, shown),
    )


def _details(rows: pd.DataFrame, shown: Mapping[tuple[int, int], int]) -> dict[tuple[int, int], Behind]:
    """Interval, adjusted p and n of the row that each cell shows, as far as the table has them."""
    names = [name for name in (*INTERVAL, "p_adjusted", "n") if name in rows]
    if not names:
        return {}
    columns = [rows[name].tolist() for name in names]
    return {
        at: behind(dict(zip(names, (column[index] for column in columns), strict=True))) for at, index in shown.items()
    }


CELL_STANDING = {"absent": 0, "trivial": 1, "undefined": 2, "ok": 3, "nan": 4}
"""Which of several trials is shown where they share a cell: a NaN is never hidden by a number."""


def _cell_state(state: str, number: float) -> str:
    if state == "ok" and not np.isfinite(number):
        return "undefined" if np.isnan(number) else "nan"
    return state


def _places(rows: pd.DataFrame, column: str | None) -> list[int | str]:
    """Where each row stands along the columns: a number, the name of a span, or `""` for "all of them"."""
    return [_key(place) for place in rows[column]] if column else [""] * len(rows)


def _key(place: Any) -> int | str:
    if isinstance(place, str):
        return place
    return "" if pd.isna(place) else int(place)


def _column_keys(rows: pd.DataFrame, column: str | None) -> list[int | str]:
    """Numbers ascending; spans in the order of the rows, which is that of the config."""
    keys = list(dict.fromkeys(_places(rows, column)))
    ascending = sorted(key for key in keys if isinstance(key, int))
    return [*ascending, *[key for key in keys if isinstance(key, str)]]


def _labels(keys: Sequence[int | str], column: str | None, tokens: Sequence[str]) -> tuple[str, ...]:
    if column == "position":
        return tuple(_position_label(key, tokens) for key in keys)
    return tuple(show_token(str(key)) if key != "" else "all" for key in keys)


def _position_label(key: int | str, tokens: Sequence[str]) -> str:
    """The position's number makes the label distinct where a word is repeated."""
    if not isinstance(key, int):
        return "all"
    return f"{key} {show_token(tokens[key])}" if 0 <= key < len(tokens) else str(key)
