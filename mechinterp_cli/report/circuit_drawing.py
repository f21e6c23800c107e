"""The picture of a circuit's graph, as PNG and SVG."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import numpy.typing as npt

from mechinterp_cli.report.circuit_graph import GraphEdge, GraphPicture
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import COLOURS, FAINT, STROKE, Chart, Drawing, Rows, head_lines, inline

ROW, COLUMN = 54, 62
"""Pixels of a row of boxes and of a head's column."""
BOX, BOX_HEIGHT = 0.36, 0.22
"""Half a box's width and height, in columns and rows."""
POINTS = 24
"""Of a line."""
THIN, THICK = 1.0, 7.0
"""Widths in pixels of the weakest and of the strongest edge."""
BENDS = (0.0, 0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0)
"""How far a line may swing to a side, in columns; the first that passes no box is taken."""
Floats = npt.NDArray[np.float64]
SIGNS = {"helps": (COLOURS[-1], [1, 0]), "hurts": (COLOURS[0], [5, 3]), "": ("#777777", [1, 0])}
"""Colour and dash of an edge, as the colours alone are lost in a grey print; grey where it has no score."""
PORT, PORT_HEIGHT = 0.085, 0.1
"""Half the width and the height of the box that an input's letter stands in, below that of its node."""
PAPER, INK = "#f4f4f4", "#1b1b1b"
"""Of boxes and of what stands in them, on a light page and on a dark one."""


def drawing(picture: GraphPicture) -> Drawing:
    """The graph as a picture."""
    return Drawing(partial(chart, picture))


def chart(picture: GraphPicture) -> Chart:
    """The picture as a Vega-Lite chart."""
    points = [row for number, edge in enumerate(picture.edges) for row in _line(number, edge, picture)]
    places = [row["_x"] for row in points]
    left, right = min([*places, -0.5]) - 1, max([*places, *(node.x for node in picture.nodes), 3.0]) + 0.6
    rows = len(picture.rows)
    x = alt.X("_x:Q", scale=alt.Scale(domain=[left, right], nice=False), axis=None)
    y = alt.Y("_y:Q", scale=alt.Scale(domain=[-0.6, rows - 0.4], nice=False), axis=None)
    layers = [_edges(points, x, y), *_boxes(picture, x, y), _beside(picture, left, x, y)]
    width, height = COLUMN * (right - left), ROW * rows
    panel = alt.LayerChart(layer=layers, width=width, height=height)
    concat = alt.concat(panel, columns=1, title=head_lines(show_text(picture.title), picture.lines, width))
    whole: Chart = concat.configure_view(stroke=None)
    return whole


def _edges(points: Rows, x: alt.X, y: alt.Y) -> alt.Chart:
    """The lines, and a legend of the signs that there are."""
    signs = [sign for sign in SIGNS if any(row["sign"] == sign for row in points)]
    colours, dashes = ([SIGNS[sign][at] for sign in signs] for at in (0, 1))
    legend = alt.Legend(title=None, **STROKE) if any(signs) else None
    lines = alt.Chart(inline(points)).mark_line(opacity=0.7, interpolate="linear")
    drawn: alt.Chart = lines.encode(
        x,
        y,
        detail="_edge:N",
        order="_at:Q",
        strokeWidth=alt.StrokeWidth("_width:Q", scale=None, legend=None),
        color=alt.Color("sign:N", scale=alt.Scale(domain=signs, range=colours), legend=legend),
        strokeDash=alt.StrokeDash("sign:N", scale=alt.Scale(domain=signs, range=dashes), legend=legend),
    )
    return drawn


def _boxes(picture: GraphPicture, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Nodes with their names, and below heads the inputs that are read with their letters."""
    nodes = [_box(node.x, node.y, BOX, BOX_HEIGHT, show_text(node.name)) for node in picture.nodes]
    read = sorted({(edge.end, edge.input) for edge in picture.edges if edge.input})
    below = BOX_HEIGHT + PORT_HEIGHT
    ports = [_box(end[0], end[1] - below, PORT, PORT_HEIGHT, name) for end, name in read]
    made = []
    for boxes, size, corner in ((ports, 9, 2), (nodes, 11, 4)):
        drawn = alt.Chart(inline(boxes)).mark_rect(
            color=PAPER, stroke=FAINT, cornerRadius=corner, opacity=1, tooltip=None
        )
        names = alt.Chart(inline(boxes)).mark_text(fontSize=size, color=INK, tooltip=None)
        made += [drawn.encode(x, y, alt.X2("_x2"), alt.Y2("_y2")), names.encode(_middle(x), _middle(y), text="name:N")]
    return made


def _middle(place: Any) -> Any:
    """The same axis, of the middle of a box."""
    return type(place)(place["shorthand"].replace(":", "_mid:"), scale=place["scale"], axis=None)


def _box(x: float, y: float, width: float, height: float, name: str) -> dict[str, Any]:
    """A box by its middle and half its width and height."""
    corners = {"_x": x - width, "_x2": x + width, "_y": y - height, "_y2": y + height}
    return {"name": name, "_x_mid": x, "_y_mid": y, **corners}


def _beside(picture: GraphPicture, left: float, x: alt.X, y: alt.Y) -> alt.Chart:
    """What stands beside each row."""
    titles = inline([{"_x": left, "_y": float(row), "name": name} for row, name in enumerate(picture.rows) if name])
    names = alt.Chart(titles).mark_text(fontSize=10, align="left", color=FAINT, tooltip=None)
    drawn: alt.Chart = names.encode(x, y, text="name:N")
    return drawn


def _line(number: int, edge: GraphEdge, picture: GraphPicture) -> Iterator[dict[str, Any]]:
    """Points of a curve that leaves upwards, arrives from below, and passes as few other boxes as it can."""
    strongest = max(abs(other.score) for other in picture.edges) or 1.0
    width = THIN + (THICK - THIN) * abs(edge.score) / strongest
    boxes = np.array([(node.x, node.y) for node in picture.nodes])
    curves = (_curve(edge, bend) for bend in BENDS)
    best = min(curves, key=lambda points: _crossed(points, boxes))
    told = {"from": edge.source, "to": edge.target, "score": edge.score if edge.scored else None}
    sign = ("helps" if edge.score >= 0 else "hurts") if edge.scored else ""
    for step, (x, y) in enumerate(best.tolist()):
        yield {**told, "sign": sign, "_edge": number, "_at": step, "_x": x, "_y": y, "_width": width}


def _curve(edge: GraphEdge, bend: float) -> Floats:
    """[points, 2] of a Bézier curve whose middle is moved to a side."""
    (x0, y0), (x1, y1) = edge.start, edge.end
    y0, y1 = y0 + BOX_HEIGHT, y1 - BOX_HEIGHT - (2 * PORT_HEIGHT if edge.input else 0.0)
    pull = max(0.35, (y1 - y0) / 3)
    t = np.linspace(0, 1, POINTS + 1)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    return np.asarray(weights @ np.array([(x0, y0), (x0 + bend, y0 + pull), (x1 + bend, y1 - pull), (x1, y1)]))


def _crossed(points: Floats, boxes: Floats) -> int:
    """How many points lie within boxes, a little room around them included."""
    inside = np.abs(points[1:-1, None] - boxes[None]) < (BOX + 0.08, BOX_HEIGHT - 0.01)
    return int(inside.all(-1).sum())
