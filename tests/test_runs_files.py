import errno
import json
import math
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs.atomic import FileInfo, file_info, open_atomic, write_bytes
from mechinterp_cli.runs.directory import RunDirectory, check_writable
from mechinterp_cli.runs.environment import git_state, hardware, package_versions
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.store import UnitStore
from mechinterp_cli.runs.tables import write_csv, write_parquet

NOBODY = 65534


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- atomic files


def test_file_appears_whole_with_its_hash(tmp_path: Path) -> None:
    info = write_bytes(tmp_path / "a.bin", b"abc")
    assert (tmp_path / "a.bin").read_bytes() == b"abc"
    assert info == file_info(tmp_path / "a.bin")
    assert info.bytes == 3
    assert names(tmp_path) == ["a.bin"]


def test_nothing_shows_before_the_end_and_nothing_stays_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), open_atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_mode_of_the_replaced_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.touch()
    path.chmod(0o640)
    write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_planted_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"keep me")
    (tmp_path / "out").symlink_to(target)
    write_bytes(tmp_path / "out", b"new")
    assert target.read_bytes() == b"keep me"
    assert not (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_error_of_the_system_names_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[call], fail)
    with pytest.raises(RunError, match=r"a\.bin: cannot be written: Input/output error"):
        write_bytes(tmp_path / "a.bin", b"new")
    assert names(tmp_path) == []


def test_missing_folder_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone/a\.bin: cannot be written: No such file"):
        write_bytes(tmp_path / "gone" / "a.bin", b"x")


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may not grow beyond 20 kB, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("write", [write_parquet, write_csv])
def test_full_disk_names_the_path_and_keeps_earlier_files(
    tmp_path: Path, write: Callable[[pa.Table, Path], FileInfo]
) -> None:
    small = pa.table({"x": [1.0, 2.0]})
    large = pa.table({"x": np.random.default_rng(0).random(100_000)})
    write(small, tmp_path / "first")
    earlier = file_info(tmp_path / "first")
    with pytest.raises(RunError, match="second: cannot be written: File too large") as caught:
        write(large, tmp_path / "second")
    assert "--out" in caught.value.remedy
    with pytest.raises(RunError, match="first: cannot be written"):
        write(large, tmp_path / "first")
    assert file_info(tmp_path / "first") == earlier
    assert names(tmp_path) == ["first"]


# --- run directories


def test_directory_is_named_by_utc_time_and_made(tmp_path: Path) -> None:
    now = datetime(2026, 11, 23, 7, 41, 24, tzinfo=UTC)
    path = RunDirectory.create(tmp_path / "deep" / "runs", "patch", "ioi", now).path
    assert path.is_dir()
    assert path.name.startswith("2026-11-23T074124Z-patch-ioi-")
    assert len(path.name.rsplit("-", 1)[1]) == 6


def test_sixteen_processes_at_once_get_sixteen_directories(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from datetime import datetime, UTC\n"
        "from mechinterp_cli.runs.directory import RunDirectory\n"
        "sys.stdin.read()\n"
        "for _ in range(20): RunDirectory.create(Path(sys.argv[1]), 'p', 'n', datetime(2026, 1, 1, tzinfo=UTC))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(16)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
    assert [worker.wait() for worker in workers] == [0] * 16
    assert len(names(tmp_path / "runs")) == 16 * 20


def test_taken_name_is_never_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    first, second = (RunDirectory.create(tmp_path, "p", "n").path for _ in range(2))
    assert first.name.endswith("aaaaaa")
    assert second.name.endswith("bbbbbb")


def test_writable_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == []


def test_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("x")
    with pytest.raises(UserError, match="runs: the output folder is a file") as caught:
        check_writable(tmp_path / "runs")
    assert "--out" in caught.value.remedy
    with pytest.raises(UserError, match="not writable: Not a directory"):
        check_writable(tmp_path / "runs" / "below")


def test_folder_without_permission() -> None:
    """The suite may run as root, who may write anywhere: become nobody meanwhile."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        if root:
            os.seteuid(NOBODY)
        try:
            with pytest.raises(UserError, match="not writable: Permission denied"):
                check_writable(folder)
            with pytest.raises(UserError, match="not writable: Permission denied"):
                check_writable(folder / "below")
        finally:
            if root:
                os.seteuid(0)
        folder.chmod(0o777)
        check_writable(folder)


# --- units


def test_units_are_listed_read_and_removed(tmp_path: Path) -> None:
    store = UnitStore(tmp_path / "units")
    assert store.finished() == []
    for unit in ("0002-b", "0000-a"):
        store.write(unit, pa.table({"x": [unit]}))
    (tmp_path / "units" / ".0001-c.parquet.ab.tmp").touch()
    assert store.finished() == ["0000-a", "0002-b"]
    assert [store.read(unit)["x"].to_pylist() for unit in store.finished()] == [["0000-a"], ["0002-b"]]
    assert "0002-b.parquet" in names(tmp_path / "units")
    with pytest.raises(RunError, match=r"0001-c\.parquet"):
        store.read("0001-c")
    store.remove()
    assert names(tmp_path) == []
    store.remove()


# --- manifest and environment


def test_manifest_survives_the_way_through_json() -> None:
    first = Manifest("patch", "ioi", {"a": [1]}, "00", outputs={"r.csv": FileInfo("ff", 3, 2)}, warnings=["\u00e9"])
    again = Manifest.from_json(first.to_json())
    assert again == first
    assert again.status == "running"
    assert again.pid == os.getpid()


def test_manifest_never_writes_nan_as_null() -> None:
    engine = {"proof": {"deviation": float("nan"), "bound": -math.inf}}
    text = Manifest("p", "n", {}, "", engine=engine).to_json()
    assert json.loads(text)["engine"] == {"proof": {"deviation": "NaN", "bound": "-Infinity"}}


def test_bad_manifests_are_named(tmp_path: Path) -> None:
    good = Manifest("p", "n", {}, "").to_json()
    for text in ("", good[:-20], "[]", "{}", good.replace('"running"', '"done"'), "null"):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(RunError, match=r"manifest\.json: "):
            Manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text(good.replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UserError, match="newer mechinterp"):
        Manifest.read(tmp_path)
    with pytest.raises(RunError, match="cannot be read"):
        Manifest.read(tmp_path / "missing")
    extra = json.dumps({**json.loads(good), "later": 1})
    assert Manifest.from_json(extra) == Manifest.from_json(good)


def test_environment_holds_no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret_1")
    text = repr((package_versions(), hardware(), git_state(tmp_path)))
    assert "hf_secret_1" not in text
    assert package_versions()["torch"]
    assert hardware()["cores"] >= 1
    assert git_state(tmp_path) is None


def test_git_state_tells_a_changed_tree(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {**clean, "dirty": True}
