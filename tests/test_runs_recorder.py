import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from mechinterp_cli.config.base import MethodOptions, TaskOptions
from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs.atomic import file_info
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.recorder import record
from mechinterp_cli.runs.signals import Terminated, stop_requests
from mechinterp_cli.runs.tables import read_parquet

CONFIG = "# a comment that is kept\nname: demo\nmodel: {id: toy}\ntask: {name: recorded-task}\nrecorded: {}\n"

REGISTER = """
from mechinterp_cli.config.base import MethodOptions, TaskOptions
class Task(TaskOptions):
    task_name = "recorded-task"
class Method(MethodOptions):
    method_name = "recorded"
"""


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoadedConfig]:
    tasks, methods = dict(TaskOptions.registry), dict(MethodOptions.registry)
    exec(REGISTER)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG)
    yield load_config(Path("c.yaml"))
    TaskOptions.registry.clear()
    TaskOptions.registry.update(tasks)
    MethodOptions.registry.clear()
    MethodOptions.registry.update(methods)


def baselines() -> pa.Table:
    return pa.table({"prompt": [0], "stream": ["clean"], "metric": ["kl"], "status": ["ok"], "value": [0.5]})


def only_run(root: Path = Path("runs")) -> Path:
    (path,) = root.iterdir()
    return path


def test_complete_run_holds_everything_its_manifest_says(loaded: LoadedConfig) -> None:
    with record(loaded, command=["mechinterp", "recorded", "c.yaml"]) as run:
        first = Manifest.read(run.path)
        assert first.status == "running"
        assert first.pid == os.getpid()
        run.units.write("0000-a", pa.table({"x": [1]}))
        run.units_done(1, 1)
        run.write_table("baselines", baselines(), formats=run.formats)
        run.write_file("figures/a.png", b"png")
        logging.getLogger("mechinterp_cli.engine").info("half way")
        run.warn("few prompts")
        run.warn("few prompts")
    manifest = Manifest.read(run.path)
    assert manifest.status == "complete"
    assert manifest.error is None
    assert manifest.command == ["mechinterp", "recorded", "c.yaml"]
    assert manifest.config_sha256 == loaded.config.sha256
    assert manifest.units_done == manifest.units_total == 1
    assert manifest.warnings == ["few prompts"]
    assert manifest.duration_seconds is not None
    files = {str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file()} - {"manifest.json"}
    assert files == set(manifest.outputs)
    assert {"baselines.csv", "baselines.parquet", "figures/a.png", "log.jsonl"} <= files
    for name, info in manifest.outputs.items():
        assert file_info(run.path / name, info.rows) == info
    assert manifest.outputs["baselines.parquet"].rows == 1
    assert (run.path / "config.yaml").read_bytes() == CONFIG.encode()
    assert load_config(run.path / "config.resolved.yaml").config == loaded.config
    messages = [json.loads(line)["message"] for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert "half way" in messages


def test_error_is_recorded_and_passed_on(loaded: LoadedConfig) -> None:
    with pytest.raises(RunError, match="NaN in layer 3"), record(loaded) as run:
        run.units.write("0000-a", pa.table({"x": [1]}))
        raise RunError("NaN in layer 3", "Use float32.")
    manifest = Manifest.read(only_run())
    assert manifest.status == "failed"
    assert manifest.error is not None
    assert "NaN in layer 3" in manifest.error
    assert run.units.finished() == ["0000-a"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated("SIGTERM")])
def test_being_stopped_is_recorded_and_passed_on(loaded: LoadedConfig, error: BaseException) -> None:
    with pytest.raises(type(error)), record(loaded):
        raise error
    assert Manifest.read(only_run()).status == "interrupted"


def test_being_stopped_while_the_first_manifest_is_written_is_recorded(
    loaded: LoadedConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.fsync

    def stop(_: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt), record(loaded):
        pytest.fail("the block must not run")
    assert Manifest.read(only_run()).status == "interrupted"


def test_handlers_and_loggers_are_put_back(loaded: LoadedConfig) -> None:
    def state() -> list[object]:
        logger = logging.getLogger("mechinterp_cli")
        return [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP), list(logger.handlers), logger.level,
                warnings.showwarning]  # fmt: skip

    before = state()
    with record(loaded):
        assert state() != before
    assert state() == before
    with pytest.raises(ZeroDivisionError), record(loaded):
        raise ZeroDivisionError
    assert state() == before


def test_python_warnings_reach_the_manifest(loaded: LoadedConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with record(loaded) as run:
            warnings.warn("odd mask", UserWarning, stacklevel=1)
    assert Manifest.read(run.path).warnings == ["UserWarning: odd mask"]


def test_unwritable_folder_leaves_nothing(loaded: LoadedConfig) -> None:
    Path("file").touch()
    with pytest.raises(UserError, match="is a file"), record(loaded, Path("file")):
        pytest.fail("the block must not run")


def test_folder_that_goes_away_is_an_error(loaded: LoadedConfig) -> None:
    with pytest.raises(RunError, match=r"baselines\.parquet: cannot be written"), record(loaded) as run:
        run.path.rename("elsewhere")
        run.write_table("baselines", baselines())


def test_failing_manifest_at_the_end_is_an_error(loaded: LoadedConfig) -> None:
    with pytest.raises(RunError, match=r"manifest\.json: cannot be written"), record(loaded) as run:
        run.path.rename("elsewhere")
    assert Manifest.read(Path("elsewhere")).status == "running"


def test_log_that_cannot_be_written_is_an_error(loaded: LoadedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, mode: str, **_: object) -> object:
        return open("/dev/full", mode)  # noqa: PTH123  # stands in for Path.open, which is replaced

    real = Path.open
    monkeypatch.setattr(Path, "open", lambda p, *a, **k: (full if p.name == "log.jsonl" else real)(p, *a, **k))
    with pytest.raises(RunError, match=r"log\.jsonl: cannot be written: No space left"), record(loaded):
        pass
    monkeypatch.undo()


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    inside: list[object] = []

    def work() -> None:
        with stop_requests():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_ignored_hangup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


SLEEPER = (
    REGISTER
    + """
import signal, sys, time
from pathlib import Path
import pyarrow as pa
# Whatever the suite's own parent ignores (nohup, a background job) must not be ignored here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from mechinterp_cli.config.loader import load_config
from mechinterp_cli.runs.recorder import record
with record(load_config(Path("c.yaml"))) as run:
    run.units.write("0000-a", pa.table({"x": [1]}))
    sys.stdout.write("ready\\n"); sys.stdout.flush()
    time.sleep(60)
"""
)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, "interrupted"),
        (signal.SIGHUP, "interrupted"),
        (signal.SIGKILL, "running"),
    ],
)
def test_stopped_process_leaves_a_manifest_that_says_so(
    loaded: LoadedConfig, number: signal.Signals, status: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(60) != 0
    manifest = Manifest.read(only_run())
    assert manifest.status == status
    assert manifest.pid == process.pid
    assert read_parquet(only_run() / "units" / "0000-a.parquet")["x"].to_pylist() == [1]


def test_killed_at_any_moment_no_run_is_unreadable_or_falsely_complete(loaded: LoadedConfig) -> None:
    code = SLEEPER.replace("time.sleep(60)", "[run.write_file(f'f{i}', b'x' * 9999) for i in range(300)]")
    for delay in (0.0, 0.01, 0.02, 0.04):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
    assert "running" in [check_run(path, 300) for path in Path("runs").iterdir()]


def check_run(path: Path, files: int) -> str:
    """Every visible file of a killed run is whole, and it says complete only where it is; gives its status."""
    manifest = Manifest.read(path)
    visible = list(path.glob("f*"))
    assert all(p.stat().st_size == 9999 for p in visible)
    if manifest.status == "complete":
        assert len(visible) == files
        assert all(file_info(path / name, info.rows) == info for name, info in manifest.outputs.items())
    return manifest.status


def test_runs_do_not_import_torch() -> None:
    code = "import sys, mechinterp_cli.runs.recorder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TWICE = SLEEPER.replace(
    "with record",
    """import mechinterp_cli.runs.recorder as recorder
real = recorder.RunRecorder.finish
def slow_finish(self, status, error=None):
    sys.stdout.write("finishing\\n"); sys.stdout.flush()
    time.sleep(60)
    real(self, status, error)
recorder.RunRecorder.finish = slow_finish
with record""",
    1,
)


def test_second_ctrl_c_stops_at_once_and_leaves_whole_files(loaded: LoadedConfig) -> None:
    with subprocess.Popen([sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"finishing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
    assert Manifest.read(only_run()).status == "running"
    assert not list(only_run().rglob("*.tmp"))


@pytest.mark.slow
def test_killed_at_two_hundred_random_moments(loaded: LoadedConfig) -> None:
    code = SLEEPER.replace("time.sleep(60)", "[run.write_file(f'f{i}', b'x' * 9999) for i in range(30)]")
    delays = random.Random(0)
    for _ in range(200):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delays.uniform(0, 0.15))
            process.kill()
    ends = [check_run(path, 30) for path in Path("runs").iterdir()]
    assert len(ends) == 200
    assert {"running", "complete"} == set(ends)
