"""What pictures of curves and of attention hold, whatever draws them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mechinterp_cli.report.behind import Behind

REACH, TYPICAL, SPARED = 1.0, 4, 2.5
"""Intervals are drawn up to so many heights of the lines beyond them, or so many times as far as a quarter of them
stays within: of a few prompts some may be a hundred times as long as others, and would press all else together. What
is no longer than `SPARED` times that is drawn whole."""
CUT = "Intervals go on beyond the axis where they meet it."


class Picture(Protocol):
    """A figure of a run."""

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification with all its data."""

    def png(self, *, scale: float = 2.0) -> bytes:
        """The picture as PNG, with so many pixels per unit."""

    def svg(self) -> bytes:
        """The picture as SVG, UTF-8."""

    def drawn_as(self, form: str) -> bytes:
        """The picture as a file: `png`, `svg` or `pdf`."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line; gaps are NaN."""

    name: str
    x: tuple[float | str, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] | None = None
    """Lower edge of the band, where there is one."""
    high: tuple[float, ...] | None = None
    behind: tuple[Behind, ...] = ()
    """What stands behind each point; empty where that is no more than the band."""
    look: Literal["marked", "line", "dots", "reference"] = "marked"
    """A line with marks at its points, without them, marks alone, or what others are held against: thin, grey, dashed
    and without a band."""


@dataclass(frozen=True, kw_only=True)
class CurvePanel:
    """One panel of at least one curve; the curves' names are distinct, but references may share one."""

    title: str
    y_title: str
    curves: tuple[Curve, ...]
    y_range: tuple[float, float] | None = None
    """Where panels are to be compared; 0 and all bands are in it otherwise."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """One picture: panels over the same x axis."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    x_title: str
    panels: tuple[CurvePanel, ...]
    across: int
    """Panels in a row; 1 sets them below each other, sharing the x axis."""
    one_legend: bool = False
    """All panels have curves of the same names."""
    width: int = 260
    linear: bool = False
    """The x axis is never logarithmic, and its ticks are round numbers: positions, not sizes."""


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One number with its interval; NaN where there is none."""

    name: str
    """The row that it stands in."""
    series: str
    """What its colour tells."""
    value: float
    low: float = math.nan
    high: float = math.nan
    behind: Behind = field(default_factory=dict)
    """What else stands behind it."""


@dataclass(frozen=True, kw_only=True)
class DotPanel:
    """One panel of rows; every series has one dot in a row at most."""

    title: str
    x_title: str
    dots: tuple[Dot, ...]
    references: tuple[float, ...] = (0.0,)
    """Where thin lines stand, which are always in view."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """One picture: panels of dots with intervals."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    panels: tuple[DotPanel, ...]
    one_axis: bool = False
    """All panels have the same rows, named once."""


@dataclass(frozen=True, kw_only=True)
class HistogramPanel:
    """One panel."""

    title: str
    series: Mapping[str, tuple[float, ...]]
    """Finite values by class."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """One picture: panels of classes over each other, all with the same bins."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    x_title: str
    panels: tuple[HistogramPanel, ...]
    across: int
    """Panels in a row."""


def y_range(panels: Sequence[CurvePanel], *, zero: bool = True) -> tuple[float, float]:
    """A range that holds every line of some panels, bands that are not far longer than others, and a margin.

    Args:
        panels: One, or those that are to be compared.
        zero: Whether 0 is in it.
    """
    curves = [curve for panel in panels for curve in panel.curves]
    lines = _finite(value for curve in curves for value in curve.y)
    lows, highs = edges(panels)
    if not zero and not lines:
        return -0.05, 0.05
    low, high = reached([*lines, 0.0] if zero else lines, _finite(lows), _finite(highs))
    margin = 0.06 * (high - low) or (1.0 if zero else 0.05)
    if not zero:
        return low - margin, high + margin
    return (low - margin if low < 0 else low), (high + margin if high > 0 or low == 0 else high)


def edges(panels: Sequence[CurvePanel]) -> tuple[list[float], list[float]]:
    """Lower and upper ends of all bands; NaN where a curve has none."""
    curves = [curve for panel in panels for curve in panel.curves if curve.look != "reference"]
    return [end for curve in curves for end in curve.low or ()], [end for curve in curves for end in curve.high or ()]


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def reached(core: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """From where to where a picture goes: all of the core, and intervals unless they are far longer than others.

    Args:
        core: What has to be seen, one number at least.
        lows: Lower ends of intervals.
        highs: Their upper ends.
    """
    low, high = min(core), max(core)
    below, above = _beyond([low - end for end in lows], high - low), _beyond([end - high for end in highs], high - low)
    return low - below, high + above


def _beyond(overs: Sequence[float], height: float) -> float:
    """How far beyond the core intervals are drawn."""
    lengths = sorted(max(0.0, over) for over in overs) or [0.0]
    usual = max(REACH * height, TYPICAL * lengths[len(lengths) // 4])
    return usual if lengths[-1] > SPARED * usual > 0 else lengths[-1]


def leaves(ends: tuple[float, float], lows: Iterable[float], highs: Iterable[float]) -> bool:
    """Whether an interval goes beyond a range.

    Args:
        ends: The range.
        lows: Lower ends of intervals; NaN where there is none.
        highs: Their upper ends.
    """
    return any(low < ends[0] for low in lows) or any(high > ends[1] for high in highs)


@dataclass(frozen=True, kw_only=True)
class AttentionPanel:
    """One head."""

    title: str
    pattern: npt.NDArray[np.float64]
    """`[queries, keys]`, probabilities; NaN where the query cannot see the key."""


@dataclass(frozen=True, kw_only=True)
class AttentionPicture:
    """Heads on one sequence."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    tokens: tuple[str, ...]
    """As decoded, one per position."""
    panels: tuple[AttentionPanel, ...]
