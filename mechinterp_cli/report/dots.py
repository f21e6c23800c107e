"""Dots with intervals: rows of numbers beside each other, as PNG and SVG."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import altair as alt

from mechinterp_cli.report.cells import interval
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import (
    EXPONENT,
    FAINT,
    PICTURE_WIDTH,
    SERIES_COLOURS,
    Chart,
    Drawing,
    head_lines,
    inline,
)
from mechinterp_cli.report.shapes import CUT, Dot, DotPanel, Dots, leaves, reached

WIDTH, ROW, LABEL_ROOM, LEGEND_ROOM = 330, 16, 230, 150
LONGEST_LABEL, LETTER = 520, 5.6
"""Pixels that names take beside a panel that is alone, and those of a letter."""
SMALL = 0.001
"""Axes that reach less far are written with an exponent."""
SHAPES = ("circle", "square", "triangle-up", "diamond")


def drawing(dots: Dots) -> Drawing:
    """The dots as a picture."""
    return Drawing(partial(chart, dots))


def chart(dots: Dots) -> Chart:
    """The picture as a Vega-Lite chart."""
    across = max(1, PICTURE_WIDTH // (WIDTH + (20 if dots.one_axis else LABEL_ROOM)))
    across = min(across, len(dots.panels))
    # Subtitles may be as wide as the panels at least.
    room = across * WIDTH + _label_room(dots) * (1 if dots.one_axis else across) + LEGEND_ROOM
    panels = [_panel(dots, index, across) for index in range(len(dots.panels))]
    cut = (CUT,) if any(_is_cut(panel, _ends(dots, panel)) for panel in dots.panels) else ()
    concat = alt.concat(*panels, columns=across, title=head_lines(dots.title, (*dots.lines, *cut), room), spacing=24)
    whole: Chart = concat.resolve_scale(color="independent", shape="independent")
    drawn: Chart = whole.configure_view(stroke="#999999").configure_axis(gridColor="#eeeeee")
    return drawn


def _label_room(dots: Dots) -> float:
    """Pixels of the rows' names; beside a panel that is alone they are not cut so soon."""
    if len(dots.panels) > 1:
        return LABEL_ROOM
    longest = max((len(show_text(dot.name)) for dot in dots.panels[0].dots), default=0)
    return min(LONGEST_LABEL, max(LABEL_ROOM, LETTER * longest))


def _panel(dots: Dots, index: int, across: int) -> alt.LayerChart:
    panel = dots.panels[index]
    names = list(dict.fromkeys(show_text(dot.name) for dot in panel.dots))
    series = _series([panel])
    named = not dots.one_axis or index % across == 0
    axis = alt.Axis(labels=named, labelLimit=_label_room(dots), labelOverlap=False, grid=True, ticks=False)
    rows = alt.Scale(type="band", domain=names)
    low, high = _ends(dots, panel)
    form: dict[str, Any] = {"format": "~f"} if max(-low, high) >= SMALL else {"labelExpr": EXPONENT}
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    x = alt.X("value:Q", scale=scale, axis=alt.Axis(tickCount=6, **form), title=show_text(panel.x_title))
    colour, shape = _looks(_series(dots.panels), with_legend=index == across - 1)
    references = inline([{"value": value} for value in panel.references])
    layers = [alt.Chart(references).mark_rule(color=FAINT, strokeDash=[4, 3]).encode(x)]
    for place, one in enumerate(series, start=1):
        # Every series has its own height within a row.
        y = alt.Y("name:N", scale=rows, axis=axis, title=None, bandPosition=place / (len(series) + 1))
        shown = DotPanel(title="", x_title="", dots=tuple(dot for dot in panel.dots if show_text(dot.series) == one))
        points, bars = inline(list(_points(shown))), inline(list(_bars(shown)))
        layers.append(alt.Chart(bars).mark_rule(strokeWidth=2, clip=True).encode(x, alt.X2("high"), y, colour))
        layers.append(alt.Chart(points).mark_point(filled=True, size=55, opacity=1).encode(x, y, colour, shape))
    room = max(len(_series([other])) for other in (dots.panels if dots.one_axis else [panel]))
    height = max(1, len(names)) * max(ROW * room, 22)
    return alt.LayerChart(layer=layers, width=WIDTH, height=height, title=show_text(panel.title))


def _series(panels: Sequence[DotPanel]) -> list[str]:
    return list(dict.fromkeys(show_text(dot.series) for panel in panels for dot in panel.dots))


def _looks(series: list[str], *, with_legend: bool) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of every series of the picture; one alone needs no legend."""
    wanted = with_legend and len(series) > 1
    legend = alt.Legend(title=None, labelLimit=LEGEND_ROOM, symbolSize=70) if wanted else None

    def scale(looks: tuple[str, ...]) -> alt.Scale:
        return alt.Scale(domain=series, range=[looks[i % len(looks)] for i in range(len(series))])

    return (
        alt.Color("series:N", scale=scale(SERIES_COLOURS), legend=legend),
        alt.Shape("series:N", scale=scale(SHAPES), legend=legend),
    )


def _ends(dots: Dots, panel: DotPanel) -> tuple[float, float]:
    """A range that holds every dot and reference, intervals that are not far longer than others, and a margin.

    Panels of one quantity share it.
    """
    alike = [other for other in dots.panels if other.x_title == panel.x_title]
    found = [dot for other in alike for dot in other.dots]
    values, lows, highs = (
        [value for value in column if math.isfinite(value)]
        for column in zip(*[(dot.value, dot.low, dot.high) for dot in found], strict=True)
    )
    references = [value for other in alike for value in other.references]
    low, high = reached([*values, *references, 0.0], lows, highs)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _is_cut(panel: DotPanel, ends: tuple[float, float]) -> bool:
    return leaves(ends, [dot.low for dot in panel.dots], [dot.high for dot in panel.dots])


def _points(panel: DotPanel) -> Iterator[dict[str, Any]]:
    for dot in panel.dots:
        if math.isfinite(dot.value):
            yield {**_place(dot), "value": dot.value, "interval": interval(dot.low, dot.high), **dot.behind}


def _bars(panel: DotPanel) -> Iterator[dict[str, Any]]:
    for dot in panel.dots:
        if math.isfinite(dot.low) and math.isfinite(dot.high):
            yield {**_place(dot), "value": dot.low, "high": dot.high}


def _place(dot: Dot) -> dict[str, Any]:
    return {"name": show_text(dot.name), "series": show_text(dot.series)}
