"""Curves with bands: panels of lines over one kind of x axis, as PNG and SVG."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import altair as alt

from mechinterp_cli.report.cells import interval
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import (
    FAINT,
    PICTURE_WIDTH,
    SERIES_COLOURS,
    STROKE,
    Chart,
    Drawing,
    head_lines,
    inline,
)
from mechinterp_cli.report.shapes import CUT, Curve, CurvePanel, Curves, edges, leaves, y_range

SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES: tuple[list[int], ...] = ([1, 0], [6, 3], [2, 2], [8, 2, 2, 2])
"""Lines differ by colour, dash and shape: the colours alone are lost in a grey print."""
HEIGHT, LOW_HEIGHT, LEGEND_ROOM = 230, 150, 190
REFERENCE_DASHES: tuple[list[int], ...] = ([7, 4], [2, 2], [10, 3, 2, 3], [1, 4])
FEW_TICKS = 6
"""As many points have a tick each on an axis that is never logarithmic."""
DOT = 75
"""Marks that stand alone are larger."""
MAX_MARKS = 60
"""A line of more points is drawn without marks at them, which would hide it."""
LABEL_PIXELS = 40
"""Room that the label of a number on the x axis takes."""
SHORT_LABEL_PIXELS = 24
"""The same where all are whole numbers below 1,000."""
WIDE = 20
"""From this ratio of the largest to the smallest positive x on, the axis is logarithmic (around 0: linear)."""


def drawing(curves: Curves) -> Drawing:
    """The curves as a picture."""
    return Drawing(partial(chart, curves))


def chart(curves: Curves) -> Chart:
    """The picture as a Vega-Lite chart."""
    curves = _joined(curves)
    across = min(curves.across, len(curves.panels), max(1, PICTURE_WIDTH // curves.width))
    room = across * (curves.width + 70) + LEGEND_ROOM
    panels = [_panel(curves, i, across) for i in range(len(curves.panels))]
    cut = (CUT,) if any(leaves(_ends(panel), *edges([panel])) for panel in curves.panels) else ()
    title = head_lines(curves.title, (*curves.lines, *cut), room)
    whole: Chart = alt.concat(*panels, columns=across, title=title, spacing=18).resolve_scale(**_APART)
    drawn: Chart = whole.configure_view(stroke="#999999").configure_axis(gridColor="#eeeeee")
    return drawn


def _joined(curves: Curves) -> Curves:
    """References that are the same everywhere as one, with all their names: their dashes would hide each other."""
    found: dict[str, list[tuple[int, tuple[float, ...]]]] = {}
    for at, panel in enumerate(curves.panels):
        for curve in panel.curves:
            if curve.look == "reference":
                found.setdefault(curve.name, []).append((at, curve.y))
    names: dict[Any, list[str]] = {}
    for name, lines in found.items():
        names.setdefault(tuple(lines), []).append(name)
    called = {same[0]: ", ".join(same) for same in names.values()}
    panels = [replace(panel, curves=tuple(_renamed(panel.curves, called))) for panel in curves.panels]
    return replace(curves, panels=tuple(panels))


def _renamed(curves: Sequence[Curve], called: Mapping[str, str]) -> Iterator[Curve]:
    for curve in curves:
        if curve.look != "reference":
            yield curve
        elif curve.name in called:
            yield replace(curve, name=called[curve.name])


_APART: dict[str, Any] = {"color": "independent", "shape": "independent", "strokeDash": "independent"}
"""Every panel, and every kind of mark in it, has looks of its own, and a legend where it is given one."""


def _ends(panel: CurvePanel) -> tuple[float, float]:
    return panel.y_range or y_range([panel])


def _panel(curves: Curves, index: int, across: int) -> alt.LayerChart:
    panel, stacked = curves.panels[index], across == 1 and len(curves.panels) > 1
    with_legend = not curves.one_legend or index == min(across, len(curves.panels)) - 1
    bottom = not stacked or index == len(curves.panels) - 1
    x = _x_axis(curves, labels=bottom)
    low, high = _ends(panel)
    y_scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    y_axis = alt.Axis(format="~f", tickCount=4 if stacked else 6, minExtent=34, titleLimit=HEIGHT)
    y = alt.Y("y:Q", scale=y_scale, axis=y_axis, title=show_text(panel.y_title))
    layers: list[alt.Chart] = [_zero(y)] if low < 0 < high else []
    layers += _references([curve for curve in panel.curves if curve.look == "reference"], x, y, with_legend)
    layers += _Looks(panel, with_legend).layers(x, y)
    height = LOW_HEIGHT if stacked else HEIGHT
    whole = alt.LayerChart(layer=layers, width=curves.width, height=height, title=show_text(panel.title))
    shown: alt.LayerChart = whole.resolve_scale(**_APART)
    return shown


class _Looks:
    """The curves of a panel that are no references, each with its colour, dash and shape.

    Lines with marks, lines without and marks alone have legends of their own, which show what is drawn.
    """

    def __init__(self, panel: CurvePanel, with_legend: bool) -> None:
        self.curves = [curve for curve in panel.curves if curve.look != "reference"]
        self.with_legend = with_legend
        longest = max((len(curve.x) for curve in self.curves), default=0)
        marked = [curve for curve in self.curves if curve.look == "marked" and longest <= MAX_MARKS]
        self.marked, self.dots = marked, [curve for curve in self.curves if curve.look == "dots"]
        self.bare = [curve for curve in self.curves if curve not in marked and curve not in self.dots]

    def layers(self, x: alt.X, y: alt.Y) -> list[alt.Chart]:
        """Bands, lines, marks; lines without marks have unseen ones that tell what is behind a point."""
        plain, made = self._colour(None), _bands(self.curves, x, y, self._colour(None))
        for curves, legend in ((self.marked, None), (self.bare, self._legend(STROKE))):
            lines = alt.Chart(_data(curves)).mark_line(strokeWidth=2, tooltip=None)
            colour, dash = self._colour(legend), self._scaled("strokeDash", DASHES, legend)
            made += [lines.encode(x, y, colour, dash, detail="name:N")] if curves else []
        if self.bare:
            made.append(alt.Chart(_data(self.bare)).mark_point(filled=True, size=42, opacity=0).encode(x, y, plain))
        for curves, size in ((self.marked, 42), (self.dots, DOT)):
            legend = self._legend(_SYMBOL, curves)
            colour, shape = self._colour(legend), self._scaled("shape", SHAPES, legend)
            marks = alt.Chart(_data(curves)).mark_point(filled=True, size=size, opacity=1)
            made += [marks.encode(x, y, colour, shape)] if curves else []
        return made

    def _legend(self, look: Mapping[str, Any], curves: Sequence[Curve] = ()) -> alt.Legend | None:
        """A legend of some curves; None where the panel has none."""
        values = [show_text(curve.name) for curve in curves or self.bare]
        return alt.Legend(title=None, labelLimit=LEGEND_ROOM, values=values, **look) if self.with_legend else None

    def _colour(self, legend: alt.Legend | None) -> alt.Color:
        return alt.Color("name:N", scale=self._scale(SERIES_COLOURS), legend=legend)

    def _scaled(self, channel: str, looks: Sequence[Any], legend: alt.Legend | None) -> Any:
        kinds = {"strokeDash": alt.StrokeDash, "shape": alt.Shape}
        return kinds[channel]("name:N", scale=self._scale(looks), legend=legend)

    def _scale(self, looks: Sequence[Any]) -> alt.Scale:
        names = [show_text(curve.name) for curve in self.curves]
        return alt.Scale(domain=names, range=[looks[i % len(looks)] for i in range(len(names))])


_SYMBOL: dict[str, Any] = {"symbolSize": 70, "symbolStrokeWidth": 0, "symbolOpacity": 1}


def _data(curves: Sequence[Curve]) -> alt.InlineData:
    return inline([row for curve in curves for row in _points(curve)])


def _references(curves: Sequence[Curve], x: alt.X, y: alt.Y, with_legend: bool) -> list[alt.Chart]:
    """Thin lines below all others, told apart by their dashes; what is the same everywhere goes from edge to edge."""
    if not curves:
        return []
    names = list(dict.fromkeys(show_text(curve.name) for curve in curves))
    scale = alt.Scale(domain=names, range=[REFERENCE_DASHES[i % len(REFERENCE_DASHES)] for i in range(len(names))])
    look: dict[str, Any] = {**STROKE, "symbolStrokeWidth": 1.5, "symbolStrokeColor": FAINT}
    legend = alt.Legend(title=None, labelLimit=2 * LEGEND_ROOM, **look)
    dash = alt.StrokeDash("name:N", scale=scale, legend=legend if with_legend else None)
    level = [curve for curve in curves if len(set(curve.y)) == 1]
    flat = alt.Chart(inline([{"name": show_text(curve.name), "y": curve.y[0]} for curve in level]))
    bent = alt.Chart(inline([row for curve in curves if curve not in level for row in _points(curve)]))
    layers: list[alt.Chart] = [flat.mark_rule(strokeWidth=1.5, color=FAINT).encode(y, dash)]
    if len(level) < len(curves):
        layers.append(bent.mark_line(strokeWidth=1.5, color=FAINT).encode(x, y, dash))
    return layers


def _zero(y: alt.Y) -> alt.Chart:
    drawn: alt.Chart = alt.Chart(inline([{"y": 0.0}])).mark_rule(color="#888888", strokeWidth=1).encode(y)
    return drawn


def _bands(curves: Sequence[Curve], x: alt.X, y: alt.Y, colour: alt.Color) -> list[alt.Chart]:
    """An area where there are several points, a bar where there is one."""
    areas: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    for curve in curves:
        rows = list(_band(curve))
        (areas if len(rows) > 1 else bars).extend(rows)
    marks = []
    if areas:
        area = alt.Chart(inline(areas)).mark_area(opacity=0.2, line=False, clip=True, tooltip=None)
        marks.append(area.encode(x, y, alt.Y2("high"), colour, detail="name:N"))
    if bars:
        rule = alt.Chart(inline(bars)).mark_rule(strokeWidth=6, opacity=0.3, clip=True)
        marks.append(rule.encode(x, y, alt.Y2("high"), colour))
    return marks


def _points(curve: Curve) -> Iterator[dict[str, Any]]:
    none = (math.nan,) * len(curve.x)
    ends = zip(curve.low or none, curve.high or none, strict=True)
    behind = curve.behind or tuple({"interval": interval(low, high)} for low, high in ends)
    for x, y, more in zip(curve.x, curve.y, behind, strict=True):
        if math.isfinite(y):
            yield {"name": show_text(curve.name), "x": _shown(x), "y": y, **more}


def _band(curve: Curve) -> Iterator[dict[str, Any]]:
    if curve.low is None or curve.high is None:
        return
    for x, low, high in zip(curve.x, curve.low, curve.high, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            yield {"name": show_text(curve.name), "x": _shown(x), "y": low, "high": high}


def _shown(x: float | str) -> float | str:
    return show_text(x) if isinstance(x, str) else float(x)


def _x_axis(curves: Curves, *, labels: bool) -> alt.X:
    places = list(dict.fromkeys(x for panel in curves.panels for curve in panel.curves for x in curve.x))
    title = show_text(curves.x_title) if labels else None
    numbers = sorted(x for x in places if not isinstance(x, str))
    if len(numbers) < len(places):
        names = [show_text(str(x)) for x in places]
        axis = alt.Axis(labels=labels, labelAngle=-50, labelLimit=140, labelOverlap=False, values=_thin_names(names))
        return alt.X("x:N", scale=alt.Scale(domain=names), axis=axis, title=title)
    if curves.linear:
        ends = alt.Scale(domain=_x_domain(numbers, "linear"), nice=False, zero=False)
        axis = alt.Axis(labels=labels, tickMinStep=1, format="d")
        if len(numbers) <= FEW_TICKS:  # the renderer would put some between two whole numbers
            axis = alt.Axis(labels=labels, values=numbers, format="~g")
        return alt.X("x:Q", scale=ends, axis=axis, title=title)
    kind, constant = _x_scale(numbers)
    scale = alt.Scale(type=kind, domain=_x_domain(numbers, kind), nice=False)
    if kind == "symlog":
        scale.constant = constant
    ticks = _ticks(numbers, kind, constant, curves.width)
    # As an expression, so that every tick has the prefix that suits it: 0, 0.005, 65.5k, 1.02M.
    text = "format(datum.value, abs(datum.value) < 1 ? '.3~g' : '.3~s')"
    axis = alt.Axis(labels=labels, values=ticks, labelExpr=text, labelOverlap=False)
    return alt.X("x:Q", scale=scale, axis=axis, title=title)


def _x_scale(numbers: Sequence[float]) -> tuple[Literal["linear", "log", "symlog"], float]:
    """Logarithmic where the numbers span far; with 0 among them the part below the smallest other one is linear."""
    positive = [x for x in numbers if x > 0]
    if len(positive) < 2 or min(numbers) < 0:
        return "linear", 1.0
    spread = positive[-1] / positive[0]
    if positive[0] > numbers[0]:
        return ("symlog", positive[0]) if spread > WIDE else ("linear", 1.0)
    return ("log", 1.0) if len(positive) > 2 and spread >= 8 else ("linear", 1.0)


def _x_domain(numbers: Sequence[float], kind: str) -> list[float]:
    if not numbers:
        return [0.0, 1.0]
    first, last = numbers[0], numbers[-1]
    if kind == "log":
        return [first / 1.15, last * 1.15]
    if kind == "symlog":
        return [0.0, last * 1.15]
    margin = 0.05 * (last - first) or 1.0
    return [first - margin, last + margin]


def _ticks(numbers: Sequence[float], kind: str, constant: float, width: int) -> list[float]:
    """Those of the points whose labels have room, the last one always."""
    first, last = (_along(end, kind, constant) for end in _x_domain(numbers, kind))
    kept: list[float] = []
    at = math.inf
    # Whole numbers below 1,000 are written as they are.
    short = all(x == int(x) and 0 <= x < 1000 for x in numbers)
    room = SHORT_LABEL_PIXELS if short else LABEL_PIXELS
    for x in reversed(numbers):
        place = (_along(x, kind, constant) - first) / (last - first) * width
        if at - place >= room:
            kept.append(x)
            at = place
    return kept[::-1]


def _along(x: float, kind: str, constant: float) -> float:
    if kind == "log":
        return math.log(x)
    return math.log1p(x / constant) if kind == "symlog" else x


def _thin_names(names: Sequence[str], most: int = 24) -> list[str]:
    every = max(1, -(-len(names) // most))
    return list(names[::-1][::every][::-1])
