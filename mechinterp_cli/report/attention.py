"""Attention pictures: which token looks at which, one panel per head."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import altair as alt
import numpy as np

from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.picture import COLOURS, PICTURE_WIDTH, Chart, Drawing, head_lines, inline
from mechinterp_cli.report.shapes import AttentionPanel, AttentionPicture

SEQUENTIAL = COLOURS[len(COLOURS) // 2 :]
"""White to blue."""
HIDDEN = "#ececec"
"""Keys that a query cannot see."""
MAX_TOKENS = 128
"""Longer sequences are drawn from their end; the caption says so."""
MAX_LABELS = 64
SIDE = 510
"""Pixels that a panel's side takes at most, as long as its cells stay visible."""
SMALLEST_SIDE = 150
LABEL_ROOM = 130


def drawing(picture: AttentionPicture) -> Drawing:
    """The panels as a picture."""
    return Drawing(partial(chart, picture))


def chart(picture: AttentionPicture) -> Chart:
    """The picture as a Vega-Lite chart."""
    length = len(picture.tokens)
    first = max(0, length - MAX_TOKENS)
    cut = (f"The last {MAX_TOKENS} of {length} tokens; attention to earlier ones is not drawn.",) if first else ()
    labels = [f"{at} {show_token(picture.tokens[at])}" for at in range(first, length)]
    cell = _cell(len(labels))
    side = max(SMALLEST_SIDE, cell * len(labels))
    across = min(len(picture.panels), max(1, PICTURE_WIDTH // (side + LABEL_ROOM)))
    room = across * (side + LABEL_ROOM)
    panels = [_panel(panel, labels, first, side, with_legend=i == across - 1) for i, panel in enumerate(picture.panels)]
    title = head_lines(picture.title, (*picture.lines, *cut), room)
    whole = alt.concat(*panels, columns=across, title=title, spacing=24).resolve_scale(color="independent")
    drawn: Chart = whole.configure_view(stroke="#999999", fill=HIDDEN).configure_axis(grid=False)
    return drawn


def _cell(count: int) -> int:
    return max(5, min(24, SIDE // max(1, count)))


def _panel(panel: AttentionPanel, labels: Sequence[str], first: int, side: int, *, with_legend: bool) -> alt.Chart:
    axis = _axis(labels, side)
    x = alt.X("key:N", scale=alt.Scale(domain=list(labels)), axis=alt.Axis(labelAngle=-90, **axis), title="key")
    y = alt.Y("query:N", scale=alt.Scale(domain=list(labels)), axis=alt.Axis(**axis), title="query")
    stops = [i / (len(SEQUENTIAL) - 1) for i in range(len(SEQUENTIAL))]
    scale = alt.Scale(domain=stops, range=list(SEQUENTIAL), clamp=True, interpolate="rgb")
    legend = alt.Legend(title="attention", gradientLength=110, values=[0, 0.25, 0.5, 0.75, 1], format=".2~f")
    colour = alt.Color("value:Q", scale=scale, legend=legend if with_legend else None)
    cells = alt.Chart(inline(_cells(panel, labels, first))).mark_rect().encode(x, y, colour)
    drawn: alt.Chart = cells.properties(width=side, height=side, title=show_text(panel.title))
    return drawn


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


def _cells(panel: AttentionPanel, labels: Sequence[str], first: int) -> list[dict[str, Any]]:
    shown = panel.pattern[first : first + len(labels), first : first + len(labels)]
    return [
        {"query": labels[i], "key": labels[j], "value": round(float(shown[i, j]), 5)}
        for i, j in zip(*np.nonzero(np.isfinite(shown)), strict=True)
    ]
