"""Grids hold what the summary holds, and pictures cannot be made to act by what is in a token."""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.heatmap import STATE_COLOURS, chart, inert_json, render_png, render_svg

ATTACK = "</script><script>alert(1)</script>"


def frame(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    blank = {"head": None, "neuron": None, "position": None, "span": None, "status": "ok"}
    table = pd.DataFrame([{**blank, **row} for row in rows])
    return table.assign(aggregate="ratio_of_means", group="all", effect=table["normalized"])


def positions(template: str | None = None, layers: int = 3, count: int = 4) -> list[dict[str, Any]]:
    extra = {} if template is None else {"template": template}
    return [
        {"layer": layer, "position": at, "normalized": layer / 10 + at, **extra}
        for layer in range(layers)
        for at in range(count)
    ]


def build(rows: Sequence[dict[str, Any]], **options: Any) -> Heatmap:
    return build_heatmap(frame(rows), HeatmapSpec(title="resid_pre", **options))


def spec_of(heatmap: Heatmap) -> dict[str, Any]:
    spec: dict[str, Any] = chart(heatmap).to_dict()
    return spec


def test_cells_stand_where_their_trials_are() -> None:
    (panel,) = build(positions(), tokens={"": [" a", " b", "\n", " a"]}).panels
    assert panel.layers == (0, 1, 2)
    assert panel.columns == ("0 ·a", "1 ·b", "2 ⏎", "3 ·a")
    np.testing.assert_allclose(panel.values, np.add.outer(np.arange(3) / 10, np.arange(4)))
    assert (panel.status == "ok").all()


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = positions()
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    np.testing.assert_array_equal(build(rows).panels[0].values, build(shuffled).panels[0].values)


def test_templates_have_panels_of_their_own_with_their_own_tokens() -> None:
    rows = positions("ABBA") + positions("BABA", count=5)
    panels = build(rows, tokens={"ABBA": list("abcd"), "BABA": list("vwxyz")}).panels
    assert [(panel.title, len(panel.columns)) for panel in panels] == [("ABBA", 4), ("BABA", 5)]
    assert panels[1].columns[4] == "4 z"


def test_positions_of_templates_are_never_pooled() -> None:
    rows = frame(positions("ABBA") + positions("BABA"))
    spec = spec_of(build_heatmap(rows, HeatmapSpec(title="t")))
    assert len(spec["concat"]) == 2
    limits = {str(p["layer"][0]["encoding"]["color"]["scale"]["domain"]) for p in spec["concat"]}
    assert len(limits) == 1


def test_spans_keep_the_order_of_the_config() -> None:
    rows = [{"layer": 0, "span": span, "normalized": 0.1} for span in ("S1", "IO", "end", "S2+1")]
    assert build(rows).panels[0].columns == ("S1", "IO", "end", "S2+1")


def test_heads_are_numbers_in_order() -> None:
    rows = [{"layer": 0, "head": float(head), "normalized": 0.1} for head in (10, 2, 0)]
    panel = build(rows).panels[0]
    assert (panel.column_title, panel.columns) == ("head", ("0", "2", "10"))


def test_heads_at_several_spans_have_a_panel_per_span() -> None:
    rows = [
        {"layer": 0, "head": head, "span": span, "normalized": head / 10} for head in range(3) for span in ("S1", "end")
    ]
    assert [panel.title for panel in build(rows).panels] == ["span S1", "span end"]


def test_too_many_combinations_show_the_strongest_and_say_so() -> None:
    rows = [
        {"layer": 0, "head": head, "position": at, "normalized": (-1) ** at * at / 20}
        for head in range(3)
        for at in range(14)
    ]
    heatmap = build(rows)
    assert heatmap.panels[0].values.tolist() == [[-0.65] * 3]
    assert "strongest over token" in heatmap.caption
    rows[5] |= {"normalized": None, "status": "nan"}
    assert build(rows).panels[0].status.tolist() == [["nan", "ok", "ok"]]


def test_cells_without_a_number_are_grey_and_zero_is_not() -> None:
    states = ["ok", "trivial", "undefined", "nan", "ok"]
    rows = [
        {"layer": 0, "position": at, "status": state, "normalized": 0.0 if state in ("ok", "trivial") else None}
        for at, state in enumerate(states)
    ]
    heatmap = build([*rows, {"layer": 1, "position": 0, "normalized": 0.5}])
    assert heatmap.states == ("trivial", "undefined", "nan", "absent")
    spec = spec_of(heatmap)
    known, odd, hatch = spec["concat"][0]["layer"]
    cells = {layer: spec["datasets"][part["data"]["name"]] for layer, part in (("known", known), ("odd", odd))}
    assert [cell["value"] for cell in cells["known"]] == [0.0, 0.0, 0.5]
    assert odd["encoding"]["color"]["scale"]["range"] == list(STATE_COLOURS.values())
    assert len({cell["kind"] for cell in cells["odd"]}) == 4
    # Cells that nobody computed are crossed out, and no others.
    crossed = spec["datasets"][hatch["data"]["name"]]
    assert len(crossed) == len(states) - 1 == sum(cell["state"] == "absent" for cell in cells["odd"])
    assert "#ffffff" not in STATE_COLOURS.values()
    plain = build(positions())
    assert plain.states == ()
    assert len(spec_of(plain)["concat"][0]["layer"]) == 1


def test_the_scale_is_centred_and_holds_every_value() -> None:
    heatmap = build([{"layer": 0, "head": i, "normalized": value} for i, value in enumerate((-2.0, 0.5))])
    assert heatmap.limit == 2.0
    domain = spec_of(heatmap)["concat"][0]["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert (domain[0], domain[3], domain[-1]) == (-2.0, 0.0, 2.0)


def test_the_aggregate_is_named_and_raw_effects_are_taken_for_means() -> None:
    table = frame(positions()).assign(aggregate="mean", normalized=None)
    heatmap = build_heatmap(table, HeatmapSpec(title="t", aggregate="mean"))
    assert heatmap.quantity == "effect"
    assert "metric's own unit" in heatmap.caption
    assert "ratio of means" in build(positions()).caption
    with pytest.raises(ValueError, match="no summary rows of aggregate 'mean_of_ratios'"):
        build_heatmap(table, HeatmapSpec(title="t", aggregate="mean_of_ratios"))


def test_arrow_backed_frames_with_nulls() -> None:
    table = frame(positions("A")).astype({"span": "string"})
    table["neuron"] = None
    arrow = pa.Table.from_pandas(table).to_pandas(types_mapper=pd.ArrowDtype)
    made = build_heatmap(arrow, HeatmapSpec(title="t", tokens={"A": list("abcd")}))
    np.testing.assert_array_equal(made.panels[0].values, build(positions("A")).panels[0].values)
    assert made.panels[0].columns[0] == "0 a"


def test_nullable_frames_of_heads() -> None:
    rows = [{"layer": layer, "head": head, "normalized": layer + head / 10} for layer in range(2) for head in range(3)]
    nullable = (
        frame(rows).astype({"layer": "Int32", "head": "Int32"}).assign(position=pd.array([None] * 6, dtype="Int32"))
    )
    made = build_heatmap(nullable, HeatmapSpec(title="t"))
    np.testing.assert_array_equal(made.panels[0].values, [[0.0, 0.1, 0.2], [1.0, 1.1, 1.2]])
    assert made.panels[0].columns == ("0", "1", "2")


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@pytest.mark.parametrize("layers", [2, 30])
def test_pictures_are_large_enough_to_read(layers: int) -> None:
    width, height = size_of(render_png(build(positions(layers=layers, count=14), subtitle="model, 64 prompts")))
    assert 2 * 14 * 30 < width < 2600
    assert 2 * layers * 14 < height < 2600


def test_ends_of_a_scale_that_are_tiny_are_not_written_as_0() -> None:
    tiny = [{**row, "normalized": row["normalized"] * 1e-9} for row in positions()]
    plain, small = (json.dumps(spec_of(build(rows))) for rows in (positions(), tiny))
    assert set(re.findall(r'"format": "([^"]*)"', plain)) == {".2~f"}
    assert '"format"' not in small
    assert "~e" in small
    assert ">2e-2<" in render_svg(build(tiny)), "effects that are nothing do not fill the scale"


def test_a_thousand_columns_all_undefined_and_one_value_are_drawn() -> None:
    wide = [{"layer": 0, "neuron": neuron, "normalized": neuron / 1e3} for neuron in range(1536)]
    assert size_of(render_png(build(wide)))[0] > 2 * 1536
    undefined = [{**row, "status": "undefined", "normalized": None} for row in positions()]
    assert build(undefined).limit == 1.0
    size_of(render_png(build(undefined)))
    size_of(render_png(build([{"layer": 0, "normalized": 1e-9}])))


def test_tokens_are_inert_in_pictures_and_in_scripts() -> None:
    tokens = [ATTACK, "<img src=x onerror=alert(1)>", "$a$ & \u2028", "中🙂\ud800"]
    heatmap = build(positions(), tokens={"": tokens}, subtitle=ATTACK, normalization="<!--<script>")
    svg = render_svg(heatmap)
    assert "<script" not in svg
    assert "<img" not in svg
    assert "&lt;/script" in svg
    script = inert_json(chart(heatmap))
    assert script.isascii()
    assert "<" not in script
    assert json.loads(script) == spec_of(heatmap)


def test_the_same_heat_map_gives_the_same_bytes() -> None:
    assert render_png(build(positions())) == render_png(build(positions()))


def test_the_room_does_not_import_torch() -> None:
    code = "import mechinterp_cli.report.heatmap, mechinterp_cli.report.terminal, mechinterp_cli.stats, sys; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
