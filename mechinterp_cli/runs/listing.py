"""The runs in a folder: one row each, whatever state they are in."""

import contextlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Any

from mechinterp_cli.errors import MechinterpError, UserError
from mechinterp_cli.runs.lock import holder
from mechinterp_cli.runs.manifest import FILE_NAME, Manifest
from mechinterp_cli.runs.reading import CONDITIONS, RUN_NAME, Condition, is_run, read_run, read_time

_NOTE_WIDTH = 80


@dataclass(frozen=True)
class RunRow:
    """One run directory."""

    path: Path
    """Absolute."""
    status: Condition
    kind: str | None = None
    """The subcommand."""
    model: str | None = None
    """Its id, as the config gives it."""
    started: datetime | None = None
    """UTC."""
    seconds: float | None = None
    """How long it took; up to the last sign of life where it did not end."""
    units_done: int | None = None
    units_total: int | None = None
    note: str = ""
    """Why it cannot be read, failed or was interrupted; who works on it."""

    def cells(self) -> dict[str, Any]:
        """The row of a table that a person reads."""
        started = None if self.started is None else self.started.replace(tzinfo=None).isoformat(" ", "seconds")
        total = "?" if self.units_total is None else self.units_total
        lines = self.note.splitlines() or [""]
        return {
            "name": self.path.name,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "started (UTC)": started,
            "seconds": self.seconds,
            "units": None if self.units_done is None else f"{self.units_done}/{total}",
            "note": lines[0] if len(lines[0]) <= _NOTE_WIDTH else f"{lines[0][: _NOTE_WIDTH - 3]}...",
        }

    def record(self) -> dict[str, Any]:
        """Everything, as plain data for a program."""
        return {
            "path": str(self.path),
            "name": self.path.name,
            "status": self.status,
            "kind": self.kind,
            "model": self.model,
            "started": None if self.started is None else self.started.isoformat(),
            "seconds": self.seconds,
            "units_done": self.units_done,
            "units_total": self.units_total,
            "note": self.note,
        }


@dataclass(frozen=True)
class Filters:
    """Which runs are wanted; what is empty or None admits all."""

    status: tuple[str, ...] = ()
    kind: tuple[str, ...] = ()
    model: str | None = None
    """Part of the model's id; upper and lower case are the same."""
    since: datetime | None = None
    until: datetime | None = None

    def admits(self, row: RunRow) -> bool:
        """Whether a run is wanted; what is not known of a run is not what was asked for."""
        started = row.started
        return (
            (not self.status or row.status in self.status)
            and (not self.kind or row.kind in self.kind)
            and (self.model is None or self.model.casefold() in (row.model or "").casefold())
            and (self.since is None or (started is not None and started >= self.since))
            and (self.until is None or (started is not None and started <= self.until))
        )


def list_runs(folder: Path) -> list[RunRow]:
    """Look at every run directory in a folder; other folders and files are passed over.

    Args:
        folder: Holds run directories.

    Returns:
        One row for each, newest last.

    Raises:
        UserError: It is missing, no folder, not readable, or itself a run.
    """
    try:
        children = list(folder.iterdir())
    except FileNotFoundError as error:
        remedy = "Run an experiment first, or give the folder that holds runs: `output.dir`, or what --out said."
        raise UserError(f"{folder}: there is no such folder", remedy) from error
    except OSError as error:
        raise UserError(
            f"{folder}: runs cannot be listed: {error.strerror or error}",
            "Give the folder that holds run directories: `output.dir` of the config, or what --out said.",
        ) from error
    if (folder / FILE_NAME).is_file():
        raise UserError(
            f"{folder}: this is one run, not a folder of runs", f"mechinterp runs {folder.absolute().parent}"
        )
    rows = [_row(child.absolute()) for child in children if is_run(child)]
    return sorted(rows, key=lambda row: (row.started or _modified(row.path), row.path.name))


def _row(path: Path) -> RunRow:
    try:
        manifest, condition = read_run(path)
        started = read_time(manifest.started)
    except MechinterpError as error:
        return _unreadable(path, error.cause.removeprefix(f"{path / FILE_NAME}: "))
    except ValueError:
        return _unreadable(path, f"not a readable manifest: started: {manifest.started[:40]!r} is not a time")
    model = manifest.model.get("id") or _configured_model(manifest)
    return RunRow(
        path=path,
        status=condition,
        kind=manifest.subcommand,
        model=None if model is None else str(model),
        started=started,
        seconds=_seconds(manifest, started),
        units_done=manifest.units_done,
        units_total=manifest.units_total,
        note=_note(path, manifest, condition),
    )


def _unreadable(path: Path, reason: str) -> RunRow:
    """What is left of a broken run is what its name says."""
    match = RUN_NAME.fullmatch(path.name)
    if match is None:
        return RunRow(path, "unreadable", note=reason)
    try:
        started = datetime.strptime(match["time"], "%Y-%m-%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:
        started = None
    return RunRow(path, "unreadable", kind=match["kind"], started=started, note=reason)


def _configured_model(manifest: Manifest) -> Any:
    """The model that was asked for, of a run that ended before it was loaded."""
    section = manifest.config.get("model")
    return section.get("id") if isinstance(section, dict) else None


def _seconds(manifest: Manifest, started: datetime) -> float | None:
    if manifest.status != "running":
        return manifest.duration_seconds
    try:
        passed = (read_time(manifest.heartbeat) - started).total_seconds()
    except ValueError:
        return None
    return max(0.0, round(passed, 3))  # a clock may have been moved back


def _note(path: Path, manifest: Manifest, condition: Condition) -> str:
    if condition == "crashed":
        return f"no process works on it; last sign of life {manifest.heartbeat}"
    if condition == "running":
        found = holder(path)
        return "" if found is None else f"process {found.pid} on {found.host}"
    return manifest.error or ""


def _modified(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except (OSError, OverflowError, ValueError):
        return datetime.min.replace(tzinfo=UTC)


def check_choices(option: str, values: tuple[str, ...], allowed: tuple[str, ...]) -> tuple[str, ...]:
    """Accept filter values that can be met.

    Args:
        option: The option's name, for the error.
        values: What was asked for.
        allowed: What there is.

    Raises:
        UserError: One of them is not allowed.
    """
    for value in values:
        if value not in allowed:
            raise UserError(f"{option} {value}: not one of {', '.join(allowed)}", f"Use {option} with one of these.")
    return values


def check_status(values: tuple[str, ...]) -> tuple[str, ...]:
    """Accept conditions of a run.

    Raises:
        UserError: One is none.
    """
    return check_choices("--status", values, CONDITIONS)


def read_bound(option: str, text: str | None) -> datetime | None:
    """Read the value of `--since` or `--until`.

    Args:
        option: Which of the two. A date without a time is its first moment after `--since`, its last after `--until`.
        text: ISO 8601; None where the option was not given. Without a zone it is UTC.

    Raises:
        UserError: It is no such time.
    """
    if text is None:
        return None
    moment = time.max if option == "--until" else time.min
    try:
        with contextlib.suppress(ValueError):
            return datetime.combine(date.fromisoformat(text), moment, UTC)
        return read_time(text)
    except ValueError as error:
        raise UserError(
            f"{option} {text}: not a date or a date-time of ISO 8601",
            "Write 2026-11-24, 2026-11-24T08:30 or 2026-11-24T08:30:00+01:00; without a zone it is UTC.",
        ) from error


def read_period(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """Read `--since` and `--until`.

    Raises:
        UserError: One is no time, or the first lies after the second.
    """
    first, last = read_bound("--since", since), read_bound("--until", until)
    if first is not None and last is not None and first > last:
        raise UserError(f"--since {since} lies after --until {until}", "Exchange the two.")
    return first, last
