"""Whatever stops a run, what it computed is kept, and going on gives the bytes that an undisturbed run gives."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mechinterp_cli.cli.main import main
from mechinterp_cli.engine import plan
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.methods import bench
from mechinterp_cli.runs import environment
from mechinterp_cli.runs.lock import FILE_NAME, hold, holder
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.recorder import RunRecorder
from mechinterp_cli.runs.signals import Terminated
from mechinterp_cli.runs.store import UnitStore
from tests.models_files import tiny_llama, write_folder

TABLES = ("prompts", "trials", "baselines", "results", "summary")
CONFIG = {
    "name": "stopped",
    "model": {"id": "toy-induction"},
    "task": {"name": "induction", "n": 4, "block": 6, "prefix": 2},
    "patch": {
        "direction": "denoise",
        "sites": [{"kind": "resid_pre", "positions": "each"}, {"kind": "z", "heads": "each", "positions": "each"}],
    },
    "stats": {"bootstrap": 100, "flips": 99},
    "output": {"figures": []},
}
UNITS = 12


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and units so small that there are many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 64)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))


def tables(run: Path) -> dict[str, bytes]:
    files = [path for name in TABLES for path in run.glob(f"{name}.*")]
    return {path.name: path.read_bytes() for path in sorted(files)}


def only_run(root: str = "runs") -> Path:
    (run,) = Path(root).iterdir()
    return run


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(plan, "ROWS_PER_UNIT", 64)
        Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
        assert main(["patch", "c.yaml", "--out", "whole", "--quiet"]) == 0
    return folder / "whole"


@pytest.fixture
def undisturbed(made_once: Path) -> dict[str, bytes]:
    """The tables of a run that nothing stopped; it is in `whole`."""
    shutil.copytree(made_once, "whole")
    run = only_run("whole")
    units = Manifest.read(run).engine["parts"][0]["plan"]["units"]
    assert len(units) == Manifest.read(run).units_done >= UNITS
    return tables(run)


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int, error: BaseException) -> None:
    """The next run ends with an error after it has saved so many units."""
    real = UnitStore.write
    saved: list[str] = []

    def write(self: UnitStore, unit: str, table: object) -> object:
        if len(saved) == units:
            monkeypatch.setattr(UnitStore, "write", real)
            raise error
        saved.append(unit)
        return real(self, unit, table)

    monkeypatch.setattr(UnitStore, "write", write)


def stopped(monkeypatch: pytest.MonkeyPatch, units: int = 3, *, error: BaseException | None = None) -> Path:
    """The directory of a run that was stopped after so many units."""
    stop_after(monkeypatch, units, error or KeyboardInterrupt())
    assert main(["patch", "c.yaml", "--quiet"]) != 0
    return only_run()


def saved_lines(run: Path) -> Counter[str]:
    lines = [json.loads(line)["message"] for line in (run / "log.jsonl").read_text().splitlines()]
    return Counter(line for line in lines if line.endswith(" is saved"))


@pytest.mark.parametrize(
    ("error", "units"),
    [
        (KeyboardInterrupt(), 0),
        (KeyboardInterrupt(), 5),
        (Terminated("SIGTERM"), 5),
        (RuntimeError("a fault of ours"), 5),
    ],
)
def test_going_on_gives_the_same_bytes_and_computes_nothing_twice(
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    error: BaseException,
    units: int,
) -> None:
    run = stopped(monkeypatch, units, error=error)
    before = Manifest.read(run)
    assert before.status == ("failed" if isinstance(error, RuntimeError) else "interrupted")
    assert before.units_done == units
    assert len(list((run / "units").glob("*"))) == units if units else True
    capfd.readouterr()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert capfd.readouterr() == (f"{run}\n", "")
    assert tables(run) == undisturbed
    after = Manifest.read(run)
    assert (after.status, after.error, after.units_done) == ("complete", None, after.units_total)
    assert [(r["after"], r["units_done"], r["pid"]) for r in after.resumed] == [(before.status, units, os.getpid())]
    assert after.engine["parts"][0]["plan"] == before.engine["parts"][0]["plan"]
    assert before.duration_seconds is not None
    assert after.duration_seconds is not None
    assert after.duration_seconds > before.duration_seconds
    counts = saved_lines(run)
    assert len(counts) == after.units_total
    assert set(counts.values()) == {1}
    assert not (run / "units").exists()
    assert not (run / FILE_NAME).exists()


def test_a_run_can_be_stopped_again_and_again(undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    run = stopped(monkeypatch, 2)
    for _ in range(3):
        stop_after(monkeypatch, 2, Terminated("SIGTERM"))
        assert main(["resume", str(run), "--quiet"]) == 143
    assert Manifest.read(run).units_done == 8
    assert main(["patch", "c.yaml", "--resume", str(run), "--quiet"]) == 0
    assert tables(run) == undisturbed
    assert len(Manifest.read(run).resumed) == 4
    assert set(saved_lines(run).values()) == {1}


def test_a_complete_run_is_left_as_it_is(undisturbed: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    run = only_run("whole")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert main(["resume", str(run)]) == 0
    out, err = capfd.readouterr()
    assert out == f"{run}\n"
    assert "this run is complete; nothing was computed" in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert undisturbed == tables(run)


def test_a_run_that_was_stopped_while_it_wrote_its_tables_only_writes_them(
    undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunRecorder.write_table

    def write(self: RunRecorder, table: str, *rest: object, **more: object) -> object:
        if table == "results":
            raise KeyboardInterrupt
        return real(self, table, *rest, **more)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(RunRecorder, "write_table", write)
    assert main(["patch", "c.yaml", "--quiet"]) == 130
    monkeypatch.setattr(RunRecorder, "write_table", real)
    run = only_run()
    assert Manifest.read(run).units_done == Manifest.read(run).units_total
    rows: list[int] = []
    monkeypatch.setattr(bench, "executor_named", lambda *a: _Counting(executor_named(*a), rows))
    assert main(["resume", str(run), "--quiet"]) == 0
    assert rows == []
    assert tables(run) == undisturbed


class _Counting:
    """An executor that notes how many trials it was given."""

    def __init__(self, inner: object, rows: list[int]) -> None:
        self.inner, self.rows = inner, rows

    def run(self, bucket: object, trials: list[object], *rest: object) -> object:
        self.rows.append(len(trials))
        return self.inner.run(bucket, trials, *rest)  # type: ignore[attr-defined]  # an Executor


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "another unit"])
def test_a_damaged_unit_is_computed_again_and_that_is_said(
    undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    run = stopped(monkeypatch, 5)
    victim, other = sorted((run / "units").iterdir())[1:3]
    data = victim.read_bytes()
    chunk = pq.ParquetFile(victim).metadata.row_group(0).column(4)
    assert chunk.path_in_schema == "value"
    place = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 3
    flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    victim.write_bytes({"cut": data[:-30], "flip": flipped, "empty": b"", "another unit": other.read_bytes()}[damage])
    assert main(["resume", str(run), "--quiet"]) == 0
    assert tables(run) == undisturbed
    assert f"units/{victim.name} was damaged; the unit is computed again" in Manifest.read(run).warnings
    assert saved_lines(run)[f"unit {victim.stem} is saved"] == 2


def test_halves_of_a_unit_are_found_again(undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(_Counting):
        def run(self, bucket: object, trials: list[object], *rest: object) -> object:
            if len(trials) > 2:
                raise torch.OutOfMemoryError("no memory")
            return super().run(bucket, trials, *rest)

    rows: list[int] = []
    monkeypatch.setattr(bench, "executor_named", lambda *a: Narrow(executor_named(*a), rows))
    run = stopped(monkeypatch, 7)
    assert main(["resume", str(run), "--quiet"]) == 0
    manifest = Manifest.read(run)
    assert max(rows) <= 2
    assert len(manifest.engine["parts"][0]["halved"]) > len(manifest.engine["parts"][0]["plan"]["units"])
    assert set(saved_lines(run).values()) == {1}
    assert any("memory ran out and units were halved" in warning for warning in manifest.warnings)
    for name in ("prompts.parquet", "trials.parquet"):
        assert tables(run)[name] == undisturbed[name]
    files = (folder / "results.parquet" for folder in (run, only_run("whole")))
    value, wanted = (pq.read_table(file)["value"].to_numpy() for file in files)
    assert abs(value - wanted).max() < 1e-4


# --- what may not change


def refused(capfd: pytest.CaptureFixture[str], run: Path, cause: str, *arguments: str, code: int = 2) -> None:
    """Going on is refused, with the cause named, and the run directory stays as it was."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capfd.readouterr()
    assert main([*(arguments or ("resume",)), str(run)]) == code
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error:", "fix:"))]
    assert out == ""
    assert cause in lines[0]
    assert lines[1].startswith("fix: ")
    assert "Traceback" not in err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_edited_config_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = stopped(monkeypatch)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"metrics": ["prob"]}))
    cause = "cannot be resumed, config changed since it began: metrics[0]: logit_diff -> prob"
    refused(capfd, run, cause, "patch", "c.yaml", "--resume")
    resolved = run / "config.resolved.yaml"
    resolved.write_text(resolved.read_text().replace("n: 4", "n: 5"))
    refused(capfd, run, "cannot be resumed, config changed since it began: task.n: 4 -> 5")


def test_other_packages_are_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = stopped(monkeypatch)
    versions = environment.package_versions()
    monkeypatch.setattr(environment, "package_versions", lambda: versions | {"torch": "9.9"})
    refused(capfd, run, f"versions changed since it began: torch: {versions['torch']} -> 9.9")


def test_another_model_file_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    write_folder(Path("model"), model)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"model": {"id": "model"}}))
    run = stopped(monkeypatch, 1)
    with torch.no_grad():
        model.lm_head.weight[0] += 1
    shutil.rmtree("model")
    write_folder(Path("model"), model)
    refused(capfd, run, "model changed since it began: model.weight_files.model.safetensors: ".replace("model.w", "w"))


@pytest.mark.parametrize("text", ["", '{"schema_version": 1', "[]", "\x00\xff"])
def test_a_damaged_manifest_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    run = stopped(monkeypatch)
    (run / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(capfd, run, "manifest.json", code=1)


def test_what_is_no_run_is_said(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(capfd, Path("empty"), "empty: this is no run directory: it has no manifest.json")
    for command in ("resume", "show", "reproduce"):
        assert main([command, "nowhere"]) == 2
        assert "nowhere: no such folder" in capfd.readouterr().err


def test_a_second_process_is_refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    run = stopped(monkeypatch)
    with hold(run):
        refused(capfd, run, f"process {os.getpid()} on ")


@pytest.mark.parametrize("arguments", [("--out", "elsewhere"), ("--dry-run",)])
def test_resuming_stays_in_its_own_directory(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    run = stopped(monkeypatch)
    refused(capfd, run, "--resume goes on in the run's own directory", "patch", "c.yaml", *arguments, "--resume")


# --- the world outside


def test_a_path_with_spaces_and_other_letters(undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    assert main(["patch", "c.yaml", "--quiet", "--out", "my räns [1] 走"]) == 130
    run = only_run("my räns [1] 走")
    assert main(["resume", str(run), "--quiet"]) == 0
    assert tables(run) == undisturbed


def test_a_full_disk_leaves_what_can_be_gone_on_with(
    undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = stopped(monkeypatch, 4, error=OSError(28, os.strerror(28)))
    del capfd
    assert Manifest.read(run).status == "failed"
    assert len(list((run / "units").iterdir())) == 4
    assert main(["resume", str(run), "--quiet"]) == 0
    assert tables(run) == undisturbed


def test_a_clock_that_is_moved_back_changes_nothing(
    undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(monkeypatch)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    assert main(["resume", str(run), "--quiet"]) == 0
    assert tables(run) == undisturbed
    assert (Manifest.read(run).duration_seconds or 0) > 0


# --- SIGKILL

RUN = "import sys; from mechinterp_cli.engine import plan; plan.ROWS_PER_UNIT = 64\n"
RUN += "from mechinterp_cli.cli.main import main; sys.exit(main(sys.argv[1:]))"


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", RUN, *arguments, "--quiet"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[bytes]") -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.002)


def killed_at_a_random_moment(generator: random.Random, out: str, seconds: float, *, in_the_sweep: bool) -> Path:
    """Kill a run at any time after its manifest is there, or after any of its first units."""
    units = generator.randrange(UNITS) if in_the_sweep else 0
    with start("patch", "c.yaml", "--out", out) as process:
        wait_for(lambda: list(Path(out).glob("*/manifest.json")), process)
        wait_for(lambda: len(list(Path(out).glob("*/units/*.parquet"))) >= units, process)
        time.sleep(0 if in_the_sweep else generator.uniform(0, seconds))
        process.kill()
    return only_run(out)


def seconds_of_a_run() -> float:
    """From the first manifest to the end, in a process of its own."""
    with start("patch", "c.yaml", "--out", "timed") as process:
        wait_for(lambda: list(Path("timed").glob("*/manifest.json")), process)
        begin = time.monotonic()
        assert process.wait() == 0
        return time.monotonic() - begin


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(undisturbed: dict[str, bytes], times: int) -> None:
    generator, seconds = random.Random(times), seconds_of_a_run()
    after = Counter[str]()
    for number in range(times):
        run = killed_at_a_random_moment(generator, f"killed{number}", seconds, in_the_sweep=number % 2 == 0)
        manifest = Manifest.read(run)
        assert holder(run) is None
        after[manifest.status] += 1
        assert main(["resume", str(run), "--quiet"]) == 0
        assert tables(run) == undisturbed
        assert Manifest.read(run).status == "complete"
        assert max(saved_lines(run).values(), default=1) == 1
        assert not [path for path in run.rglob("*") if path.suffix == ".tmp" or path.name == FILE_NAME]
    assert after["running"] > 0


@pytest.mark.skipif(not hasattr(signal, "SIGTERM") or os.name != "posix", reason="POSIX signals")
def test_sigterm_ends_with_143_and_two_processes_do_not_meet(undisturbed: dict[str, bytes]) -> None:
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG | {"task": {**CONFIG["task"], "n": 400}}))  # type: ignore[dict-item]
    with start("patch", "c.yaml", "--out", "long") as process:
        wait_for(lambda: list(Path("long").glob("*/units/*.parquet")), process)
        assert process.poll() is None
        assert main(["resume", str(only_run("long"))]) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143  # in the middle: the manifest says so
    manifest = Manifest.read(only_run("long"))
    assert (manifest.status, manifest.error) == ("interrupted", "stopped by SIGTERM")
    assert undisturbed
