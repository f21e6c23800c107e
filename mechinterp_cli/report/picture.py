"""What every picture shares: how it becomes PNG and SVG, its head lines, and colours that the colour-blind can tell.

Pictures are Vega-Lite charts made by Altair, drawn by vl-convert without a browser or a network.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import altair as alt
import vl_convert

from mechinterp_cli.report.labels import show_text

Chart: TypeAlias = alt.ConcatChart
"""Every picture is panels set side by side, be it one."""

Rows: TypeAlias = list[dict[str, Any]]
VERSION = ".".join(alt.SCHEMA_VERSION.split(".")[:2])
"""Of Vega-Lite, that Altair writes."""
COLOURS = ("#b2182b", "#ef8a62", "#fddbc7", "#ffffff", "#d1e5f0", "#67a9cf", "#2166ac")
"""ColorBrewer's red–blue, which the colour-blind can tell apart: white is 0 (or chance), blue is above."""
SERIES_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart; their yellow is too pale for points on white."""
FAINT = "#444444"
"""Of lines and letters that stay behind. The page's script knows this grey, and makes it light on a dark page."""
STROKE: dict[str, Any] = {"symbolType": "stroke", "symbolSize": 300, "symbolStrokeWidth": 2}
"""A legend's symbols for lines: long enough for their dashes to be seen."""
EXPONENT = "datum.value ? format(datum.value, '.2~e') : '0'"
"""How numbers too small for decimals are written on an axis, as Vega's expression."""
PICTURE_WIDTH = 1280
"""Panels are set side by side up to this many pixels."""


@dataclass(frozen=True, eq=False)
class Drawing:
    """A picture whose chart is made when it is asked for."""

    chart: Callable[[], Chart]
    data: Callable[[], Mapping[str, Rows]] = dict
    """Data that the chart has by name. Altair copies and checks what stands in a chart again and again, a second for
    ten thousand rows; large data is better put in afterwards."""

    def spec(self) -> dict[str, Any]:
        """The Vega-Lite specification with all its data; not to be changed."""
        return self._spec

    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.chart().to_dict()
        spec["datasets"] = {**spec.get("datasets", {}), **self.data()}
        return spec

    def png(self, *, scale: float = 2.0) -> bytes:
        """The picture as PNG.

        Args:
            scale: Pixels per unit; 2 is sharp on dense screens and in print.
        """
        drawn: bytes = vl_convert.vegalite_to_png(self._spec, vl_version=VERSION, scale=scale)
        return drawn

    def svg(self) -> bytes:
        """The picture as SVG; text from tokens is escaped."""
        drawn: str = vl_convert.vegalite_to_svg(self._spec, vl_version=VERSION)
        return drawn.encode("utf-8", "backslashreplace")

    def pdf(self) -> bytes:
        """The picture as PDF, letters as letters; its fonts stand in an order that varies, so its bytes do."""
        drawn: bytes = vl_convert.vegalite_to_pdf(self._spec, vl_version=VERSION)
        return drawn

    def drawn_as(self, form: str) -> bytes:
        """The picture as a file.

        Args:
            form: `png`, `svg` or `pdf`.
        """
        return {"png": self.png, "svg": self.svg, "pdf": self.pdf}[form]()


def ink_on(share: float) -> str:
    """Black or white: what can be read on a colour.

    Args:
        share: Where the colour lies among `COLOURS`: −1 and 1 are their ends, 0 the middle.
    """
    arm = len(COLOURS) // 2
    place = min(max(share, -1.0), 1.0) * arm + arm
    at = min(int(place), len(COLOURS) - 2)
    ends = ([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in COLOURS[at : at + 2])
    mixed = (low + (high - low) * (place - at) for low, high in zip(*ends, strict=True))
    light = sum(weight * _linear(part) for weight, part in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    return "#000000" if light > MID_LIGHT else "#ffffff"


MID_LIGHT = 0.179
"""Relative luminance at which black and white letters stand out alike (WCAG 2.2)."""


def _linear(part: float) -> float:
    """A colour's part of sRGB as light."""
    return float(part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)


def head_lines(title: str, lines: Sequence[str], room: float) -> alt.TitleParams:
    """A picture's title and what stands below it, broken to the picture's width.

    Args:
        title: In bold.
        lines: Subtitle, caption.
        room: Width in pixels.
    """
    return alt.TitleParams(
        wrap(title, room, pixels=8.5),
        subtitle=_broken(lines, room),
        anchor="start",
        fontSize=15,
        subtitleFontSize=11,
        subtitleColor=FAINT,
        subtitleLineHeight=15,
        offset=12,
    )


def _broken(lines: Sequence[str], room: float) -> list[str]:
    """Lines broken to the width; every line but the last ends with a space, by which a page knows where they end."""
    paragraphs = [parts for line in lines if (parts := wrap(line, room))]
    ended = [[*parts[:-1], f"{parts[-1]} "] for parts in paragraphs[:-1]]
    return [part for parts in [*ended, *paragraphs[-1:]] for part in parts]


def wrap(text: str, room: float, *, pixels: float = 6.0) -> list[str]:
    """Break a text into lines; what is not seen, or acts, is written as its code.

    Args:
        text: Anything.
        room: Width in pixels; lines of 70 characters are always allowed.
        pixels: Mean width of a letter.
    """
    return textwrap.wrap(show_text(text), max(70, int(room / pixels)), break_long_words=True)


def inline(rows: Sequence[dict[str, Any]]) -> alt.InlineData:
    """Rows as data that stands in the chart itself."""
    return alt.InlineData(values=list(rows))
