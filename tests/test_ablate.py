"""An `ablate` run: its tables from its results, draws, seeds, several values at once, and the commands on it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from mechinterp_cli.cli.main import main
from mechinterp_cli.runs.store import UnitStore
from tests.experiments import Run, config_of, run_method

HEADS: dict[str, Any] = {"units": [{"kind": "head"}]}
TEXT = {"name": "repeats", "n": 8, "block": 6, "repeats": 2}
CUMULATIVE: dict[str, Any] = {"ranking": ["1.2", "0.3", "1.3"], "k": [1, 2, 3], "random": 4}
DESIGNS: dict[str, dict[str, Any]] = {
    "cumulative": {"cumulative": CUMULATIVE},
    "keep": {"sets": {"one": ["1.2"], "two": ["1.2", "0.3"]}},
    "pairs": {"pairs": [["1.2", "0.3"], ["1.0", "0.0"]]},
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


def ablate(folder: Path, section: Mapping[str, Any], **sections: Any) -> Run:
    folder.mkdir(exist_ok=True)
    return run_method(folder, "ablate", HEADS | dict(section), **sections)


def means(run: Run, column: str = "effect") -> pd.Series:
    """By trial and metric: the mean over prompts of the mean over draws."""
    rows = run.table("results")
    return rows.groupby(["trial", "metric", "prompt"])[column].mean().groupby(["trial", "metric"]).mean()


def trials(run: Run, **where: Any) -> list[int]:
    """Numbers of the trials that have these values in these columns (None: null)."""
    rows = run.table("results")
    for name, value in where.items():
        rows = rows[rows[name].isna() if value is None else (rows[name] == value).fillna(False)]
    return sorted({int(trial) for trial in rows["trial"]})


# --- tables from results


@pytest.mark.parametrize("value", ["zero", "resample"])
def test_the_curve_is_of_the_results(tmp_path: Path, value: str) -> None:
    run = ablate(tmp_path, {"design": "cumulative", "values": [value], **DESIGNS["cumulative"]}, task=TEXT)
    found, curve = means(run), run.table("curve")
    base = run.table("baselines").groupby("metric")["value"].mean()
    assert len(curve) == 3 * 3
    for _, row in curve.iterrows():
        (own,) = trials(run, k=row["k"], ranking=None)
        random = [found[trial, row["metric"]] for trial in trials(run, k=row["k"]) if trial != own]
        assert row["effect"] == pytest.approx(found[own, row["metric"]], abs=1e-9)
        assert row["baseline"] == pytest.approx(base[row["metric"]], abs=1e-9)
        assert row["draws"] == len(random) > 0
        assert row["random_effect"] == pytest.approx(np.mean(random), abs=1e-9)
        assert (row["random_low"], row["random_high"]) == pytest.approx(np.percentile(random, [2.5, 97.5]), abs=1e-9)
        assert row["difference"] == pytest.approx(row["effect"] - row["random_effect"], abs=1e-9)
        assert row["ci_low"] <= row["effect"] <= row["ci_high"]
        assert row["units"] == "+".join(CUMULATIVE["ranking"][: row["k"]])
        assert row["n"] == 8


def test_circuits_are_of_the_results(tmp_path: Path) -> None:
    run = ablate(tmp_path, {"design": "keep", "values": ["zero"], **DESIGNS["keep"]})
    value = means(run, "value").xs("logit_diff", level="metric")
    full = float(run.baseline("clean", "logit_diff").mean())
    (nothing,) = (value[t] for t in trials(run, design="everything"))
    for _, row in run.table("circuits").iterrows():
        (alone,) = (value[t] for t in trials(run, design="keep", set=row["set"]))
        (without,) = (value[t] for t in trials(run, design="set", set=row["set"]))
        wanted = (full, nothing, alone, without)
        assert (row["full"], row["empty"], row["alone"], row["without"]) == pytest.approx(wanted, abs=1e-9)
        assert row["faithfulness"] == pytest.approx((alone - nothing) / (full - nothing), abs=1e-9)
        assert row["completeness"] == pytest.approx((full - without) / (full - nothing), abs=1e-9)
        assert row["size"] == len(DESIGNS["keep"]["sets"][row["set"]])


def test_interactions_are_of_the_results(tmp_path: Path) -> None:
    run = ablate(tmp_path, {"design": "pairs", "values": ["mean"], **DESIGNS["pairs"]})
    effect = means(run).droplevel("metric")
    of = {
        str(label).split(",")[0]: effect[trial] for trial, label in run.table("summary")[["trial", "label"]].to_numpy()
    }
    table = run.table("interactions")
    assert [[row["a"], row["b"]] for _, row in table.iterrows()] == DESIGNS["pairs"]["pairs"]
    for _, row in table.iterrows():
        a, b, joint = of[row["a"]], of[row["b"]], of[f"{row['a']}+{row['b']}"]
        assert (row["effect_a"], row["effect_b"], row["joint"]) == pytest.approx((a, b, joint), abs=1e-9)
        assert row["interaction"] == pytest.approx(joint - a - b, abs=1e-9)


def groups(sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    names = [name for name, size in sizes.items() for _ in range(size)]
    texts = [f"k{i} k{i + 20} k{i + 40} k{i}" for i in range(len(names))]
    answers = [(f"k{i + 20}", f"k{i + 40}") for i in range(len(names))]
    return [
        {"clean": text, "answer": right, "wrong_answer": wrong, "group": name}
        for text, (right, wrong), name in zip(texts, answers, names, strict=True)
    ]


def test_contrasts_are_differences_of_group_means(tmp_path: Path) -> None:
    task = {"prompts": groups({"a": 4, "b": 3, "lonely": 1})}
    run = ablate(tmp_path, {"values": ["zero"]}, task=task, metrics=["logit_diff"])
    rows = run.table("results").groupby(["trial", "group"])["effect"].mean()
    table = run.table("contrasts")
    assert set(table["group_a"]) == {"a"}
    assert set(table["group_b"]) == {"b"}
    assert len(table) == 8
    for _, row in table.iterrows():
        a, b = rows[row["trial"], "a"], rows[row["trial"], "b"]
        assert (row["effect_a"], row["effect_b"]) == pytest.approx((a, b), abs=1e-9)
        assert row["difference"] == pytest.approx(a - b, abs=1e-9)
        assert (row["n_a"], row["n_b"]) == (4, 3)
    assert any("group lonely has a single prompt" in warning for warning in run.manifest["warnings"])


def test_words_are_there_once_unedited_and_for_every_strong_ablation(tmp_path: Path) -> None:
    section = {"values": ["zero", "resample", "optimal"], "optimal": {"steps": 2}, "generate": 3, "generate_prompts": 2}
    run = ablate(tmp_path, section, task=TEXT)
    words = run.table("words")
    plain = words[words["trial"].isna()]
    assert plain["prompt"].tolist() == [0, 1]
    assert set(words["ablation"].dropna()) == {"zero", "resample", "optimal"}
    assert {len(ids) for ids in words["token_ids"]} == {3}
    labels = run.table("summary").drop_duplicates("trial").set_index("trial")["label"]
    named = words.dropna(subset=["trial"])
    assert [labels[trial] for trial in named["trial"]] == named["label"].tolist()


# --- draws, seeds, several values


def test_draws_are_in_the_results_and_their_spread_is_seen(tmp_path: Path) -> None:
    section = {"values": ["zero", "resample", "noise"], "resample": {"draws": 3}, "noise": {"draws": 2}}
    rows = ablate(tmp_path, section, task=TEXT, metrics=["loss"]).table("results")
    draws = {value: set(part["draw"].dropna()) for value, part in rows.groupby("ablation")}
    assert draws == {"zero": set(), "resample": {0, 1, 2}, "noise": {0, 1}}
    spread = rows.dropna(subset=["draw"]).groupby(["ablation", "trial", "prompt"])["value"].std()
    assert (spread.groupby("ablation").max() > 1e-3).all()


def test_prompts_that_constants_are_fitted_on_are_not_measured(tmp_path: Path) -> None:
    section = {"values": ["zero", "optimal"], "optimal": {"steps": 2, "share": 0.25}}
    rows = ablate(tmp_path, section, task=TEXT).table("results")
    measured = {value: set(part["prompt"]) for value, part in rows.groupby("ablation")}
    assert measured["zero"] == set(range(8))
    assert len(measured["optimal"]) == 6


# --- fitted constants


FIT: dict[str, Any] = {"values": ["zero", "optimal"], "optimal": {"steps": 12, "share": 0.5}}


def fits(run: Run) -> pd.DataFrame:
    """One row per fitted trial."""
    columns = ["fit_mean", "fit_zero", "fit_loss", "fit_prompts"]
    return run.table("trials").groupby("trial")[columns].first().dropna(how="all")


def test_trials_say_what_their_fit_came_to(tmp_path: Path) -> None:
    run = ablate(tmp_path, FIT, task=TEXT, metrics=["loss"])
    found = fits(run)
    assert found.index.tolist() == trials(run, ablation="optimal")
    assert (found["fit_loss"] <= found[["fit_mean", "fit_zero"]].min(axis=1)).all()
    assert (found["fit_loss"] < found["fit_mean"]).any()
    assert set(found["fit_prompts"]) == {4}
    # With zeros in place, on the prompts that are fitted on: those that `optimal` does not measure.
    rows = run.table("results")
    optimal = set(rows[rows["ablation"] == "optimal"]["prompt"])
    zero = rows[(rows["ablation"] == "zero") & ~rows["prompt"].isin(optimal)].groupby("trial")["value"].mean()
    assert found["fit_zero"].to_numpy(dtype=float) == pytest.approx(zero.to_numpy(dtype=float), abs=1e-5)
    assert not [warning for warning in run.manifest["warnings"] if "nothing better" in warning]


def test_fits_that_found_nothing_better_are_counted(tmp_path: Path) -> None:
    far = {"values": ["optimal"], "optimal": {"steps": 2, "rate": 1000.0}}
    run = ablate(tmp_path, far, task=TEXT, metrics=["loss"])
    found = fits(run)
    kept = int((found["fit_loss"] >= found[["fit_mean", "fit_zero"]].min(axis=1)).sum())
    assert kept > 0
    told = f"{kept} of 8 fits found nothing better than the mean or zero (trials: fit_loss)"
    assert told in run.manifest["warnings"]


def test_keeping_everything_needs_no_constant(tmp_path: Path) -> None:
    every = [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    sets = {"all": every, "one": ["1.2"]}
    run = ablate(tmp_path, {"values": ["optimal"], "design": "keep", "sets": sets, "optimal": {"steps": 2}})
    circuits = run.table("circuits").set_index("set")
    assert circuits.loc["all", "faithfulness"] == 1.0
    assert circuits.loc["one", "faithfulness"] != 1.0
    rows = run.table("results")
    assert set(rows[(rows["design"] == "keep") & (rows["set"] == "all")]["effect"].dropna()) == {0.0}
    assert len(fits(run)) == 4


def test_long_fits_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"values": ["optimal"], "optimal": {"steps": 2}}

    def told(name: str) -> list[str]:
        run = ablate(tmp_path / name, quick, task=TEXT, metrics=["loss"])
        return [warning for warning in run.manifest["warnings"] if "fits of" in warning]

    assert told("short") == []
    monkeypatch.setattr("mechinterp_cli.methods.ablate.optimal.LONG_SECONDS", 0)
    monkeypatch.setattr("mechinterp_cli.methods.ablate.optimal.matmul_rate", lambda device: 1e5)
    (warning,) = told("long")
    assert warning.startswith("8 fits of 2 steps each, one after the other, take about ")
    assert warning.endswith("minutes or more; fewer units or a smaller ablate.optimal.steps take less")


def data(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.path.glob("*.parquet"))}


@pytest.mark.parametrize("value", ["resample", "noise", "optimal"])
def test_the_seed_decides(tmp_path: Path, value: str) -> None:
    def once(seed: int, name: str) -> Run:
        extra = {"steps": 2} if value == "optimal" else {"draws": 2}
        return ablate(tmp_path / name, {"values": [value], value: {"seed": seed, **extra}}, task=TEXT)

    first, again, other = once(0, "a"), once(0, "b"), once(1, "c")
    assert data(first) == data(again)
    assert data(first)["results.parquet"] != data(other)["results.parquet"]
    assert first.manifest["seeds"][f"ablate.{value}"] == 0


def test_several_values_are_as_many_runs(tmp_path: Path) -> None:
    values = ("zero", "mean", "resample")
    section = {"design": "cumulative", **DESIGNS["cumulative"]}
    joint = ablate(tmp_path / "all", section | {"values": list(values)}, task=TEXT)
    for value in values:
        single = ablate(tmp_path / value, section | {"values": [value]}, task=TEXT)
        for name in ("results", "summary", "curve", "positions"):
            wanted = single.table(name)
            found = joint.table(name)
            found = found[found["ablation"] == value].reset_index(drop=True)
            if name == "positions":
                found, wanted = found.drop(columns="trial"), wanted.drop(columns="trial")
            elif name != "curve":
                found["trial"] -= found["trial"].min()
            pd.testing.assert_frame_equal(found, wanted)


def test_checkpoints(tmp_path: Path) -> None:
    steps = ["step600", "step1500"]
    run = ablate(tmp_path, {"values": ["zero"]}, model={"id": "toy-induction", "checkpoints": steps}, task=TEXT)
    summary = run.table("summary")
    assert list(dict.fromkeys(summary["checkpoint"])) == steps
    alone = ablate(tmp_path / "alone", {"values": ["zero"]}, task=TEXT).table("summary")
    last = summary[summary["checkpoint"] == "step1500"]
    assert last["effect"].to_numpy() == pytest.approx(alone["effect"].to_numpy(), abs=1e-9)


# --- commands

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in a folder with a config; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    section = HEADS | {"values": ["zero", "resample"], "design": "cumulative", "generate": 2, **DESIGNS["cumulative"]}
    config_of(tmp_path, section, method="ablate", task=TEXT)

    def run_main(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(arguments))
        return code, *capfd.readouterr()

    return run_main


def test_stdout_is_the_path_and_verify_show_and_reproduce_agree(call: Call) -> None:
    code, out, err = call("ablate", "experiment.yaml")
    assert (code, Path(out.removesuffix("\n")).is_dir()) == (0, True)
    assert "proved: executor packed" in err
    assert call("verify", out.strip())[0] == 0
    code, again, view = call("show", out.strip())
    assert (code, again) == (0, out)
    assert len(view.splitlines()) > 10
    assert view.splitlines() == err.splitlines()[-len(view.splitlines()) :]
    code, _, told = call("reproduce", out.strip(), "--out", "again", "--exact")
    assert code == 0
    assert "same bytes" in told.splitlines()[-1]


def test_json_a_dry_run_and_formats(call: Call) -> None:
    code, out, err = call("ablate", "experiment.yaml", "--dry-run")
    plan = json.loads(out)
    assert (code, err, Path("runs").exists()) == (0, "", False)
    assert (plan["design"], plan["units"]) == ("cumulative", 8)
    assert not any("fit" in value for value in plan["values"].values())
    fitted = (
        "--set",
        "ablate.values=[optimal]",
        "--set",
        "ablate.optimal.steps=7",
        "--set",
        "ablate.optimal.share=.25",
    )
    planned = json.loads(call("ablate", "experiment.yaml", "--dry-run", *fitted)[1])["values"]["optimal"]
    fit = planned["fit"]
    assert (fit["fits"], fit["steps"], fit["prompts"]) == (planned["trials"], 7, 2)
    assert fit["flops"] > 0
    assert fit["seconds"] >= 0
    code, out, err = call("ablate", "experiment.yaml", "--json", "--quiet", "--set", "output.formats=[parquet,csv]")
    assert (code, err) == (0, "")
    run = Path(json.loads(out)["run"])
    trials = len(pd.read_parquet(run / "results.parquet")["trial"].unique())
    assert sum(value["trials"] for value in plan["values"].values()) == trials
    assert (run / "curve.csv").exists()
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["ablate"]["design"] == "cumulative"


def test_going_on_after_a_stop_gives_the_same_bytes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("ablate", "experiment.yaml", "--out", "whole", "--quiet")[0] == 0
    real = UnitStore.write
    saved: list[str] = []

    def write(self: UnitStore, unit: str, table: object) -> object:
        if len(saved) == 1:
            monkeypatch.setattr(UnitStore, "write", real)
            raise KeyboardInterrupt
        saved.append(unit)
        return real(self, unit, table)

    monkeypatch.setattr(UnitStore, "write", write)
    assert call("ablate", "experiment.yaml", "--quiet")[0] == 130
    assert saved == [unit for unit in saved if unit.startswith("zero-")]
    (run,), (whole,) = Path("runs").iterdir(), Path("whole").iterdir()
    assert call("resume", str(run), "--quiet")[0] == 0
    wanted = {path.name: path.read_bytes() for path in whole.glob("*.parquet")}
    assert {path.name: path.read_bytes() for path in run.glob("*.parquet")} == wanted
