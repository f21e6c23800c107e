"""What differs between two runs, or between a run and now, in words."""

from pathlib import Path
from typing import Any

import mechinterp_cli
from mechinterp_cli.errors import UserError
from mechinterp_cli.runs import environment
from mechinterp_cli.runs.manifest import Manifest, json_ready

_NOTHING = object()


def changes(before: Any, now: Any, where: str = "") -> list[str]:
    """Every value that differs, as `key.path: old -> new`.

    Args:
        before: Mappings and lists of plain values; JSON's form and Python's count as the same.
        now: The same.
        where: Key path of what is compared.
    """
    before, now = json_ready(before), json_ready(now)
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        prefix = f"{where}." if where else ""
        pairs = [(f"{prefix}{key}", before.get(key, _NOTHING), now.get(key, _NOTHING)) for key in keys]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(f"{where}[{i}]", old, new) for i, (old, new) in enumerate(zip(before, now, strict=True))]
    else:
        return [] if before == now else [f"{where}: {_text(before)} -> {_text(now)}"]
    return [change for path, old, new in pairs for change in changes(old, new, path)]


def _text(value: Any) -> str:
    if value is _NOTHING:
        return "nothing"
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse_changes(path: Path, what: str, found: list[str]) -> None:
    """Refuse to go on with a run where something is not what it was.

    Args:
        path: The run directory.
        what: What was compared.
        found: What `changes` gives.

    Raises:
        UserError: Something changed; names the first of it.
    """
    if not found:
        return
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    raise UserError(
        f"{path}: cannot be resumed, {what} changed since it began: {'; '.join(found[:5])}{more}",
        "Put back what it began with, or run the experiment anew.",
    )


def version_changes(manifest: Manifest) -> list[str]:
    """Packages whose version is not that of the run any more."""
    found = changes(manifest.versions, environment.package_versions())
    return found + changes(manifest.mechinterp_version, mechinterp_cli.__version__, "mechinterp")


def environment_changes(manifest: Manifest, threads: int) -> list[str]:
    """How this process's surroundings differ from the run's: versions, machine, threads, commit.

    Args:
        manifest: The run's.
        threads: Threads that this process computes with.
    """
    now = environment.hardware() | {"threads": threads}
    before = {key: value for key, value in manifest.hardware.items() if key in now}
    found = version_changes(manifest) + changes(before, {key: now[key] for key in before})
    commit, here = (manifest.git or {}).get("commit"), (environment.git_state(Path.cwd()) or {}).get("commit")
    return found + (changes(commit, here, "git commit") if commit and here else [])
