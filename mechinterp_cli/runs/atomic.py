"""A visible file is a whole file: write to a temporary in the same folder, fsync, rename."""

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

from mechinterp_cli.errors import RunError

_CHUNK = 1 << 20
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class FileInfo:
    """What the manifest says of a file."""

    sha256: str
    """In hexadecimal."""
    bytes: int
    """Its size."""
    rows: int | None = None
    """Rows of a table; None for other files."""


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name only when it is complete and on disk.

    The temporary stands in the same folder, so that the rename never crosses file systems. A file that stands
    there already stays untouched until the end, and its mode is kept; a symbolic link is replaced, not followed.

    Args:
        path: The final name.

    Yields:
        A binary file to write to.

    Raises:
        RunError: The system refused (disk full, no permission, folder gone); the message names the path,
            and neither the temporary nor a part of the file is left.
    """
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.tmp")
    try:
        with _exclusive(temporary) as file:
            yield cast(BinaryIO, file)
            _keep_mode(path, file.fileno())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written: {error.strerror or error}",
            "Free space there, or choose another folder with --out.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes(path: Path, data: bytes) -> FileInfo:
    """Write a whole file atomically.

    Args:
        path: Where.
        data: What.

    Returns:
        Hash and size of what was written.

    Raises:
        RunError: The system refused; see `open_atomic`.
    """
    with open_atomic(path) as file:
        file.write(data)
    return FileInfo(hashlib.sha256(data).hexdigest(), len(data))


def file_info(path: Path, rows: int | None = None) -> FileInfo:
    """Hash and measure a file that stands on disk.

    Raises:
        RunError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}", "Check the disk and run again.") from error
    return FileInfo(digest.hexdigest(), size, rows)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exclusive(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666), "wb")


def _keep_mode(path: Path, descriptor: int) -> None:
    """Give the new file the old one's permissions."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode):
        os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
