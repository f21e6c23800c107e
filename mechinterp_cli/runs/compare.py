"""Two finished runs, row by row: what both have in common, and how far it agrees.

Rows are joined by what a trial is (site, layer, head, position, ..., metric), null being equal to null. Compared is
what stands for all prompts, under the main aggregate: the ratio of means, or the mean where nothing normalises; of
methods whose runs another table stands for (`heads`: the scores), that table's values.

Estimates (`attribute`) are joined by their estimator too; a run that measures (`patch`) is set beside every estimator
of one that estimates, by size where an estimator tells no sign. A run of `circuit` stands there by its nodes, whose
estimates are the sums over the edges that leave them; units of `ablate` are set beside sites (a head beside `z`), each
ablation for itself.

Trivial rows (0 in both, because causality says so) are counted and nothing more: hundreds of exact zeros on top of
each other would make any two sweeps look alike. So they are in no mean, correlation, overlap or sign share.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from mechinterp_cli.errors import DifferenceError, UserError
from mechinterp_cli.runs.atomic import write_bytes
from mechinterp_cli.runs.directory import check_writable
from mechinterp_cli.runs.estimators import ABLATION, ESTIMATOR, beside_each, signed
from mechinterp_cli.runs.sides import NEEDED, Side, by_sites
from mechinterp_cli.runs.tables import write_csv, write_parquet
from mechinterp_cli.stats.agreement import agree

KEYS = (
    *("checkpoint", "metric", "site", "layer", "head", "kv_head", "neuron", "position", "span", "template"),
    *(ESTIMATOR, ABLATION),
)
"""What makes a row of one run and a row of another the same."""
Column = Literal["value", "effect", "normalized"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class CompareOptions:
    """What is compared."""

    metrics: tuple[str, ...] = ()
    """All where empty."""
    column: Column | None = None
    """Metric by metric, where None: `normalized` where both runs have it, else `effect`, or `value` where there is no
    effect."""
    top: int = 10
    """How many of the largest magnitudes are looked up in the other run."""
    floor: float | None = None
    """Magnitude beyond which a sign counts; the larger of the runs' `stats.smallest_effect` for `normalized` and 0
    else, where None."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What two runs have in common."""

    a: Side
    b: Side
    rows: pd.DataFrame
    """A row per trial and metric of either run: the keys, `label`, `column`, `a`, `b`, `difference` (B − A),
    `status_a`, `status_b`, and `state`: `compared`, `trivial`, `no_number` (null or NaN in A or B), `only_a`,
    `only_b`."""
    agreement: list[dict[str, Any]]
    """A row per metric and kind of site; of each estimator, ablation and checkpoint that both runs have, where there
    are several."""

    def ranked(self) -> pd.DataFrame:
        """The rows that are not the same, worst first: without a number in one run alone, then by |difference|."""
        sizes = self.rows["difference"].abs().where(~_lost(self.rows), np.inf)
        moved = sizes[sizes > 0].sort_values(ascending=False, kind="stable")
        return self.rows.loc[moved.index]

    def worst(self, count: int = 5) -> list[dict[str, Any]]:
        """The rows that differ most, to be shown."""
        return [
            {"metric": row["metric"], "where": self.where(row), "column": row["column"]}
            | {name: _number(row[name]) for name in ("a", "b", "difference")}
            for row in self.ranked().head(count).to_dict("records")
        ]

    def where(self, row: Any) -> str:
        """A row's place in words; with its template, its checkpoint and its estimator where there are several."""
        more = [f"{name} {row[name]}" for name in self._several if not pd.isna(row[name])]
        return ", ".join([str(row["label"]), *more])

    @cached_property
    def _several(self) -> list[str]:
        named = [name for name in ("template", "checkpoint", ESTIMATOR, ABLATION) if name in self.rows]
        return [name for name in named if self.rows[name].nunique() > 1]

    def check(self, limit: float) -> None:
        """Refuse differences above a limit, and rows that have a number in one run alone.

        Args:
            limit: Largest |difference| allowed, in the unit of the column compared.

        Raises:
            DifferenceError: There is one; the worst is named.
            UserError: The limit is not a number from 0 up.
        """
        if not 0 <= limit < np.inf:
            raise UserError(f"--fail-above: {limit} is not valid; allowed: a number from 0 up", "0 allows none.")
        beyond = int(((self.rows["difference"].abs() > limit) | _lost(self.rows)).sum())
        if beyond:
            row = self.ranked().iloc[0]
            a, b = (_said(row[name], row[f"status_{name}"]) for name in "ab")
            raise DifferenceError(
                f"{row['metric']}, {self.where(row)}: {row['column']} is {a} in A and {b} in B",
                f"{beyond} of {self._in_both()} rows in both differ by more than {limit:g}.",
            )

    def _in_both(self) -> int:
        return int((~self.rows["state"].isin(["only_a", "only_b"])).sum())


def compare(a: Side, b: Side, options: CompareOptions | None = None) -> Comparison:
    """Join two runs and say how far they agree.

    Args:
        a: The first.
        b: The second.
        options: What is compared.

    Raises:
        UserError: No row is in both, a row stands twice in a run, or the metric or the column is in neither or in one
            alone.
    """
    options = options or CompareOptions()
    a, b = by_sites(a, b)
    left, right = beside_each(*(_of_metrics(side, (a, b), options.metrics) for side in (a, b)))
    keys = _unique_keys((a, left), (b, right))
    joined = left.merge(right, on=keys, how="outer", suffixes=("_a", "_b"), indicator="found")
    joined = joined.sort_values(["order_a", "order_b"], na_position="last", ignore_index=True)
    if not (joined["found"] == "both").any():
        raise _nothing_common(left, right)
    rows = _compared(joined, keys, options)
    agreement = list(_agreement(rows, options, _smallest_effect(a, b)))
    return Comparison(a, b, rows, agreement)


def _of_metrics(side: Side, both: Sequence[Side], metrics: Sequence[str]) -> pd.DataFrame:
    known = list(dict.fromkeys(name for one in both for name in one.rows["metric"]))
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise UserError(f"--metric: {unknown[0]!r} is in neither run", f"There are {', '.join(known)}.")
    rows = side.rows[side.rows["metric"].isin(list(metrics) or known)]
    wanted = [name for name in (*KEYS, *NEEDED) if name in rows]
    kept = rows[list(dict.fromkeys(wanted))].drop(columns="group")
    return kept.assign(order=np.arange(len(kept)))


def _unique_keys(*sides: tuple[Side, pd.DataFrame]) -> list[str]:
    """The columns that name a row: the common keys; where those repeat (windows, groups of heads) the label too.

    Trials that even the label does not tell apart are the same where both runs have the same list of trials.
    """
    frames = [frame for _, frame in sides]
    common = [name for name in KEYS if all(name in frame for frame in frames)]
    (a, _), (b, _) = sides
    numbered = [["label", "trial"]] if a.section.get("sites") == b.section.get("sites") else []
    for more in ([], ["label"], *numbered):
        keys = [*common, *more]
        if not any(frame.duplicated(keys).any() for frame in frames):
            return keys
    side, frame = next((s, f) for s, f in sides if f.duplicated([*common, "label"]).any())
    row = frame[frame.duplicated([*common, "label"])].iloc[0]
    raise UserError(
        f"{side.path}: two trials are both called {row['label']!r} (metric {row['metric']})",
        "Nothing tells them apart: run it again without the site block that repeats them.",
    )


def _nothing_common(left: pd.DataFrame, right: pd.DataFrame) -> UserError:
    first = [_first_key(frame) for frame in (left, right)]
    return UserError(
        f"the runs have no row in common: A begins with {first[0]}, B with {first[1]}",
        "Compare runs of the same sites, positions (or spans), templates, metrics and checkpoints.",
    )


def _first_key(frame: pd.DataFrame) -> str:
    if frame.empty:
        return "nothing"
    row = frame.iloc[0]
    return "(" + ", ".join(f"{name} {row[name]}" for name in KEYS if name in frame and not pd.isna(row[name])) + ")"


def _compared(joined: pd.DataFrame, keys: Sequence[str], options: CompareOptions) -> pd.DataFrame:
    """The joined rows with the quantity of either run, their difference and their state."""
    columns = joined["metric"].map(_columns(joined, options.column))
    rows = joined[list(keys)].copy()
    for name in ("label", "trial"):
        if name not in keys:
            rows[name] = joined[f"{name}_a"].fillna(joined[f"{name}_b"])
    rows["column"] = columns
    for side in "ab":
        rows[side] = _chosen(joined, columns, side)
    _without_sign(rows)
    a, b = rows["a"].to_numpy(), rows["b"].to_numpy()
    with np.errstate(invalid="ignore"):
        rows["difference"] = np.where(a == b, 0.0, b - a)
    rows["status_a"], rows["status_b"] = joined["status_a"], joined["status_b"]
    rows["state"] = _states(rows, joined["found"])
    return rows


def _sized(rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Rows of estimates that are sizes."""
    if ESTIMATOR not in rows:
        return np.zeros(len(rows), dtype=np.bool_)
    places = zip(rows[ESTIMATOR], rows["site"], strict=True)
    return np.array([not signed(estimator, site) for estimator, site in places], dtype=np.bool_)


def _without_sign(rows: pd.DataFrame) -> None:
    """Take the size of both sides where one tells no more; a value on a stream keeps its sign."""
    sized = _sized(rows) & (rows["column"] != "value").to_numpy(dtype=bool)
    for side in "ab":
        rows[side] = rows[side].abs().where(sized, rows[side])


def _columns(joined: pd.DataFrame, wanted: Column | None) -> dict[str, str]:
    """Metric to the column that is compared."""
    both = joined[joined["found"] == "both"]
    found: dict[str, str] = {}
    for metric in joined["metric"].unique():
        rows = both[both["metric"] == metric]
        if wanted is None:
            found[metric] = _best_column(rows if len(rows) else joined[joined["metric"] == metric])
            continue
        lacking = _lacking(rows, wanted)
        if wanted != "value" and lacking and len(rows):
            names = " and ".join(side.upper() for side in lacking) + (" has" if len(lacking) == 1 else " have")
            what, other = {"normalized": ("normalised", "effect"), "effect": ("effect of", "value")}[wanted]
            raise UserError(f"--column {wanted}: {names} no {what} {metric}", f"Use --column {other}.")
        found[metric] = wanted
    return found


def _lacking(rows: pd.DataFrame, column: str) -> list[str]:
    return [side for side in "ab" if not rows[f"{column}_{side}"].notna().any()]


def _best_column(rows: pd.DataFrame) -> Column:
    if not _lacking(rows, "normalized"):
        return "normalized"
    return "value" if len(_lacking(rows, "effect")) == 2 and len(_lacking(rows, "value")) < 2 else "effect"


def _chosen(joined: pd.DataFrame, columns: pd.Series, side: str) -> Floats:
    """One run's numbers, each row from its own column; NaN where there is none."""
    values = np.full(len(joined), np.nan)
    for name in columns.unique():
        rows = (columns == name).to_numpy(dtype=bool)
        values[rows] = joined[f"{name}_{side}"][rows].to_numpy(dtype=np.float64, na_value=np.nan)
    return values


def _states(rows: pd.DataFrame, found: pd.Series) -> npt.NDArray[np.object_]:
    a, b = rows["a"].to_numpy(), rows["b"].to_numpy()
    skipped = ((rows["status_a"] == "trivial") & (rows["status_b"] == "trivial")).fillna(False).to_numpy(dtype=bool)
    conditions = [
        (found == "left_only").to_numpy(),
        (found == "right_only").to_numpy(),
        ~(np.isfinite(a) & np.isfinite(b)),
        skipped | ((a == 0) & (b == 0)),
    ]
    return np.select(conditions, ["only_a", "only_b", "no_number", "trivial"], "compared").astype(object)


def _lost(rows: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Rows in both runs that have a number in one alone, or none for different reasons."""
    finite = np.isfinite(rows["a"].to_numpy()) != np.isfinite(rows["b"].to_numpy())
    reason = (rows["status_a"] != rows["status_b"]).fillna(True).to_numpy(dtype=bool)
    lost: npt.NDArray[np.bool_] = (rows["state"] == "no_number").to_numpy(dtype=bool) & (finite | reason)
    return lost


def _smallest_effect(a: Side, b: Side) -> float:
    sections = (side.manifest.config.get("stats") or {} for side in (a, b))
    return max(float(section.get("smallest_effect", 0.0)) for section in sections)


def _agreement(rows: pd.DataFrame, options: CompareOptions, smallest: float) -> Iterator[dict[str, Any]]:
    """A row per metric and kind of site, in the order of the runs; of each estimator and checkpoint of both runs."""
    along = "checkpoint" in rows and bool(rows["checkpoint"].notna().any())
    first = ["checkpoint"] * along + [name for name in (ESTIMATOR, ABLATION) if name in rows]
    names = [*first, "metric", "site"]
    if along:
        shared = rows["checkpoint"][~rows["state"].isin(["only_a", "only_b"])]
        rows = rows[rows["checkpoint"].isin(shared)]
    for place, part in rows.groupby(names, sort=False, dropna=False):
        *told, metric, site = place
        column = str(part["column"].iloc[0])
        floor = options.floor if options.floor is not None else smallest if column == "normalized" else 0.0
        states = part["state"].value_counts()
        used = part[part["state"] == "compared"]
        found = agree(used["a"].to_numpy(), used["b"].to_numpy(), top=options.top, floor=floor)
        if _sized(part).any():
            found = replace(found, sign_agreement=None, sign_rows=0)
        sizes = part["difference"].abs().to_numpy()
        largest = None if np.isnan(sizes).all() else part.iloc[int(np.nanargmax(sizes))]
        yield {
            **dict(zip(first, told, strict=True)),
            "metric": metric,
            "site": site,
            "column": column,
            "common": len(part) - int(states.get("only_a", 0)) - int(states.get("only_b", 0)),
            **{name: int(states.get(name, 0)) for name in ("only_a", "only_b", "trivial", "no_number", "compared")},
            "mean_difference": found.mean_difference,
            "max_difference": None if largest is None else abs(float(largest["difference"])),
            "pearson": found.pearson,
            "spearman": found.spearman,
            "top": options.top,
            "top_overlap": found.top_overlap,
            "sign_agreement": found.sign_agreement,
            "sign_rows": found.sign_rows,
            "floor": floor,
            "max_at": None if largest is None else str(largest["label"]),
            "undefined": "; ".join(found.undefined),
        }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _said(value: float, status: Any) -> str:
    return f"{value:.6g}" if np.isfinite(value) else "NaN" if status == "nan" else "undefined"


def comparison_table(comparison: Comparison) -> pa.Table:
    """The joined rows as a table; a number that is missing is null, one that came out as NaN stays NaN."""
    table = pa.Table.from_pandas(comparison.rows, preserve_index=False).replace_schema_metadata()
    for name in "ab":
        values = comparison.rows[name].to_numpy()
        computed = (comparison.rows[f"status_{name}"] == "nan").fillna(False).to_numpy(dtype=bool)
        column = pa.array(values, mask=np.isnan(values) & ~computed, from_pandas=False)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


def save(comparison: Comparison, folder: Path, picture: bytes) -> None:
    """Write the joined rows, the agreement and the picture; files of these names are replaced.

    Args:
        comparison: What was found.
        folder: Where; made if it is not there.
        picture: `scatter.png`.

    Raises:
        UserError: The folder cannot be written to.
        RunError: A file cannot be written.
    """
    check_writable(folder)
    table = comparison_table(comparison)
    write_parquet(table, folder / "comparison.parquet")
    write_csv(table, folder / "comparison.csv")
    write_csv(_agreement_table(comparison.agreement), folder / "agreement.csv")
    write_bytes(folder / "scatter.png", picture)


def _agreement_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    kinds = {**dict.fromkeys(_TEXTS, pa.string()), **dict.fromkeys(_COUNTS, pa.int64())}
    return pa.Table.from_pylist(rows, pa.schema([(name, kinds.get(name, pa.float64())) for name in rows[0]]))


_TEXTS = ("checkpoint", ESTIMATOR, ABLATION, "metric", "site", "column", "max_at", "undefined")
_COUNTS = ("common", "only_a", "only_b", "trivial", "no_number", "compared", "top", "sign_rows")
