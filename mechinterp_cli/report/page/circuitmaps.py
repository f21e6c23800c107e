"""Maps of single prompts of `circuit`: how much of that prompt's behaviour every circuit keeps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, missing, number, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.page.promptmaps import PromptMap
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.runs.manifest import Manifest

MOST = 3.0
"""Largest share that has a colour of its own: on a prompt that hardly divides, shares are wild."""
ABSENT = "Edges were scored on this prompt; circuits are run on others."
LEAST = 1e-3
"""Least difference that is divided by, where the config says nothing."""
Floats = npt.NDArray[np.float64]


def circuit_maps(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> Iterator[PromptMap]:
    """A map per metric and ranking: a row per score, a column per size; circuits of no ranking are in all.

    Args:
        manifest: The run's.
        tables: `evaluations` and `baselines`, where they are there.
    """
    table, baselines = tables.get("evaluations"), tables.get("baselines")
    if table is None or baselines is None or table.empty:
        return
    least = number((manifest.config.get("stats") or {}).get("denominator_absolute", LEAST))
    rows = checkpoints_of(table).last(table)
    ends = checkpoints_of(baselines).last(baselines)
    for metric in distinct(rows, "metric"):
        own, known = having(rows, metric=metric), _ends(having(ends, metric=metric))
        ranks = distinct(own, "rank")
        for rank in ranks or [""]:
            chosen = own[(own["rank"].isna() | (own["rank"] == rank)).to_numpy(dtype=bool)]
            named = [metric, f"{rank} scores" if len(ranks) > 1 else ""]
            yield _map(", ".join(filter(None, named)), metric, chosen, known, least)


def _ends(baselines: pd.DataFrame) -> dict[int, tuple[float, float]]:
    """By prompt the metric of the whole model, and of the model with every edge patched."""
    if "draw" in baselines:
        baselines = baselines[baselines["draw"].isna().to_numpy(dtype=bool)]
    by_stream = {
        name: {int(at): number(value) for at, value in zip(part["prompt"], part["value"], strict=True)}
        for name, part in ((name, having(baselines, stream=name)) for name in ("clean", "corrupt"))
    }
    return {at: (value, by_stream["corrupt"].get(at, np.nan)) for at, value in by_stream["clean"].items()}


def _map(
    title: str, metric: str, rows: pd.DataFrame, ends: Mapping[int, tuple[float, float]], least: float
) -> PromptMap:
    """The map of one metric and ranking."""
    named = [_size(row) for row in records(rows[["size", "threshold"]])]
    columns = [name for _, name in sorted(set(named))]
    scores = distinct(rows, "score")
    at_row, at_column = ({name: at for at, name in enumerate(names)} for names in (scores, columns))
    places = [(at_row[text(score)], at_column[name]) for score, (_, name) in zip(rows["score"], named, strict=True)]
    cells = sorted(set(places))
    at_cell = {cell: at for at, cell in enumerate(cells)}
    placed = rows.assign(cell=[at_cell[place] for place in places])
    parts = {int(number(prompt)): part for prompt, part in placed.groupby("prompt", sort=True)}
    shares = {at: _shares(part, ends.get(at, (np.nan, np.nan)), least, len(cells)) for at, part in parts.items()}
    return PromptMap(
        title=f"kept, {title}",
        quantity="share kept",
        axis="size (share of all edges)",
        side="score",
        rows=scores,
        columns=columns,
        cells=cells,
        values=shares,
        scale=_scale(shares.values()),
        told={at: {metric: _spread(part, len(cells)).tolist()} for at, part in parts.items()},
        about={at: _about(metric, ends.get(at, (np.nan, np.nan)), least) for at in parts},
        absent=ABSENT,
    )


def _scale(shares: Iterable[Floats]) -> tuple[float, float, float]:
    """Of all prompts: 0 is the model with every edge patched, 1 the whole model, and more where circuits have more."""
    largest = max((float(np.nanmax(np.abs(one))) for one in shares if np.isfinite(one).any()), default=1.0)
    end = min(MOST, max(1.0, largest))
    return -end, 0.0, end


def _size(row: Row) -> tuple[tuple[int, float], str]:
    """A circuit's place among the columns, and the column's name: sizes, thresholds, those that were given whole."""
    if not missing(row["size"]):
        return (0, number(row["size"])), f"{number(row['size']):g}"
    if not missing(row["threshold"]):
        return (1, number(row["threshold"])), f"above {number(row['threshold']):g}"
    return (2, 0.0), "as given"


def _spread(rows: pd.DataFrame, count: int) -> Floats:
    found = np.full(count, np.nan)
    found[rows["cell"].to_numpy(dtype=np.int64)] = rows["value"].to_numpy(dtype=np.float64, na_value=np.nan)
    return found


def _shares(rows: pd.DataFrame, ends: tuple[float, float], least: float, count: int) -> Floats:
    """`[cells]`: 0 with every edge patched, 1 for the whole model; NaN where these are too near to each other."""
    full, empty = ends
    apart = full - empty
    return (_spread(rows, count) - empty) / (apart if abs(apart) >= least else np.nan)


def _about(metric: str, ends: Sequence[float], least: float) -> str:
    full, empty = ends
    told = (
        f"{unit_of(metric)} on this prompt: {figure(full)} of the whole model, {figure(empty)} with every edge patched"
    )
    return f"{told}, too near to each other for a share." if abs(full - empty) < least else f"{told}."
