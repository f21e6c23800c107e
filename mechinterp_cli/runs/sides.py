"""The two sides of a comparison: finished runs, and how the conditions differ under which they were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs.changes import changes
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.reading import is_run, read_run
from mechinterp_cli.runs.tables import read_parquet, to_frame
from mechinterp_cli.stats.summary import ALL_GROUPS

NEEDED = ("trial", "label", "group", "aggregate", "value", "effect", "normalized", "status", "metric", "site")
"""Columns that every summary has."""
_REMEDIES = {
    "running": "Wait until it is complete.",
    "interrupted": "`mechinterp resume` finishes it.",
    "crashed": "`mechinterp resume` finishes it.",
    "failed": "Its log.jsonl says why; put that right and run it again.",
}


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two runs."""

    path: Path
    manifest: Manifest
    rows: pd.DataFrame
    """The summary's rows of all prompts and the main aggregate."""

    @property
    def section(self) -> dict[str, Any]:
        """The method's section of the config."""
        return dict(self.manifest.config.get(self.manifest.subcommand) or {})


def read_side(path: Path) -> Side:
    """Read a run for comparison.

    Args:
        path: A run directory.

    Raises:
        UserError: It is none, it is not complete, or its method leaves no summary.
        RunError: A file is damaged.
    """
    if not is_run(path):
        raise UserError(f"{path}: not a run directory", "`mechinterp runs` lists those of a folder.")
    manifest, condition = read_run(path)
    if condition != "complete":
        raise UserError(f"{path}: the run is {condition}; only complete runs are compared", _REMEDIES[condition])
    summary = path / "summary.parquet"
    if summary.name not in manifest.outputs:
        problem = f"{path}: the run has no {summary.name}"
        raise UserError(problem, "Run it again with `output.formats: auto`.")
    frame = to_frame(read_parquet(summary))
    missing = [name for name in NEEDED if name not in frame]
    if missing:
        raise RunError(f"{summary}: columns missing: {', '.join(missing)}", "`mechinterp verify` checks a run.")
    return Side(path, manifest, _main_rows(frame))


def differing(a: Side, b: Side) -> list[str]:
    """What was not the same in the two runs, but for the list of sites: `model.dtype: float32 -> bfloat16`."""
    return changes(_conditions(a), _conditions(b))


def _conditions(side: Side) -> dict[str, Any]:
    manifest = side.manifest
    model = {name: manifest.model.get(name) for name in ("id", "revision", "dtype", "device", "weight_files")}
    task = {name: manifest.task.get(name) for name in ("name", "prompts", "sha256")}
    section = {name: value for name, value in side.section.items() if name != "sites"}
    versions = {"mechinterp": manifest.mechinterp_version, **manifest.versions}
    return {"subcommand": manifest.subcommand, "model": model, "task": task, "method": section, "versions": versions}


def _main_rows(frame: pd.DataFrame) -> pd.DataFrame:
    rows = frame[frame["group"] == ALL_GROUPS]
    normalised = set(rows["metric"][rows["aggregate"] == "ratio_of_means"])
    main = rows["metric"].map(lambda metric: "ratio_of_means" if metric in normalised else "mean")
    return rows[rows["aggregate"] == main].reset_index(drop=True)
