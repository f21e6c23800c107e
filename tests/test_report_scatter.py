"""The scatter plot holds what the comparison holds: A across, B up, the diagonal, a colour per kind of site."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechinterp_cli.report import scatter
from mechinterp_cli.report.scatter import Scatter, build_scatter, chart, render_png
from mechinterp_cli.runs.compare import Comparison
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.sides import Side


def side(name: str, dtype: str) -> Side:
    manifest = Manifest("patch", "demo", {"patch": {"direction": "denoise", "source": "pair"}}, "0" * 64)
    manifest.model = {"id": "toy-induction", "dtype": dtype}
    return Side(Path("runs") / name, manifest, pd.DataFrame())


def comparison(rows: list[tuple[str, str, float, float, str]]) -> Comparison:
    frame = pd.DataFrame(rows, columns=["metric", "site", "a", "b", "state"])
    frame["column"], frame["label"] = "normalized", [f"row {at}" for at in range(len(rows))]
    return Comparison(side("one", "float32"), side("two", "bfloat16"), frame, [])


ROWS = [
    ("kl", "z", 0.5, 0.25, "compared"),
    ("kl", "resid_pre", -1.0, -0.5, "compared"),
    ("kl", "z", 0.0, 0.0, "trivial"),
    ("kl", "z", 0.1, float("nan"), "only_a"),
    ("kl", "z", float("nan"), 0.3, "no_number"),
    ("prob", "z", 20.0, 10.0, "compared"),
]


def panels(drawn: Scatter) -> list[dict[str, Any]]:
    spec: dict[str, Any] = chart(drawn).to_dict()
    for panel in spec["concat"]:
        for layer in panel["layer"]:
            # Altair hoists inline data to the top and leaves its name.
            layer["data"] = {"values": spec["datasets"][layer["data"]["name"]]}
    return list(spec["concat"])


def points(panel: dict[str, Any]) -> list[tuple[float, float, str]]:
    return [(point["a"], point["b"], point["site"]) for point in panel["layer"][1]["data"]["values"]]


def test_points_are_the_rows_that_have_both_numbers() -> None:
    first, second = panels(build_scatter(comparison(ROWS)))
    assert sorted(points(first)) == [(-1, -0.5, "resid_pre"), (0, 0, "z"), (0.5, 0.25, "z")]
    assert points(second) == [(20, 10, "z")]


def test_axes_are_the_same_and_the_diagonal_runs_along_them() -> None:
    for panel in panels(build_scatter(comparison(ROWS))):
        line, marks = panel["layer"]
        domains = [marks["encoding"][axis]["scale"]["domain"] for axis in "xy"]
        assert domains[0] == domains[1]
        low, high = domains[0]
        assert line["data"]["values"] == [{"a": low, "b": low}, {"a": high, "b": high}]
        assert all(low < value < high for a, b, _ in points(panel) for value in (a, b, 0.0))
        assert panel["width"] == panel["height"]


def test_one_colour_and_shape_per_kind_of_site_over_all_panels() -> None:
    kinds = [f"kind{i}" for i in range(13)]
    first, second = panels(build_scatter(comparison([(m, k, 1.0, 2.0, "compared") for m in "xy" for k in kinds])))
    scales = [
        [panel["layer"][1]["encoding"][name]["scale"] for name in ("color", "shape")] for panel in (first, second)
    ]
    assert scales[0] == scales[1]
    assert scales[0][0]["domain"] == kinds
    assert len(set(zip(scales[0][0]["range"], scales[0][1]["range"], strict=True))) == 13
    legends = [panel["layer"][1]["encoding"]["color"]["legend"] for panel in (first, second)]
    assert [legend is None for legend in legends] == [True, False]


def test_the_picture_says_which_run_is_which() -> None:
    spec = chart(build_scatter(comparison(ROWS))).to_dict()
    assert [line.rstrip() for line in spec["title"]["subtitle"]] == [
        "A: one, toy-induction, float32, denoise, pair",
        "B: two, toy-induction, bfloat16, denoise, pair",
    ]


def test_where_one_kind_of_site_is_compared_colours_are_checkpoints() -> None:
    rows = [("induction", "head", 0.5, 0.25, "compared"), ("induction", "head", 0.9, 0.8, "compared")]
    along = comparison(rows)
    along.rows["checkpoint"] = ["step0", "step9"]
    (panel,) = panels(build_scatter(along))
    assert points(panel) == [(0.5, 0.25, "step0"), (0.9, 0.8, "step9")]
    several = comparison([*rows, ("induction", "z", 1.0, 1.0, "compared")])
    several.rows["checkpoint"] = ["step0", "step9", "step9"]
    assert build_scatter(several).kinds == ("head", "z")
    along.rows["checkpoint"] = None
    assert build_scatter(along).kinds == ("head",)


def test_a_run_over_checkpoints_is_not_named_after_the_first() -> None:
    found = comparison(ROWS)
    found.a.manifest.model |= {"revision": "step0", "checkpoints": [{"checkpoint": "step0"}, {"checkpoint": "step9"}]}
    assert build_scatter(found).lines[0] == "A: one, toy-induction, 2 checkpoints, float32, denoise, pair"


def test_of_too_many_points_the_largest_are_drawn_and_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MAX_POINTS", 3)
    values = np.random.default_rng(0).permutation(10) / 10
    drawn = build_scatter(comparison([("kl", "z", value, -value, "compared") for value in values]))
    assert drawn.lines[2:] == ("kl: the 3 largest of 10 rows",)
    assert [a for a, _, _ in points(panels(drawn)[0])] == [0.7, 0.8, 0.9]


def test_too_many_metrics_are_left_to_the_table() -> None:
    drawn = build_scatter(comparison([(f"m{i}", "z", 1.0, 2.0, "compared") for i in range(8)]))
    assert len(drawn.panels) == 6
    assert drawn.lines[2:] == ("2 more metrics are in the table alone",)
    drawn = build_scatter(comparison([(f"m{i}", "z", 1.0, 2.0, "compared") for i in range(7)]))
    assert drawn.lines[2:] == ("1 more metric is in the table alone",)


def test_picture_of_nothing_but_zeros(tmp_path: Path) -> None:
    for rows in (ROWS, [("kl", "z", 0.0, 0.0, "trivial")]):
        width, height = struct.unpack(">II", render_png(build_scatter(comparison(rows)))[16:24])
        assert min(width, height) > 2 * scatter.SIZE
