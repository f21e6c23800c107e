import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mechinterp_cli.runs.reading as reading
from mechinterp_cli.cli.main import main
from mechinterp_cli.runs.lock import hold
from mechinterp_cli.runs.manifest import Manifest
from tests.experiments import run_patch

BEGUN = "2026-11-23T10:00:00.000+00:00"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()


def make(name: str, **values: Any) -> Path:
    """A run directory with a manifest alone."""
    values = {"subcommand": "patch", "status": "complete", "started": BEGUN, "model": {"id": "toy"}} | values
    folder = Path("runs") / name
    folder.mkdir()
    manifest = Manifest(name="x", config={"model": {"id": "asked-for"}}, config_sha256="0" * 64, **values)
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


def listed(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    """What `runs --json` gives."""
    assert main(["runs", *arguments, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


def names(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [row["name"] for row in listed(capfd, *arguments)]


def test_a_row_says_what_ran_when_how_long_and_how_far(capfd: pytest.CaptureFixture[str]) -> None:
    make("a", status="failed", error="cause\nremedy", duration_seconds=1.5, units_done=3, units_total=8)
    row = {
        "path": str(Path("runs/a").absolute()),
        "name": "a",
        "status": "failed",
        "kind": "patch",
        "model": "toy",
        "started": "2026-11-23T10:00:00+00:00",
        "seconds": 1.5,
        "units_done": 3,
        "units_total": 8,
        "note": "cause\nremedy",
    }
    assert listed(capfd) == [row]
    assert main(["runs"]) == 0
    header, line = capfd.readouterr().out.splitlines()
    assert header.split() == ["name", "status", "kind", "model", "started", "(UTC)", "seconds", "units", "note"]
    assert line.split() == ["a", "failed", "patch", "toy", "2026-11-23", "10:00:00", "1.5", "3/8", "cause"]


def test_a_real_run_is_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_patch(tmp_path, {"sites": [{"kind": "resid_pre", "positions": "all"}]})
    (row,) = listed(capfd)
    assert (row["path"], row["status"], row["model"]) == (str(run.path), "complete", "toy-induction")
    assert row["units_done"] == row["units_total"] > 0
    assert row["seconds"] > 0


def test_newest_is_last_whatever_it_is_called(capfd: pytest.CaptureFixture[str]) -> None:
    make("b", started="2026-11-23T10:00:00+00:00")
    make("c", started="2026-11-23T10:30:00+01:00")  # half an hour before b
    make("a", started="2026-11-23T11:00:00")
    (Path("runs") / "2026-11-23T103000Z-patch-ioi-0123ab").mkdir()  # broken; its name says when
    assert names(capfd) == ["c", "b", "2026-11-23T103000Z-patch-ioi-0123ab", "a"]


def test_running_is_believed_only_while_somebody_holds_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    run = make("a", status="running", heartbeat="2026-11-23T10:00:02.500+00:00")
    with hold(run):
        (row,) = listed(capfd)
        assert (row["status"], row["seconds"]) == ("running", 2.5)
        assert row["note"].startswith(f"process {os.getpid()} on ")
    (row,) = listed(capfd)
    assert row["status"] == "crashed"
    assert "2026-11-23T10:00:02.500+00:00" in row["note"]


def test_a_run_that_ends_while_it_is_looked_at_did_not_crash(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make("a", status="running")

    def end(path: Path) -> None:
        manifest = Manifest.read(run)
        manifest.status = "complete"
        manifest.write(run)

    monkeypatch.setattr(reading, "holder", end)
    assert [row["status"] for row in listed(capfd)] == ["complete"]


def test_clock_that_was_moved_back_gives_no_negative_time(capfd: pytest.CaptureFixture[str]) -> None:
    make("a", status="running", heartbeat="2026-11-23T09:00:00+00:00")
    assert [row["seconds"] for row in listed(capfd)] == [0]


def test_a_run_that_failed_before_its_model_loaded_shows_the_one_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    make("a", model={}, status="failed")
    assert [row["model"] for row in listed(capfd)] == ["asked-for"]


def good() -> dict[str, Any]:
    manifest = Manifest(subcommand="patch", name="x", config={}, config_sha256="0" * 64, started=BEGUN)
    data: dict[str, Any] = json.loads(manifest.to_json())
    return data | {"status": "complete"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a readable manifest: Expecting value"),
        (json.dumps(good()).encode()[:-30], "not a readable manifest: "),
        (b"[]", "not a readable manifest: "),
        (b"null", "not a readable manifest: "),
        (b"{}", "not a readable manifest: 'schema_version'"),
        (b"[" * 200_000, "not a readable manifest: nested too deep"),
        (json.dumps(good()).encode().replace(b"patch", b"p\xfftch"), "cannot be read: 'utf-8' codec"),
        (json.dumps(good() | {"schema_version": 99}).encode(), "written by a newer mechinterp"),
        (json.dumps(good() | {"status": "done"}).encode(), "unknown status 'done'"),
        (json.dumps(good() | {"status": []}).encode(), "not a readable manifest: "),
        (json.dumps(good() | {"started": 5}).encode(), "not a readable manifest: started: 5 is not of type str"),
        (json.dumps(good() | {"started": "yesterday"}).encode(), "started: 'yesterday' is not a time"),
        (json.dumps(good() | {"started": "0001-01-01T00:00+14:00"}).encode(), "is not a time"),
        (json.dumps(good() | {"units_done": True}).encode(), "units_done: True is not of type int"),
        (json.dumps(good() | {"model": "toy"}).encode(), "model: 'toy' is not of type"),
        (json.dumps(good() | {"outputs": {"a": 3}}).encode(), "not a readable manifest: "),
        (
            json.dumps(good() | {"outputs": {"a": {"sha256": 3, "bytes": 1}}}).encode(),
            "not a readable manifest: outputs: ",
        ),
    ],
)
def test_a_broken_manifest_breaks_its_own_row_alone(
    capfd: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    make("a")
    (make("b") / "manifest.json").write_bytes(content)
    make("c")
    rows = {row["name"]: row for row in listed(capfd)}
    assert {name: row["status"] for name, row in rows.items()} == {"a": "complete", "b": "unreadable", "c": "complete"}
    assert reason in rows["b"]["note"]
    assert "runs" not in rows["b"]["note"].split(":")[0]  # the path stands in the row already


def test_the_content_that_the_cases_damage_is_good(capfd: pytest.CaptureFixture[str]) -> None:
    (make("a") / "manifest.json").write_text(json.dumps(good()))
    assert [row["status"] for row in listed(capfd)] == ["complete"]


def test_manifests_that_are_no_files_are_not_opened(capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("folder", "pipe", "link"):
        (make(name) / "manifest.json").unlink()
    Path("runs/folder/manifest.json").mkdir()
    os.mkfifo("runs/pipe/manifest.json")
    Path("runs/link/manifest.json").symlink_to("nowhere")
    found = {row["name"]: (row["status"], row["note"]) for row in listed(capfd)}
    assert found == {
        "folder": ("unreadable", "not an ordinary file"),
        "pipe": ("unreadable", "not an ordinary file"),
        "link": ("unreadable", "cannot be read: No such file or directory"),
    }


def test_what_is_no_run_directory_is_passed_over(capfd: pytest.CaptureFixture[str]) -> None:
    make("a")
    Path("runs/figures for the paper").mkdir()
    Path("runs/notes.txt").write_text("x")
    Path("runs/2026-11-23T100000Z-patch-ioi-0123ab").mkdir()
    Path("runs/2026-11-23T100000Z-patch-ioi-nohex").mkdir()
    rows = {row["name"]: row for row in listed(capfd)}
    assert set(rows) == {"a", "2026-11-23T100000Z-patch-ioi-0123ab"}
    broken = rows["2026-11-23T100000Z-patch-ioi-0123ab"]
    assert (broken["kind"], broken["started"]) == ("patch", "2026-11-23T10:00:00+00:00")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "abcd"),
        (["--status", "complete"], "a"),
        (["--status", "failed", "--status", "crashed"], "bc"),
        (["--status", "unreadable"], "d"),
        (["--status", "interrupted"], ""),
        (["--kind", "probe"], "b"),
        (["--kind", "patch", "--kind", "probe"], "abc"),
        (["--model", "SMOL"], "bc"),
        (["--model", "smollm2-135m"], "b"),
        (["--since", "2026-11-23"], "bcd"),
        (["--until", "2026-11-23"], "ab"),
        (["--since", "2026-11-23", "--until", "20261123"], "b"),
        (["--since", "2026-11-23T23:59:59.500"], "bcd"),
        (["--since", "2026-11-24T00:59:59.501+01:00"], "cd"),
        (["--until", "2026-11-23T23:59:59.5Z"], "ab"),
        (["--kind", "probe", "--status", "complete"], ""),
    ],
)
def test_filters(capfd: pytest.CaptureFixture[str], arguments: list[str], wanted: str) -> None:
    make("a", started="2026-11-22T23:59:59+00:00", model={"id": "toy"})
    make(
        "b", started="2026-11-23T23:59:59.500+00:00", subcommand="probe", status="failed", model={"id": "smollm2-135m"}
    )
    make("c", started="2026-11-24T00:00:00+00:00", status="running", model={"id": "SmolLM2-360M"})
    (make("d") / "manifest.json").unlink()
    Path("runs/d").rename("runs/2026-11-24T000001Z-heads-d-0123ab")
    assert "".join(name if len(name) == 1 else "d" for name in names(capfd, *arguments)) == wanted


def test_folder_is_an_argument_and_an_empty_list_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    make("a")
    Path("empty folder").mkdir()
    assert main(["runs", "empty folder"]) == 0
    assert capfd.readouterr() == ("", "empty folder: no runs\n")
    assert main(["runs", "--status", "failed"]) == 0
    assert capfd.readouterr() == ("", "runs: none of 1 run is wanted\n")
    assert listed(capfd, "empty folder") == []


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["none"], "error: none: there is no such folder"),
        (["file"], "error: file: runs cannot be listed: Not a directory"),
        (["runs/a"], "error: runs/a: this is one run, not a folder of runs"),
        (["--status", "done"], "error: --status done: not one of running, complete, interrupted, failed, crashed, unr"),
        (["--kind", "ptach"], "error: --kind ptach: not one of "),
        (["--since", "yesterday"], "error: --since yesterday: not a date or a date-time of ISO 8601"),
        (["--until", "2026-13-01"], "error: --until 2026-13-01: not a date"),
        (["--since", "0001-01-01T00:00+14:00"], "error: --since 0001-01-01T00:00+14:00: not a date"),
        (["--since", "2026-11-24", "--until", "2026-11-23"], "error: --since 2026-11-24 lies after --until 2026-11-23"),
    ],
)
def test_bad_arguments(capfd: pytest.CaptureFixture[str], arguments: list[str], cause: str) -> None:
    make("a")
    Path("file").touch()
    assert main(["runs", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(cause)
    assert err.splitlines()[1].startswith("fix: ")


def test_a_kind_without_runs_is_no_mistake(capfd: pytest.CaptureFixture[str]) -> None:
    make("a", subcommand="other")
    assert names(capfd, "--kind", "patch") == []
    assert main(["runs", "--kind", "ptach"]) == 2
    allowed = capfd.readouterr().err.split("not one of ")[1].splitlines()[0].split(", ")
    assert {"other", "patch"} <= set(allowed)
    assert not {"runs", "schema"} & set(allowed)


def test_texts_are_shown_and_never_acted_on(capfd: pytest.CaptureFixture[str]) -> None:
    make("a", model={"id": "x\x1b[31m\nspoofed"}, status="failed", error="\x1b]0;title\x07\u202e" + "long " * 50)
    Path("runs/a").rename("runs/a\x1b[2J\nb")
    assert main(["runs"]) == 0
    out = capfd.readouterr().out
    assert not set(out) & {"\x1b", "\x07", "\u202e"}
    assert len(out.splitlines()) == 2
    assert "\\x1b[31m\\nspoofed" in out


LIGHT = """
import sys
from mechinterp_cli.cli.main import main
code = main(["runs"])
sys.stderr.write(" ".join({"torch", "pandas", "pyarrow", "numpy"} & set(sys.modules)))
sys.exit(code)
"""


def test_a_thousand_runs_are_listed_fast_without_the_heavy_libraries() -> None:
    text = json.dumps(good())
    for number in range(1000):
        folder = Path("runs") / f"r{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text(text)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1001
    assert seconds < 5
