"""Grids of words as PNG and SVG: the colour behind a word, the number below it."""

from functools import partial
from typing import Any

import altair as alt
import numpy as np

from mechinterp_cli.report.grid import ColourScale
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.picture import COLOURS, Chart, Drawing, Rows, head_lines, ink_on
from mechinterp_cli.report.wordgrid import LETTER, LONGEST, ROOM, WordGrid, WordPanel, cell_pixels

LOW, HIGH = 18, 30
"""Height of a cell with a word alone, and with a number below it."""
LABEL_ROOM, LEGEND_ROOM = 150, 110


def drawing(grid: WordGrid) -> Drawing:
    """The grid as a picture."""
    return Drawing(partial(chart, grid), partial(datasets, grid))


def chart(grid: WordGrid) -> Chart:
    """The picture as a Vega-Lite chart."""
    shown = _shown(grid)
    cell = _cell_width(grid)
    room = max(len(panel.columns) for panel in shown) * cell + LABEL_ROOM + LEGEND_ROOM
    panels = [_panel(grid, panel, at, cell) for at, panel in enumerate(shown)]
    title = head_lines(grid.title, (*grid.lines, _cut(grid, shown)), room)
    whole = alt.concat(*panels, columns=1, title=title, spacing=14).resolve_scale(color="independent")
    drawn: Chart = whole.configure_view(stroke="#999999").configure_axis(grid=False)
    return drawn


def datasets(grid: WordGrid) -> dict[str, Rows]:
    """The chart's data by name: the cells of every panel."""
    return {f"cells {at}": _cells(panel, grid.scale) for at, panel in enumerate(_shown(grid))}


def _shown(grid: WordGrid) -> list[WordPanel]:
    """The panels, each with the last of its columns where not all have room."""
    most = int(ROOM // _cell_width(grid))
    return [panel.last(most) for panel in grid.panels]


def _cut(grid: WordGrid, shown: list[WordPanel]) -> str:
    panel, most = max(
        zip(grid.panels, shown, strict=True), key=lambda pair: len(pair[0].columns) - len(pair[1].columns)
    )
    if len(most.columns) == len(panel.columns):
        return ""
    return f"The last {len(most.columns)} of {len(panel.columns)} {grid.cut}; the table has all."


def _cell_width(grid: WordGrid) -> float:
    words = (word for panel in grid.panels for row in panel.words for word in row)
    return cell_pixels(words, (number for panel in grid.panels for row in panel.numbers for number in row))


def _panel(grid: WordGrid, panel: WordPanel, at: int, cell: float) -> alt.LayerChart:
    short = all(len(label) <= cell / LETTER for label in panel.columns)
    column_axis = alt.Axis(labelAngle=0 if short else -50, labelLimit=140, labelOverlap=False, ticks=False)
    row_axis = alt.Axis(labelLimit=LABEL_ROOM - 30, labelOverlap=False, ticks=False, minExtent=24)
    columns, rows = ([show_text(label) for label in labels] for labels in (panel.columns, panel.rows))
    x = alt.X("column:N", scale=alt.Scale(domain=columns), title=show_text(panel.column_title) or None)
    y = alt.Y("row:N", scale=alt.Scale(domain=rows), title=show_text(panel.row_title) or None)
    x["axis"], y["axis"] = column_axis, row_axis
    base = alt.Chart(alt.NamedData(f"cells {at}"))
    ink = alt.Color("ink:N", scale=None)
    numbers = any(number for row in panel.numbers for number in row)
    layers = [base.mark_rect(stroke="#dddddd", strokeWidth=0.5).encode(x, y, _colour(grid, with_legend=at == 0))]
    layers.append(base.mark_text(fontSize=10, dy=-6 if numbers else 0).encode(x, y, ink, alt.Text("word:N")))
    if numbers:
        layers.append(base.mark_text(fontSize=8.5, dy=7).encode(x, y, ink, alt.Text("number:N")))
    height = len(panel.rows) * (HIGH if numbers else LOW)
    layered = alt.LayerChart(layer=layers, width=cell * len(columns), height=height, title=show_text(panel.title))
    drawn: alt.LayerChart = layered.resolve_scale(color="independent")
    return drawn


def _colour(grid: WordGrid, *, with_legend: bool) -> alt.Color:
    scale, arm = grid.scale, len(COLOURS) // 2
    above = [scale.middle + (scale.high - scale.middle) * i / arm for i in range(arm + 1)]
    below = [scale.low + (scale.middle - scale.low) * i / arm for i in range(arm)] if scale.low < scale.middle else []
    stops = [*below, *above]
    ends = [scale.low, scale.middle, scale.high] if below else [scale.low, scale.high]
    legend = alt.Legend(title=grid.quantity, gradientLength=70, values=ends, format=".2~f", titleLimit=LEGEND_ROOM)
    colours = alt.Scale(domain=stops, range=list(COLOURS[-len(stops) :]), clamp=True, interpolate="rgb")
    return alt.Color("value:Q", scale=colours, legend=legend if with_legend else None)


def _cells(panel: WordPanel, scale: ColourScale) -> Rows:
    return [
        _cell(panel, scale, i, j)
        for i in range(len(panel.rows))
        for j in range(len(panel.columns))
        if panel.words[i][j] or panel.numbers[i][j]
    ]


def _cell(panel: WordPanel, scale: ColourScale, row: int, column: int) -> dict[str, Any]:
    value = float(panel.values[row, column])
    known = bool(np.isfinite(value))
    return {
        "row": show_text(panel.rows[row]),
        "column": show_text(panel.columns[column]),
        "word": show_token(panel.words[row][column], longest=LONGEST),
        "number": panel.numbers[row][column],
        "value": value if known else None,
        "ink": ink_on(scale.share(value)) if known else "#000000",
    }
