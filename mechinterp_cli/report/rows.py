"""Choosing rows of tables, whatever is null in them."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

Row: TypeAlias = Mapping[str, Any]
"""One row by column."""


def records(rows: pd.DataFrame) -> list[Row]:
    """A table's rows, one by one."""
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def having(rows: pd.DataFrame, **values: object) -> pd.DataFrame:
    """The rows that hold these values; none where there is no such column.

    Args:
        rows: Any table.
        values: Column to the value wanted; a tuple of values means any of them.
    """
    chosen = np.ones(len(rows), dtype=bool)
    for name, wanted in values.items():
        if name not in rows:
            return rows.head(0)
        options = list(wanted) if isinstance(wanted, tuple) else [wanted]
        chosen &= rows[name].isin(options).fillna(False).to_numpy(dtype=bool)
    return rows[chosen]


def without(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows that hold nothing in a column; all where there is no such column."""
    return rows[rows[name].isna().to_numpy(dtype=bool)] if name in rows else rows


def distinct(rows: pd.DataFrame, name: str) -> list[str]:
    """What a column of texts holds, in the order of the table."""
    return [str(value) for value in rows[name].dropna().unique()] if name in rows else []


def chosen_metric(rows: pd.DataFrame, metrics: Sequence[str]) -> str:
    """The first of the config's metrics that the table has, else the first that it has; empty where it has none."""
    there = distinct(rows, "metric")
    return next((name for name in metrics if name in there), there[0] if there else "")
