"""What a run of attribution leaves in `figures/`, and that it is shown the same from its directory."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mechinterp_cli.report.view import read_outcome
from mechinterp_cli.runs.outcome import RunOutcome
from tests.experiments import Run, run_method

SECTION: dict[str, Any] = {
    "sites": [{"kind": "z", "layers": "all", "heads": "each", "positions": "all"}],
    "verify": {"top": 2, "random": 4},
    "inputs": {"estimators": ["gradient_x_input"]},
    "lens": {"positions": "last"},
    "direct": {},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("attribute")
    return run_method(folder, "attribute", SECTION, metrics=["logit_diff"], output={"figures": ["svg"]})


def drawn(outcome: RunOutcome) -> str:
    assert outcome.draw is not None
    console = Console(width=100, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        for part in outcome.draw(100, True):
            console.print(part)
    return capture.get()


def test_every_part_leaves_its_pictures_and_tokens_a_page(found: Run) -> None:
    names = {path.name for path in (found.path / "figures").iterdir()}
    assert names == {"00-z-atp-logit_diff.svg", "verified-logit_diff.svg", "direct-heads.svg", "direct.svg",
                     "lens-resid_post.svg", "lens.svg", "tokens-logit_diff.svg", "spans-logit_diff.svg",
                     "tokens.html"}  # fmt: skip


def test_the_page_is_among_the_runs_outputs_and_holds_every_prompt(found: Run) -> None:
    page = (found.path / "figures" / "tokens.html").read_bytes()
    assert found.manifest["outputs"]["figures/tokens.html"]["sha256"] == hashlib.sha256(page).hexdigest()
    rows = found.table("inputs")
    assert page.count(b"<h2>") == rows["prompt"].nunique()
    assert page.count(b'title="position') == len(rows)


def test_a_run_looks_the_same_from_its_directory(found: Run) -> None:
    again = read_outcome(found.path)
    assert drawn(again) == drawn(found.outcome)
    assert again.headline_rows == found.outcome.headline_rows
    assert {row["table"] for row in again.headline_rows} == {"summary", "verification", "direct", "lens", "inputs"}


def test_without_figures_there_is_no_page(tmp_path: Path) -> None:
    run = run_method(tmp_path, "attribute", {"inputs": {"estimators": ["gradient_x_input"]}}, metrics=["logit_diff"])
    assert len(run.table("inputs"))
    assert not (run.path / "figures").exists()
