"""The picture of a circuit of heads and neurons, as PNG and SVG."""

import math
from functools import partial
from typing import Any

import altair as alt

from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.neuron_graph import NeuronBox, NeuronPicture, strongest
from mechinterp_cli.report.picture import COLOURS, FAINT, Chart, Drawing, head_lines, inline

ROW, COLUMN = 50, 92
"""Pixels of a row of boxes and of a head's column."""
BOX, BOX_HEIGHT = 0.42, 0.34
"""Half a box's width and height, in columns and rows."""
LINE = 0.15
"""How far a box's two lines of text are from its middle, in rows."""
THIN, THICK = 1.0, 5.0
"""Widths in pixels of the outline of the weakest and of the strongest box."""
PAPER, INK = "#f4f4f4", "#1b1b1b"
"""Of boxes and of what stands in them, on a light page and on a dark one."""
SIGNS = {"helps": (COLOURS[-1], [1, 0]), "hurts": (COLOURS[0], [5, 3]), "": (FAINT, [1, 0])}
"""Colour and dash of an outline, as the colours alone are lost in a grey print; grey where there is no score."""

_SQUARE: dict[str, Any] = {
    "symbolType": "square",
    "symbolSize": 150,
    "symbolStrokeWidth": 2,
    "symbolFillColor": PAPER,
}


def drawing(picture: NeuronPicture) -> Drawing:
    """The circuit as a picture."""
    return Drawing(partial(chart, picture))


def chart(picture: NeuronPicture) -> Chart:
    """The picture as a Vega-Lite chart."""
    left, right, rows = -1.6, max(3.0, *(box.x for box in picture.boxes)) + 0.6, len(picture.rows)
    x = alt.X("_x:Q", scale=alt.Scale(domain=[left, right], nice=False), axis=None)
    y = alt.Y("_y:Q", scale=alt.Scale(domain=[-0.6, rows - 0.4], nice=False), axis=None)
    boxes = [_box(box, strongest(picture)) for box in picture.boxes]
    beside = [{"_x": left, "_y": float(row), "text": name} for row, name in enumerate(picture.rows) if name]
    names = [line for box in picture.boxes for line in _lines(box)]
    words = alt.Chart(inline(names)).mark_text(fontSize=11, color=INK, tooltip=None)
    titles = alt.Chart(inline(beside)).mark_text(fontSize=10, align="left", color=FAINT, tooltip=None)
    layers = [_outlines(boxes, x, y), words.encode(x, y, text="text:N"), titles.encode(x, y, text="text:N")]
    width, height = COLUMN * (right - left), ROW * rows
    panel = alt.LayerChart(layer=layers, width=width, height=height)
    concat = alt.concat(panel, columns=1, title=head_lines(show_text(picture.title), picture.lines, width))
    whole: Chart = concat.configure_view(stroke=None)
    return whole


def _outlines(boxes: list[dict[str, Any]], x: alt.X, y: alt.Y) -> alt.Chart:
    """The boxes, and a legend of the signs that there are."""
    signs = [sign for sign in SIGNS if any(box["sign"] == sign for box in boxes)]
    colours, dashes = ([SIGNS[sign][at] for sign in signs] for at in (0, 1))
    legend = alt.Legend(title=None, values=[sign for sign in signs if sign], **_SQUARE) if any(signs) else None
    drawn: alt.Chart = (
        alt.Chart(inline(boxes))
        .mark_bar(color=PAPER, cornerRadius=4, opacity=1)
        .encode(
            x,
            y,
            alt.X2("_x2"),
            alt.Y2("_y2"),
            stroke=alt.Stroke("sign:N", scale=alt.Scale(domain=signs, range=colours), legend=legend),
            strokeDash=alt.StrokeDash("sign:N", scale=alt.Scale(domain=signs, range=dashes), legend=legend),
            strokeWidth=alt.StrokeWidth("_width:Q", scale=None, legend=None),
            tooltip=["name:N", "neurons:Q", alt.Tooltip("score:Q", format=".4g")],
        )
    )
    return drawn


def _box(box: NeuronBox, largest: float) -> dict[str, Any]:
    """A box by its corners."""
    scored = not math.isnan(box.score)
    sign = ("helps" if box.score >= 0 else "hurts") if scored else ""
    width = THIN + (THICK - THIN) * (abs(box.score) / largest if scored else 0.0)
    corners = {"_x": box.x - BOX, "_x2": box.x + BOX, "_y": box.y - BOX_HEIGHT, "_y2": box.y + BOX_HEIGHT}
    told = {"name": show_text(box.name), "neurons": box.count or None, "score": box.score if scored else None}
    return {**corners, **told, "sign": sign, "_width": width}


def _lines(box: NeuronBox) -> list[dict[str, Any]]:
    """What stands in a box: its name, and below an MLP's how many neurons are kept."""
    if not box.count:
        return [{"_x": box.x, "_y": box.y, "text": show_text(box.name)}]
    counted = f"{box.count:,} neuron{'' if box.count == 1 else 's'}"
    return [
        {"_x": box.x, "_y": box.y + LINE, "text": show_text(box.name)},
        {"_x": box.x, "_y": box.y - LINE, "text": counted},
    ]
