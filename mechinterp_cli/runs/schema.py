"""Names and types of every table's columns, in one place.

A method adds its own columns with `register_columns`, beside the code that fills them.
"""

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mechinterp_cli.errors import RunError

_INDEX = pa.int32()
_TEXT = pa.string()
_REAL = pa.float64()
_TOKENS = pa.list_(pa.int32())


def column(name: str, kind: pa.DataType, *, required: bool = False) -> pa.Field:
    """Describe one column.

    Args:
        name: Its name, the same in YAML, tables and Python.
        kind: Its Arrow type.
        required: Whether null is refused.
    """
    return pa.field(name, kind, nullable=not required)


_SITE = [
    column("label", _TEXT),
    column("site", _TEXT),
    column("layer", _INDEX),
    column("head", _INDEX),
    column("neuron", _INDEX),
    column("position", _INDEX),
    column("span", _TEXT),
]

_COLUMNS: dict[str, list[pa.Field]] = {
    # One row per trial x edit.
    "trials": [
        column("trial", pa.int64(), required=True),
        column("edit", _INDEX, required=True),
        column("op", _TEXT, required=True),
        column("site", _TEXT, required=True),
        column("layer", _INDEX),
        column("head", _INDEX),
        column("kv_head", _INDEX),
        column("neuron", _INDEX),
        column("position", _INDEX),
        column("span", _TEXT),
        column("key_position", _INDEX),
        column("key_span", _TEXT),
        column("source", _TEXT),
        column("reference", _TEXT),
        column("set", _TEXT),
        column("k", _INDEX),
        column("design", _TEXT),
        column("checkpoint", _TEXT),
    ],
    # One row per observation: trial x prompt x metric x draw.
    "results": [
        column("trial", pa.int64(), required=True),
        *_SITE,
        column("prompt", _INDEX, required=True),
        column("cluster", _TEXT),
        column("group", _TEXT),
        column("metric", _TEXT, required=True),
        column("draw", _INDEX),
        column("value", _REAL),
        column("effect", _REAL),
        column("normalized", _REAL),
        column("status", _TEXT, required=True),
    ],
    # One row per prompt x stream x metric, of the unedited streams.
    "baselines": [
        column("prompt", _INDEX, required=True),
        column("cluster", _TEXT),
        column("group", _TEXT),
        column("stream", _TEXT, required=True),
        column("metric", _TEXT, required=True),
        column("draw", _INDEX),
        column("value", _REAL),
        column("status", _TEXT, required=True),
    ],
    # One row per trial x metric x group.
    "summary": [
        column("trial", pa.int64(), required=True),
        *_SITE,
        column("metric", _TEXT, required=True),
        column("group", _TEXT),
        column("aggregate", _TEXT, required=True),
        column("value", _REAL),
        column("effect", _REAL),
        column("normalized", _REAL),
        column("n", _INDEX, required=True),
        column("n_dropped", _INDEX, required=True),
        column("clusters", _INDEX),
        column("ci_low", _REAL),
        column("ci_high", _REAL),
        column("ci_method", _TEXT),
        column("p", _REAL),
        column("p_adjusted", _REAL),
        column("family", _TEXT),
    ],
    # One row per prompt x stream: enough to recompute any row of results with transformers alone.
    "prompts": [
        column("prompt", _INDEX, required=True),
        column("stream", _TEXT, required=True),
        column("text", _TEXT, required=True),
        column("tokens", _TOKENS, required=True),
        column("token_strings", pa.list_(_TEXT), required=True),
        column("spans", pa.map_(_TEXT, _TOKENS)),
        column("answer", _TOKENS),
        column("answer_text", _TEXT),
        column("wrong_answer", _TOKENS),
        column("wrong_answer_text", _TEXT),
        column("group", _TEXT),
        column("template", _TEXT),
        column("cluster", _TEXT),
    ],
}

_Values: TypeAlias = "pa.ChunkedArray | pa.Array | pd.Series[Any]"

_extensions: dict[tuple[str, str], list[pa.Field]] = {}

STATUSES = ("ok", "trivial", "undefined", "nan")
"""What `results.status` may be: computed; known to be 0 and not computed; no normalised value; NaN in the model."""


def register_columns(method: str, table: str, columns: Iterable[pa.Field]) -> None:
    """Add a method's own columns to a table, after the common ones.

    A table that is not one of the common ones (`predictions`) is made by this call.

    Args:
        method: The subcommand that fills them.
        table: The table's name.
        columns: What `column` gives.

    Raises:
        ValueError: A name is taken.
    """
    added = list(columns)
    names = [item.name for item in (*_COLUMNS.get(table, []), *added)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{table}: columns named twice: {', '.join(twice)}")
    _extensions[method, table] = added


def table_schema(table: str, method: str = "") -> pa.Schema:
    """Give a table's Arrow schema.

    Args:
        table: `trials`, `results`, `baselines`, `summary`, `prompts`, or one that the method registered.
        method: The subcommand, whose own columns come last.

    Raises:
        KeyError: There is no such table.
    """
    own = _extensions.get((method, table), [])
    if not own and table not in _COLUMNS:
        raise KeyError(f"{table}: no such table; there are {', '.join(_COLUMNS)}")
    return pa.schema([*_COLUMNS.get(table, []), *own])


def validate(table: str, data: pd.DataFrame | pa.Table, method: str = "") -> pa.Table:
    """Bring a table into its fixed form: order, types, and null kept apart from NaN.

    Columns that may be null and are missing become null. NaN stays NaN, also out of numpy columns.

    Args:
        table: The table's name.
        data: A frame or an Arrow table.
        method: The subcommand.

    Returns:
        An Arrow table with exactly the schema's columns and types.

    Raises:
        RunError: A column is unknown, missing, of another type, or null where a value is required.
    """
    schema = table_schema(table, method)
    columns = _columns_of(data)
    unknown = [name for name in columns if name not in schema.names]
    missing = [item.name for item in schema if item.name not in columns and not item.nullable]
    if unknown or missing:
        problem = f"unknown columns {unknown}" if unknown else f"missing columns {missing}"
        raise RunError(f"{table}: {problem}", f"Columns are fixed: {', '.join(schema.names)}.")
    length = len(data)
    arrays = [_fit(table, item, columns.get(item.name), length) for item in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _columns_of(data: pd.DataFrame | pa.Table) -> dict[str, _Values]:
    if isinstance(data, pa.Table):
        return {name: data.column(name) for name in data.column_names}
    return {str(name): data[name] for name in data.columns}


def _fit(table: str, item: pa.Field, values: "_Values | None", length: int) -> pa.ChunkedArray | pa.Array:
    """Bring one column to its type."""
    if values is None:
        return pa.nulls(length, item.type)
    try:
        fitted = (_from_series(values, item.type) if isinstance(values, pd.Series) else values).cast(item.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise RunError(
            f"{table}.{item.name}: the values do not fit {item.type}: {error}", "Fill the column with that type."
        ) from error
    if not item.nullable and fitted.null_count:
        row = pc.index(pc.is_null(fitted), pa.scalar(True)).as_py()
        raise RunError(f"{table}.{item.name}: null in row {row}", "This column needs a value in every row.")
    return fitted


def _from_series(series: "pd.Series[Any]", kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Turn a pandas column into Arrow without making NaN into null, as pandas' own conversion does."""
    if isinstance(series.dtype, np.dtype) and series.dtype.kind in "fiub":
        return pa.array(series.to_numpy(), from_pandas=False)
    if series.dtype == object:
        return pa.array(list(series), type=kind, from_pandas=not pa.types.is_floating(kind))
    return pa.array(series, from_pandas=True)
