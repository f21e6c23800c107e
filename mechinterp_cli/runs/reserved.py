"""Large files that are filled in place: whole or not there, without ever being held in memory."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs.atomic import sync_folder

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


class NoRoomError(RunError):
    """A file cannot be made, and nothing has been done for it yet."""


@contextlib.contextmanager
def reserved(path: Path, size: int) -> Iterator[Path]:
    """Make room for a file of the cache; it appears under its name when the body has filled it and ended.

    The room is taken before the body begins, so that a full disk is an error here and not a signal while a mapping
    of the file is written to. The file is not open while the body runs.

    Args:
        path: The final name; its folder is made where it is not there.
        size: Bytes.

    Yields:
        The temporary file, `size` bytes of zeros.

    Raises:
        NoRoomError: The system refused to make the file.
        RunError: It refused to give it its name. Neither the temporary nor a part of the file is left.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with _told(path, NoRoomError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _make(temporary, size)
        yield temporary
        with _told(path, RunError):
            _publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _told(path: Path, kind: type[RunError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path}: cannot be written: {error.strerror or error}",
            "Free space there, or set MECHINTERP_CACHE to another folder.",
        ) from error


def _make(path: Path, size: int) -> None:
    descriptor = os.open(path, _FLAGS, 0o666)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, path: Path) -> None:
    descriptor = os.open(temporary, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)
