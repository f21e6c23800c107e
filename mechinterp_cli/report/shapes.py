"""What pictures of curves and of attention hold, whatever draws them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt


class Picture(Protocol):
    """A figure of a run."""

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification with all its data."""

    def png(self) -> bytes:
        """The picture as PNG."""

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


def y_range(panels: Sequence[CurvePanel]) -> tuple[float, float]:
    """A range that holds every line and band of some panels, 0, and a margin.

    Args:
        panels: One, or those that are to be compared.
    """
    found = [value for panel in panels for curve in panel.curves for value in _heights(curve) if math.isfinite(value)]
    low, high = min([*found, 0.0]), max([*found, 0.0])
    margin = 0.06 * (high - low) or 1.0
    return (low - margin if low < 0 else low), (high + margin if high > 0 or low == 0 else high)


def _heights(curve: Curve) -> Iterator[float]:
    yield from curve.y
    yield from curve.low or ()
    yield from curve.high or ()


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
