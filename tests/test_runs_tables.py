import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.big_table import METRICS, random_sweep
from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.errors import RunError
from mechinterp_cli.methods import tables
from mechinterp_cli.methods.tables import Sweep, result_columns
from mechinterp_cli.runs import schema
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.recorder import record
from mechinterp_cli.runs.tables import (
    AUTO_CSV_ROWS,
    chosen_formats,
    read_csv,
    read_parquet,
    to_frame,
    write_csv,
    write_parquet,
)
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.observations import denominator_threshold
from tests.experiments import config_of

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
    monkeypatch.setattr(schema, "_KEYS", {})
    schema.register_columns("m", "own", [schema.column("x", pa.int32(), required=True)], keys=["x"])
    assert schema.table_schema("summary", "m").names[-1] == "estimate"
    assert "estimate" not in schema.table_schema("summary").names
    assert schema.table_schema("own", "m").names == ["x", "checkpoint", "tokens_seen"]
    assert schema.table_keys("own") == ("checkpoint", "x")
    with pytest.raises(ValueError, match="twice: metric"):
        schema.register_columns("m", "summary", [schema.column("metric", pa.string())])
    with pytest.raises(KeyError, match="no such table"):
        schema.table_schema("own")


def test_parquet_pages_carry_checksums_for_other_readers(tmp_path: Path) -> None:
    write_parquet(awkward(), tmp_path / "t.parquet")
    assert pq.read_table(tmp_path / "t.parquet", page_checksum_verification=True).num_rows == len(TOKENS)


# --- huge tables


def test_auto_leaves_csv_out_of_huge_tables() -> None:
    assert chosen_formats("auto", AUTO_CSV_ROWS) == ("parquet", "csv")
    assert chosen_formats("auto", AUTO_CSV_ROWS + 1) == ("parquet",)
    assert chosen_formats(("csv",), AUTO_CSV_ROWS + 1) == ("csv",)


@pytest.mark.parametrize("formats", ["auto", ["parquet", "csv"]])
def test_a_csv_that_is_left_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, formats: Any) -> None:
    monkeypatch.setattr("mechinterp_cli.runs.tables.AUTO_CSV_ROWS", 1)
    output = {"figures": [], "formats": formats}
    loaded = config_of(tmp_path, {"sites": [{"kind": "z"}]}, output=output)
    with record(loaded, tmp_path / "runs") as run:
        for table, rows in (("baselines", 1), ("results", 2)):
            own = {"trial": range(rows)} if table == "results" else {"stream": ["clean"] * rows}
            common = {"prompt": range(rows), "metric": ["kl"] * rows, "status": ["ok"] * rows}
            run.write_table(table, own | common, formats=run.formats)
    manifest = Manifest.read(run.path)
    left_out = formats == "auto"
    assert ("results.csv" not in manifest.outputs) == left_out
    assert {"results.parquet", "baselines.parquet", "baselines.csv"} <= set(manifest.outputs)
    asked = ["results: no CSV of 2 rows (more than 1,000,000); `output.formats: [parquet, csv]` writes one"]
    assert manifest.warnings == (asked if left_out else [])
    assert (asked[0] in (run.path / "log.jsonl").read_text()) == left_out


def test_a_table_stands_for_a_method_s_runs_only_where_it_can() -> None:
    register_all()
    found = schema.standing_of("heads")
    assert found is not None
    assert (found.table, found.metric) == ("scores", "score")
    assert schema.standing_of("patch") is None
    for table, metric, lacks in (("causal", "metric", "value"), ("scores", "chance", "the key chance")):
        with pytest.raises(ValueError, match=f"{table}: lacks {lacks}"):
            schema.register_standing("heads", schema.Standing(table, metric, "head", "head {layer}"))
    assert schema.standing_of("heads") == found


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    register_all()
    return random_sweep(2400, 64)


def test_no_python_object_is_made_of_any_row(sweep: Sweep) -> None:
    columns = result_columns(sweep, StatsOptions())
    wanted = schema.table_schema("results", "patch")
    later = ("checkpoint", "tokens_seen")  # filled in where there are several
    assert {name: values.type for name, values in columns.items()} == {
        f.name: f.type for f in wanted if f.name not in later
    }
    assert all(len(values) == 2400 * 64 * 2 for values in columns.values())
    table = schema.validate("results", columns, "patch")
    for name, values in columns.items():
        # Fitting the schema copies nothing: the table stands on the columns' own memory.
        fitted = [buffer.address for chunk in table[name].chunks for buffer in chunk.buffers() if buffer is not None]
        chunks = values.chunks if isinstance(values, pa.ChunkedArray) else [values]
        assert fitted == [buffer.address for chunk in chunks for buffer in chunk.buffers() if buffer is not None]


def test_large_table_is_right_row_by_row_and_comes_back(sweep: Sweep, tmp_path: Path) -> None:
    table = schema.validate("results", result_columns(sweep, StatsOptions()), "patch")
    assert write_parquet(table, tmp_path / "results.parquet").rows == table.num_rows == 307_200
    assert read_parquet(tmp_path / "results.parquet").equals(table)
    base, other = (sweep.streams[name][:, 0] for name in ("corrupt", "clean"))
    for row in np.random.default_rng(0).integers(table.num_rows, size=200).tolist():
        found = table.slice(row, 1).to_pylist()[0]
        trial, prompt, metric = np.unravel_index(row, (2400, 64, 2))
        trivial = bool(sweep.status[trial, prompt])
        value = base[prompt, metric] if trivial else sweep.values[trial, prompt, 0, metric]
        effect, difference = value - base[prompt, metric], other[prompt, metric] - base[prompt, metric]
        spec = sweep.specs[trial].columns()
        assert (found["trial"], found["label"], found["layer"]) == (trial, spec["label"], spec["layer"])
        assert (found["neuron"], found["head"], found["span"]) == (spec["neuron"], None, None)
        assert (found["position"], found["template"]) == (spec["position"], "ABBA")
        assert (found["prompt"], found["metric"], found["draw"]) == (prompt, METRICS[metric], None)
        assert (found["cluster"], found["group"]) == (f"template {prompt % 4}", "ab"[prompt % 2])
        assert (found["value"], found["effect"]) == (value, effect)
        assert found["status"] == "trivial" if trivial else found["status"] in ("ok", "undefined")
        assert (found["normalized"] is None) == (
            abs(difference) < denominator_threshold(base[:, metric], other[:, metric])
        )
        if found["normalized"] is not None:
            assert found["normalized"] == pytest.approx(effect / difference)


def test_chosen_trials_draws_and_chunks(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_LOOK_UP_ROWS", 100)
    random = np.random.default_rng(0)
    drawn = replace(
        sweep,
        values=random.normal(size=(2400, 64, 3, 2)),
        streams={name: random.normal(size=(64, 3, 2)) for name in ("corrupt", "clean")},
        status=np.where(np.arange(64) < 2, sweep.status, Status.ABSENT).astype(np.int8),
        drawn=True,
    )
    columns = result_columns(drawn, StatsOptions(), np.array([7, 3]))
    frame = to_frame(schema.validate("results", columns, "patch"))
    assert columns["label"].num_chunks == 1
    assert [tuple(row) for row in frame[["trial", "prompt", "metric", "draw"]].to_numpy()] == [
        (trial, prompt, metric, draw)
        for trial in (3, 7)
        for prompt in (0, 1)
        for metric in METRICS
        for draw in range(3)
    ]
    every = result_columns(drawn, StatsOptions())
    assert every["label"].num_chunks == 2400 * 2 * 6 // 100
    assert every["label"].to_pylist()[3 * 12 : 4 * 12] == frame["label"].tolist()[:12]


def test_no_trial_gives_an_empty_table(sweep: Sweep) -> None:
    columns = result_columns(sweep, StatsOptions(), np.array([], dtype=np.int64))
    assert schema.validate("results", columns, "patch").num_rows == 0


def test_nan_stays_nan_and_what_is_undefined_is_null(sweep: Sweep) -> None:
    values, status = sweep.values[:1].copy(), np.zeros((1, 64), dtype=np.int8)
    values[0, 0] = np.nan
    small = replace(sweep, specs=sweep.specs[:1], values=values, status=status)
    streams = {
        "corrupt": np.zeros((64, 1, 2)),
        "clean": np.where(np.arange(64) == 1, 0.0, 1.0)[:, None, None] + np.zeros(2),
    }
    table = schema.validate("results", result_columns(replace(small, streams=streams), StatsOptions()), "patch")
    rows = table.to_pylist()
    assert (rows[0]["status"], math.isnan(rows[0]["normalized"])) == ("nan", True)
    assert (rows[2]["status"], rows[2]["normalized"]) == ("undefined", None)
    assert (rows[4]["status"], rows[4]["normalized"]) == ("ok", values[0, 2, 0, 0])
    alone = schema.validate("results", result_columns(replace(small, other=None), StatsOptions()), "patch")
    assert alone["normalized"].null_count == 128
    assert math.isnan(alone["value"][0].as_py())
