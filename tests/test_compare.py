"""Two runs compared: joined by place, worked out like scipy and pandas do, and refused where nothing can be said."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats

from mechinterp_cli.cli.main import main
from mechinterp_cli.errors import DifferenceError, UserError
from mechinterp_cli.runs.compare import CompareOptions, Comparison, compare, comparison_table
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.sides import differing, read_side
from tests.experiments import run_method, run_patch

RESID, Z, MLP = {"kind": "resid_pre"}, {"kind": "z", "positions": "all"}, {"kind": "mlp_out"}
TWO = ["logit_diff", "prob"]
ALONE = [
    {"clean": "k1 k2 k3 k4 k1 k2", "answer": "k3", "wrong_answer": "k4"},
    {"clean": "k5 k6 k7 k8 k5 k6", "answer": "k7", "wrong_answer": "k8"},
]
"""Prompts without a corruption: nothing normalises."""
RUNS: dict[str, dict[str, Any]] = {
    "base": {"method": {"sites": [RESID, Z]}, "metrics": TWO},
    "bfloat16": {
        "method": {"sites": [RESID, Z]},
        "metrics": TWO,
        "model": {"id": "toy-induction", "dtype": "bfloat16"},
    },
    "noise": {"method": {"sites": [RESID, Z], "direction": "noise"}, "metrics": TWO},
    "step600": {
        "method": {"sites": [RESID, Z]},
        "metrics": TWO,
        "model": {"id": "toy-induction", "revision": "step600"},
    },
    "more": {"method": {"sites": [MLP, Z, RESID]}, "metrics": ["prob"]},
    "mlp": {"method": {"sites": [MLP]}},
    "zero": {"method": {"sites": [Z], "source": "zero", "direction": "noise"}, "task": {"prompts": ALONE}},
    "windows": {"method": {"sites": [MLP | {"layers": {"window": w}, "positions": "all"} for w in (1, 3)]}},
    "keys": {"method": {"sites": [{"kind": "pattern", "positions": "last", "keys": [k]} for k in (0, 9)]}},
    "other keys": {"method": {"sites": [{"kind": "pattern", "positions": "last", "keys": [k]} for k in (9, 0)]}},
}
CAUSAL = {"causal": {"k": [1], "random": 3, "prompts": 2}}
STEPS = ["step600", "step1500"]
HEADS: dict[str, dict[str, Any]] = {
    "heads": {"section": {"scores": ["induction", "previous_token"]}},
    "heads step600": {
        "section": {"scores": ["previous_token", "induction", "k_composition"]} | CAUSAL,
        "model": {"id": "toy-induction", "revision": "step600"},
    },
    "heads along": {
        "section": {"scores": ["induction", "k_composition"]},
        "model": {"id": "toy-induction", "checkpoints": ["step0", *STEPS]},
    },
    "heads along, others": {
        "section": {"scores": ["induction", "k_composition"], "layers": [1]},
        "model": {"id": "toy-induction", "checkpoints": [*STEPS[::-1], "step50"]},
        "task": {"name": "repeats", "n": 3, "block": 7, "seed": 1},
    },
}
"""Runs of another method, which another table stands for."""
K = {"kind": "k", "positions": "all"}
ESTIMATORS = ["atp", "atp_star"]
ESTIMATES: dict[str, dict[str, Any]] = {
    "estimates": {"section": {"sites": [RESID, Z, K], "estimators": ESTIMATORS}, "metrics": TWO},
    "noise estimates": {
        "section": {
            "sites": [Z, K],
            "estimators": ["atp_star"],
            "direction": "noise",
            "verify": {"top": 0, "random": 8},
        }
    },
}
"""Runs of `attribute`, whose rows are estimates."""
Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Gives the run of a name; each is made once, when it is first asked for."""
    made: dict[str, Path] = {}

    def give(name: str) -> Path:
        if name in HEADS:
            made[name] = made.get(name) or run_method(tmp_path_factory.mktemp("run"), "heads", **HEADS[name]).path
        elif name in ESTIMATES:
            made[name] = (
                made.get(name) or run_method(tmp_path_factory.mktemp("run"), "attribute", **ESTIMATES[name]).path
            )
        elif name not in made:
            others = dict(RUNS[name])
            made[name] = run_patch(tmp_path_factory.mktemp("run"), others.pop("method"), **others).path
        return made[name]

    return give


def compared(a: Path, b: Path, **options: Any) -> Comparison:
    return compare(read_side(a), read_side(b), CompareOptions(**options))


def by_site(comparison: Comparison, metric: str = "logit_diff") -> dict[str, dict[str, Any]]:
    return {row["site"]: row for row in comparison.agreement if row["metric"] == metric}


def numbers(path: Path, metric: str, site: str, column: str = "normalized") -> pd.Series:
    """One column of the summary by label, read as a stranger would; rows that are 0 by causality left out."""
    rows = pd.read_parquet(path / "summary.parquet")
    rows = rows[(rows["metric"] == metric) & (rows["site"] == site) & (rows["group"] == "all")]
    rows = rows[rows["aggregate"].isin(["ratio_of_means", "mean"]) & (rows["status"] != "trivial")]
    return rows.set_index("label")[column]


def changed(run: Path, folder: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Path:
    """A copy of a run whose summary is another."""
    copy = folder / "changed"
    shutil.copytree(run, copy)
    table = pq.read_table(copy / "summary.parquet")
    frame = table.to_pandas(types_mapper=pd.ArrowDtype)
    pq.write_table(
        pa.Table.from_pandas(change(frame), preserve_index=False).cast(table.schema), copy / "summary.parquet"
    )
    return copy


def in_state(run: Path, folder: Path, status: Any) -> Path:
    copy = folder / str(status)
    shutil.copytree(run, copy)
    manifest = Manifest.read(copy)
    manifest.status = status
    manifest.write(copy)
    return copy


# --- what is found


def estimated(run: Path, estimator: str, site: str) -> pd.Series:
    """The estimates of logit_diff by label, rows that are 0 by causality left out."""
    rows = pd.read_parquet(run / "summary.parquet").query("group == 'all' and metric == 'logit_diff'")
    rows = rows[(rows["estimator"] == estimator) & (rows["site"] == site) & (rows["status"] != "trivial")]
    return rows.set_index("label")["normalized"]


@pytest.mark.parametrize("turned", [False, True])
def test_estimates_stand_beside_exact_effects_estimator_by_estimator(runs: Runs, turned: bool) -> None:
    paths = [runs("estimates"), runs("base")]
    found = compared(*(reversed(paths) if turned else paths), metrics=("logit_diff",))
    ours, theirs = ("b", "a") if turned else ("a", "b")
    assert {row["estimator"] for row in found.agreement} == set(ESTIMATORS)
    rows = {(row["estimator"], row["site"]): row for row in found.agreement}
    assert len(rows) == 6
    for estimator in ESTIMATORS:
        assert rows[estimator, "k"][f"only_{ours}"] > 0  # what was not patched has nothing beside it
        for site in ("resid_pre", "z"):
            row, estimates = rows[estimator, site], estimated(runs("estimates"), estimator, site)
            exact = numbers(runs("base"), "logit_diff", site).loc[estimates.index].astype(float)
            exact = exact.abs() if estimator == "atp_star" else exact
            assert row["compared"] == len(estimates) > 2
            assert row["pearson"] == pytest.approx(np.corrcoef(estimates.astype(float), exact)[0, 1], abs=1e-12)
            assert row["max_difference"] == pytest.approx(float((estimates - exact).abs().max()), abs=1e-12)
            assert (row["sign_agreement"] is None) == (estimator == "atp_star")
            mine = found.rows.query("estimator == @estimator and site == @site and state == 'compared'")
            assert dict(zip(mine["label"], mine[theirs], strict=True)) == pytest.approx(exact.to_dict())


def test_sizes_are_sizes_whichever_way_the_metric_goes(runs: Runs) -> None:
    rows = pd.read_parquet(runs("noise estimates") / "summary.parquet").query("status == 'ok'")
    baselines = pd.read_parquet(runs("noise estimates") / "baselines.parquet").groupby("stream")["value"].mean()
    assert baselines["corrupt"] < baselines["clean"]
    sizes, signed = rows[rows["site"] == "z"], rows[rows["site"] == "k"]
    assert (sizes["normalized"] > 0).all()
    assert (sizes["estimate"] > 0).all()
    assert (sizes["ci_low"] <= sizes["ci_high"]).all()
    assert (np.sign(signed["normalized"]) == -np.sign(signed["estimate"])).all()
    observed = pd.read_parquet(runs("noise estimates") / "results.parquet").query("status == 'ok' and site == 'z'")
    assert (observed["normalized"] > 0).all()


def test_estimates_agree_with_themselves_and_are_told_apart(runs: Runs) -> None:
    found = compared(runs("estimates"), runs("estimates"))
    assert {row["estimator"] for row in found.agreement} == set(ESTIMATORS)
    assert not (found.rows["difference"].abs() > 0).any()
    assert set(found.rows["state"]) == {"compared", "trivial"}


def test_the_worst_row_says_whose_estimate_it_is(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = str(runs("estimates")), str(runs("base"))
    assert main(["compare", *paths, "--fail-above", "0.05", "--out", str(tmp_path / "out")]) == 3
    out, err = capfd.readouterr()
    assert out.split()[0] == "estimator"
    assert ", estimator atp" in err
    assert "estimator" in pq.read_table(tmp_path / "out" / "comparison.parquet").column_names


def test_a_run_with_itself(runs: Runs) -> None:
    found = compared(runs("base"), runs("base"))
    assert not differing(found.a, found.b)
    assert [(row["metric"], row["site"]) for row in found.agreement] == [
        (metric, site) for metric in TWO for site in ("resid_pre", "z")
    ]
    for row in found.agreement:
        assert (row["mean_difference"], row["max_difference"], row["only_a"], row["only_b"]) == (0, 0, 0, 0)
        assert row["pearson"] == pytest.approx(1, abs=1e-12)
        assert row["spearman"] == pytest.approx(1, abs=1e-12)
        assert row["sign_agreement"] == 1
        assert row["common"] == row["compared"] + row["trivial"]
    assert found.worst() == []
    found.check(0)


@pytest.mark.parametrize(("other", "moved"), [("bfloat16", "model.dtype"), ("step600", "model.revision")])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_numbers_are_those_of_scipy_and_pandas(runs: Runs, other: str, moved: str, site: str) -> None:
    found = compared(runs("base"), runs(other), top=3)
    assert any(change.startswith(f"{moved}: ") for change in differing(found.a, found.b))
    row = by_site(found, "prob")[site]
    a, b = numbers(runs("base"), "prob", site), numbers(runs(other), "prob", site)
    both = pd.DataFrame({"a": a, "b": b})
    assert both.notna().all(axis=None)
    assert row["compared"] == len(both)
    assert row["pearson"] == pytest.approx(scipy.stats.pearsonr(both["a"], both["b"]).statistic)
    assert row["spearman"] == pytest.approx(scipy.stats.spearmanr(both["a"], both["b"]).statistic)
    difference = (both["b"] - both["a"]).abs()
    assert row["mean_difference"] == pytest.approx(difference.mean())
    assert row["max_difference"] == pytest.approx(difference.max())
    assert row["max_at"] == difference.idxmax()
    strongest = [set(both[name].abs().nlargest(3).index) for name in "ab"]
    assert row["top_overlap"] == len(strongest[0] & strongest[1]) / len(strongest[0] | strongest[1])
    signed = both[(both.abs() > 0.02).all(axis=1)]
    assert (row["floor"], row["sign_rows"]) == (0.02, len(signed))
    assert row["sign_agreement"] == (np.sign(signed["a"]) == np.sign(signed["b"])).mean()


def test_denoise_against_noise(runs: Runs) -> None:
    found = compared(runs("base"), runs("noise"))
    assert differing(found.a, found.b) == ["method.direction: denoise -> noise"]
    row = by_site(found)["z"]
    a, b = (numbers(runs(name), "logit_diff", "z") for name in ("base", "noise"))
    assert row["pearson"] == pytest.approx(np.corrcoef(a, b[a.index])[0, 1])
    assert row["max_difference"] > 0.01


def test_one_run_has_more_sites_and_another_order(runs: Runs) -> None:
    found = compared(runs("base"), runs("more"))
    rows = {(row["metric"], row["site"]): row for row in found.agreement}
    assert set(rows) == {*((m, s) for m in TWO for s in ("resid_pre", "z")), ("prob", "mlp_out")}
    assert all(rows["prob", site]["max_difference"] < 1e-5 for site in ("resid_pre", "z"))
    only_b, only_a = rows["prob", "mlp_out"], rows["logit_diff", "z"]
    assert (only_b["common"], only_b["only_a"], only_b["only_b"]) == (0, 0, 22)
    assert (only_a["common"], only_a["only_a"], only_a["only_b"]) == (0, 8, 0)
    assert only_a["mean_difference"] is only_a["max_difference"] is only_a["pearson"] is None
    found.check(1e-5)


def test_trivial_rows_are_counted_and_do_not_make_runs_alike(runs: Runs) -> None:
    found = compared(runs("base"), runs("step600"))
    row = by_site(found)["resid_pre"]
    everything = found.rows[(found.rows["metric"] == "logit_diff") & (found.rows["site"] == "resid_pre")]
    assert row["trivial"] == (everything["state"] == "trivial").sum() > 0
    assert (everything[everything["state"] == "trivial"][["a", "b"]] == 0).all(axis=None)
    assert row["mean_difference"] > everything["difference"].abs().mean()


def test_without_a_normalised_effect_effects_are_compared(runs: Runs) -> None:
    found = by_site(compared(runs("base"), runs("zero")))
    assert (found["z"]["column"], found["z"]["common"], found["z"]["floor"]) == ("effect", 8, 0)
    a, b = (numbers(runs(name), "logit_diff", "z", "effect") for name in ("base", "zero"))
    assert found["z"]["mean_difference"] == pytest.approx((b - a).abs().mean())
    with pytest.raises(UserError, match="--column normalized: B has no normalised logit_diff"):
        compared(runs("base"), runs("zero"), column="normalized")


@pytest.mark.parametrize("column", ["value", "effect", "normalized"])
def test_the_column_can_be_chosen(runs: Runs, column: str) -> None:
    found = by_site(compared(runs("base"), runs("noise"), column=column))["z"]
    a, b = (numbers(runs(name), "logit_diff", "z", column) for name in ("base", "noise"))
    assert found["column"] == column
    assert found["mean_difference"] == pytest.approx((b - a).abs().mean())


def test_constant_and_few_rows_have_no_correlation(runs: Runs, tmp_path: Path) -> None:
    flat = changed(runs("base"), tmp_path, lambda f: f.assign(normalized=0.5))
    row = by_site(compared(runs("base"), flat))["z"]
    assert row["pearson"] is row["spearman"] is row["top_overlap"] is None
    assert row["undefined"] == "correlation: B constant; top: no more than the 10 largest, or ties"
    row = by_site(compared(runs("windows"), runs("windows")))["mlp_out"]
    assert row["pearson"] is not None
    few = changed(runs("windows"), tmp_path / "few", lambda f: f.head(2))
    assert by_site(compared(few, few))["mlp_out"]["undefined"].startswith("correlation: fewer than 3 rows; top")


# --- how rows are joined


def test_windows_about_one_layer_are_told_apart(runs: Runs) -> None:
    found = compared(runs("windows"), runs("windows"))
    rows = found.rows[found.rows["metric"] == "logit_diff"]
    assert not rows.duplicated(["layer", "label"]).any()
    assert rows.duplicated("layer").any()
    assert (rows["state"] == "compared").all()
    assert rows["a"].nunique() > 2
    assert by_site(found)["mlp_out"]["max_difference"] == 0


def test_what_no_label_tells_apart_is_joined_only_where_the_trials_are_the_same(runs: Runs) -> None:
    same = by_site(compared(runs("keys"), runs("keys")))["pattern"]
    assert (same["common"], same["max_difference"]) == (16, 0)
    with pytest.raises(UserError, match="two trials are both called 'pattern, layer 0, head 0, end'"):
        compared(runs("keys"), runs("other keys"))


def test_null_is_equal_to_null_and_the_order_of_rows_does_not_matter(runs: Runs, tmp_path: Path) -> None:
    found = compared(runs("base"), changed(runs("base"), tmp_path, lambda f: f.sample(frac=1, random_state=0)))
    heads = found.rows[found.rows["site"] == "z"]
    assert heads["position"].isna().all()
    assert set(found.rows["state"]) == {"compared", "trivial"}
    assert (found.rows["difference"] == 0).all()


# --- another table, and checkpoints


def scores(path: Path, score: str, checkpoint: str | None = None) -> pd.Series:
    """A score of every head, as a stranger would read it."""
    rows = pd.read_parquet(path / "scores.parquet")
    rows = rows[(rows["score"] == score) & (rows["checkpoint"].isna() | (rows["checkpoint"] == checkpoint))]
    return rows.set_index(["layer", "head"])["value"]


def test_heads_are_compared_by_their_scores(runs: Runs) -> None:
    a, b = runs("heads"), runs("heads step600")
    assert "summary.parquet" in {path.name for path in b.iterdir()} - {path.name for path in a.iterdir()}
    found = compared(a, b)
    assert [(row["metric"], row["site"]) for row in found.agreement] == [
        ("induction", "head"),
        ("previous_token", "head"),
        ("k_composition", "head"),
    ]
    assert "checkpoint" not in found.agreement[0]
    for row in found.agreement[:2]:
        before, now = (scores(path, row["metric"]) for path in (a, b))
        assert row["column"] == "value"
        assert (row["common"], row["compared"], row["only_a"], row["only_b"]) == (8, 8, 0, 0)
        assert row["mean_difference"] == pytest.approx((now - before).abs().mean())
        assert row["pearson"] == pytest.approx(np.corrcoef(before, now[before.index])[0, 1])
        place: Any = (now - before).abs().idxmax()
        assert row["max_at"] == "head {}.{}".format(*place)
    assert (found.agreement[2]["common"], found.agreement[2]["only_b"]) == (0, 8)
    assert {row["where"] for row in found.worst()} <= {f"head {layer}.{head}" for layer in (0, 1) for head in range(4)}


def test_a_run_of_heads_agrees_with_itself_and_what_is_undefined_is_no_number(runs: Runs) -> None:
    found = compared(runs("heads step600"), runs("heads step600"))
    assert found.ranked().empty
    composition = by_site(found, "k_composition")["head"]
    assert (composition["compared"], composition["no_number"]) == (4, 4)
    found.check(0)


@pytest.mark.parametrize("column", ["effect", "normalized"])
def test_scores_have_no_effect(runs: Runs, column: str) -> None:
    with pytest.raises(UserError, match=f"--column {column}: A and B have no .* induction"):
        compared(runs("heads"), runs("heads"), column=column)


def test_checkpoints_are_compared_with_those_of_the_same_name(runs: Runs) -> None:
    a, b = runs("heads along"), runs("heads along, others")
    found = compared(a, b)
    rows = {(row["checkpoint"], row["metric"]): row for row in found.agreement}
    assert set(rows) == {(step, score) for step in STEPS for score in ("induction", "k_composition")}
    for step in STEPS:
        before, now = (scores(path, "induction", step) for path in (a, b))
        difference = (now - before).dropna().abs()
        row = rows[step, "induction"]
        assert (row["common"], row["only_a"]) == (4, 4)
        assert row["max_difference"] == pytest.approx(difference.max())
        # Of one set of weights, composition is one.
        assert rows[step, "k_composition"]["max_difference"] == 0
    alone = found.rows[found.rows["state"].isin(["only_a", "only_b"])]
    assert {"step0", "step50"} <= set(alone["checkpoint"])
    assert all(", checkpoint step" in row["where"] for row in found.worst())


def test_what_differs_between_the_weights_of_checkpoints(runs: Runs, tmp_path: Path) -> None:
    a, b = runs("heads along"), runs("heads along, others")
    names = [change.split(":")[0] for change in differing(read_side(a), read_side(b))]
    assert names == ["model.checkpoints", "task.prompts", "task.sha256", "method.layers"]
    copy = tmp_path / "copy"
    shutil.copytree(a, copy)
    manifest = Manifest.read(copy)
    manifest.model["checkpoints"][1]["weight_files"] = {"step600.safetensors": "0" * 64}
    manifest.write(copy)
    (change,) = differing(read_side(a), read_side(copy))
    assert change.startswith("model.weight_files.step600.step600.safetensors: ")


def test_a_run_without_checkpoints_has_nothing_in_common_with_one_that_has(runs: Runs) -> None:
    with pytest.raises(
        UserError, match=r"A begins with \(metric induction, .*B with \(checkpoint step0, metric"
    ) as caught:
        compared(runs("heads"), runs("heads along"))
    assert "checkpoints" in caught.value.remedy


def test_patched_checkpoints_are_told_apart(tmp_path: Path) -> None:
    model = {"id": "toy-induction", "checkpoints": STEPS}
    path = run_patch(tmp_path, {"sites": [Z]}, model=model).path
    found = compared(path, path)
    assert [(row["checkpoint"], row["site"], row["common"]) for row in found.agreement] == [(s, "z", 8) for s in STEPS]
    first, second = (found.rows[found.rows["checkpoint"] == step]["a"].to_numpy() for step in STEPS)
    assert not np.allclose(first, second)


def test_heads_and_checkpoints_on_the_command_line(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = [str(runs("heads along")), str(runs("heads along, others"))]
    assert main(["compare", *pair, "--out", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert out.splitlines()[0].split()[:4] == ["checkpoint", "metric", "site", "column"]
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["step600", "step600", "step1500", "step1500"]
    # One line for one reason, however many rows it holds for.
    assert sum(line.startswith("undefined for ") for line in err.splitlines()) <= 3
    assert "undefined for step600, induction, head; " in err
    assert list(pd.read_csv(tmp_path / "agreement.csv")["checkpoint"]) == [STEPS[0], STEPS[0], STEPS[1], STEPS[1]]
    assert {"checkpoint", "layer", "head"} <= set(pd.read_csv(tmp_path / "comparison.csv"))


# --- the command


def test_result_on_stdout_the_rest_on_stderr(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs("base")), str(runs("bfloat16")), "--metric", "prob"]) == 0
    out, err = capfd.readouterr()
    assert [line.split()[:3] for line in out.splitlines()] == [
        ["metric", "site", "column"],
        ["prob", "resid_pre", "normalized"],
        ["prob", "z", "normalized"],
    ]
    assert err.startswith("not the same (A -> B): model.dtype: float32 -> bfloat16\n")
    assert "undefined for prob, resid_pre; prob, z: top: no more than the 10 largest, or ties\n" in err
    worst = err[err.index("the rows that differ most:\n") :].splitlines()[2:]
    sizes = [abs(float(line.split()[-1])) for line in worst]
    assert len(sizes) == 5
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) > 0


def test_json_has_null_where_nothing_is_defined(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs("base")), str(runs("base")), "--json", "--quiet", "--top", "3"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    rows = json.loads(out)
    assert [row["top_overlap"] for row in rows if row["site"] == "z"] == [1, 1]
    assert main(["compare", str(runs("base")), str(runs("base")), "--json", "--quiet"]) == 0
    rows = json.loads(capfd.readouterr()[0])
    assert [row["top_overlap"] for row in rows if row["site"] == "z"] == [None, None]


def test_fail_above_names_the_worst_row(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    pair = ["compare", str(runs("base")), str(runs("noise")), "--metric", "logit_diff", "--quiet"]
    found = compared(runs("base"), runs("noise"), metrics=("logit_diff",))
    (worst,) = found.worst(1)
    size = abs(worst["difference"])
    assert main([*pair, "--fail-above", str(size * 1.001)]) == 0
    assert main([*pair, "--fail-above", str(size * 0.999)]) == 3
    err = capfd.readouterr()[1].splitlines()
    assert err[0] == (
        f"error: logit_diff, {worst['where']}: normalized is {worst['a']:.6g} in A and {worst['b']:.6g} in B"
    )
    assert err[1].startswith("fix: 1 of ")


@pytest.mark.parametrize(("status", "word"), [("nan", "NaN"), ("undefined", "undefined")])
def test_a_number_that_is_gone_is_a_difference(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: str, word: str
) -> None:
    def lose(frame: pd.DataFrame) -> pd.DataFrame:
        row = frame.index[frame["site"] == "z"][0]
        frame.loc[row, ["normalized", "effect"]] = float("nan") if status == "nan" else None
        frame.loc[row, "status"] = status
        return frame

    copy = changed(runs("base"), tmp_path, lose)
    assert main(["compare", str(copy), str(copy), "--quiet", "--fail-above", "0"]) == 0
    assert main(["compare", str(runs("base")), str(copy), "--quiet", "--fail-above", "100"]) == 3
    assert f"in A and {word} in B" in capfd.readouterr()[1]
    found = compared(runs("base"), copy)
    assert by_site(found)["z"]["no_number"] == 1
    assert by_site(found)["z"]["pearson"] == pytest.approx(1)
    assert by_site(found)["resid_pre"]["no_number"] == 0


def test_files_of_a_comparison(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "a folder" / "é"
    assert main(["compare", str(runs("base")), str(runs("more")), "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "comparison.parquet",
        "comparison.csv",
        "agreement.csv",
        "scatter.png",
    }
    rows = pd.read_parquet(folder / "comparison.parquet", dtype_backend="pyarrow")
    assert set(rows["state"]) == {"compared", "trivial", "only_a", "only_b"}
    assert rows["a"].isna().sum() == (rows["state"] == "only_b").sum()
    assert len(pd.read_csv(folder / "comparison.csv")) == len(rows)
    agreement = pd.read_csv(folder / "agreement.csv").set_index(["metric", "site"])
    assert agreement.loc[("prob", "z"), "pearson"] == pytest.approx(1)
    assert agreement["pearson"].isna().tolist() == [True, True, False, False, True]
    picture = (folder / "scatter.png").read_bytes()
    assert struct.unpack(">II", picture[16:24]) > (600, 600)
    assert main(["compare", str(runs("base")), str(runs("base")), "--out", str(folder)]) == 0
    assert (folder / "scatter.png").read_bytes() != picture
    capfd.readouterr()


# --- what is refused


def test_a_nan_stays_a_nan_in_the_file(runs: Runs, tmp_path: Path) -> None:
    def lose(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[frame["site"] == "z", "normalized"] = float("nan")
        frame.loc[frame["site"] == "z", "status"] = "nan"
        return frame

    table = comparison_table(compared(runs("base"), changed(runs("base"), tmp_path, lose)))
    assert table["b"].null_count == 0
    assert np.isnan(table["b"].to_numpy()).sum() == 16


@pytest.mark.parametrize(
    ("status", "said"), [("interrupted", "interrupted"), ("failed", "failed"), ("running", "crashed")]
)
def test_runs_that_are_not_complete_are_refused(
    runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str], status: str, said: str
) -> None:
    copy = in_state(runs("base"), tmp_path, status)
    assert main(["compare", str(runs("base")), str(copy)]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert f"error: {copy}: the run is {said}; only complete runs are compared\nfix: " in err
    assert main(["compare", str(in_state(copy, tmp_path, "complete")), str(runs("base")), "--quiet"]) == 0


def test_nothing_in_common_names_both_keys(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs("base")), str(runs("mlp"))]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert "A begins with (metric logit_diff, site resid_pre, layer 0, position 0, template " in err
    assert "B with (metric logit_diff, site mlp_out, layer 0, position 0, template " in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", "kl"], "--metric: 'kl' is in neither run\nfix: There are logit_diff, prob."),
        (["--fail-above", "nan"], "--fail-above"),
        (["--fail-above", "inf"], "--fail-above: inf is not valid; allowed: a number from 0 up"),
        (["--fail-above", "-1"], "--fail-above"),
        (["--top", "0"], "--top"),
        (["--column", "p"], "--column"),
    ],
)
def test_bad_options(runs: Runs, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["compare", str(runs("base")), str(runs("base")), *arguments]) == 2
    assert message in capfd.readouterr()[1]


def test_what_is_no_run_is_refused(runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), str(runs("base"))]) == 2
    assert f"error: {tmp_path}: not a run directory" in capfd.readouterr()[1]
    copy = tmp_path / "copy"
    shutil.copytree(runs("base"), copy)
    (copy / "summary.parquet").write_bytes((copy / "summary.parquet").read_bytes()[:-20])
    assert main(["compare", str(copy), str(runs("base"))]) == 1
    assert "summary.parquet: missing or damaged" in capfd.readouterr()[1]


def test_a_run_without_the_table_says_how_to_get_it(runs: Runs, tmp_path: Path) -> None:
    path = run_patch(tmp_path, {"sites": [Z]}, output={"figures": [], "formats": ["csv"]}).path
    with pytest.raises(UserError, match=r"the run has no summary\.parquet"):
        read_side(path)


def test_check_refuses_what_is_no_limit(runs: Runs) -> None:
    found = compared(runs("base"), runs("noise"))
    for limit in (float("nan"), float("inf"), -1.0):
        with pytest.raises(UserError, match="allowed: a number from 0 up"):
            found.check(limit)
    with pytest.raises(DifferenceError):
        found.check(0)
