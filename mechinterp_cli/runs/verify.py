"""Checking a run directory: is everything there, unchanged, and in the form that was promised?"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import mechinterp_cli
from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.config.loader import load_config
from mechinterp_cli.errors import DifferenceError, RunError, UserError
from mechinterp_cli.runs import lock, manifest
from mechinterp_cli.runs.atomic import FileInfo, file_info
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.reading import Condition, is_run, read_run
from mechinterp_cli.runs.store import UnitStore
from mechinterp_cli.runs.verify_tables import table_problems
from mechinterp_cli.text import visible

_LOG = "log.jsonl"
_CONFIG = "config.resolved.yaml"
_NEEDED = ("config.yaml", _CONFIG, _LOG)
_UNITS = "units"
_DIGITS = 12


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was recorded."""

    file: str
    """Its path within the run directory."""
    what: str

    def __str__(self) -> str:
        """One line, without anything that a terminal acts on."""
        return f"{visible(self.file)}: {visible(self.what)}"


@dataclass(frozen=True)
class Verification:
    """What was found."""

    path: Path
    """The run directory, as it was given."""
    status: Condition
    files: int
    """How many files stand as they were recorded."""
    bytes: int
    """How large these are together."""
    problems: tuple[Problem, ...]
    unlisted: tuple[str, ...]
    """Files that the manifest does not name."""

    def record(self) -> dict[str, Any]:
        """Everything, as plain data for a program."""
        data = asdict(self)
        return {"run": str(data.pop("path")), **data}

    def require_good(self) -> None:
        """End the command where something is wrong.

        Raises:
            DifferenceError: There are problems; each is a line.
        """
        if not self.problems:
            return
        remedy = f"Restore these files from a copy, or run it again: mechinterp reproduce {self.path}"
        if self.status == "unreadable":
            remedy = "Restore manifest.json from a copy; without it nothing else can be checked."
        elif self.status == "running":
            remedy = "Wait until it is complete."
        elif self.status != "complete" and len(self.problems) == 1:
            remedy = f"Go on with it: mechinterp resume {self.path}"
        raise DifferenceError("\n".join(map(str, self.problems)), remedy)


def check_is_run(path: Path) -> None:
    """Accept a run directory, good or broken, before anything slow begins.

    Raises:
        UserError: It is none.
    """
    if not is_run(path):
        problem = "this is no run directory" if path.exists() else "no such folder"
        raise UserError(f"{path}: {problem}", "Give the path that a run printed; `mechinterp runs` lists them.")


def verify_run(path: Path) -> Verification:
    """Check a run directory against its manifest. Reads only, and only within the directory.

    Methods must have been imported before: importing them registers their tables' columns.

    Args:
        path: The run directory.

    Returns:
        What was found; nothing is wrong where it has no problems.

    Raises:
        UserError: It is no run directory, or a newer version wrote it.
    """
    check_is_run(path)
    try:
        found, condition = read_run(path)
    except RunError as error:
        problem = Problem(manifest.FILE_NAME, error.cause.removeprefix(f"{path / manifest.FILE_NAME}: "))
        return Verification(path, "unreadable", 0, 0, (problem,), ())
    problems = list(_ending_problems(found, condition))
    intact = {}
    for name, info in found.outputs.items():
        # The log of a run that has not ended goes on after the manifest was written.
        if name == _LOG and condition in ("running", "crashed"):
            continue
        problem_of_file = _file_problem(path, name, info)
        if problem_of_file is None:
            intact[name] = info
        else:
            problems.append(Problem(name, problem_of_file))
    problems += _content_problems(path, found, intact)
    if condition != "complete":
        problems += _unit_problems(path)
    size = sum(info.bytes for info in intact.values())
    return Verification(path, condition, len(intact), size, tuple(problems), _unlisted(path, found, condition))


def _ending_problems(found: Manifest, condition: Condition) -> Iterator[Problem]:
    """How the run ended, where that is not well; what a complete run must have."""
    if condition != "complete":
        total = "an unknown number of" if found.units_total is None else found.units_total
        why = f": {found.error}" if found.error else ""
        yield Problem(manifest.FILE_NAME, f"the run is {condition}, {found.units_done} of {total} units done{why}")
        return
    for name in _NEEDED:
        if name not in found.outputs:
            yield Problem(name, "a complete run has this file and the manifest does not name it")


def _file_problem(run: Path, name: str, info: FileInfo) -> str | None:
    """What is wrong with one recorded file."""
    path = inside(run, name)
    if path is None:
        return "this name leads out of the run directory; it was not read"
    try:
        if not path.is_file():
            return "not an ordinary file" if path.exists() else "missing"
        size = path.stat().st_size
        if size != info.bytes:
            return f"changed: {size:,} bytes, recorded were {info.bytes:,}"
        found = file_info(path)
    except (OSError, RunError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
    if found.sha256 != info.sha256:
        return f"changed: sha256 {found.sha256[:_DIGITS]}..., recorded was {info.sha256[:_DIGITS]}..."
    return None


def inside(run: Path, name: str) -> Path | None:
    """Find the file that a manifest names, if it lies in the run directory, links followed.

    Args:
        run: The run directory.
        name: From the manifest, so anybody may have written it.

    Returns:
        Where it stands, or None where the name leads out or is no name.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or _foreign(name):
        return None
    try:
        resolved = (run / pure).resolve()
        return resolved if resolved.is_relative_to(run.resolve()) else None
    except (OSError, ValueError, RuntimeError):  # NUL, surrogates, links in a circle
        return None


def _foreign(name: str) -> bool:
    """Whether a name would be more than a name on another system: drives and backslashes."""
    return "\\" in name or bool(PureWindowsPath(name).drive)


def _content_problems(run: Path, found: Manifest, intact: dict[str, FileInfo]) -> Iterator[Problem]:
    """What is wrong inside files whose bytes are as recorded.

    Others are not parsed: it would tell nothing new, and their bytes may be anybody's.
    """
    if found.subcommand not in MethodOptions.registry:
        known = ", ".join(sorted(MethodOptions.registry))
        yield Problem(manifest.FILE_NAME, f"subcommand: {found.subcommand!r} is unknown; there are {known}")
        return
    for name, what in table_problems(run, intact, found.subcommand):
        yield Problem(name, what + _by_another_version(found))
    if _CONFIG in intact:
        problem = _config_problem(run / _CONFIG, found)
        if problem is not None:
            yield Problem(_CONFIG, problem + _by_another_version(found))


def _config_problem(path: Path, found: Manifest) -> str | None:
    try:
        config = load_config(path).config
    except UserError as error:
        return f"does not load: {error.cause.replace(str(path), path.name)}"
    if config.sha256 != found.config_sha256:
        return f"hashes to {config.sha256[:_DIGITS]}..., config_sha256 is {found.config_sha256[:_DIGITS]}..."
    return None if config.resolved() == found.config else "differs from the config in the manifest"


def _by_another_version(found: Manifest) -> str:
    """Where forms differ, another version may be the reason."""
    if found.mechinterp_version == mechinterp_cli.__version__:
        return ""
    return f" (the run is of mechinterp {found.mechinterp_version}, this is {mechinterp_cli.__version__})"


def _unit_problems(run: Path) -> Iterator[Problem]:
    """Finished units that do not read; resuming needs them."""
    if inside(run, _UNITS) is None:
        yield Problem(_UNITS, "this folder leads out of the run directory; it was not read")
        return
    store = UnitStore(run / _UNITS)
    for unit in store.finished():
        name = f"{_UNITS}/{store.path(unit).name}"
        try:
            if inside(run, name) is None:
                yield Problem(name, "this leads out of the run directory; it was not read")
            else:
                store.read(unit)
        except RunError as error:
            yield Problem(name, error.cause.removeprefix(f"{store.path(unit)}: "))


def _unlisted(run: Path, found: Manifest, condition: Condition) -> tuple[str, ...]:
    """Files in the directory that the manifest does not name; units are expected until a run is complete."""
    known = {*found.outputs, manifest.FILE_NAME, lock.FILE_NAME}
    if condition != "complete":
        known.add(_LOG)
    names = (path.relative_to(run).as_posix() for path in _files(run))
    units = f"{_UNITS}/"
    return tuple(
        sorted(name for name in names if name not in known and (condition == "complete" or not name.startswith(units)))
    )


def _files(run: Path) -> Iterator[Path]:
    """All files below a folder; links are not followed, and count as files."""
    for folder, folders, files in os.walk(run):
        here = Path(folder)
        yield from (here / name for name in files)
        yield from (here / name for name in folders if (here / name).is_symlink())
