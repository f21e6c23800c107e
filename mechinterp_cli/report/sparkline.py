"""Curves in the terminal: a line of blocks for each, as high as the numbers; digits where only ASCII is wanted."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from mechinterp_cli.report.cells import figure
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves
from mechinterp_cli.report.tables import line

BLOCKS, DIGITS = "▁▂▃▄▅▆▇█", "0123456789"
STYLES = ("cyan", "yellow", "green", "magenta", "blue", "bright_red")
"""The terminal's own colours, which can be read on its ground, be it dark or light."""
LEAST = 3
"""Points; fewer are told by tables."""
MAX_CURVES, MAX_PANELS = 8, 6
MAX_CELLS = 3
"""Columns that a point takes at most; a digit takes one."""
LEAST_ROOM = 6
"""Columns of marks; where there are fewer, numbers are left out."""
LONGEST = 34
"""Letters of a curve's name."""
Place = float | str


def terminal_curves(curves: Curves | None, *, width: int, plain: bool) -> Iterator[Group]:
    """The curves as lines of text: name, a block per point, and the number that is largest in size.

    Points stand beside each other in order, at equal distances. Where there are more than columns, a column is the mean
    of several.

    Args:
        curves: What to draw; nothing where None, or where no curve has enough points.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if curves is None:
        return
    drawn = [panel for panel in curves.panels if any(_known(curve) >= LEAST for curve in panel.curves)]
    lines = [line(curves.title, plain, "bold")]
    for panel in drawn[:MAX_PANELS]:
        lines += _panel(panel, curves.x_title, width, plain)
    if len(drawn) > MAX_PANELS:
        lines.append(line(f"{MAX_PANELS} of {len(drawn)} panels; the picture has all", plain, "dim"))
    if drawn:
        yield Group(*lines)


def _known(curve: Curve) -> int:
    return sum(map(math.isfinite, curve.y))


@dataclass(frozen=True)
class _Scale:
    """Which number the lowest and the highest mark stand for."""

    low: float
    high: float

    def mark(self, value: float, marks: str) -> str:
        """The mark of a number; a blank where there is none."""
        if not math.isfinite(value):
            return " "
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return marks[min(len(marks) - 1, int(share * len(marks)))]


def _panel(panel: CurvePanel, x_title: str, width: int, plain: bool) -> Iterator[Text]:
    shown = [curve for curve in panel.curves if _known(curve)][:MAX_CURVES]
    places = _places(shown)
    known = [y for curve in shown for y in curve.y if math.isfinite(y)]
    scale = _Scale(min(known), max(known))
    low, high = figure(scale.low), figure(scale.high)
    ends = f"{DIGITS[0]} is {low}, {DIGITS[-1]} is {high}" if plain else f"{low} to {high}"
    along = f"by {x_title}, {_short(places[0])} to {_short(places[-1])}"
    heading = ": ".join(filter(None, (panel.title, f"{panel.y_title}, {ends}, {along}")))
    yield line(heading, plain, "dim")
    names = [_name(curve.name, width, plain) for curve in shown]
    tails = [_tail(curve) for curve in shown]
    margin = max(map(cell_len, names)) + 1
    room = width - margin - max(map(len, tails)) - 2
    if room < LEAST_ROOM:
        tails, room = [""] * len(tails), width - margin
    for at, (curve, name, tail) in enumerate(zip(shown, names, tails, strict=True)):
        marks = _marks(curve, places, scale, room, plain)
        row = Text(set_cell_size(name, margin)).append(marks, style="" if plain else STYLES[at % len(STYLES)])
        yield row.append(f"  {show_text(tail, plain=plain)}" if tail else "")
    if len(shown) < len(panel.curves):
        yield line(f"{len(shown)} of {len(panel.curves)} curves; the picture has all", plain, "dim")


def _name(name: str, width: int, plain: bool) -> str:
    shown = show_text(name, plain=plain)
    return set_cell_size(shown, min(cell_len(shown), LONGEST, max(8, width // 3)))


def _places(curves: Sequence[Curve]) -> list[Place]:
    """Where points stand, in order."""
    places = list(dict.fromkeys(x for curve in curves for x in curve.x))
    numbers = [x for x in places if not isinstance(x, str)]
    return list(sorted(numbers)) if len(numbers) == len(places) else places


def _tail(curve: Curve) -> str:
    """The number that is largest in size, and where it is."""
    points = [(y, x) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(y)]
    value, at = max(points, key=lambda point: abs(point[0]))
    level = len({y for y, _ in points}) == 1
    return f"{figure(value)} throughout" if level and len(points) > 1 else f"{figure(value)} at {_short(at)}"


def _short(place: Place) -> str:
    if isinstance(place, str):
        return place[:12]
    return f"{place:,.0f}" if abs(place) >= 1000 else f"{place:g}"


def _marks(curve: Curve, places: Sequence[Place], scale: _Scale, room: int, plain: bool) -> str:
    by_place = dict(zip(curve.x, curve.y, strict=True))
    values = [by_place.get(place, math.nan) for place in places]
    if len(values) > room:
        ends = [at * len(values) // room for at in range(room + 1)]
        values = [_mean(values[start:end]) for start, end in zip(ends, ends[1:], strict=False)]
    if plain:
        return "".join(scale.mark(value, DIGITS) for value in values)
    each = max(1, min(MAX_CELLS, room // len(values)))
    return "".join(scale.mark(value, BLOCKS) * each for value in values)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan
