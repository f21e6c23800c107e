"""What a shell completes on the command line: configs, runs, models. Nothing heavy is imported, and nothing fails."""

import sys
from collections.abc import Iterator
from pathlib import Path

CONFIG_ENDINGS = (".yaml", ".yml")
RUNS = "runs"
"""The folder whose runs are offered where no other is named."""
_DEPTH = 2
"""Folders below each other that are searched for configs."""
_MOST = 200
"""No more are offered."""


def leave_values_unread() -> None:
    """Keep Typer from importing pydantic in a process that only completes.

    Typer reads the words before the one that is completed by pydantic, whose import is half of the time that the shell
    waits. Nothing here needs those values, and while it completes Typer passes over a value that it cannot read.
    """
    sys.modules["pydantic"] = None  # type: ignore[assignment]  # how Python is told that an import is to fail


def complete_config(incomplete: str) -> list[str]:
    """YAML files whose path begins so.

    A folder stands for the files in it: what they have in common is then completed without a blank after it.

    Args:
        incomplete: What stands there.
    """
    folder, start = _split(incomplete)
    found = _configs(Path(folder or "."), start, _DEPTH)
    return [f"{folder}{name}" for _, name in zip(range(_MOST), found, strict=False)]


def complete_run(incomplete: str) -> list[str]:
    """Run directories whose path begins so; those in `runs` where no folder is named.

    Args:
        incomplete: What stands there.
    """
    folder, start = _split(incomplete)
    if not folder and f"{RUNS}/".startswith(incomplete):
        folder, start = f"{RUNS}/", ""
    there = _entries(Path(folder or "."), start)
    return [f"{folder}{path.name}" for path in there if (path / "manifest.json").is_file()][-_MOST:]


def complete_model(incomplete: str) -> list[str]:
    """Models that need no hub, by name."""
    from mechinterp_cli.models.zoo import ZOO

    return [entry.name for entry in ZOO if entry.name.startswith(incomplete)]


def _split(incomplete: str) -> tuple[str, str]:
    """The folder, with its slash, and the beginning of a name in it."""
    folder, slash, start = incomplete.rpartition("/")
    return folder + slash, start


def _configs(folder: Path, start: str, depth: int) -> Iterator[str]:
    """Paths of YAML files below a folder, seen from there; run directories are passed over, which hold copies."""
    for path in _entries(folder, start):
        if path.name.endswith(CONFIG_ENDINGS) and path.is_file():
            yield path.name
        elif depth > 1 and path.is_dir() and not (path / "manifest.json").is_file():
            yield from (f"{path.name}/{below}" for below in _configs(path, "", depth - 1))


def _entries(folder: Path, start: str) -> list[Path]:
    """What is in a folder and begins so, by name; hidden files only where a dot stands there already."""
    try:
        found = sorted(folder.expanduser().iterdir())
    except (OSError, RuntimeError):  # no such folder; no such user's home
        return []
    return [path for path in found if path.name.startswith(start) and (start or not path.name.startswith("."))]
