"""Curves and dots made of rows of tables, with all that stands behind their numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from mechinterp_cli.report.behind import INTERVAL, Behind, behind, behind_random
from mechinterp_cli.report.cells import number
from mechinterp_cli.report.rows import Row
from mechinterp_cli.report.shapes import Curve, Dot

Place = float | str


def numbers(rows: Sequence[Row], name: str) -> tuple[float, ...]:
    """A column of rows; NaN where a row has nothing.

    Args:
        rows: Of any table.
        name: The column's.
    """
    return tuple(number(row.get(name)) for row in rows)


def curve_of(
    name: str,
    rows: Sequence[Row],
    x: str | Sequence[Place],
    y: str,
    *,
    ends: tuple[str, str] = INTERVAL,
    band: bool = True,
    floor: float = -math.inf,
    look: Literal["marked", "line", "dots", "reference"] = "marked",
    told: Callable[[Row], Behind] | None = None,
) -> Curve:
    """A line through a column of rows.

    Args:
        name: The curve's.
        rows: A point each, in order.
        x: The column of places along the axis, or the places.
        y: The column that is drawn.
        ends: Columns of its interval.
        band: Whether the interval is drawn; it is told anyway.
        floor: Lower numbers are drawn here.
        look: How the line is drawn.
        told: What stands behind a row; interval, p and n where None.
    """
    low, high, heights = (_floored(numbers(rows, column), floor) for column in (*ends, y))
    known = band and any(math.isfinite(end) for end in (*low, *high))
    return Curve(
        name=name,
        x=numbers(rows, x) if isinstance(x, str) else tuple(x),
        y=heights,
        low=low if known else None,
        high=high if known else None,
        behind=tuple(told(row) if told else behind(row, ends) for row in rows),
        look=look,
    )


def _floored(values: Sequence[float], floor: float) -> tuple[float, ...]:
    return tuple(floor if value < floor else value for value in values)


def random_curve(
    name: str, rows: Sequence[Row], x: str, *, y: str = "random_effect", look: Literal["marked", "line"] = "marked"
) -> Curve:
    """The mean of random draws with their middle as the band.

    Args:
        name: The curve's.
        rows: With `random_low`, `random_high` and `draws`.
        x: The column of places along the axis.
        y: The column of the mean.
        look: How the line is drawn.
    """
    return curve_of(name, rows, x, y, ends=("random_low", "random_high"), look=look, told=behind_random)


def dot_of(name: str, series: str, row: Row, value: str, ends: tuple[str, str] = INTERVAL) -> Dot:
    """A number of a row with its interval.

    Args:
        name: The line that it stands in.
        series: What its colour tells.
        row: Of any table.
        value: The number's column.
        ends: Columns of its interval.
    """
    low, high = (number(row.get(end)) for end in ends)
    return Dot(name=name, series=series, value=number(row[value]), low=low, high=high, behind=behind(row, ends))
