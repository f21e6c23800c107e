"""Names and types of every table's columns, in one place.

A method adds its own columns with `register_columns`, beside the code that fills them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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


def texts(*names: str, required: bool = False) -> list[pa.Field]:
    """Columns of text."""
    return [column(name, _TEXT, required=required) for name in names]


def indices(*names: str, required: bool = False) -> list[pa.Field]:
    """Columns of whole numbers, 32 bit."""
    return [column(name, _INDEX, required=required) for name in names]


def reals(*names: str) -> list[pa.Field]:
    """Columns of float64 numbers."""
    return [column(name, _REAL) for name in names]


_SITE = [
    column("label", _TEXT),
    column("site", _TEXT),
    column("layer", _INDEX),
    column("head", _INDEX),
    column("neuron", _INDEX),
    column("position", _INDEX),
    column("span", _TEXT),
]

_CHECKPOINT = [column("checkpoint", _TEXT), column("tokens_seen", pa.int64())]
"""Of every table but `prompts`: which moment of training a row is of, where the config names several."""

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
        *_CHECKPOINT,
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
        *_CHECKPOINT,
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
        *_CHECKPOINT,
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
        column("cluster_low", _REAL),
        column("cluster_high", _REAL),
        column("p", _REAL),
        column("p_method", _TEXT),
        column("p_adjusted", _REAL),
        column("family", _TEXT),
        column("verdict", _TEXT),
        column("status", _TEXT),
        *_CHECKPOINT,
    ],
    # One row per prompt x stream: enough to recompute any row of results with transformers alone.
    "prompts": [
        column("prompt", _INDEX, required=True),
        column("stream", _TEXT, required=True),
        column("text", _TEXT, required=True),
        column("token_ids", _TOKENS, required=True),
        column("tokens", pa.list_(_TEXT), required=True),
        # JSON: span name to positions. The names differ from task to task.
        column("spans", _TEXT),
        column("answer", _TEXT),
        column("answer_ids", _TOKENS),
        column("wrong_answer", _TEXT),
        column("wrong_answer_ids", _TOKENS),
        column("group", _TEXT),
        column("template", _TEXT),
        column("cluster", _TEXT),
    ],
}

TableData: TypeAlias = pa.Table | pd.DataFrame | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What can be brought into a table's form."""

_KEYS: dict[str, tuple[str, ...]] = {
    "trials": ("checkpoint", "trial", "edit"),
    "prompts": ("prompt", "stream"),
    "baselines": ("checkpoint", "prompt", "stream", "metric", "draw"),
    "results": ("checkpoint", "trial", "prompt", "metric", "draw"),
    "summary": ("checkpoint", "trial", "metric", "group", "aggregate"),
}
PARQUET_ONLY = frozenset(
    {"trials", "baselines", "prompts", "patterns", "words", "predictions", "edges", "members", "evaluations"}
)
"""Tables that are never written as CSV: for looking things up, not for reading."""

_extensions: dict[tuple[str, str], list[pa.Field]] = {}


@dataclass(frozen=True)
class Standing:
    """A table that stands for a method's runs where two are compared, in place of `summary`."""

    table: str
    metric: str
    """The column that says what was measured."""
    site: str
    """What kind of place every row is of; empty where the column `site` says it."""
    label: str
    """The place in words, a format of the row's columns: `head {layer}.{head}`."""
    value: str = "value"
    """The column that holds the number."""
    only: Mapping[str, str | None] = field(default_factory=dict)
    """Which rows stand for the run: column to what it holds, None for null."""


_standing: dict[str, Standing] = {}

STATUSES = ("ok", "trivial", "undefined", "nan")
"""What `results.status` may be: computed; known to be 0 and not computed; no normalised value; NaN in the model."""


_INFERRED: dict[str, frozenset[str]] = {}
"""By table what its method infers from the table's numbers."""


def register_columns(
    method: str, table: str, columns: Iterable[pa.Field], keys: Sequence[str] = (), inferred: Sequence[str] = ()
) -> None:
    """Add a method's own columns to a table, after the common ones.

    A table that is not one of the common ones (`predictions`) is made by this call; it has a checkpoint's columns, too.

    Args:
        method: The subcommand that fills them.
        table: The table's name.
        columns: What `column` gives.
        keys: For a table that is made: what names a row, beside the checkpoint.
        inferred: Columns that are no measurements, and that rounding alone decides where numbers are next to nothing:
            correlations, places in an order.

    Raises:
        ValueError: A name is taken, or a column that is inferred is not there.
    """
    added = [*columns, *(() if table in _COLUMNS else _CHECKPOINT)]
    names = [item.name for item in (*_COLUMNS.get(table, []), *added)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{table}: columns named twice: {', '.join(twice)}")
    if lacking := sorted({*inferred} - {*names}):
        raise ValueError(f"{table}: lacks {', '.join(lacking)}")
    _extensions[method, table] = added
    _INFERRED[table] = _INFERRED.get(table, frozenset()) | frozenset(inferred)
    if table not in _COLUMNS:
        _KEYS[table] = ("checkpoint", *keys)


def register_standing(method: str, standing: Standing) -> None:
    """Say which table stands for a method's runs; its columns are registered before.

    Args:
        method: The subcommand.
        standing: The table, and how its columns are read. Without a column `status` every number is `ok`.

    Raises:
        ValueError: The table has no keys, or its columns are not those that are named.
    """
    schema = table_schema(standing.table, method)
    named = (standing.metric, standing.value, *standing.only, *([] if standing.site else ["site"]))
    lacking = [name for name in named if name not in schema.names]
    if lacking or standing.metric not in table_keys(standing.table):
        raise ValueError(f"{standing.table}: lacks {', '.join(lacking) or f'the key {standing.metric}'}")
    _standing[method] = standing


def standing_of(method: str) -> Standing | None:
    """The table that stands for a method's runs; None where it is `summary`."""
    return _standing.get(method)


def table_keys(table: str) -> tuple[str, ...]:
    """What names a row of a table; none for a table that nobody registered."""
    return _KEYS.get(table, ())


def inferred_columns(table: str) -> frozenset[str]:
    """What a table's methods infer from its numbers; not those that every table may have, such as `p`."""
    return _INFERRED.get(table, frozenset())


def keyed_tables() -> tuple[str, ...]:
    """Every table whose rows have a name."""
    return tuple(_KEYS)


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


def validate(table: str, data: TableData, method: str = "") -> pa.Table:
    """Bring a table into its fixed form: order, types, and null kept apart from NaN.

    Columns that may be null and are missing become null. NaN stays NaN, also out of numpy columns; None and what a
    masked array masks are null.

    Args:
        table: The table's name.
        data: An Arrow table, a frame, a mapping of column names to arrays, or a list of rows.
        method: The subcommand.

    Returns:
        An Arrow table with exactly the schema's columns and types.

    Raises:
        RunError: A column is unknown, missing, of another type or length, or null where a value is required.
    """
    schema = table_schema(table, method)
    columns, length = _columns_of(data)
    unknown = [name for name in columns if name not in schema.names]
    missing = [item.name for item in schema if item.name not in columns and not item.nullable and length]
    if unknown or missing:
        problem = f"unknown columns {unknown}" if unknown else f"missing columns {missing}"
        raise RunError(f"{table}: {problem}", f"Columns are fixed: {', '.join(schema.names)}.")
    arrays = [_fit(table, item, columns.get(item.name), length) for item in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _columns_of(data: TableData) -> tuple[dict[str, Any], int]:
    """Give the columns by name, and how many rows there are."""
    if isinstance(data, pa.Table):
        return {name: data.column(name) for name in data.column_names}, data.num_rows
    if isinstance(data, pd.DataFrame):
        return {str(name): data[name] for name in data.columns}, len(data)
    if isinstance(data, Mapping):
        return dict(data), max((len(values) for values in data.values()), default=0)
    names = dict.fromkeys(name for row in data for name in row)
    return {name: [row.get(name) for row in data] for name in names}, len(data)


def _fit(table: str, item: pa.Field, values: Any, length: int) -> pa.ChunkedArray | pa.Array:
    """Bring one column to its type."""
    if values is None:
        return pa.nulls(length, item.type)
    try:
        fitted = _to_arrow(values, item.type).cast(item.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise RunError(
            f"{table}.{item.name}: the values do not fit {item.type}: {error}", "Fill the column with that type."
        ) from error
    if len(fitted) != length:
        raise RunError(f"{table}.{item.name}: {len(fitted)} values for {length} rows", "Fill every row.")
    if not item.nullable and fitted.null_count:
        row = pc.index(pc.is_null(fitted), pa.scalar(True)).as_py()
        raise RunError(f"{table}.{item.name}: null in row {row}", "This column needs a value in every row.")
    return fitted


def _to_arrow(values: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """Turn any column into Arrow without making NaN into null, as pandas' own conversion does."""
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if isinstance(values, pd.Series):
        if not isinstance(values.dtype, np.dtype):
            return pa.array(values, from_pandas=True)
        values = values.to_numpy()
    if isinstance(values, np.ma.MaskedArray):
        return pa.array(values.data, mask=np.ma.getmaskarray(values), from_pandas=False)
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiub":
        return pa.array(values, from_pandas=False)
    # Object columns: only where text or lists are wanted does a float NaN mean that there is nothing.
    return pa.array(list(values), type=kind, from_pandas=not pa.types.is_floating(kind))
