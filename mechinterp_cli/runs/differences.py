"""Two runs of one experiment, row by row: which numbers moved, and by how much."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from pandas.api.types import is_numeric_dtype

from mechinterp_cli.runs.schema import inferred_columns, table_keys

INFERRED = frozenset(
    {"ci_low", "ci_high", "cluster_low", "cluster_high", "difference_low", "difference_high"}
    | {"ci_method", "p", "p_adjusted", "p_method", "verdict"}
)
"""What statistics make of the numbers, in any table; a method names more with its own (`inferred_columns`). Compared
where the effect is the same to the last bit and well beyond the tolerance: elsewhere a sign that rounding turned can
tip a p-value, and rounding alone decides how numbers that are next to nothing are correlated, and which of two comes
first. The numbers themselves are what counts."""

_WELL_BEYOND = 10
"""Times the tolerance. A mean that is hardly more may be of one prompt, and what the others are is rounding."""

MEASURED = ("effect", "value", "mean", "difference", "score", "statistic", "mean_difference")
"""What a table's statistics are of: the first of these that it has as numbers."""


@dataclass(frozen=True)
class Tolerance:
    """A number has moved when |repeated - recorded| > atol + rtol * |recorded|."""

    atol: float
    rtol: float


TOLERANCES = {
    # The largest |repeated - recorded| of any value or effect when a run was repeated by plain hooks instead of packed:
    # 1.1e-5 on the toy, 1.6e-5 on SmolLM2 (float32); another processor's matrix products sum in another order, too.
    # Repeated in half precision on SmolLM2: 0.39 logits (bfloat16), 0.055 nats of KL (float16).
    "float64": Tolerance(1e-8, 1e-8),
    "float32": Tolerance(1e-4, 1e-3),
    "float16": Tolerance(0.05, 0.02),
    "bfloat16": Tolerance(0.5, 0.05),
}


@dataclass(frozen=True)
class Difference:
    """A cell that is not what it was."""

    table: str
    row: str
    """The row's keys in words."""
    column: str
    recorded: Any
    repeated: Any
    size: float
    """|repeated - recorded|; infinite where they cannot be subtracted."""

    def __str__(self) -> str:
        """The difference in one line."""
        return f"{self.table}: {self.row}: {self.column} was {_text(self.recorded)} and is {_text(self.repeated)}"


def table_differences(name: str, recorded: pa.Table, repeated: pa.Table, tolerance: Tolerance) -> list[Difference]:
    """Every cell that differs beyond the tolerance, largest first; a row that one table lacks counts as one.

    NaN equals NaN and null equals null, and neither equals a number. Text and whole numbers must be the same; for what
    statistics infer, see `INFERRED`.

    Args:
        name: The table's name (`results`).
        recorded: The first run's.
        repeated: The second run's.
        tolerance: For real numbers.
    """
    keys = [key for key in table_keys(name) if key in recorded.column_names and key in repeated.column_names]
    before, now = _frame(recorded, keys), _frame(repeated, keys)
    found = [
        Difference(name, _words(row, keys), "row", *sides, float("inf"))
        for frame, other, sides in ((before, now, ("there", "missing")), (now, before, ("missing", "there")))
        for row in frame[~frame.index.isin(other.index)].head(100).to_dict("records")
    ]
    shared = before.index[before.index.isin(now.index)]
    before, now = before.loc[shared], now.loc[shared]
    for column in dict.fromkeys([*before.columns, *now.columns]):
        if column not in keys:
            inferred = column in INFERRED | inferred_columns(name)
            rows = _inferred_alike(before, now, tolerance) if inferred else slice(None)
            found += _column_differences(name, keys, before[rows], now[rows], str(column), tolerance)
    return sorted(found, key=lambda difference: -difference.size)


def _inferred_alike(before: pd.DataFrame, now: pd.DataFrame, tolerance: Tolerance) -> npt.NDArray[np.bool_]:
    """Rows whose statistics must be the same (see `INFERRED`)."""
    column = next(name for name in MEASURED if name in before and is_numeric_dtype(before[name]))
    first, second = (frame[column].to_numpy(dtype=np.float64, na_value=np.nan) for frame in (before, now))
    alike: npt.NDArray[np.bool_] = (first == second) & (np.abs(first) > _WELL_BEYOND * tolerance.atol)
    return alike


def _frame(table: pa.Table, keys: Sequence[str]) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
    frame.index = pd.MultiIndex.from_frame(frame[list(keys)].astype("string").fillna("")) if keys else frame.index
    return frame


def _column_differences(
    name: str, keys: Sequence[str], before: pd.DataFrame, now: pd.DataFrame, column: str, tolerance: Tolerance
) -> Iterator[Difference]:
    if column not in before or column not in now:
        yield Difference(name, "every row", column, column in before, column in now, float("inf"))
        return
    sizes = _sizes(before[column], now[column], tolerance)
    for place in np.flatnonzero(sizes):
        row = before.iloc[place].to_dict()
        yield Difference(
            name, _words(row, keys), column, before[column].iloc[place], now[column].iloc[place], float(sizes[place])
        )


def _sizes(before: pd.Series, now: pd.Series, tolerance: Tolerance) -> npt.NDArray[np.float64]:
    """How far each cell moved; 0 where within the tolerance, infinite where it is something else altogether."""
    null = before.isna().to_numpy(), now.isna().to_numpy()
    if not pd.api.types.is_float_dtype(before.dtype):
        same = np.array([a == b for a, b in zip(_plain(before), _plain(now), strict=True)], dtype=bool)
        return np.where(same, 0.0, np.inf)
    a, b = (series.to_numpy(dtype=np.float64, na_value=np.nan) for series in (before, now))
    with np.errstate(invalid="ignore"):
        size = np.abs(b - a)
        within = (np.isfinite(size) & (size <= tolerance.atol + tolerance.rtol * np.abs(a))) | (a == b)
    alike = (null[0] == null[1]) & (np.isnan(a) == np.isnan(b))
    return np.where(alike & (within | np.isnan(a)), 0.0, np.where(np.isfinite(size), size, np.inf))


def _plain(series: pd.Series) -> list[Any]:
    values: list[Any] = pa.array(series).to_pylist()
    return values


def _words(row: Any, keys: Sequence[str]) -> str:
    parts = [f"{key} {row[key]}" for key in keys if not pd.isna(row[key])]
    label = row.get("label")
    return ", ".join([*parts[:1], *([f"({label})"] if isinstance(label, str) else []), *parts[1:]])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
