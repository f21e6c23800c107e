"""Two probing runs are joined by place and probe, and compared by their scores."""

from pathlib import Path
from typing import Any

import pytest

from mechinterp_cli.cli.main import main
from mechinterp_cli.runs.compare import compare
from mechinterp_cli.runs.sides import read_side
from tests.experiments import Run, run_method

SITES = [{"kind": "resid_post", "layers": "all"}, {"kind": "z", "layers": [1], "heads": "each"}]
SECTION: dict[str, Any] = {"sites": SITES, "probes": ["mass_mean", "lda"], "folds": 3, "baselines": ["majority"]}
TASK = {"name": "induction_labels", "n": 6}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The toy early and late; the late one is probed at the stream alone."""
    folder = tmp_path_factory.mktemp("probes")
    early = run_method(folder, "probe", SECTION, task=TASK, model={"id": "toy-induction", "revision": "step600"})
    return early, run_method(folder, "probe", SECTION | {"sites": SITES[:1]}, task=TASK)


def test_scores_are_joined_by_place_and_probe(pair: tuple[Run, Run]) -> None:
    a, b = (run.table("probes") for run in pair)
    found = compare(read_side(pair[0].path), read_side(pair[1].path)).rows
    assert len(found) == 2 * (2 + 4)
    both = found[found["state"] == "compared"]
    assert set(found["state"]) == {"compared", "only_a"}
    assert len(both) == 2 * 2
    for row in both.to_dict("records"):
        for side, table in (("a", a), ("b", b)):
            own = table[(table["label"] == row["label"]) & (table["probe"] == row["metric"])]
            own = own[own["fold"].isna() & own["baseline"].isna() & (own["target"] == "label")]
            assert own["score"].item() == row[side]


def test_a_run_agrees_with_itself(pair: tuple[Run, Run]) -> None:
    side = read_side(pair[0].path)
    found = compare(side, side)
    assert (found.rows["difference"] == 0).all()
    assert {(row["metric"], row["site"]) for row in found.agreement} == {
        (probe, site) for probe in ("mass_mean", "lda") for site in ("resid_post", "z")
    }


def test_the_command_line_compares_and_draws(
    pair: tuple[Run, Run], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *(str(run.path) for run in pair), "--out", str(tmp_path / "c")]) == 0
    assert "mass_mean" in capfd.readouterr().out
    assert list((tmp_path / "c").glob("*.png"))
