"""Projections are those of held-out samples, on the probe of the fold that did not see them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mechinterp_cli.methods.probe.options import ProbeName, ProbeOptions
from mechinterp_cli.methods.probe.projections import LINEAR, boundaries, projected
from mechinterp_cli.methods.probe.scoring import Problem, fit
from tests.experiments import run_method

OPTIONS = ProbeOptions(folds=4, penalties=(0.01, 1.0))
TASK = {"name": "induction_labels", "n": 6}
SITES = [{"kind": "resid_post", "layers": "all"}, {"kind": "z", "layers": [1], "heads": "each"}]


def problem(n: int = 80, d: int = 5) -> tuple[torch.Tensor, Problem]:
    """Two clouds that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=n)
    x = rng.normal(size=(n, d)) + np.outer(labels, [1.5, -1, 0, 0, 0]) + 3
    made = Problem.of(labels.tolist(), 2, [str(i) for i in range(n)], OPTIONS)
    return torch.from_numpy(x), made


@pytest.mark.parametrize("name", LINEAR)
def test_the_side_of_the_boundary_is_the_held_out_prediction(name: ProbeName) -> None:
    x, made = problem()
    outcome = fit(name, x, made, OPTIONS)
    along = projected(x, made, *boundaries(name, x, made, outcome.penalty or ()))
    assert ((along > 0) == outcome.held_out.bool()).all()
    assert 0.6 < float(((along > 0) == made.targets.bool()).double().mean()) < 1


def test_logistic_projections_are_scikit_learns_decisions_over_their_spread_in_training() -> None:
    x, made = problem()
    penalty = fit("logistic", x, made, OPTIONS).penalty
    assert penalty is not None
    along = projected(x, made, *boundaries("logistic", x, made, penalty)).numpy()
    expected = np.full(len(x), np.nan)
    for fold, train in enumerate(made.nested.outer.train.numpy()):
        scaler = StandardScaler().fit(x[train])
        model = LogisticRegression(C=penalty[fold], tol=1e-10, max_iter=10_000)
        model.fit(scaler.transform(x[train]), made.targets[train])
        decisions = model.decision_function(scaler.transform(x))
        expected[~train] = decisions[~train] / decisions[train].std()
    assert np.abs(along - expected).max() < 1e-3


def test_a_constant_activation_is_on_the_boundary_and_nowhere_else() -> None:
    _, made = problem()
    x = torch.ones(80, 5, dtype=torch.float64)
    assert projected(x, made, torch.ones(4, 5).double(), -5 * torch.ones(4).double()).abs().max() < 1e-12


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    section: dict[str, Any] = {"sites": SITES, "probes": ["logistic", "mlp", "lda"], "folds": 3, "baselines": []}
    folder: Path = tmp_path_factory.mktemp("projections")
    run = run_method(folder, "probe", section | {"penalties": [0.01], "control": False}, task=TASK)
    return {name: run.table(name) for name in ("projections", "probes", "labels")}


def test_every_place_has_each_sample_once_with_its_own_label(table: dict[str, pd.DataFrame]) -> None:
    rows, labels = table["projections"], table["labels"]
    assert set(rows["probe"]) == {"logistic", "lda"}
    merged = rows.merge(labels, on=["prompt", "word"], suffixes=("", "_label"))
    assert len(merged) == len(rows) == 2 * 6 * len(labels)
    assert (merged["class"] == merged["class_label"]).all()


def test_shares_on_the_right_side_are_the_scores(table: dict[str, pd.DataFrame]) -> None:
    rows, scores = table["projections"], table["probes"]
    scores = scores[scores["fold"].isna() & (scores["target"] == "label")]
    second = sorted(set(rows["class"]))[1]
    for (label, probe), part in rows.groupby(["label", "probe"]):
        right = ((part["projection"] > 0) == (part["class"] == second)).mean()
        (score,) = scores[(scores["label"] == label) & (scores["probe"] == probe)]["score"]
        assert right == pytest.approx(score)


def test_of_many_samples_the_best_places_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: dict[str, pd.DataFrame]
) -> None:
    monkeypatch.setattr("mechinterp_cli.methods.probe.projections.ROWS", 0)
    section = {"sites": SITES, "probes": ["logistic"], "folds": 3, "baselines": [], "penalties": [0.01]}
    run = run_method(tmp_path, "probe", section | {"control": False}, task=TASK)
    rows, scores = run.table("projections"), run.table("probes")
    scores = scores[scores["fold"].isna() & (scores["target"] == "label")]
    assert set(rows["site"]) == {"resid_post", "z"}
    for site, part in rows.groupby("site"):
        best = scores[scores["site"] == site]["score"].max()
        (label,) = part["label"].unique()
        assert scores[scores["label"] == label]["score"].item() == best


def test_numbers_and_more_than_two_classes_have_none(tmp_path: Path) -> None:
    section = {"sites": [{"kind": "resid_post", "layers": [0]}], "folds": 3, "baselines": []}
    run = run_method(tmp_path, "probe", section, task={"name": "position", "n": 6})
    assert not (run.path / "projections.parquet").exists()
