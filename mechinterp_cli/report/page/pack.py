"""Data as a page carries it: rows as columns, numbers as short as they may be, text that cannot act."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 6
"""Significant digits of a number on the page; the tables have all."""


def inert(data: object) -> str:
    """JSON that can stand inside a `<script>` element: no text in it can end the element, and all of it is ASCII.

    Args:
        data: Mappings, lists, texts, numbers; no NaN.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def packed(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A Vega-Lite specification with its data taken out and written column by column.

    Args:
        spec: With data that stand in it (`values`) or by name (`datasets`).

    Returns:
        `spec`, whose data are named, and `data`: by name, `fields` and `columns`.
    """
    found: dict[str, dict[str, Any]] = {}
    named = {name: rows for name, rows in spec.get("datasets", {}).items()}
    bare = _without_values({key: value for key, value in spec.items() if key != "datasets"}, named)
    for name, rows in named.items():
        found[name] = columns_of(rows)
    return {"spec": bare, "data": found}


def row_count(spec: Mapping[str, Any]) -> int:
    """How many rows of data a specification has."""
    named: dict[str, Any] = dict(spec.get("datasets", {}))
    _without_values({key: value for key, value in spec.items() if key != "datasets"}, named)
    return sum(len(rows) for rows in named.values())


def _without_values(part: Any, named: dict[str, Any]) -> Any:
    """The part with `{"values": rows}` as `{"name": ...}`, the rows put into `named`."""
    if isinstance(part, Mapping):
        if isinstance(part.get("data"), Mapping) and isinstance(part["data"].get("values"), list):
            name = f"rows {len(named)}"
            named[name] = part["data"]["values"]
            part = {**part, "data": {"name": name}}
        return {key: _without_values(value, named) for key, value in part.items()}
    if isinstance(part, list):
        return [_without_values(item, named) for item in part]
    return part


def columns_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows as `fields` and `columns`; what a row lacks is null."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    return {"fields": fields, "columns": [[plain(row.get(name)) for row in rows] for name in fields]}


def plain(value: Any) -> Any:
    """A cell as JSON holds it: NaN is null, real numbers are rounded to `DIGITS` significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
