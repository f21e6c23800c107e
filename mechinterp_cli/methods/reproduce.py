"""Repeating a recorded run, and telling whether a number moved."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import run as running
from mechinterp_cli.methods.resume import recorded_parts
from mechinterp_cli.runs.atomic import file_info
from mechinterp_cli.runs.changes import changes, environment_changes
from mechinterp_cli.runs.differences import TOLERANCES, Difference, Tolerance, table_differences
from mechinterp_cli.runs.directory import find_run
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.outcome import Progress
from mechinterp_cli.runs.reading import read_manifest
from mechinterp_cli.runs.schema import keyed_tables
from mechinterp_cli.runs.tables import read_parquet

DIFFERENT_EVERY_TIME = ("log.jsonl", "config.yaml", "report.html")
"""Outputs whose bytes say nothing about the numbers: times, the command, and how the config was written."""


@dataclass(frozen=True)
class Reproduction:
    """What came of repeating a run."""

    path: Path
    """The new run."""
    surroundings: Sequence[str]
    """How versions, machine, model or prompts differ."""
    differences: Sequence[Difference]
    """Cells that moved beyond the tolerance, largest first."""
    other_bytes: Sequence[str]
    """Outputs whose sha256 differs."""
    damaged: Sequence[str]
    """Recorded tables that are missing, or not the files any more that were recorded."""
    tolerance: Tolerance


def recorded_experiment(path: Path, overrides: Sequence[str] = ()) -> tuple[Manifest, LoadedConfig]:
    """A complete run's manifest and config, changed as asked.

    Args:
        path: The run directory.
        overrides: `--set` texts.

    Raises:
        UserError: It is no run, it is not complete, or its config is not the recorded one.
    """
    manifest = read_manifest(find_run(path))
    if manifest.status != "complete":
        raise UserError(f"{path}: the run is {manifest.status}, not complete", f"Run: mechinterp resume {path}")
    source = path / "config.resolved.yaml"
    found = changes(manifest.config, load_config(source).config.resolved())
    if found:
        raise UserError(f"{source}: is not the recorded config: {'; '.join(found[:5])}", "Put the file back.")
    return manifest, load_config(source, overrides)


def reproduce(
    path: Path,
    manifest: Manifest,
    loaded: LoadedConfig,
    *,
    out: Path | None,
    progress: Progress,
    atol: float | None = None,
    rtol: float | None = None,
) -> Reproduction:
    """Run a recorded experiment again in a new directory, and compare all tables row by row.

    The recorded plan is used where the config is the recorded one, so that on the same machine bits are the same.

    Args:
        path: The recorded run.
        manifest: Its manifest.
        loaded: Its config, or a changed one (`recorded_experiment`).
        out: Folder for the new run; that of the config where None.
        progress: Where to tell.
        atol: Absolute tolerance; that of the dtype where None (`TOLERANCES`).
        rtol: Relative tolerance; the same.

    Raises:
        MechinterpError: As `run_experiment`.
    """
    surroundings = environment_changes(manifest, torch.get_num_threads())
    surroundings += changes(manifest.config, loaded.config.resolved())
    same = loaded.config.sha256 == manifest.config_sha256
    plans = recorded_parts(manifest) if same else ()
    outcome = running.run_experiment(loaded, out=out, progress=progress, recorded=plans)
    repeated = Manifest.read(outcome.path)
    surroundings += changes(manifest.model, repeated.model, "model") + changes(manifest.task, repeated.task, "task")
    tolerance = _tolerance(manifest, repeated, atol, rtol)
    differences: list[Difference] = []
    for name in keyed_tables():
        if _has(path, name) and _has(outcome.path, name):
            before, now = (read_parquet(folder / f"{name}.parquet") for folder in (path, outcome.path))
            differences += table_differences(name, before, now, tolerance)
    return Reproduction(
        outcome.path,
        surroundings,
        sorted(differences, key=lambda difference: -difference.size),
        _other_bytes(manifest, repeated),
        _damaged(path, manifest),
        tolerance,
    )


def _has(folder: Path, table: str) -> bool:
    return (folder / f"{table}.parquet").exists()


def _tolerance(first: Manifest, second: Manifest, atol: float | None, rtol: float | None) -> Tolerance:
    """That of the coarser dtype, where not given."""
    dtypes = [str(manifest.model.get("dtype", "float32")) for manifest in (first, second)]
    coarser = max((TOLERANCES.get(dtype, TOLERANCES["float32"]) for dtype in dtypes), key=lambda t: t.atol)
    return Tolerance(coarser.atol if atol is None else atol, coarser.rtol if rtol is None else rtol)


def _other_bytes(first: Manifest, second: Manifest) -> list[str]:
    names = [name for name in dict.fromkeys([*first.outputs, *second.outputs]) if name not in DIFFERENT_EVERY_TIME]
    return [name for name in names if first.outputs.get(name) != second.outputs.get(name)]


def _damaged(path: Path, manifest: Manifest) -> list[str]:
    recorded = {name: info for name, info in manifest.outputs.items() if name.endswith(".parquet")}
    return [
        name
        for name, info in recorded.items()
        if not (path / name).is_file() or file_info(path / name).sha256 != info.sha256
    ]
