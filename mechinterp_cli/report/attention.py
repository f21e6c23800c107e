"""Attention pictures: which token looks at which, one panel per head."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import numpy.typing as npt

from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.picture import COLOURS, PICTURE_WIDTH, Chart, Drawing, Rows, head_lines
from mechinterp_cli.report.shapes import AttentionPicture

SEQUENTIAL = COLOURS[len(COLOURS) // 2 :]
"""White to blue."""
HIDDEN = "#ececec"
"""Keys that a query cannot see."""
FAINT = 0.002
"""Less attention than this is white on every screen, and not drawn: most cells are such."""
MAX_TOKENS = 128
"""Longer sequences are drawn from their end; the caption says so."""
MAX_LABELS = 64
SIDE = 510
"""Pixels that a panel's side takes at most, as long as its cells stay visible."""
SMALLEST_SIDE = 150
LABEL_ROOM = 130


def drawing(picture: AttentionPicture) -> Drawing:
    """The panels as a picture."""
    return Drawing(partial(chart, picture), partial(datasets, picture))


def chart(picture: AttentionPicture) -> Chart:
    """The picture as a Vega-Lite chart."""
    length = len(picture.tokens)
    first, labels = _labels(picture)
    cut = (f"The last {MAX_TOKENS} of {length} tokens; attention to earlier ones is not drawn.",) if first else ()
    cell = _cell(len(labels))
    side = max(SMALLEST_SIDE, cell * len(labels))
    across = min(len(picture.panels), max(1, PICTURE_WIDTH // (side + LABEL_ROOM)))
    room = across * (side + LABEL_ROOM)
    panels = [
        _panel(panel.title, i, labels, side, with_legend=i == across - 1) for i, panel in enumerate(picture.panels)
    ]
    title = head_lines(picture.title, (*picture.lines, *cut), room)
    whole = alt.concat(*panels, columns=across, title=title, spacing=24).resolve_scale(color="independent")
    drawn: Chart = whole.configure_view(stroke="#999999", fill=HIDDEN).configure_axis(grid=False)
    return drawn


def datasets(picture: AttentionPicture) -> dict[str, Rows]:
    """The chart's data by name: of every panel, what its queries can see, and its cells."""
    first, labels = _labels(picture)
    found: dict[str, Rows] = {}
    for i, panel in enumerate(picture.panels):
        shown = panel.pattern[first : first + len(labels), first : first + len(labels)]
        found |= {f"visible {i}": _visible(shown, labels), f"cells {i}": _cells(shown, labels)}
    return found


def _labels(picture: AttentionPicture) -> tuple[int, list[str]]:
    """The first position that is drawn, and the labels from there on, distinct by their number."""
    length = len(picture.tokens)
    first = max(0, length - MAX_TOKENS)
    return first, [f"{at} {show_token(picture.tokens[at])}" for at in range(first, length)]


def _cell(count: int) -> int:
    return max(5, min(24, SIDE // max(1, count)))


def _panel(title: str, index: int, labels: Sequence[str], side: int, *, with_legend: bool) -> alt.LayerChart:
    axis, order = _axis(labels, side), alt.Scale(domain=list(labels))
    key_axis = alt.Axis(labelAngle=-90, **axis)
    y = alt.Y("query:N", scale=order, axis=alt.Axis(**axis), title="query")
    stops = [i / (len(SEQUENTIAL) - 1) for i in range(len(SEQUENTIAL))]
    scale = alt.Scale(domain=stops, range=list(SEQUENTIAL), clamp=True, interpolate="rgb")
    legend = alt.Legend(title="attention", gradientLength=110, values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")
    colour = alt.Color("value:Q", scale=scale, legend=legend if with_legend else None)
    # White where a query sees keys; only cells that differ from it are drawn one by one.
    start = alt.X("first:N", scale=order, bandPosition=0, axis=key_axis, title="key")
    visible = alt.Chart(alt.NamedData(f"visible {index}")).mark_rect(color=SEQUENTIAL[0])
    cells = alt.Chart(alt.NamedData(f"cells {index}")).mark_rect()
    layers = [
        visible.encode(start, y, alt.X2("last:N", bandPosition=1)),
        cells.encode(alt.X("key:N", scale=order, axis=key_axis, title="key"), y, colour),
    ]
    return alt.LayerChart(layer=layers, width=side, height=side, title=show_text(title))


def _axis(labels: Sequence[str], side: int) -> dict[str, Any]:
    every = max(1, -(-len(labels) // MAX_LABELS))
    size = max(7, min(10, every * side // max(1, len(labels)) - 1))
    return {
        "values": list(labels[::every]),
        "labelOverlap": False,
        "labelFontSize": size,
        "labelLimit": 100,
        "labelPadding": 3,
        "ticks": every > 1,
    }


def _visible(shown: npt.NDArray[np.float64], labels: Sequence[str]) -> Rows:
    """Every run of keys that a query can see."""
    runs = []
    for i, row in enumerate(np.isfinite(shown)):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], row, [False]])))
        for start, end in edges.reshape(-1, 2):
            runs.append({"query": labels[i], "first": labels[start], "last": labels[end - 1]})
    return runs


def _cells(shown: npt.NDArray[np.float64], labels: Sequence[str]) -> Rows:
    return [
        {"query": labels[i], "key": labels[j], "value": round(float(shown[i, j]), 5)}
        for i, j in zip(*np.nonzero(np.nan_to_num(shown) >= FAINT), strict=True)
    ]
