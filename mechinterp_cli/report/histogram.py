"""Histograms of classes over each other, as PNG and SVG."""

from collections.abc import Iterator, Sequence
from functools import partial
from textwrap import wrap
from typing import Any

import altair as alt
import numpy as np

from mechinterp_cli.report.curves import DASHES
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
from mechinterp_cli.report.shapes import Histogram, HistogramPanel

WIDTH, HEIGHT, LEGEND_ROOM = 300, 190, 150
TITLE = 36
"""Letters of a line of a panel's title: more would reach beyond the panel."""
FEWEST, MOST = 8, 30
"""Bins, about."""


def drawing(histogram: Histogram) -> Drawing:
    """The histograms as a picture."""
    return Drawing(partial(chart, histogram))


def chart(histogram: Histogram) -> Chart:
    """The picture as a Vega-Lite chart."""
    across = min(histogram.across, len(histogram.panels), PICTURE_WIDTH // WIDTH)
    room = across * (WIDTH + 70) + LEGEND_ROOM
    panels = [_panel(histogram, at, with_legend=at == across - 1) for at in range(len(histogram.panels))]
    title = head_lines(histogram.title, histogram.lines, room)
    whole: Chart = alt.concat(*panels, columns=across, title=title, spacing=18)
    whole = whole.resolve_scale(color="independent", strokeDash="independent")
    drawn: Chart = whole.configure_view(stroke="#999999").configure_axis(gridColor="#eeeeee")
    return drawn


def edges(histogram: Histogram) -> list[float]:
    """Edges of the bins that all panels share, 0 among them.

    Args:
        histogram: The picture.
    """
    found = [value for panel in histogram.panels for values in panel.series.values() for value in values]
    low, high = min([*found, 0.0]), max([*found, 0.0])
    largest = max(sum(map(len, panel.series.values())) for panel in histogram.panels)
    width = (high - low) / min(MOST, max(FEWEST, int(1.5 * largest**0.5))) or 1.0
    first, last = int(np.floor(low / width)), int(np.floor(high / width)) + 1
    return [width * at for at in range(first, last + 1)]


def _panel(histogram: Histogram, at: int, *, with_legend: bool) -> alt.LayerChart:
    panel, bins = histogram.panels[at], edges(histogram)
    names = [show_text(name) for name in panel.series]

    def scale(looks: Sequence[Any]) -> alt.Scale:
        return alt.Scale(domain=names, range=[looks[i % len(looks)] for i in range(len(names))])

    legend = alt.Legend(title=None, labelLimit=LEGEND_ROOM, **STROKE) if with_legend else None
    fill = alt.Fill("_fill:N", scale=None, legend=None)  # a scale of its own would split the legend in two
    colour = alt.Color("name:N", scale=scale(SERIES_COLOURS), legend=legend)
    dash = alt.StrokeDash("name:N", scale=scale(DASHES), legend=legend)
    reach = alt.Scale(domain=[bins[0], bins[-1]], nice=False, zero=False)
    x = alt.X("from:Q", scale=reach, title=show_text(histogram.x_title), axis=alt.Axis(tickCount=7, format="~g"))
    found = (_shares(other, bins) for other in histogram.panels)
    tallest = max((share for classes in found for _, shares in classes for share in shares), default=0.0) or 1.0
    heights = alt.Scale(domain=[0, 1.06 * tallest], nice=False)
    y = alt.Y("share:Q", title="share of the class", axis=alt.Axis(format=".0%", tickCount=5), scale=heights)
    bars = alt.Chart(inline(list(_bars(panel, bins)))).mark_rect(opacity=0.35)
    steps = alt.Chart(inline(list(_outline(panel, bins)))).mark_line(
        interpolate="step-after", strokeWidth=1.5, tooltip=None
    )
    middle = alt.Chart(inline([{"from": 0.0}])).mark_rule(color=FAINT, strokeDash=[4, 3])
    layers = [
        bars.encode(x, alt.X2("to"), y, alt.Y2(datum=0), fill),
        steps.encode(x, y, colour, dash, detail="name:N"),
        middle.encode(x),
    ]
    title = wrap(show_text(panel.title), TITLE) or [""]
    return alt.LayerChart(layer=layers, width=WIDTH, height=HEIGHT, title=alt.TitleParams(title))


def _shares(panel: HistogramPanel, bins: Sequence[float]) -> Iterator[tuple[str, list[float]]]:
    """Of every class the share of its values in each bin."""
    for name, values in panel.series.items():
        counts, _ = np.histogram(values, bins)
        yield show_text(name), (counts / max(1, len(values))).tolist()


def _bars(panel: HistogramPanel, bins: Sequence[float]) -> Iterator[dict[str, Any]]:
    sizes = {show_text(name): len(values) for name, values in panel.series.items()}
    for index, (name, shares) in enumerate(_shares(panel, bins)):
        look = {"name": name, "n": str(sizes[name]), "_fill": SERIES_COLOURS[index % len(SERIES_COLOURS)]}
        for at, share in enumerate(shares):
            if share:
                yield {**look, "from": bins[at], "to": bins[at + 1], "share": share}


def _outline(panel: HistogramPanel, bins: Sequence[float]) -> Iterator[dict[str, Any]]:
    for name, shares in _shares(panel, bins):
        for edge, share in zip(bins, [*shares, 0.0], strict=True):
            yield {"name": name, "from": edge, "share": share}
