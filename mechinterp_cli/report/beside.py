"""Estimates against exact effects as PNG and SVG: a panel per estimator, a point per verified node."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import altair as alt

from mechinterp_cli.report.curves import SHAPES
from mechinterp_cli.report.estimates import EstimatePanel, EstimateScatter
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import FAINT, PICTURE_WIDTH, SERIES_COLOURS, Chart, Drawing, Rows, head_lines

SIZE, MARGIN, LEGEND_ROOM = 300, 80, 90
DIAGONAL: dict[str, Any] = {"color": FAINT, "strokeDash": [4, 3], "strokeWidth": 1, "tooltip": None}


def drawing(scatter: EstimateScatter) -> Drawing:
    """The points as a picture."""
    return Drawing(partial(chart, scatter), partial(datasets, scatter))


def chart(scatter: EstimateScatter) -> Chart:
    """The picture as a Vega-Lite chart."""
    across = min(len(scatter.panels), max(1, (PICTURE_WIDTH - LEGEND_ROOM) // (SIZE + MARGIN)))
    room = across * (SIZE + MARGIN) + LEGEND_ROOM
    panels = [_panel(scatter, panel, at, with_legend=at == across - 1) for at, panel in enumerate(scatter.panels)]
    concat = alt.concat(*panels, columns=across, title=head_lines(scatter.title, scatter.lines, room), spacing=24)
    whole: Chart = concat.resolve_scale(color="independent", shape="independent")
    drawn: Chart = whole.configure_view(stroke="#999999").configure_axis(gridColor="#eeeeee")
    return drawn


def datasets(scatter: EstimateScatter) -> dict[str, Rows]:
    """The chart's data by name: of every panel its points, those drawn at random apart, and the diagonal."""
    found: dict[str, Rows] = {}
    for at, panel in enumerate(scatter.panels):
        low, high = panel.domain
        found[f"diagonal {at}"] = [{"estimate": end, "exact": end} for end in (low, high)]
        found |= {f"random {at}": _points(panel, True), f"top {at}": _points(panel, False)}
    return found


def _points(panel: EstimatePanel, drawn: bool) -> Rows:
    behind = panel.behind or ({},) * len(panel.sites)
    return [
        {"estimate": float(panel.estimate[i]), "exact": float(panel.exact[i]), "site": show_text(site), **behind[i]}
        for i, site in enumerate(panel.sites)
        if panel.drawn[i] is drawn
    ]


def _panel(scatter: EstimateScatter, panel: EstimatePanel, at: int, *, with_legend: bool) -> alt.LayerChart:
    axis, scale = alt.Axis(format=".2~g", tickCount=6), alt.Scale(domain=list(panel.domain), nice=False, zero=False)
    x = alt.X("estimate:Q", scale=scale, axis=axis, title=f"estimated {scatter.unit}")
    y = alt.Y("exact:Q", scale=scale, axis=axis, title=f"exact {scatter.unit}")
    colour, shape = looks_of(scatter.kinds, with_legend=with_legend)
    diagonal = alt.Chart(alt.NamedData(f"diagonal {at}")).mark_line(**DIAGONAL)
    hollow = alt.Chart(alt.NamedData(f"top {at}")).mark_point(filled=False, size=46, strokeWidth=1.4, opacity=0.9)
    filled = alt.Chart(alt.NamedData(f"random {at}")).mark_point(filled=True, size=40, opacity=0.75)
    layers = [diagonal.encode(x, y), *(marks.encode(x, y, colour, shape) for marks in (hollow, filled))]
    title = alt.TitleParams(
        show_text(panel.title), subtitle=show_text(panel.below), subtitleColor=FAINT, limit=SIZE + MARGIN - 20
    )
    return alt.LayerChart(layer=layers, width=SIZE, height=SIZE, title=title)


def looks_of(kinds: Sequence[str], *, with_legend: bool) -> tuple[alt.Color, alt.Shape]:
    """Colour and shape of kinds of points: the colours alone are lost in a grey print.

    Args:
        kinds: In the order of their colours, as the field `site` has them.
        with_legend: Whether there is one.
    """
    names = [show_text(kind) for kind in kinds]
    legend = alt.Legend(title=None, symbolOpacity=1) if with_legend else None
    count = len(SERIES_COLOURS)
    colours = [SERIES_COLOURS[i % count] for i in range(len(names))]
    # A colour that comes again has another shape.
    shapes = [SHAPES[(i + i // count) % len(SHAPES)] for i in range(len(names))]
    return (
        alt.Color("site:N", scale=alt.Scale(domain=names, range=colours), legend=legend),
        alt.Shape("site:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
    )
