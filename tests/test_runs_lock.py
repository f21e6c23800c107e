"""One process works on a run; the dead are found out, the living are left alone."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs import lock
from mechinterp_cli.runs.lock import FILE_NAME, Holder, hold, holder

HOLD = "import sys, time; from pathlib import Path; from mechinterp_cli.runs.lock import hold\n"
HOLD += "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def put(folder: Path, who: Holder, age: float = 0.0) -> None:
    (folder / FILE_NAME).write_text(json.dumps(asdict(who)))
    os.utime(folder / FILE_NAME, (time.time() - age,) * 2)


def test_a_lock_stands_while_it_is_held_and_no_longer(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with hold(tmp_path) as held:
        found = holder(tmp_path)
        assert found is not None
        assert (found.pid, found.token) == (os.getpid(), held.mine.token)
        held.check()
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* works on this run") as error, hold(tmp_path):
            pytest.fail("held twice")
        assert str(tmp_path / FILE_NAME) in error.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_refused_while_the_first_lives(tmp_path: Path, other: "subprocess.Popen[str]") -> None:
    with pytest.raises(UserError, match=f"process {other.pid} "), hold(tmp_path):
        pytest.fail("held twice")
    other.kill()
    time.sleep(0.2)  # not waited for: a zombie is dead, too
    assert holder(tmp_path) is None
    with hold(tmp_path):
        assert holder(tmp_path) is not None
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_got_the_same_number_later_is_not_the_holder(tmp_path: Path) -> None:
    me = Holder.myself()
    put(tmp_path, me)
    assert holder(tmp_path) is not None
    put(tmp_path, replace(me, born="another boot:1"))
    assert holder(tmp_path) is None
    with hold(tmp_path):
        pass


@pytest.mark.parametrize(("age", "lives"), [(0, True), (60, True), (-3600, True), (lock.SILENT_SECONDS + 5, False)])
def test_a_holder_on_another_host_lives_as_long_as_its_heart_beats(tmp_path: Path, age: float, lives: bool) -> None:
    put(tmp_path, replace(Holder.myself(), host="elsewhere"), age)
    assert (holder(tmp_path) is not None) == lives
    if lives:
        with pytest.raises(UserError, match="on elsewhere works on this run"), hold(tmp_path):
            pytest.fail("held twice")
    else:
        with hold(tmp_path):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', "\x00"])
def test_an_unreadable_lock_is_judged_by_its_age(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match="an unknown host"), hold(tmp_path):
        pytest.fail("held twice")
    os.utime(tmp_path / FILE_NAME, (0, 0))
    with hold(tmp_path):
        pass


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with hold(tmp_path):
        os.utime(tmp_path / FILE_NAME, (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / FILE_NAME).stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert time.time() - (tmp_path / FILE_NAME).stat().st_mtime < 60
    assert not any(thread.name == "heartbeat" and thread.is_alive() for thread in _after(threading.enumerate()))


def _after(threads: list[threading.Thread]) -> list[threading.Thread]:
    for thread in threads:
        if thread.name == "heartbeat":
            thread.join(timeout=10)
    return threads


def test_who_lost_the_lock_notices_and_leaves_the_other_ones(tmp_path: Path) -> None:
    with hold(tmp_path) as held:
        put(tmp_path, replace(Holder.myself(), token="other"))
        with pytest.raises(RunError, match=f"was taken over by process {os.getpid()}"):
            held.check()
    assert (tmp_path / FILE_NAME).exists()
    (tmp_path / FILE_NAME).unlink()
    with hold(tmp_path) as held:
        (tmp_path / FILE_NAME).unlink()
        with pytest.raises(RunError, match="is gone"):
            held.check()


def race(folder: Path) -> tuple[int, int]:
    """How many of eight threads that reach for a lock at once get it, and how many are refused."""
    won, lost, together = [], [], threading.Barrier(8)

    def take() -> None:
        together.wait()
        try:
            with hold(folder) as held:
                won.append(held)
                together.wait()
        except UserError as error:
            lost.append(error)
            together.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(won), len(lost)


def test_of_many_that_take_over_from_the_dead_one_wins(tmp_path: Path) -> None:
    for _ in range(20):
        put(tmp_path, replace(Holder.myself(), born="long ago"))
        assert race(tmp_path) == (1, 7)
        assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be made: No such file"), hold(tmp_path / "gone"):
        pytest.fail("nothing to hold")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match="cannot be made: Read-only file system"), hold(tmp_path):
        pytest.fail("nothing can be held")
