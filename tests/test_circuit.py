"""A `circuit` run: its tables from what each prompt gave, its options, going on after a stop, and the dry run."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechinterp_cli.engine.edge_patching import EdgePatching
from mechinterp_cli.errors import RunError
from mechinterp_cli.methods.circuit import engines, evaluating
from mechinterp_cli.methods.resume import resume_experiment
from mechinterp_cli.methods.run import dry_run, run_experiment
from mechinterp_cli.report.cells import number
from mechinterp_cli.runs.outcome import SilentProgress
from tests.experiments import Run, config_of, run_method

SIZES = [0.05, 0.3, 1.0]
SMALL: dict[str, Any] = {
    "scores": ["eap", "random"],
    "sizes": SIZES,
    "random": {"draws": 2},
    "tests": {"size": 0.3, "edges": 3, "inflated": 4, "subsets": 2, "permutations": 99},
    "stability": {"size": 0.3, "draws": 5},
}
BARE: dict[str, Any] = {"random": {"draws": 0}, "tests": None, "stability": None, "files": False}
TASK = {"name": "induction", "n": 10, "block": 6, "prefix": 2}
TABLES = ("edges", "members", "faithfulness", "evaluations", "quality", "tests", "minimality", "stability", "summary")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_method(tmp_path_factory.mktemp("small"), "circuit", SMALL, task=TASK, metrics=["logit_diff", "kl"])


def bare(folder: Path, section: dict[str, Any], **sections: Any) -> Run:
    folder.mkdir(exist_ok=True)
    return run_method(folder, "circuit", BARE | {"sizes": [0.1, 1.0]} | section, **({"task": TASK} | sections))


# --- tables


def test_training_and_evaluation_prompts_are_disjoint_and_each_is_used_for_its_own(small: Run) -> None:
    task = small.manifest["task"]
    assert not set(task["train"]) & set(task["evaluate"])
    assert sorted([*task["train"], *task["evaluate"]]) == list(range(10))
    assert set(small.table("evaluations")["prompt"]) == set(task["evaluate"])
    assert set(small.table("summary")["n"]) == {len(task["train"])}


def test_faithfulness_and_areas_are_of_the_evaluations(small: Run) -> None:
    evaluate = small.manifest["task"]["evaluate"]
    keys = ["score", "rank", "size", "metric"]
    values = small.table("evaluations").groupby(keys)["value"].mean()
    rows = small.table("faithfulness").set_index(keys)
    for metric in ("logit_diff", "kl"):
        full, empty = (float(small.baseline(stream, metric)[evaluate].mean()) for stream in ("clean", "corrupt"))
        for key in [key for key in rows.index if key[-1] == metric]:
            row = rows.loc[key]
            assert (row["value"], row["full"], row["empty"]) == pytest.approx((values[key], full, empty), abs=1e-9)
            assert row["faithfulness"] == pytest.approx((values[key] - empty) / (full - empty), abs=1e-9)
            assert row["ci_low"] - 1e-9 <= row["faithfulness"] <= row["ci_high"] + 1e-9
    quality = small.table("quality").set_index(["score", "rank", "metric", "measure"])["value"]
    for rank in ("signed", "absolute"):
        f = [number(rows.loc[("eap", rank, size, "logit_diff"), "faithfulness"]) for size in SIZES]
        assert quality["eap", rank, "logit_diff", "cpr"] == pytest.approx(np.trapezoid(f, SIZES))
        assert quality["eap", rank, "logit_diff", "cmd"] == pytest.approx(np.trapezoid(np.abs(1 - np.array(f)), SIZES))
        assert f[-1] == pytest.approx(1, abs=1e-5)


def test_members_are_the_best_of_the_edges_table(small: Run) -> None:
    edges, members = small.table("edges"), small.table("members")
    for rank in ("signed", "absolute"):
        order = edges[edges["score"] == "eap"].sort_values(rank)
        strengths = order["value"].abs() if rank == "absolute" else order["value"]
        assert (strengths.diff().dropna() <= 1e-12).all()
        for size in SIZES:
            best = set(order["edge"].head(int(size * len(order))))
            own = members[(members["score"] == "eap") & (members["rank"] == rank) & (members["size"] <= size)]
            assert set(own["edge"]) <= best
            counted = small.table("faithfulness").set_index(["score", "rank", "size", "metric"])
            assert counted.loc[("eap", rank, size, "logit_diff"), "kept"] == len(own)


def test_a_node_is_the_sum_of_the_edges_that_leave_it(small: Run) -> None:
    edges = small.table("edges")
    sums = edges[edges["score"] == "eap"].groupby("source")["value"].sum()
    nodes = small.table("summary").set_index("label")["effect"]
    # Noise: patching an edge that helps lowers the metric.
    assert nodes["z, layer 1, head 2"] == pytest.approx(-sums["a1.h2"], rel=1e-5)
    assert nodes["mlp_out, layer 0"] == pytest.approx(-sums["m0"], rel=1e-5)


def test_an_edge_taken_out_is_measured_by_running_the_circuit_without_it(small: Run) -> None:
    rows = small.table("minimality")
    logits = rows[rows["metric"] == "logit_diff"]
    assert len(logits) == 3
    ends = small.table("faithfulness").iloc[0]
    lost = (logits["value"] - logits["without"]) / (ends["full"] - ends["empty"])
    assert logits["effect"].tolist() == pytest.approx(lost.tolist(), abs=1e-9)
    tests = small.table("tests")
    assert set(tests["test"]) == {"equivalence", "independence", "minimality"}
    assert set(tests["verdict"]) <= {"yes", "no", "inconclusive"}


def test_the_whole_and_nothing_are_the_native_streams(small: Run) -> None:
    (part,) = small.manifest["engine"]["parts"]
    assert max(part["ends_deviation"].values()) <= 1e-3
    assert part["residual_sum"] <= 1e-4


# --- options


@pytest.mark.parametrize("name", ["eap", "eap_ig_inputs"])
def test_denoising_scores_have_the_sign_of_noising_ones(tmp_path: Path, name: str) -> None:
    scores = []
    for direction in ("noise", "denoise"):
        edges = bare(tmp_path / direction, {"scores": [name], "direction": direction}).table("edges")
        scores.append(edges["value"].to_numpy())
    strongest = np.argsort(-np.abs(scores[0]))[:5]
    assert (np.sign(scores[0][strongest]) == np.sign(scores[1][strongest])).all()


def test_nodes_keep_the_edges_among_them(tmp_path: Path) -> None:
    run = bare(tmp_path, {"scores": ["eap"], "granularity": "nodes", "sizes": [0.5, 1.0]})
    rows = run.table("faithfulness").set_index(["rank", "size"])
    assert rows.loc[("signed", 0.5), "asked"] == 5
    assert number(rows.loc[("signed", 0.5), "nodes"]) <= 5
    assert rows.loc[("signed", 1.0), "faithfulness"] == pytest.approx(1, abs=1e-5)


def test_greedy_circuits_lead_to_the_logits(tmp_path: Path) -> None:
    members = bare(tmp_path, {"scores": ["eap"], "select": "greedy"}).table("members")
    own = members[(members["rank"] == "signed") & (members["size"] == 0.1)]
    assert "logits" in set(own["target"])


def test_edges_are_told_apart_by_spans_and_sum_to_those_that_are_not(tmp_path: Path) -> None:
    whole = bare(tmp_path / "whole", {"scores": ["eap"]}).table("edges")
    parts = bare(tmp_path / "parts", {"scores": ["eap"], "spans": ["copied", "end"]}).table("edges")
    assert set(parts["span"]) == {"copied", "end", "rest"}
    assert len(parts) == 3 * len(whole)
    sums = parts.groupby(["source", "target"])["value"].sum()
    own = whole.set_index(["source", "target"])["value"]
    assert (sums - own).abs().max() <= 1e-5 * own.abs().max()
    rows = pd.concat([parts[parts["span"] == "end"]])
    assert rows["value"].abs().max() > 0


def test_a_circuit_of_heads_has_all_edges_among_them(tmp_path: Path) -> None:
    run = bare(tmp_path, {"scores": ["random"], "given": {"heads": ["0.1", "1.2"]}})
    members = run.table("members")
    own = members[members["score"] == "given"]
    names = set(own["source"]) | {".".join(name.split(".")[:2]) for name in own["target"]}
    assert names == {"embed", "a0.h1", "a1.h2", "logits"}
    # embed into q, k, v of both heads and the logits; 0.1 into q, k, v of 1.2 and the logits; 1.2 into the logits.
    assert len(own) == 3 + 3 + 1 + 3 + 1 + 1


# --- going on


def broken(*_arguments: Any, **_options: Any) -> Any:
    raise RunError("stopped", "go on")


def test_what_is_saved_is_not_computed_again_and_the_tables_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluating, "PIECE", 4)  # what is run together decides the last bits
    section = SMALL | {"tests": None}
    whole = run_method(tmp_path, "circuit", section, task=TASK)
    loaded = config_of(tmp_path, section, method="circuit", task=TASK)
    with monkeypatch.context() as patch, pytest.raises(RunError):
        calls = iter(range(2))
        run = EdgePatching.run

        def twice(*arguments: Any, **options: Any) -> Any:
            return run(*arguments, **options) if next(calls, None) is not None else broken()

        patch.setattr(EdgePatching, "run", twice)
        run_experiment(loaded, out=tmp_path / "stopped", progress=SilentProgress())
    (path,) = (tmp_path / "stopped").iterdir()
    units = sorted(unit.stem for unit in (path / "units").iterdir())
    assert units == ["circuits-000", "circuits-001", "score-eap-000"]
    monkeypatch.setattr(engines, "edge_scores", broken)  # would stop the run, were it asked again
    resume_experiment(path, progress=SilentProgress())
    for name in (name for name in TABLES if name not in ("tests", "minimality")):
        assert (path / f"{name}.parquet").read_bytes() == (whole.path / f"{name}.parquet").read_bytes(), name


def test_the_dry_run_tells_edges_passes_and_circuits(tmp_path: Path) -> None:
    plan = dry_run(config_of(tmp_path, SMALL, method="circuit", task=TASK))
    assert (plan["nodes"], plan["edges"]) == (12, 110)
    assert plan["passes"] == {"eap": 4, "random": 0}
    assert plan["trials"] == 2 * 2 * 3 + 2 * 3 + 2 + 3 + 2 * 4 + 2 * 2
    assert (plan["train"], plan["evaluate"]) == (5, 5)
    assert plan["flops"] > 0
