"""The two sides of a comparison: finished runs, and how the conditions differ under which they were made."""

from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.runs.changes import changes
from mechinterp_cli.runs.estimators import ABLATION
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.reading import is_run, read_run
from mechinterp_cli.runs.schema import Standing, standing_of, table_keys
from mechinterp_cli.runs.tables import read_parquet, to_frame
from mechinterp_cli.stats.summary import ALL_GROUPS

NEEDED = ("trial", "label", "group", "aggregate", "value", "effect", "normalized", "status", "metric", "site")
"""Columns that every summary has, and that every other table is given."""
SITES = {"head": "z", "attention": "attn_out", "mlp": "mlp_out"}
"""Units of `ablate` as the sites of other methods."""
REMEDIES = {
    "running": "Wait until it is complete.",
    "interrupted": "`mechinterp resume` finishes it.",
    "crashed": "`mechinterp resume` finishes it.",
    "failed": "Its log.jsonl says why; put that right and run it again.",
}
"""What to do about a run that is not complete."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two runs."""

    path: Path
    manifest: Manifest
    rows: pd.DataFrame
    """The summary's rows of all prompts and the main aggregate; those of another table in the summary's form, where
    another one stands for the method's runs (`runs.schema.register_standing`)."""

    @property
    def section(self) -> dict[str, Any]:
        """The method's section of the config."""
        return dict(self.manifest.config.get(self.manifest.subcommand) or {})


def read_side(path: Path) -> Side:
    """Read a run for comparison.

    Args:
        path: A run directory.

    Raises:
        UserError: It is none, it is not complete, or it left no table to be compared.
        RunError: A file is damaged.
    """
    if not is_run(path):
        raise UserError(f"{path}: not a run directory", "`mechinterp runs` lists those of a folder.")
    manifest, condition = read_run(path)
    if condition != "complete":
        raise UserError(f"{path}: the run is {condition}; only complete runs are compared", REMEDIES[condition])
    standing = standing_of(manifest.subcommand)
    file = path / f"{standing.table if standing else 'summary'}.parquet"
    if file.name not in manifest.outputs:
        problem = f"{path}: the run has no {file.name}"
        raise UserError(problem, "Run it again with `output.formats: auto`.")
    frame = to_frame(read_parquet(file))
    wanted = NEEDED if standing is None else (*table_keys(standing.table), standing.value)
    missing = [name for name in wanted if name not in frame]
    if missing:
        raise RunError(f"{file}: columns missing: {', '.join(missing)}", "`mechinterp verify` checks a run.")
    return Side(path, manifest, main_rows(frame) if standing is None else _standing_rows(frame, standing))


def by_sites(a: Side, b: Side) -> tuple[Side, Side]:
    """Both sides in the words of sites, where one is a run of `ablate`, which names units, and the other is not.

    Its ablations are then told apart, where there are several; in two runs of `ablate` the labels do that.

    Args:
        a: The first.
        b: The second.
    """
    ablated = [side.manifest.subcommand == "ablate" for side in (a, b)]
    if ablated[0] == ablated[1]:
        return _without_ablation(a), _without_ablation(b)
    return (_sited(a) if ablated[0] else a), (_sited(b) if ablated[1] else b)


def _without_ablation(side: Side) -> Side:
    return replace(side, rows=side.rows.drop(columns=ABLATION, errors="ignore"))


def _sited(side: Side) -> Side:
    """Units called by their sites; a query head's key/value head is no part of its place there."""
    rows = side.rows.copy()
    units = rows["site"].isin(list(SITES)).fillna(False).to_numpy(dtype=bool)
    rows["site"] = rows["site"].map(lambda name: SITES.get(name, name)).astype(rows["site"].dtype)
    if "kv_head" in rows:
        rows["kv_head"] = rows["kv_head"].mask(units & rows["head"].notna().to_numpy(dtype=bool))
    found = replace(side, rows=rows)
    return found if rows[ABLATION].nunique() > 1 else _without_ablation(found)


def differing(a: Side, b: Side) -> list[str]:
    """What was not the same in the two runs, but for the list of sites: `model.dtype: float32 -> bfloat16`.

    Of two methods the sections have nothing in common, and are not compared.
    """
    shared = {*_checkpoints(a)} & {*_checkpoints(b)}
    before, now = (_conditions(side, shared) for side in (a, b))
    if a.manifest.subcommand != b.manifest.subcommand:
        del before["method"], now["method"]
    return changes(before, now)


def _checkpoints(side: Side) -> dict[str, Any]:
    """Checkpoint to the hashes of its weights; empty for a run on one model."""
    return {part["checkpoint"]: part.get("weight_files") for part in side.manifest.model.get("checkpoints") or []}


def _conditions(side: Side, shared: Set[str]) -> dict[str, Any]:
    """Under which a run was made; of its checkpoints, the weights of those that both runs have."""
    manifest = side.manifest
    names = ("id", "revision", "dtype", "device", "weight_files")
    model = {name: manifest.model.get(name) for name in names}
    if several := _checkpoints(side):  # then the model's own entries are those of the first
        files = {name: several[name] for name in several if name in shared}
        model |= {"revision": None, "weight_files": files, "checkpoints": ", ".join(several)}
    task = {name: manifest.task.get(name) for name in ("name", "prompts", "sha256")}
    section = {name: value for name, value in side.section.items() if name != "sites"}
    versions = {"mechinterp": manifest.mechinterp_version, **manifest.versions}
    return {"subcommand": manifest.subcommand, "model": model, "task": task, "method": section, "versions": versions}


def main_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of a `summary` that stand for all prompts, by the main aggregate of each metric."""
    rows = frame[frame["group"] == ALL_GROUPS]
    normalised = set(rows["metric"][rows["aggregate"] == "ratio_of_means"])
    main = rows["metric"].map(lambda metric: "ratio_of_means" if metric in normalised else "mean")
    return rows[rows["aggregate"] == main].reset_index(drop=True)


def _standing_rows(frame: pd.DataFrame, standing: Standing) -> pd.DataFrame:
    """The table's rows and values under the summary's names; nothing is an effect, and nothing normalises."""
    for name, wanted in standing.only.items():
        frame = frame[frame[name].isna() if wanted is None else (frame[name] == wanted).fillna(False)]
    labels = [standing.label.format_map(row) for row in frame.to_dict("records")]
    text, number = pd.ArrowDtype(pa.string()), pd.ArrowDtype(pa.float64())
    none = pd.Series(pd.NA, index=frame.index, dtype=number)
    return frame.assign(
        value=frame[standing.value],
        status=frame["status"] if "status" in frame else pd.Series("ok", index=frame.index, dtype=text),
        metric=frame[standing.metric],
        site=standing.site or frame["site"],
        label=pd.Series(labels, index=frame.index, dtype=text),
        trial=range(len(frame)),
        group=ALL_GROUPS,
        aggregate="mean",
        effect=none,
        normalized=none,
    ).reset_index(drop=True)
