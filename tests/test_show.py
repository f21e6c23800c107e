"""A run looks the same the day after."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mechinterp_cli.cli.main import main
from mechinterp_cli.runs.manifest import Manifest

TOY = Path(__file__).parent.parent / "configs" / "patch-induction-toy.yaml"
TRACED = """\
name: traced
model: {id: toy-induction}
task: {name: induction, n: 8, block: 6, prefix: 2}
patch: {tracing: {span: matched, draws: 2}, sites: [{kind: resid_pre, positions: [matched, end]}]}
metrics: [prob]
stats: {bootstrap: 100, flips: 99}
output: {figures: []}
"""


def shown(err: str) -> list[str]:
    """The lines from the first map on."""
    lines = err.splitlines()
    return lines[next(i for i, line in enumerate(lines) if ", induction, " in line) :]


@pytest.mark.parametrize("config", [str(TOY), "traced.yaml"])
def test_a_run_is_shown_again_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], config: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("traced.yaml").write_text(TRACED)
    assert main(["patch", config, "--out", "runs"]) == 0
    out, err = capfd.readouterr()
    assert main(["show", out.strip()]) == 0
    again, view = capfd.readouterr()
    assert again == out
    assert shown(view) == shown(err)
    assert len(shown(view)) > 10
    assert main(["show", out.strip(), "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert data["run"] == out.strip()
    assert len(data["headline"]) == min(10, len(data["headline"])) > 0
    assert data["notes"][0].startswith("proved: executor packed")


def test_a_run_without_a_summary_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Manifest("patch", "x", {}, "0", status="interrupted").write(tmp_path)
    assert main(["show", "."]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "error: .: the run is interrupted and has no summary to show",
        "fix: Go on with it: mechinterp resume .",
    ]


def test_showing_needs_no_torch() -> None:
    code = "import sys, mechinterp_cli.report.view; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
