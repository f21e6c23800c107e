"""The picture of a circuit's graph, as PNG and SVG."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import altair as alt
import numpy as np
import numpy.typing as npt

from mechinterp_cli.report.circuit_graph import GraphEdge, GraphPicture
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import COLOURS, Chart, Drawing, head_lines, inline

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
HELPS, HURTS = COLOURS[-1], COLOURS[0]


def drawing(picture: GraphPicture) -> Drawing:
    """The graph as a picture."""
    return Drawing(partial(chart, picture))


def chart(picture: GraphPicture) -> Chart:
    """The picture as a Vega-Lite chart."""
    points = [row for number, edge in enumerate(picture.edges) for row in _line(number, edge, picture)]
    places = [row["x"] for row in points]
    left, right = min([*places, -0.5]) - 1, max([*places, *(node.x for node in picture.nodes), 3.0]) + 0.6
    rows = len(picture.rows)
    x = alt.X("x:Q", scale=alt.Scale(domain=[left, right], nice=False), axis=None)
    y = alt.Y("y:Q", scale=alt.Scale(domain=[-0.6, rows - 0.4], nice=False), axis=None)
    edges = inline(points)
    colours = alt.Scale(domain=["helps", "hurts"], range=[HELPS, HURTS])
    lines = alt.Chart(edges).mark_line(opacity=0.65, interpolate="linear")
    lines = lines.encode(
        x,
        y,
        detail="edge:N",
        order="at:Q",
        strokeWidth=alt.StrokeWidth("width:Q", scale=None, legend=None),
        color=alt.Color("sign:N", scale=colours, legend=alt.Legend(title=None, symbolStrokeWidth=4)),
    )
    boxes = inline([_box(node.x, node.y) for node in picture.nodes])
    drawn = alt.Chart(boxes).mark_rect(color="#f4f4f4", stroke="#555555", cornerRadius=4, opacity=1)
    middles = inline([{"name": show_text(node.name), "x": node.x, "y": node.y} for node in picture.nodes])
    names = alt.Chart(middles).mark_text(fontSize=11).encode(x, y, text="name:N")
    read = {(edge.end, edge.input) for edge in picture.edges if edge.input}
    inputs = inline([{"x": end[0] + 0.09, "y": end[1] - BOX_HEIGHT - 0.1, "name": name} for end, name in sorted(read)])
    letters = alt.Chart(inputs).mark_text(fontSize=9, color="#333333").encode(x, y, text="name:N")
    titles = inline([{"x": left, "y": float(row), "name": name} for row, name in enumerate(picture.rows) if name])
    beside = alt.Chart(titles).mark_text(fontSize=10, align="left", color="#777777").encode(x, y, text="name:N")
    layers = [lines, drawn.encode(x, y, alt.X2("x2"), alt.Y2("y2")), names, letters, beside]
    width, height = COLUMN * (right - left), ROW * rows
    panel = alt.LayerChart(layer=layers, width=width, height=height)
    concat = alt.concat(panel, columns=1, title=head_lines(show_text(picture.title), picture.lines, width))
    whole: Chart = concat.configure_view(stroke=None)
    return whole


def _box(x: float, y: float) -> dict[str, Any]:
    """A node's box."""
    return {"x": x - BOX, "x2": x + BOX, "y": y - BOX_HEIGHT, "y2": y + BOX_HEIGHT}


def _line(number: int, edge: GraphEdge, picture: GraphPicture) -> Iterator[dict[str, Any]]:
    """Points of a curve that leaves upwards, arrives from below, and passes as few other boxes as it can."""
    strongest = max(abs(other.score) for other in picture.edges) or 1.0
    width = THIN + (THICK - THIN) * abs(edge.score) / strongest
    boxes = np.array([(node.x, node.y) for node in picture.nodes])
    curves = (_curve(edge, bend) for bend in BENDS)
    best = min(curves, key=lambda points: _crossed(points, boxes))
    for step, (x, y) in enumerate(best.tolist()):
        sign = "helps" if edge.score >= 0 else "hurts"
        yield {"edge": number, "at": step, "x": x, "y": y, "width": width, "sign": sign}


def _curve(edge: GraphEdge, bend: float) -> Floats:
    """[points, 2] of a Bézier curve whose middle is moved to a side."""
    (x0, y0), (x1, y1) = edge.start, edge.end
    y0, y1 = y0 + BOX_HEIGHT, y1 - BOX_HEIGHT
    pull = max(0.35, (y1 - y0) / 3)
    t = np.linspace(0, 1, POINTS + 1)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    return np.asarray(weights @ np.array([(x0, y0), (x0 + bend, y0 + pull), (x1 + bend, y1 - pull), (x1, y1)]))


def _crossed(points: Floats, boxes: Floats) -> int:
    """How many points lie within boxes, a little room around them included."""
    inside = np.abs(points[1:-1, None] - boxes[None]) < (BOX + 0.08, BOX_HEIGHT - 0.01)
    return int(inside.all(-1).sum())
