import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs import schema
from mechinterp_cli.runs.tables import read_csv, read_parquet, to_frame, write_csv, write_parquet

TOKENS = ["NA", "null", "nan", "None", "", "\r", "\n", "\r\n", ",", '"', "=1+1", "+", "-", "@", "\t", " ", "N/A", "#",
          "a,b", 'x"y', "\u2028", "\ufeff", "\x00", "caf\u00e9", "\U0001f600", "true", "1", None]  # fmt: skip
REALS = [float("nan"), None, math.inf, -math.inf, 0.1 + 0.2, 5e-324, -0.0, 1.7976931348623157e308]


def awkward() -> pa.Table:
    reals = (REALS * len(TOKENS))[: len(TOKENS)]
    flags = ([True, None, False] * len(TOKENS))[: len(TOKENS)]
    return pa.table(
        {
            "token": pa.array(TOKENS, pa.string()),
            "real": pa.array(reals, pa.float64()),
            "count": pa.array([None, *range(len(TOKENS) - 1)], pa.int32()),
            "flag": pa.array(flags, pa.bool_()),
            "nothing": pa.nulls(len(TOKENS), pa.string()),
        }
    )


def test_awkward_values_come_back_exactly(tmp_path: Path) -> None:
    table = awkward()
    write_parquet(table, tmp_path / "t.parquet")
    write_csv(table, tmp_path / "t.csv")
    for again in (read_parquet(tmp_path / "t.parquet"), read_csv(tmp_path / "t.csv", table.schema)):
        assert again.schema == table.schema
        for name in table.column_names:
            assert [repr(v) for v in again[name].to_pylist()] == [repr(v) for v in table[name].to_pylist()]


def test_documented_pandas_options_give_every_text(tmp_path: Path) -> None:
    write_csv(awkward(), tmp_path / "t.csv")
    texts = pd.read_csv(tmp_path / "t.csv", keep_default_na=False, dtype=str, encoding="utf-8")["token"]
    assert list(texts) == [token or "" for token in TOKENS]


def test_frames_keep_null_and_nan_apart(tmp_path: Path) -> None:
    write_parquet(awkward(), tmp_path / "t.parquet")
    frame = to_frame(read_parquet(tmp_path / "t.parquet"))
    again = pa.Table.from_pandas(frame, preserve_index=False)
    assert again["real"].null_count == awkward()["real"].null_count
    assert again["real"].null_count < sum(value is None or value != value for value in awkward()["real"].to_pylist())


def test_two_writes_give_the_same_bytes(tmp_path: Path) -> None:
    assert write_parquet(awkward(), tmp_path / "a") == write_parquet(awkward(), tmp_path / "b")
    assert write_csv(awkward(), tmp_path / "a") == write_csv(awkward(), tmp_path / "b")


def test_flipped_bit_and_cut_end_are_found(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    values = np.random.default_rng(0).random(1000)
    write_parquet(pa.table({"x": values}), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (bytes(flipped), whole[:-10], whole[:100], b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"t\.parquet: missing or damaged"):
            read_parquet(path)
    path.write_bytes(whole)
    assert read_parquet(path)["x"].to_pylist() == values.tolist()


def test_damaged_csv_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("x\nabc\n")
    with pytest.raises(RunError, match=r"t\.csv: missing or damaged"):
        read_csv(tmp_path / "t.csv", pa.schema([("x", pa.float64())]))


# --- schema


def summary_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "trial": [0, 1],
            "metric": ["kl", "kl"],
            "aggregate": ["mean", "mean"],
            "n": [3, 3],
            "n_dropped": [0, 0],
            "value": [float("nan"), 1.0],
        }
    )


def test_table_gets_its_fixed_form() -> None:
    table = schema.validate("summary", summary_frame())
    assert table.schema == schema.table_schema("summary")
    assert math.isnan(table["value"][0].as_py())
    assert table["effect"].null_count == 2
    assert repr(schema.validate("summary", table).to_pylist()) == repr(table.to_pylist())


@pytest.mark.parametrize("dtype", ["float64", "object", "double[pyarrow]"])
def test_nan_never_becomes_null(dtype: Literal["float64", "object", "double[pyarrow]"]) -> None:
    values = pd.Series(pd.array(pa.array([float("nan"), 1.0]), dtype="double[pyarrow]")).astype(dtype)
    column = schema.validate("summary", summary_frame().assign(value=values))["value"]
    assert column.null_count == 0
    assert math.isnan(column[0].as_py())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.assign(extra=1), r"summary: unknown columns \['extra'\]"),
        (lambda f: f.drop(columns="metric"), r"summary: missing columns \['metric'\]"),
        (lambda f: f.assign(metric=["kl", None]), r"summary\.metric: null in row 1"),
        (lambda f: f.assign(n=[3, 2**40]), r"summary\.n: the values do not fit int32"),
        (lambda f: f.assign(n=[3, 2.5]), r"summary\.n: the values do not fit int32"),
        (lambda f: f.assign(value=["a", "b"]), r"summary\.value: the values do not fit double"),
    ],
)
def test_table_of_another_form_is_refused(change: Callable[[pd.DataFrame], pd.DataFrame], message: str) -> None:
    with pytest.raises(RunError, match=message):
        schema.validate("summary", change(summary_frame()))


def test_prompt_columns_hold_tokens_and_spans(tmp_path: Path) -> None:
    row = {
        "prompt": 0,
        "stream": "clean",
        "text": "a b",
        "token_ids": [1, 2],
        "tokens": ["a", " b"],
        "spans": '{"end": [1]}',
        "answer_ids": [7],
    }
    write_parquet(schema.validate("prompts", [row]), tmp_path / "prompts.parquet")
    again = read_parquet(tmp_path / "prompts.parquet").to_pylist()[0]
    assert {name: again[name] for name in row} == row
    assert again["wrong_answer_ids"] is None


def test_every_form_of_data_gives_the_same_table() -> None:
    columns: dict[str, Any] = {
        "trial": np.array([0, 1, 2]),
        "metric": ["kl", "kl", "kl"],
        "aggregate": np.array(["mean"] * 3, dtype=object),
        "n": np.array([3, 3, 3]),
        "n_dropped": (0, 0, 0),
        "value": np.ma.MaskedArray([np.nan, 1.0, 2.0], mask=[False, False, True]),
        "family": np.array(["f", None, "f"], dtype=object),
    }
    rows = [
        {"trial": i, "metric": "kl", "aggregate": "mean", "n": 3, "n_dropped": 0, "value": value, "family": family}
        for i, (value, family) in enumerate([(float("nan"), "f"), (1.0, None), (None, "f")])
    ]
    expected = repr(schema.validate("summary", columns).to_pylist())
    assert expected == repr(schema.validate("summary", rows).to_pylist())
    assert expected == repr(schema.validate("summary", pa.Table.from_pylist(rows)).to_pylist())
    assert "nan" in expected
    assert schema.validate("summary", rows)["value"].null_count == 1
    with pytest.raises(RunError, match=r"summary\.n: 2 values for 3 rows"):
        schema.validate("summary", {**columns, "n": [1, 2]})


def test_empty_table_keeps_its_columns() -> None:
    assert schema.validate("results", []).schema == schema.table_schema("results")


def test_method_adds_columns_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "_extensions", {})
    schema.register_columns("m", "summary", [schema.column("estimate", pa.float64())])
    schema.register_columns("m", "own", [schema.column("x", pa.int32(), required=True)])
    assert schema.table_schema("summary", "m").names[-1] == "estimate"
    assert "estimate" not in schema.table_schema("summary").names
    assert schema.table_schema("own", "m").names == ["x"]
    with pytest.raises(ValueError, match="twice: metric"):
        schema.register_columns("m", "summary", [schema.column("metric", pa.string())])
    with pytest.raises(KeyError, match="no such table"):
        schema.table_schema("own")


def test_parquet_pages_carry_checksums_for_other_readers(tmp_path: Path) -> None:
    write_parquet(awkward(), tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet", page_checksum_verification=True).num_rows == len(TOKENS)
