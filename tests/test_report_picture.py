"""What charts share: letters that can be read, what stands behind a number, counts in words, ranges that show lines."""

import math
from typing import Any

import numpy as np
import pytest

from mechinterp_cli.report.behind import ALONE, behind, behind_random
from mechinterp_cli.report.cells import between, counted_between
from mechinterp_cli.report.picture import COLOURS, ink_on
from mechinterp_cli.report.rows import Row
from mechinterp_cli.report.series import curve_of, dot_of, random_curve
from mechinterp_cli.report.shapes import Curve, CurvePanel, edges, leaves, y_range
from mechinterp_cli.text import counted

ROW: dict[str, Any] = {"layer": 3, "effect": 0.5, "ci_low": 0.4, "ci_high": 0.7, "p": 0.01, "p_adjusted": 0.02, "n": 12}


def light(red: float, green: float, blue: float) -> float:
    """Relative luminance of a colour of 0 to 255 (WCAG 2.2)."""
    parts = [part / 255 for part in (red, green, blue)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_letters_stand_out_from_every_colour_of_the_scale() -> None:
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in COLOURS])
    for share in np.linspace(-1, 1, 201):
        place = (share + 1) / 2 * (len(COLOURS) - 1)
        behind_it = light(*(np.interp(place, range(len(COLOURS)), stops[:, part]) for part in range(3)))
        ink = {"#000000": 0.0, "#ffffff": 1.0}[ink_on(float(share))]
        ratio = (max(ink, behind_it) + 0.05) / (min(ink, behind_it) + 0.05)
        assert ratio >= 4.5, share
    assert ink_on(-5.0) == ink_on(-1.0)
    assert ink_on(5.0) == ink_on(1.0)


def test_what_stands_behind_a_number_is_interval_adjusted_p_and_n() -> None:
    assert behind(ROW) == {"interval": "[0.400, 0.700]", "p": "0.0200", "n": "12"}
    assert behind({**ROW, "p_adjusted": None}) == {"interval": "[0.400, 0.700]", "p": "", "n": "12"}
    alone = {name: value for name, value in ROW.items() if name != "p_adjusted"}
    assert behind(alone) == {"interval": "[0.400, 0.700]", "p": "", ALONE: "0.0100", "n": "12"}
    assert behind({}) == {"interval": "", "p": "", "n": ""}
    assert behind({"low": -1.0, "high": math.nan}, ("low", "high"))["interval"] == ""
    drawn = behind_random({"random_low": 0.0, "random_high": 1.0, "draws": 9})
    assert drawn == {"middle 95 %": "[0.000, 1.000]", "draws": "9"}


def test_curves_and_dots_have_what_stands_behind_their_rows() -> None:
    rows: list[Row] = [ROW, {**ROW, "layer": 4, "effect": None, "ci_low": None, "ci_high": None}]
    made = curve_of("own", rows, "layer", "effect")
    assert made.x == (3.0, 4.0)
    assert made.y[0] == 0.5
    assert math.isnan(made.y[1])
    assert [told["n"] for told in made.behind] == ["12", "12"]
    assert made.low is not None
    assert made.low[0] == 0.4
    assert curve_of("own", rows, "layer", "effect", band=False).low is None
    assert curve_of("own", rows, ("a", "b"), "effect").x == ("a", "b")
    floored = curve_of("own", rows[:1], "layer", "effect", floor=0.6)
    assert (floored.y, floored.low, floored.high) == ((0.6,), (0.6,), (0.7,))
    assert floored.behind[0]["interval"] == "[0.400, 0.700]"
    assert curve_of("own", [{"layer": 1, "effect": 2.0}], "layer", "effect").low is None
    random = random_curve("random", [{"layer": 0, "random_effect": 1.0, "draws": 3}], "layer")
    assert random.behind[0]["draws"] == "3"
    dot = dot_of("row", "series", ROW, "effect")
    assert (dot.value, dot.low, dot.high) == (0.5, 0.4, 0.7)
    assert dot.behind == behind(ROW)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 prompts"), (1, "1 prompt"), (2, "2 prompts"), (1200, "1,200 prompts")]
)
def test_one_is_singular(count: int, words: str) -> None:
    assert counted(count, "prompt") == words


def test_plurals_that_are_no_s_and_counts_that_vary() -> None:
    assert counted(1, "more metric is", "more metrics are") == "1 more metric is"
    assert counted(2, "more metric is", "more metrics are") == "2 more metrics are"
    assert counted_between([1, 1.0, None], "cluster") == "1 cluster"
    assert counted_between([16, 2], "cluster") == "2 to 16 clusters"
    assert counted_between([math.nan], "cluster") == ""
    assert between([5, 5]) == "5"
    assert between([]) == ""


def panel(*curves: Curve) -> CurvePanel:
    return CurvePanel(title="", y_title="", curves=curves)


def test_a_few_wild_intervals_do_not_press_the_lines_together() -> None:
    x, y = tuple(range(8)), (0.0, 0.1, -0.1, 0.05, 0.0, 0.1, 0.0, 0.1)
    low, high = tuple(value - 0.02 for value in y), tuple(value + 0.02 for value in y)
    usual = panel(Curve(name="a", x=x, y=y, low=low, high=high))
    assert not leaves(y_range([usual]), *edges([usual]))
    wild = panel(Curve(name="a", x=x, y=y, low=low, high=(*high[:-1], 50.0)))
    ends = y_range([wild])
    assert ends[1] < 0.5
    assert leaves(ends, *edges([wild]))


def test_intervals_are_whole_where_all_are_alike_or_there_is_one() -> None:
    x, y = (0, 1, 2), (0.01, 0.0, 0.02)
    wide = panel(Curve(name="a", x=x, y=y, low=(-3.0, -2.5, -3.5), high=(3.0, 2.5, 3.5)))
    one = panel(Curve(name="a", x=(0,), y=(0.1,), low=(-40.0,), high=(50.0,)))
    flat = panel(Curve(name="a", x=x, y=(0.0, 0.0, 0.0), low=(0.0, 0.0, -1.0), high=(0.0, 0.0, 2.0)))
    for made in (wide, one, flat):
        assert not leaves(y_range([made]), *edges([made]))


def test_a_range_without_zero_is_that_of_the_lines() -> None:
    made = panel(Curve(name="a", x=(0, 1), y=(0.7, 0.9), low=(0.65, 0.8), high=(0.75, 0.95)))
    low, high = y_range([made], zero=False)
    assert 0.6 < low < 0.65
    assert 0.95 < high < 1.0
    assert y_range([made])[0] == 0.0
    empty = y_range([panel()], zero=False)
    assert empty[0] < empty[1]
