"""Heat maps as PNG and SVG, drawn by Altair and vl-convert without a browser or a network."""

import json
from functools import partial
from typing import Any

import altair as alt

from mechinterp_cli.report.coarse import coarse
from mechinterp_cli.report.grid import ColourScale, Heatmap, Panel
from mechinterp_cli.report.picture import COLOURS, EXPONENT, PICTURE_WIDTH, Drawing, head_lines, ink_on, inline

STATE_COLOURS = {"trivial": "#e3e3e3", "undefined": "#8a8a8a", "nan": "#000000", "absent": "#efefef"}
STATE_NAMES = {"trivial": "exactly 0 (trivial)", "undefined": "undefined", "nan": "NaN", "absent": "not computed"}
"""Cells without a number: white would be a number, 0."""
HATCH = "#a0a0a0"

CELL_WIDTH, CELL_HEIGHT = 30, 14
MAX_COLUMN_LABELS = 64
NUMBER_WIDTH, NUMBER_HEIGHT = 26, 11
"""The smallest cell that a number of two decimals is printed in."""
SMALLEST = 8
"""Pixels of the smallest cell that a sign or a stroke is drawn in."""
SMALL = 0.04
"""Ends of the colour scale below this are written with an exponent: half of them would not differ from 0."""
BELOW = -0.3
"""From this share of the colour scale down, cells have a minus: in a grey print red and blue are the same."""
MINUS = "\N{MINUS SIGN}"


def chart(heatmap: Heatmap) -> alt.ConcatChart:
    """The picture as a Vega-Lite chart, one colour scale over all panels."""
    widths = [_panel_width(panel) for panel in heatmap.panels]
    across = max(1, PICTURE_WIDTH // (max(widths) + 110))
    # One scale for all panels, so one legend: at the end of the first row.
    last = min(across, len(widths)) - 1
    panels = [_panel_chart(heatmap, panel, with_legend=i == last) for i, panel in enumerate(heatmap.panels)]
    room = (max(widths) + 110) * min(across, len(widths))
    signed = any(_has_minus(heatmap, panel) for panel in heatmap.panels)
    minus = f"{MINUS} marks cells below {heatmap.colours.middle:.2g}." if signed else ""
    title = head_lines(heatmap.title, (heatmap.subtitle, heatmap.caption, minus), room)
    whole = alt.concat(*panels, columns=across, title=title, spacing=24).resolve_scale(color="independent")
    drawn: alt.ConcatChart = whole.configure_view(stroke="#999999").configure_axis(grid=False)
    return drawn


def drawing(heatmap: Heatmap) -> Drawing:
    """The heat map as a picture; one that is too large for that has its columns joined."""
    return Drawing(partial(chart, coarse(heatmap)))


def render_png(heatmap: Heatmap, *, scale: float = 2.0) -> bytes:
    """The picture as PNG.

    Args:
        heatmap: What to draw.
        scale: Pixels per unit; 2 is sharp on dense screens and in print.
    """
    return drawing(heatmap).png(scale=scale)


def render_svg(heatmap: Heatmap) -> str:
    """The picture as SVG; text from tokens is escaped."""
    return drawing(heatmap).svg().decode()


def inert_json(chart_or_spec: alt.ConcatChart | dict[str, Any]) -> str:
    """A chart's specification as JSON that can stand inside a `<script>` element.

    No token can end the element or open a comment: every `<` is written as its code, and all of it is ASCII.
    """
    spec = chart_or_spec if isinstance(chart_or_spec, dict) else chart_or_spec.to_dict()
    return json.dumps(spec, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _panel_width(panel: Panel) -> int:
    columns = len(panel.columns)
    return max(120, min(columns * CELL_WIDTH, max(560, columns)))


def _panel_height(panel: Panel) -> int:
    rows = len(panel.layers)
    return rows * max(CELL_HEIGHT, min(28, 220 // rows))


def _panel_chart(heatmap: Heatmap, panel: Panel, *, with_legend: bool) -> alt.LayerChart:
    # The order is the scale's domain: as a `sort` list, a thousand columns overflow the renderer's stack.
    order = alt.Scale(domain=list(panel.columns))
    x = alt.X("column:N", scale=order, title=panel.column_title or None, axis=_column_axis(panel))
    y = _rows(panel)
    cells = _cells(panel)
    known = inline([cell for cell in cells if cell["state"] == "ok"])
    odd = inline([cell for cell in cells if cell["state"] in STATE_COLOURS])
    layers = [alt.Chart(known).mark_rect().encode(x, y, _value_colour(heatmap, with_legend))]
    if any(state in STATE_COLOURS for state in heatmap.states):
        layers.append(alt.Chart(odd).mark_rect().encode(x, y, _state_colour(heatmap, with_legend)))
        layers += _hatch(panel, cells, x, y)
    if _has_numbers(heatmap, panel):
        layers.append(_words(heatmap, cells, x, y, alt.Text("value:Q", format=".2f")))
    elif _has_minus(heatmap, panel):
        below = [cell for cell in cells if _is_below(heatmap, cell["value"])]
        layers.append(_words(heatmap, below, x, y, alt.value(MINUS)))
    layered = alt.layer(*layers).resolve_scale(color="independent")
    drawn: alt.LayerChart = layered.properties(
        width=_panel_width(panel), height=_panel_height(panel), title=panel.title
    )
    return drawn


def _has_numbers(heatmap: Heatmap, panel: Panel) -> bool:
    """Whether every cell's value is printed: it is wanted, and cells are large enough."""
    return heatmap.numbers and _cells_are(panel, NUMBER_WIDTH, NUMBER_HEIGHT)


def _has_minus(heatmap: Heatmap, panel: Panel) -> bool:
    """Whether some cells have a minus in place of a number."""
    if _has_numbers(heatmap, panel) or not _cells_are(panel, SMALLEST, SMALLEST):
        return False
    return any(_is_below(heatmap, float(value)) for value in panel.values[panel.status == "ok"])


def _cells_are(panel: Panel, width: float, height: float) -> bool:
    """Whether cells are so many pixels wide and high at least."""
    wide = _panel_width(panel) >= width * len(panel.columns)
    return wide and _panel_height(panel) >= height * len(panel.layers)


def _is_below(heatmap: Heatmap, value: float | None) -> bool:
    return value is not None and heatmap.colours.share(value) <= BELOW


def _words(heatmap: Heatmap, cells: list[dict[str, Any]], x: alt.X, y: alt.Y, word: Any) -> alt.Chart:
    """The value in each of some cells that have one, or a sign for it."""
    shown = [
        {name: cell[name] for name in ("column", "layer", "value")}
        | {"ink": ink_on(heatmap.colours.share(cell["value"]))}
        for cell in cells
        if cell["state"] == "ok"
    ]
    words = alt.Chart(inline(shown)).mark_text(fontSize=9, tooltip=None)
    drawn: alt.Chart = words.encode(x, y, alt.Color("ink:N", scale=None, legend=None), text=word)
    return drawn


def _hatch(panel: Panel, cells: list[dict[str, Any]], x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """A stroke across every cell that was not computed, where cells are large enough."""
    absent = [cell for cell in cells if cell["state"] == "absent"]
    if not absent or not _cells_are(panel, SMALLEST, 0):
        return []
    lines = alt.Chart(inline(absent)).mark_rule(color=HATCH, strokeWidth=1)
    left, bottom = x.copy(), y.copy()
    left["bandPosition"], bottom["bandPosition"] = 0, 1
    drawn: alt.Chart = lines.encode(left, alt.X2("column", bandPosition=1), bottom, alt.Y2("layer", bandPosition=0))
    return [drawn]


def _rows(panel: Panel) -> alt.Y:
    if panel.row_title == "layer":
        return alt.Y("layer:O", sort="descending", title="layer", axis=_layer_axis(panel))
    order = alt.Scale(domain=list(panel.layers))
    return alt.Y("layer:N", scale=order, title=panel.row_title or None, axis=_layer_axis(panel))


def _column_axis(panel: Panel) -> alt.Axis:
    short = all(len(label) <= 3 for label in panel.columns)
    every = max(1, -(-len(panel.columns) // MAX_COLUMN_LABELS))
    shown = list(panel.columns[::every])
    return alt.Axis(labelAngle=0 if short else -60, labelLimit=150, labelOverlap=False, values=shown, ticks=every > 1)


def _layer_axis(panel: Panel) -> alt.Axis:
    every = max(1, -(-len(panel.layers) // 48))
    values: list[Any] = list(panel.layers[::every])
    return alt.Axis(values=values, labelOverlap=False, ticks=False, titleAngle=-90)


def _value_colour(heatmap: Heatmap, with_legend: bool) -> alt.Color:
    stops, ticks = _stops(heatmap.colours)
    length = min(160, max(70, min(_panel_height(panel) for panel in heatmap.panels) - 20))
    # Two decimals would show ends of 1e-9 as 0.
    form: dict[str, Any] = (
        {"format": ".2~f"} if max(abs(stops[0]), abs(stops[-1])) >= SMALL else {"labelExpr": EXPONENT}
    )
    legend = alt.Legend(title=heatmap.quantity, gradientLength=length, values=ticks, **form)
    # Vega would go by hue, which tints the smallest effects yellow and cyan.
    scale = alt.Scale(domain=stops, range=list(COLOURS[-len(stops) :]), clamp=True, interpolate="rgb")
    return alt.Color("value:Q", scale=scale, legend=legend if with_legend else None)


def _stops(colours: ColourScale) -> tuple[list[float], list[float]]:
    """The value of every colour, and the values written beside the legend."""
    arm = len(COLOURS) // 2
    above = [colours.middle + (colours.high - colours.middle) * i / arm for i in range(arm + 1)]
    if colours.low == colours.middle:
        return above, [colours.low + (colours.high - colours.low) * share for share in (0, 0.25, 0.5, 0.75, 1)]
    below = [colours.low + (colours.middle - colours.low) * i / arm for i in range(arm)]
    halves = [(colours.low + colours.middle) / 2, colours.middle, (colours.middle + colours.high) / 2]
    return [*below, *above], [colours.low, *halves, colours.high]


def _state_colour(heatmap: Heatmap, with_legend: bool) -> alt.Color:
    """Greys for cells that have no colour; only the kinds that occur are in the legend."""
    states = [state for state in heatmap.states if state in STATE_COLOURS]
    scale = alt.Scale(domain=[STATE_NAMES[state] for state in states], range=[STATE_COLOURS[state] for state in states])
    legend = alt.Legend(title=None, symbolType="square", symbolStrokeColor="#999999")
    return alt.Color("kind:N", scale=scale, legend=legend if with_legend else None)


def _cells(panel: Panel) -> list[dict[str, Any]]:
    return [
        {
            "column": label,
            "layer": layer,
            "state": panel.status[i, j],
            "kind": STATE_NAMES.get(panel.status[i, j], ""),
            "value": float(panel.values[i, j]) if panel.status[i, j] == "ok" else None,
            **panel.details.get((i, j), {}),
        }
        for i, layer in enumerate(panel.layers)
        for j, label in enumerate(panel.columns)
    ]
