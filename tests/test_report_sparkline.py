"""Curves in the terminal: right heights, right numbers, nothing wider than the window."""

import math

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves
from mechinterp_cli.report.sparkline import BLOCKS, STYLES, terminal_curves


def curve(*y: float, name: str = "probe", x: tuple[float | str, ...] | None = None) -> Curve:
    return Curve(name=name, x=x or tuple(map(float, range(len(y)))), y=y)


def curves(*drawn: Curve, panels: int = 1) -> Curves:
    made = tuple(CurvePanel(title=f"panel {at}", y_title="score", curves=drawn) for at in range(panels))
    return Curves(title="Scores", lines=(), x_title="layer", panels=made, across=1)


def rows(made: Curves | None, width: int = 80, *, plain: bool = False) -> list[Text]:
    """The lines, before any is broken."""
    groups = terminal_curves(made, width=width, plain=plain)
    return [row for group in groups for row in group.renderables if isinstance(row, Text)]


def test_heights_are_the_numbers() -> None:
    eight = tuple(float(at) for at in range(8))
    assert rows(curves(curve(*eight)), 26)[2].plain == f"probe {BLOCKS}  7.000 at 7"
    assert rows(curves(curve(*eight)), 47)[2].plain.split()[1] == "".join(block * 3 for block in BLOCKS)


def test_digits_are_tenths_of_the_range() -> None:
    ten = tuple(float(at) for at in range(10))
    heading, row = rows(curves(curve(*ten)), plain=True)[1:]
    assert heading.plain == "panel 0: score, 0 is 0.000, 9 is 9.000, by layer, 0 to 9"
    assert row.plain == "probe 0123456789  9.000 at 9"


def test_the_largest_in_size_is_told_be_it_negative() -> None:
    assert rows(curves(curve(0.5, -2.0, 1.0)))[2].plain.endswith("  -2.000 at 1")
    assert rows(curves(curve(0.5, 0.5, 0.5)))[2].plain.endswith("  0.500 throughout")


def test_all_curves_of_a_panel_have_one_scale_and_one_axis() -> None:
    low = curve(0.0, 0.0, 0.0, name="low", x=(1.0, 2.0, 3.0))
    high = curve(1.0, 1.0, 1.0, name="high", x=(2.0, 3.0, 4.0))
    below, above = (row.plain for row in rows(curves(low, high), plain=True)[2:])
    assert below == "low  000   0.000 throughout"
    assert above == "high  999  1.000 throughout"


def test_a_gap_is_a_blank() -> None:
    assert rows(curves(curve(0.0, math.nan, 1.0, 1.0)), plain=True)[2].plain.startswith("probe 0 99")


def test_more_points_than_columns_are_means() -> None:
    steps = curve(*([0.0] * 100), *([1.0] * 100))
    marks = rows(curves(steps), 60, plain=True)[2].plain.split()[1]
    assert set(marks) == {"0", "9"}
    assert marks.count("0") == pytest.approx(len(marks) / 2, abs=1)
    assert len(marks) > 20


@pytest.mark.parametrize("width", [20, 60, 80, 200])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("points", [3, 30, 3000])
def test_no_curve_is_wider_than_the_window(width: int, plain: bool, points: int) -> None:
    drawn = [curve(*map(math.sin, range(points)), name=name) for name in ("a", "中" * 40, "x" * 300)]
    for row in rows(curves(*drawn), width, plain=plain)[2:]:
        assert cell_len(row.plain) <= width


def test_too_few_points_are_left_to_tables() -> None:
    assert rows(None) == rows(curves(curve(1.0, 2.0))) == rows(curves(curve(1.0, math.nan, 2.0))) == []
    assert rows(curves(curve(1.0, 2.0), curve(1.0, 2.0, 3.0)))


def test_what_is_left_out_is_said() -> None:
    many = curves(*(curve(1.0, 2.0, 3.0, name=f"head {at}") for at in range(12)), panels=8)
    text = [row.plain for row in rows(many)]
    assert text.count("8 of 12 curves; the picture has all") == 6
    assert text[-1] == "6 of 8 panels; the picture has all"


def test_names_cannot_act_and_plain_is_ascii() -> None:
    hostile = curves(curve(1.0, 2.0, 3.0, name="\x1b[31m[bold]·中"), curve(1.0, 2.0, 3.0, x=("\x07", "·", "é")))
    for plain in (True, False):
        text = "\n".join(row.plain for row in rows(hostile, plain=plain))
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "[bold]" in text
        assert text.isascii() == plain


def test_colours_tell_curves_apart_and_plain_has_none() -> None:
    drawn = curves(*(curve(1.0, 2.0, 3.0, name=f"head {at}") for at in range(3)))
    styles = [[str(span.style) for span in row.spans if span.style] for row in rows(drawn)[2:]]
    assert styles == [[style] for style in STYLES[:3]]
    console = Console(width=80, force_terminal=True, color_system="truecolor")
    segments = [part for row in rows(drawn, plain=True) for part in console.render(row)]
    assert not any(part.style for part in segments)
