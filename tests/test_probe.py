"""`probe` from the YAML file to the tables: what is readable is read, what is not is not, beside its baselines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.run import dry_run
from mechinterp_cli.models.loaded import LoadedModel
from tests.experiments import Run, config_of, run_method
from tests.models_fixtures import toy

__all__ = ["toy"]

LAST = ("k3", "k14", "k15", "k27")
SITES = [{"kind": "resid_post", "layers": "all"}, {"kind": "z", "layers": [1], "heads": "each"}]


def texts(toy: LoadedModel, n: int, seed: int) -> list[list[str]]:
    """Random symbols that the toy knows, the last one of four."""
    words = [word for word in toy.tokenizer.get_vocab() if word.isalnum()]
    rng = np.random.default_rng(seed)
    return [[*map(str, rng.choice(words, size=8)), str(rng.choice(LAST))] for _ in range(n)]


def write(path: Path, rows: list[list[str]], label: Callable[[int, list[str]], str]) -> dict[str, Any]:
    """A file of labelled texts, and the task that reads it."""
    lines = [f"{' '.join(row)},{label(i, row)}" for i, row in enumerate(rows)]
    path.write_text("text,label\n" + "\n".join(lines) + "\n")
    return {"name": "labelled", "path": str(path)}


@pytest.fixture
def readable(toy: LoadedModel, tmp_path: Path) -> dict[str, Any]:
    """The label is which of four symbols the last one is, two by two."""
    return write(tmp_path / "a.csv", texts(toy, 60, 0), lambda _, row: "low" if row[-1] in LAST[:2] else "high")


@pytest.fixture
def unreadable(toy: LoadedModel, tmp_path: Path) -> dict[str, Any]:
    """Labels by the toss of a coin."""
    coin = np.random.default_rng(1).integers(2, size=60)
    return write(tmp_path / "b.csv", texts(toy, 60, 0), lambda i, _: "heads" if coin[i] else "tails")


def probe(folder: Path, task: dict[str, Any], **section: Any) -> Run:
    return run_method(folder, "probe", {"sites": SITES, "folds": 4, **section}, task=task)


def whole(run: Run) -> pd.DataFrame:
    """Over all folds."""
    rows = run.table("probes")
    return rows[rows["fold"].isna()]


def test_what_stands_in_the_last_token_is_read_and_random_labels_are_not(
    readable: dict[str, Any], unreadable: dict[str, Any], tmp_path: Path
) -> None:
    best = []
    for task in (readable, unreadable):
        rows = whole(probe(tmp_path, task))
        own = rows[rows["baseline"].isna() & (rows["site"] == "resid_post") & (rows["layer"] == 0)].iloc[0]
        best.append(float(own["score"]))
        assert own["n"] == 60
    assert best[0] > 0.9
    assert 0.25 < best[1] < 0.75


def test_scores_are_those_of_held_out_samples_fold_by_fold(readable: dict[str, Any], tmp_path: Path) -> None:
    rows = probe(tmp_path, readable).table("probes")
    place = rows[(rows["site"] == "z") & (rows["head"] == 2) & rows["baseline"].isna() & (rows["target"] == "label")]
    folds = place[place["split"] == "test"].dropna(subset=["fold"])
    (over_all,) = place[place["fold"].isna()]["score"]
    assert sorted(folds["fold"]) == [0, 1, 2, 3]
    assert (folds["score"] * folds["n"]).sum() / folds["n"].sum() == pytest.approx(over_all)
    assert folds["n"].sum() == 60
    train = place[place["split"] == "train"]
    assert (train["n"] == train["n_train"]).all()


def test_a_probe_is_scikit_learns_on_the_same_activations_and_folds(
    readable: dict[str, Any], toy: LoadedModel, tmp_path: Path
) -> None:
    run = probe(tmp_path, readable, penalties=[1.0], baselines=[], folds=4)
    rows = run.table("probes")
    hidden = toy.model(input_ids=run.tokens("clean"), output_hidden_states=True).hidden_states[1][:, -1]
    labels = run.table("labels")["class"].to_numpy()
    groups = run.table("labels")["group"].to_numpy()
    splitter = StratifiedGroupKFold(4, shuffle=True, random_state=0)
    scores = []
    for train, test in splitter.split(hidden, labels, groups):
        fitted = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-8, max_iter=5000))
        x = hidden.detach().numpy().astype(np.float64)
        scores.append(fitted.fit(x[train], labels[train]).score(x[test], labels[test]))
    own = rows[(rows["site"] == "resid_post") & (rows["layer"] == 0) & (rows["split"] == "test")].dropna(
        subset=["fold"]
    )
    assert sorted(own["score"].astype(float)) == pytest.approx(sorted(scores))


def test_baselines_stand_beside(readable: dict[str, Any], tmp_path: Path) -> None:
    run = probe(tmp_path, readable)
    rows, labels = whole(run), run.table("labels")["class"]
    by_name = rows.dropna(subset=["baseline"]).groupby("baseline")
    assert set(by_name.groups) == {"majority", "bag", "embedding", "random_weights"}
    (majority,) = by_name.get_group("majority")["score"]
    assert majority <= labels.value_counts().max() / len(labels)
    assert len(by_name.get_group("random_weights")) == 2 + 4
    assert rows[rows["baseline"].isna()]["probe"].unique().tolist() == ["logistic"]


def test_words_have_control_labels_and_a_selectivity(tmp_path: Path) -> None:
    run = probe(tmp_path, {"name": "induction_labels", "n": 6}, code_length=True)
    rows = whole(run)
    own = rows[rows["baseline"].isna()].set_index(["label", "target"])["score"].unstack()
    told = rows[rows["target"].eq("label") & rows["baseline"].isna()].set_index("label")["selectivity"]
    assert (own["label"] - own["control"]).to_dict() == pytest.approx(told.to_dict())
    code = run.table("code")
    assert (code["compression"] * code["bits"]).to_numpy(dtype=float) == pytest.approx(
        code["uniform"].to_numpy(dtype=float)
    )


def test_numbers_are_read_by_ridge(tmp_path: Path) -> None:
    rows = whole(probe(tmp_path, {"name": "position", "n": 6}))
    assert rows["measure"].unique().tolist() == ["r2"]
    own = rows[rows["baseline"].isna() & (rows["site"] == "resid_post")]
    assert own["probe"].unique().tolist() == ["ridge"]
    majority = float(rows[rows["baseline"] == "majority"]["score"].iloc[0])
    assert majority < 0.05


def test_a_plan_computes_nothing(readable: dict[str, Any], tmp_path: Path) -> None:
    plan = dry_run(config_of(tmp_path, {"sites": SITES}, method="probe", task=readable))
    assert (plan["probes"], plan["samples"]) == (6, 60)


@pytest.mark.parametrize(
    ("section", "task", "text"),
    [
        ({}, {"name": "induction", "n": 4}, "task 'induction' has no labels"),
        ({"probes": ["ridge"]}, {"name": "induction_labels", "n": 4}, "probe.probes[0]: ridge: labels are classes"),
        ({"probes": ["lda"]}, {"name": "position", "n": 4}, "probe.probes[0]: lda: labels are numbers"),
        ({"code_length": True}, {"name": "position", "n": 4}, "probe.code_length: code length is of classes"),
        ({"folds": 9}, {"name": "position", "n": 4}, "probe.folds: 9 folds of 4 groups"),
        ({"sites": [{"layers": [7]}]}, {"name": "position", "n": 4}, "probe.sites[0].layers[0]: 7 is outside 0..1"),
    ],
)
def test_what_cannot_be_is_refused_with_the_key(
    section: dict[str, Any], task: dict[str, Any], text: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        run_method(tmp_path, "probe", section, task=task)
    assert text in caught.value.cause
    assert caught.value.remedy


def test_predictions_and_the_end_of_the_learning_curve_are_the_scores(readable: dict[str, Any], tmp_path: Path) -> None:
    sites = [{"kind": "resid_post", "layers": [0]}]
    run = probe(
        tmp_path, readable, sites=sites, baselines=[], learning_curve=True, penalties=[0.1, 1.0], permutations=19
    )
    rows, said, curve = whole(run), run.table("predictions"), run.table("learning")
    (score,) = rows[rows["target"] == "label"]["score"]
    (p,) = rows[rows["target"] == "label"]["p"]
    assert p == 1 / 20
    right = said["class"] == said["predicted_class"]
    assert len(said) == 60
    assert float(right.mean()) == pytest.approx(score)
    assert ((said["probability"] > 0.5) == right).all()
    assert curve["n_train"].tolist() == [8, 16, 32, 45]
    assert curve["score"].iloc[-1] == pytest.approx(score)
    assert curve["score"].iloc[0] < score
