"""Curves: every point and band is drawn where it is, and no label stands on another."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp_cli.report.curves import LABEL_PIXELS, SHORT_LABEL_PIXELS, chart, drawing
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range

NAN = math.nan


def curve(x: tuple[float | str, ...], y: tuple[float, ...], name: str = "a", **band: Any) -> Curve:
    return Curve(name=name, x=x, y=y, **band)


def picture(*curves: Curve, across: int = 1, copies: int = 1) -> Curves:
    panel = CurvePanel(title="t", y_title="y", curves=curves)
    return Curves(title="T", lines=("sub",), x_title="x", panels=(panel,) * copies, across=across)


def spec_of(made: Curves) -> dict[str, Any]:
    spec: dict[str, Any] = chart(made).to_dict()
    return spec


def x_of(made: Curves, panel: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = spec_of(made)["concat"][panel]["layer"][-1]["encoding"]["x"]
    return found


def points(made: Curves) -> list[dict[str, Any]]:
    return [row for rows in spec_of(made)["datasets"].values() for row in rows if "name" in row and "high" not in row]


def bands(made: Curves) -> list[dict[str, Any]]:
    return [row for rows in spec_of(made)["datasets"].values() for row in rows if "high" in row]


def test_gaps_are_left_out() -> None:
    made = picture(curve((1, 2, 3), (0.5, NAN, 1.5), low=(0.1, NAN, NAN), high=(0.9, 1.0, 2.0)))
    assert [(row["x"], row["y"]) for row in points(made)] == [(1.0, 0.5), (3.0, 1.5)]
    assert [(row["y"], row["high"]) for row in bands(made)] == [(0.1, 0.9)]


def test_without_bands_none_are_drawn() -> None:
    assert bands(picture(curve((1, 2), (1, 2)))) == []
    assert bands(picture(curve((1, 2), (1, 2), low=(0, 1), high=(2, 3))))


def test_nothing_but_gaps_is_drawn() -> None:
    for made in (picture(curve((1, 2), (NAN, NAN))), picture(curve((), ()))):
        assert drawing(made).png()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("x", "kind"),
    [
        ((1, 2, 3), "linear"),
        ((1, 2, 4, 8), "log"),
        ((0, 1, 2), "linear"),
        ((0, 1, 1000), "symlog"),
        ((-1, 1, 1000), "linear"),
        ((5,), "linear"),
        ((0,), "linear"),
    ],
)
def test_axes_are_logarithmic_where_it_helps(x: tuple[float, ...], kind: str) -> None:
    made = picture(curve(x, tuple(0.0 for _ in x)))
    assert x_of(made)["scale"]["type"] == kind
    low, high = x_of(made)["scale"]["domain"]
    assert low <= min(x) <= max(x) <= high
    assert low < high


def test_a_symlog_axis_is_linear_up_to_its_smallest_step() -> None:
    assert x_of(picture(curve((0, 64, 4096), (0, 0, 0))))["scale"]["constant"] == 64


def along(x: float, scale: dict[str, Any]) -> float:
    if scale["type"] == "log":
        return math.log(x)
    return math.log1p(x / scale["constant"]) if scale["type"] == "symlog" else x


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40, unique=True))
def test_labels_on_the_axis_have_room(x: list[int]) -> None:
    places = tuple(float(value) for value in sorted(x))
    made = x_of(picture(curve(places, tuple(0.0 for _ in places))))
    first, last = (along(end, made["scale"]) for end in made["scale"]["domain"])
    pixels = [(along(value, made["scale"]) - first) / (last - first) * 260 for value in made["axis"]["values"]]
    room = SHORT_LABEL_PIXELS if max(x) < 1000 else LABEL_PIXELS
    assert all(right - left >= room - 1e-6 for left, right in zip(pixels, pixels[1:], strict=False))
    assert made["axis"]["values"][-1] == places[-1]


def test_names_keep_their_order_and_are_thinned() -> None:
    names = tuple(f"step {i}" for i in range(60, 0, -1))
    made = x_of(picture(curve(names, tuple(float(i) for i in range(60)))))
    assert made["scale"]["domain"] == list(names)
    assert made["axis"]["values"][-1] == "step 1"
    assert len(made["axis"]["values"]) <= 24


def test_panels_below_each_other_share_the_axis_and_label_it_once() -> None:
    made = picture(curve((1, 2), (1, 2)), copies=3)
    assert [x_of(made, i)["axis"]["labels"] for i in range(3)] == [False, False, True]
    beside = picture(curve((1, 2), (1, 2)), copies=3, across=3)
    assert [x_of(beside, i)["axis"]["labels"] for i in range(3)] == [True] * 3


def test_curves_differ_in_colour_dash_and_shape() -> None:
    made = spec_of(picture(*[curve((1, 2), (1, 2), name=str(i)) for i in range(4)]))
    line, mark = made["concat"][0]["layer"][-2:]
    looks = [line["encoding"]["color"], line["encoding"]["strokeDash"], mark["encoding"]["shape"]]
    for look in looks:
        assert look["scale"]["domain"] == ["0", "1", "2", "3"]
        assert len({str(value) for value in look["scale"]["range"]}) == 4


def test_the_range_holds_bands_and_zero() -> None:
    panel = CurvePanel(title="", y_title="", curves=(curve((1, 2), (1, NAN), low=(-0.5, NAN), high=(2.0, math.inf)),))
    low, high = y_range([panel])
    assert -0.8 < low < -0.5
    assert 2.0 < high < 2.3
    assert y_range([CurvePanel(title="", y_title="", curves=())]) == (0.0, 1.0)


def test_names_cannot_act() -> None:
    made = picture(curve(("<script>", "\x1b"), (1, 2), name="</script>\x1b[31m"))
    svg = drawing(made).svg().decode()
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert "&lt;script&gt;" in svg


def test_numbers_on_the_y_axis_are_written_out() -> None:
    svg = drawing(picture(curve((1, 2), (0.0, 10.8)))).svg().decode()
    assert ">10<" in svg
    assert ">1e+1<" not in svg
    assert ">0.002<" in drawing(picture(curve((1, 2), (0.0, 0.0031)))).svg().decode()
