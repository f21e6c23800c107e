"""What a run directory says of itself, read with suspicion: it may be cut off, changed, or come from a stranger.

Nothing here imports torch, pandas or pyarrow: a thousand runs are listed in a moment.
"""

import dataclasses
import functools
import re
import stat
import types
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs.lock import holder
from mechinterp_cli.runs.manifest import FILE_NAME, Manifest

Condition = Literal["running", "complete", "interrupted", "failed", "crashed", "unreadable"]
"""How a run stands: its manifest's status, but `crashed` where it says `running` and no process works on it."""
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

RUN_NAME = re.compile(
    r"(?P<time>[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{6}Z)-(?P<kind>[a-z_]+)-(?P<name>.+)-[0-9a-f]{6}", re.DOTALL
)
"""How `RunDirectory.create` names folders."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory, good or broken: it has a manifest, or the name of one."""
    return folder.is_dir() and (_exists(folder / FILE_NAME) or RUN_NAME.fullmatch(folder.name) is not None)


def read_run(folder: Path) -> tuple[Manifest, Condition]:
    """Read a run directory's manifest, and find out how the run stands.

    Args:
        folder: The run directory.

    Returns:
        The manifest, every value of the type that `Manifest` says; and the condition, never `unreadable`.

    Raises:
        RunError: There is no manifest, or it is cut off, changed, or something else.
        UserError: A newer version of mechinterp wrote it.
    """
    manifest = read_manifest(folder)
    if manifest.status == "running" and holder(folder) is None:
        # It may have ended between the two looks; only one that still says `running` crashed.
        manifest = read_manifest(folder)
        if manifest.status == "running":
            return manifest, "crashed"
    return manifest, manifest.status


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest and check the type of every value.

    Raises:
        RunError: There is none, it cannot be read, or a value has another type.
        UserError: A newer version of mechinterp wrote it.
    """
    path = folder / FILE_NAME
    try:
        ordinary = stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror or error}", _DAMAGED) from error
    if not ordinary:
        raise RunError(f"{path}: not an ordinary file", _DAMAGED)
    try:
        manifest = Manifest.read(folder)
    except RecursionError as error:
        raise RunError(f"{path}: not a readable manifest: nested too deep", _DAMAGED) from error
    except TypeError as error:
        raise RunError(f"{path}: not a readable manifest: {error}", _DAMAGED) from error
    problem = misfit(manifest)
    if problem is not None:
        raise RunError(f"{path}: not a readable manifest: {problem}", _DAMAGED)
    return manifest


_DAMAGED = "The run crashed at its start, or the file was damaged."


def misfit(record: Any) -> str | None:
    """Find a value of a dataclass that is not of the field's type.

    Args:
        record: An instance filled from JSON.

    Returns:
        `started: 5 is not text` or the like; None where all is well.
    """
    kind: Any = type(record)
    hints = _hints(kind)
    for item in dataclasses.fields(record):
        value, hint = getattr(record, item.name), hints[item.name]
        if not _fits(value, hint):
            return f"{item.name}: {repr(value)[:_SHOWN]} is not of type {getattr(hint, '__name__', hint)}"
    return None


_SHOWN = 60


@functools.cache
def _hints(record: Any) -> dict[str, Any]:
    return get_type_hints(record)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a type; numbers are no booleans, and whole numbers are numbers, too."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if dataclasses.is_dataclass(hint):
        return type(value) is hint and misfit(value) is None
    return isinstance(value, _NUMBERS.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


_NUMBERS: Mapping[Any, Any] = {float: (int, float)}


def read_time(text: str) -> datetime:
    """Read an ISO 8601 date-time; one without a zone is UTC.

    Raises:
        ValueError: It is none, or lies outside of what a calendar has.
    """
    time = datetime.fromisoformat(text)
    try:
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text}: out of range") from error


def _exists(path: Path) -> bool:
    """Whether something stands there, be it a link that leads nowhere."""
    try:
        path.lstat()
    except OSError:
        return False
    return True
