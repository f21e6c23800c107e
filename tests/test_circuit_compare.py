"""The heads of a circuit beside `patch` and `ablate`, joined by `compare`."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechinterp_cli.runs.compare import Comparison, compare
from mechinterp_cli.runs.sides import differing, read_side
from tests.experiments import Run, run_method

TASK = {"name": "induction", "n": 8, "block": 6, "prefix": 2}
SECTION: dict[str, Any] = {"scores": ["eap"], "sizes": [0.1, 1.0], "split": None, "files": False}
SECTION |= {"random": {"draws": 0}, "tests": None, "stability": None}
HEADS = [f"z, layer {layer}, head {head}" for layer in range(2) for head in range(4)]


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_method(tmp_path_factory.mktemp("circuit"), "circuit", SECTION, task=TASK)


def common(found: Comparison) -> pd.DataFrame:
    """Rows of heads that both runs have."""
    rows = found.rows
    return rows[~rows["state"].isin(["only_a", "only_b"]) & (rows["site"] == "z")]


def test_heads_stand_beside_those_of_patch(circuit: Run, tmp_path: Path) -> None:
    sites = [{"kind": "z", "layers": "all", "heads": "each", "positions": "all"}]
    patched = run_method(tmp_path, "patch", {"direction": "noise", "sites": sites}, task=TASK)
    found = compare(read_side(circuit.path), read_side(patched.path))
    rows = common(found).set_index("label")
    assert set(rows.index) == set(HEADS)
    assert set(rows["estimator"]) == {"eap"}
    estimates = circuit.table("summary").set_index("label")["normalized"]
    rows_b = patched.table("summary")
    measured = rows_b[rows_b["aggregate"] == "ratio_of_means"].set_index("label")["normalized"]
    for label in HEADS:
        assert rows.loc[label, "a"] == pytest.approx(estimates[label])
        assert rows.loc[label, "b"] == pytest.approx(measured[label])


def test_heads_stand_beside_those_of_ablate(circuit: Run, tmp_path: Path) -> None:
    ablated = run_method(
        tmp_path, "ablate", {"units": [{"kind": "head"}, {"kind": "mlp"}], "values": ["zero"]}, task=TASK
    )
    for a, b in ((circuit, ablated), (ablated, circuit)):
        found = compare(read_side(a.path), read_side(b.path))
        assert len(common(found)) == 8
        mlps = found.rows[(found.rows["site"] == "mlp_out") & ~found.rows["state"].isin(["only_a", "only_b"])]
        assert len(mlps) == 2
    # Two runs of ablate keep their own words.
    same = compare(read_side(ablated.path), read_side(ablated.path))
    assert set(same.rows["site"]) == {"head", "mlp"}


def test_every_ablation_of_a_run_stands_beside_every_score(circuit: Run, tmp_path: Path) -> None:
    section = {"units": [{"kind": "head"}], "values": ["zero", "mean"]}
    ablated = run_method(tmp_path, "ablate", section, task=TASK)
    summary = ablated.table("summary")
    measured = summary[summary["aggregate"] == "ratio_of_means"].set_index("label")["normalized"]
    for a, b, side in ((circuit, ablated, "b"), (ablated, circuit, "a")):
        found = compare(read_side(a.path), read_side(b.path))
        rows = common(found)
        assert set(zip(rows["estimator"], rows["ablation"], strict=True)) == {("eap", "zero"), ("eap", "mean")}
        for ablation in ("zero", "mean"):
            values = rows[rows["ablation"] == ablation].set_index(["layer", "head"])[side]
            wanted = [measured[f"{layer}.{head}, {ablation}"] for layer in range(2) for head in range(4)]
            assert values.sort_index().tolist() == pytest.approx(wanted)
        assert {(row["site"], row["ablation"]) for row in found.agreement if row["common"]} == {
            ("z", "zero"), ("z", "mean"),
        }  # fmt: skip
        assert [change for change in differing(*(read_side(run.path) for run in (a, b))) if "method" in change] == []
