"""Who works on a run directory: one process at a time.

The lock is a file that is made exclusively (`flock` does not exclude across NFS clients). It names host and process,
and its modification time is its holder's heartbeat. A holder is dead when, on this host, no such process lives
(a process that got the same number later is told apart by when it was born), or, on another host, its heart has not
beaten for two minutes. A dead holder's lock is taken over.
"""

import contextlib
import json
import os
import platform
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from mechinterp_cli.errors import RunError, UserError

FILE_NAME = "lock.json"
HEARTBEAT_SECONDS = 10.0
SILENT_SECONDS = 120.0
"""A holder on another host that has been silent for so long is dead."""
_ATTEMPTS = 50
_MOST_BYTES = 4096
_PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock."""

    token: str
    """Random; tells this lock from any other that ever stood there."""
    host: str
    pid: int
    born: str
    """When the process was started, in a form that no change of the clock touches."""
    started: str
    """When it took the lock, UTC."""
    heartbeat: str = ""
    """Its last sign of life, UTC."""

    @classmethod
    def myself(cls) -> "Holder":
        """This process."""
        pid = os.getpid()
        return cls(secrets.token_hex(8), platform.node(), pid, _birth(pid) or "", _utc(time.time()))


def holder(run: Path) -> Holder | None:
    """The process that works on a run now, or None where there is none or it is dead.

    Args:
        run: The run directory.
    """
    found = _read(run / FILE_NAME)
    return found if found is not None and _lives(found, run / FILE_NAME) else None


@contextlib.contextmanager
def hold(run: Path) -> Iterator["Lock"]:
    """Hold a run directory while the block runs; a thread keeps the heartbeat.

    Args:
        run: The run directory.

    Raises:
        UserError: Another process that lives holds it.
        RunError: The lock cannot be written.
    """
    lock = Lock(run / FILE_NAME, _acquire(run / FILE_NAME))
    stop = threading.Event()
    thread = threading.Thread(target=lock.beat, args=(stop,), name="heartbeat", daemon=True)
    try:
        thread.start()
        yield lock
    finally:
        stop.set()
        lock.release()


@dataclass(frozen=True)
class Lock:
    """A lock that this process holds."""

    path: Path
    mine: Holder

    def check(self) -> None:
        """Make sure that nobody has taken over, as may happen after a long sleep.

        Raises:
            RunError: The lock is gone or another's.
        """
        found = _read(self.path)
        if found is None or found.token != self.mine.token:
            who = "is gone" if found is None else f"was taken over by process {found.pid} on {found.host}"
            raise RunError(
                f"{self.path}: the lock of this run {who}", "Nothing more was written; look who works on it."
            )

    def beat(self, stop: threading.Event) -> None:
        """Give a sign of life every few seconds, until told to stop or the lock is gone."""
        while not stop.wait(HEARTBEAT_SECONDS):
            try:
                os.utime(self.path)
            except OSError:
                return

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        found = _read(self.path)
        if found is not None and found.token == self.mine.token:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _acquire(path: Path) -> Holder:
    mine = Holder.myself()
    for _ in range(_ATTEMPTS):
        if _make(path, mine):
            return mine
        found = _read(path)
        if found is not None and _lives(found, path):
            raise UserError(
                f"{path.parent}: process {found.pid} on {found.host} works on this run (last sign of life: "
                f"{found.heartbeat})",
                f"Wait for it or stop it. If it is gone for certain, delete {path}.",
            )
        if found is not None:
            _remove_dead(path, found)
    raise RunError(f"{path}: other processes keep taking this lock", "Start one process on a run.")


def _make(path: Path, mine: Holder) -> bool:
    """Make the lock; False where one stands there already."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    except OSError as error:
        raise RunError(f"{path}: cannot be made: {error.strerror or error}", "Check the run directory.") from error
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({key: value for key, value in asdict(mine).items() if key != "heartbeat"}, file)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror or error}", "Free space there.") from error
    return True


def _remove_dead(path: Path, dead: Holder) -> None:
    """Remove a dead holder's lock, and nobody else's: only who makes the guard may, and looks once more."""
    guard = path.with_name(f".{FILE_NAME}.{dead.token}.dead")
    try:
        os.close(os.open(guard, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - guard.stat().st_mtime > SILENT_SECONDS:  # its maker died, too
                guard.unlink()
        time.sleep(_PAUSE_SECONDS)
        return
    except OSError as error:
        raise RunError(f"{guard}: cannot be made: {error.strerror or error}", "Check the run directory.") from error
    try:
        found = _read(path)
        if found is not None and found.token == dead.token:
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _read(path: Path) -> Holder | None:
    """Who a lock names; None without a lock. One that cannot be read names nobody, and is judged by its age."""
    try:
        status = path.stat()
        data: Any = json.loads(path.read_bytes()[:_MOST_BYTES]) if stat.S_ISREG(status.st_mode) else None
    except OSError:
        return None
    except (ValueError, RecursionError):
        data = None
    beat = _utc(status.st_mtime)
    try:
        return Holder(data["token"], data["host"], int(data["pid"]), data["born"], data["started"], beat)
    except (TypeError, KeyError, ValueError):
        return Holder("unreadable", "an unknown host", 0, "", beat, beat)


def _lives(found: Holder, path: Path) -> bool:
    if found.host == platform.node() and found.pid:
        return _birth(found.pid) == found.born
    try:
        return time.time() - path.stat().st_mtime < SILENT_SECONDS
    except OSError:
        return False


def _birth(pid: int) -> str | None:
    """When a process was started, counted from a boot that has a name where there are such; None if it is dead."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return _birth_elsewhere(pid)
    fields = line.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _birth_elsewhere(pid: int) -> str | None:
    """The same where there is no `/proc`, or no such process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    except psutil.Error:
        return None


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
