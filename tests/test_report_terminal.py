"""The terminal's view: right numbers at every width, and tokens that cannot act."""

import io
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console, RenderableType

from mechinterp_cli.report.grid import HeatmapSpec, build_heatmap
from mechinterp_cli.report.terminal import describe_place, strongest, strongest_table, terminal_heatmap

TOKENS = ["[/INST]", " [red]", "\x1b[31m", "\x07", " Mary", "\n", " John", " to"]


def summary(layers: int = 3, columns: int = 8) -> pd.DataFrame:
    rows = [
        {"layer": layer, "position": at, "normalized": (at - 3) / 10 + layer / 100}
        for layer in range(layers)
        for at in range(columns)
    ]
    table = pd.DataFrame(rows).assign(head=None, neuron=None, span=None, site="resid_pre", status="ok", n=64)
    return table.assign(
        aggregate="ratio_of_means", group="all", ci_low=0.123, ci_high=0.456, p_adjusted=0.0123, verdict="inconclusive"
    )


def put(table: pd.DataFrame, row: int, status: str, value: float) -> None:
    table.at[row, "status"] = status
    table.at[row, "normalized"] = value


def shown(renderable: RenderableType, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(renderable)
    return file.getvalue()


def view(table: pd.DataFrame, width: int = 100, *, plain: bool = True, **options: Any) -> str:
    made = build_heatmap(table, HeatmapSpec(title="resid_pre", subtitle="a [bold] model", tokens={"": TOKENS}))
    return shown(terminal_heatmap(made, width=width, plain=plain), width, **options)


def test_numbers_stand_in_their_rows_with_layer_0_below() -> None:
    lines = view(summary()).splitlines()
    assert [line.split() for line in lines if line.lstrip()[:1] in "012"][-3:] == [
        ["2", "-.28", "-.18", "-.08", ".02", ".12", ".22", ".32", ".42"],
        ["1", "-.29", "-.19", "-.09", ".01", ".11", ".21", ".31", ".41"],
        ["0", "-.30", "-.20", "-.10", "0", ".10", ".20", ".30", ".40"],
    ]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize("columns", [1, 8, 40])
def test_nothing_is_wider_than_the_terminal(width: int, columns: int) -> None:
    table = summary(columns=columns)
    made = build_heatmap(table, HeatmapSpec(title="t", tokens={"": ["中" * 9] * columns}))
    for plain in (True, False):
        wide = shown(terminal_heatmap(made, width=width, plain=plain), 10_000).splitlines()
        cells = [line for line in wide if line.strip()[:1].isdigit()]
        assert cells
        assert max(map(len, cells)) <= width


def test_what_does_not_fit_is_said() -> None:
    text = view(summary(columns=60), width=50)
    assert "columns 1 to 33 of 60; the picture has all" in text
    assert "cells are hundredths" in text
    assert "the picture has all" not in view(summary())


def test_cells_without_a_number_are_not_zeros() -> None:
    table = summary(layers=1)
    put(table, 0, "trivial", 0.0)
    put(table, 1, "undefined", np.nan)
    put(table, 2, "nan", np.nan)
    text = view(table)
    assert ["0", ".", "?", "NaN", "0", ".10", ".20", ".30", ".40"] in [line.split() for line in text.splitlines()]
    assert "exactly 0 (trivial)" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_tokens_cannot_act(terminal: bool) -> None:
    options: dict[str, Any] = {"force_terminal": terminal, "color_system": None}
    text = view(summary(), plain=False, **options)
    text += shown(strongest_table(summary(), tokens={"": TOKENS}, count=24), **options)
    for token in ("[/INST]", "[red]", "\\x1b[31m", "\\x07", "·Mary", "⏎", "a [bold] model"):
        assert token in text, token
    assert "\x07" not in text
    assert "\x1b[31m" not in text


def test_plain_is_ascii_without_escapes() -> None:
    table = summary().assign(span="中")
    text = view(table, force_terminal=True) + shown(strongest_table(table, tokens={"": TOKENS}, plain=True))
    assert text.isascii()
    assert "\x1b" not in view(table)
    assert "\x1b[" in view(table, plain=False, force_terminal=True, color_system="truecolor")


def test_the_strongest_come_first_and_only_what_was_computed() -> None:
    table = summary()
    put(table, 0, "ok", -9.0)
    put(table, 1, "undefined", 99.0)
    put(table, 2, "nan", np.nan)
    found = strongest(table, count=3)
    assert found["normalized"].tolist() == pytest.approx([-9.0, 0.42, 0.41])
    assert len(strongest(table, count=100)) == 22
    assert strongest(table.assign(status="trivial")).empty


def test_the_table_says_where_how_much_and_how_sure() -> None:
    text = shown(strongest_table(summary(), tokens={"": TOKENS}, count=1), width=120)
    for piece in ("resid_pre, layer 2, position 7 ·to", "0.420", "[0.123, 0.456]", "0.0123", "64", "inconclusive"):
        assert piece in text, piece
    narrow = shown(strongest_table(summary(), tokens={"": TOKENS}, count=1, width=60), width=60)
    assert "0.420" in narrow
    assert "inconclusive" not in narrow


def test_nulls_of_every_kind_are_left_out() -> None:
    table = summary(layers=1, columns=1).assign(
        ci_low=None, ci_high=pd.array([None], dtype="Float64"), p_adjusted=np.nan, verdict=None, normalized=0.5
    )
    text = shown(strongest_table(table))
    assert "0.500" in text
    assert not any(word in text for word in ("nan", "None", "NA"))
    assert (
        describe_place({"site": "z", "layer": 3.0, "head": 1, "span": "S2", "position": pd.NA}, {})
        == "z, layer 3, head 1, S2"
    )


def test_the_template_is_named_where_there_are_several() -> None:
    row = {"site": "z", "layer": 3, "position": 1, "template": "ABBA"}
    assert describe_place(row, {"ABBA": ["a", "b"], "BABA": ["c", "d"]}) == "z, layer 3, position 1 b, ABBA"
    assert describe_place(row, {"ABBA": ["a", "b"], "": ["a", "b"]}) == "z, layer 3, position 1 b"


def test_no_name_of_a_column_is_broken_over_two_lines() -> None:
    names = [f"k-{i}" for i in range(20)]
    made = build_heatmap(summary(columns=20), HeatmapSpec(title="t", tokens={"": names}))
    text = shown(terminal_heatmap(made, width=40), 40)
    assert all(f"{i} {name}" in text for i, name in enumerate(names))
