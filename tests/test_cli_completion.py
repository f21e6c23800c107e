"""What shells complete, asked as a shell asks: by environment variables, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mechinterp_cli.cli.completion import complete_config, complete_run
from mechinterp_cli.cli.experiments import EXPERIMENTS
from mechinterp_cli.models.zoo import ZOO

HEAVY = ("torch", "transformers", "pandas", "pyarrow", "numpy", "altair", "rich", "yaml", "pydantic_core")
OLD, NEW, OTHER = "2026-01-01T000000Z-patch-a-000001", "2026-01-02T000000Z-heads-b-000002", "kept-run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configs, runs, and what is neither."""
    for name in ("mine.yaml", "notes.txt", "configs/one.yaml", "configs/two.yml", "configs/deep/far.yaml",
                 ".hidden/no.yaml", "data/table.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for folder in (f"runs/{OLD}", f"runs/{NEW}", f"elsewhere/{OTHER}"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "manifest.json").write_text("{}")
        (tmp_path / folder / "config.yaml").write_text("")
    (tmp_path / "runs" / "no-run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(line: str, shell: str = "bash") -> list[str]:
    """What the command answers when Tab is pressed at the end of a line."""
    words = line.split(" ")
    given = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_TYPER_COMPLETE_ARGS": line}
    given |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_MECHINTERP_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, "-m", "mechinterp_cli.cli.main"]
    done = subprocess.run(command, capture_output=True, check=True, text=True, env={**os.environ, **given})
    assert done.stderr == ""
    return [word for word in done.stdout.splitlines() if word]


def test_configs_are_completed() -> None:
    assert asked("mechinterp patch conf") == ["configs/one.yaml", "configs/two.yml"]


def test_runs_are_completed_wherever_one_is_wanted() -> None:
    runs = [f"runs/{OLD}", f"runs/{NEW}"]
    assert asked("mechinterp show ") == runs
    assert asked("mechinterp compare runs/x runs/2026-01-02") == runs[1:]
    assert asked("mechinterp patch mine.yaml --resume ") == runs


def test_models_and_kinds_are_completed() -> None:
    assert asked("mechinterp models fetch ") == [entry.name for entry in ZOO]
    assert asked("mechinterp models fetch smol") == ["smollm2-135m-instruct"]
    assert asked("mechinterp init ") == list(EXPERIMENTS)
    assert asked("mechinterp init at") == ["attribute"]


def test_commands_and_options_are_completed() -> None:
    assert asked("mechinterp ab") == ["ablate"]
    assert asked("mechinterp patch mine.yaml --dry") == ["--dry-run"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_too(shell: str) -> None:
    assert any("configs/one.yaml" in answer for answer in asked("mechinterp patch configs/o", shell))


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_itself_completes(tmp_path: Path) -> None:
    """The script that `--show-completion` prints, run by bash with a `mechinterp` on its path."""
    command = tmp_path / "bin" / "mechinterp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mechinterp_cli.cli.main "$@"\n')
    command.chmod(0o755)
    given = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    script = (
        'eval "$(_MECHINTERP_COMPLETE=source_bash mechinterp)"; '
        "COMP_WORDS=(mechinterp patch configs/t); COMP_CWORD=2; "
        "$(complete -p mechinterp | sed 's/.*-F \\([^ ]*\\).*/\\1/') mechinterp; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=given, check=True)
    assert done.stdout.splitlines() == ["configs/two.yml"]


@pytest.mark.parametrize(
    ("start", "found"),
    [
        ("", ["configs/one.yaml", "configs/two.yml", "mine.yaml"]),
        ("m", ["mine.yaml"]),
        ("configs/", ["configs/deep/far.yaml", "configs/one.yaml", "configs/two.yml"]),
        ("./configs/o", ["./configs/one.yaml"]),
        (".h", [".hidden/no.yaml"]),
        ("notes", []),
        ("nowhere/x", []),
        ("~nobody-of-that-name/", []),
    ],
)
def test_configs_are_yaml_files_and_no_copies_in_runs(start: str, found: list[str]) -> None:
    assert complete_config(start) == found


def test_absolute_paths_are_completed(here: Path) -> None:
    assert complete_config(f"{here}/m") == [f"{here}/mine.yaml"]
    assert complete_run(f"{here}/elsewhere/") == [f"{here}/elsewhere/{OTHER}"]


def test_only_run_directories_are_runs() -> None:
    assert complete_run("runs/") == complete_run("ru") == [f"runs/{OLD}", f"runs/{NEW}"]
    assert complete_run("runs/no") == []
    assert complete_run("nowhere/") == []


def test_a_folder_that_cannot_be_read_gives_nothing(here: Path) -> None:
    (here / "configs").chmod(0)
    try:
        assert "mine.yaml" in complete_config("")
    finally:
        (here / "configs").chmod(0o755)


def test_no_more_are_offered_than_can_be_read() -> None:
    for number in range(250):
        Path(f"many-{number:03d}.yaml").touch()
    assert len(complete_config("many")) == 200


@pytest.mark.parametrize("line", ["mechinterp patch conf", "mechinterp show ", "mechinterp models fetch s"])
def test_nothing_heavy_is_imported(line: str) -> None:
    code = (
        "import atexit, sys; from mechinterp_cli.cli.main import main; "
        f"atexit.register(lambda: sys.stderr.write(' '.join({set(HEAVY)!r} & set(sys.modules)))); main([])"
    )
    given = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_MECHINTERP_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **given})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
