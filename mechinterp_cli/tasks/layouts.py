"""What the columns of a prompt file mean: this project's own layout and two public ones."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.items import PromptItem
from mechinterp_cli.tasks.reading import Row, Rows

_SPAN = "span_"
_OWN = ("clean", "corrupt", "answer", "wrong_answer", "group", "cluster", "template", "label", "spans")
_REQUIRED = ("clean", "answer")
_TOKEN_IDS: Mapping[str, str] = {
    "clean": "clean",
    "corrupted": "corrupt",
    "correct_idx": "answer",
    "incorrect_idx": "wrong_answer",
}
"""EAP-IG's columns; it has others for some tasks, which are left out."""
_ANSWER_LISTS: Mapping[str, str] = {
    "clean": "clean",
    "corrupt": "corrupt",
    "answers": "answer",
    "wrong_answers": "wrong_answer",
}
"""auto-circuit's keys."""


def items_of(rows: Rows) -> list[tuple[str, PromptItem]]:
    """Read a file's rows as prompts, in whichever of the three layouts they are.

    Args:
        rows: The file.

    Raises:
        UserError: A column is missing or unknown, or a value is not what it must be; the message names the row.
    """
    return [(where, _item(where, _translated(where, row), rows)) for where, row in rows.rows]


def _translated(where: str, row: Row) -> dict[str, Any]:
    if "answer" in row:
        return dict(row)
    if "correct_idx" in row:
        ids = {key: _token_ids(row[key], f"{where}: {key}") for key in ("correct_idx", "incorrect_idx") if key in row}
        return _renamed({**row, **ids}, _TOKEN_IDS)
    if "answers" in row:
        return _renamed(row, _ANSWER_LISTS)
    return dict(row)


def _renamed(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: row[theirs] for theirs, ours in names.items() if theirs in row}


def _token_ids(cell: Any, where: str) -> Any:
    """A token id, or a list of them, as it stands in a CSV cell."""
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except (json.JSONDecodeError, RecursionError):
        raise UserError(f"{where} {cell!r} is no token id", "Give a number, or a list such as [5, 7].") from None


def _item(where: str, row: dict[str, Any], rows: Rows) -> PromptItem:
    for column in _REQUIRED:
        if column not in row:
            raise _missing(where, column, row)
    for column in row:
        if column not in _OWN and not column.startswith(_SPAN):
            raise _unknown(where, column)
    spans = {**_object(row.get("spans", {})), **_span_columns(row)}
    fields = {key: value for key, value in row.items() if key in _OWN and not _absent(key, value, rows)}
    try:
        return PromptItem.model_validate({**fields, "spans": spans})
    except ValidationError as error:
        raise _invalid(where, error) from None


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {"spans": value}


def _absent(column: str, value: Any, rows: Rows) -> bool:
    """Whether an optional value is left out: null, or in CSV, which has no null, an empty cell."""
    return column not in _REQUIRED and (value is None or (rows.kind == "csv" and value == ""))


def _span_columns(row: Row) -> dict[str, Any]:
    columns = {key.removeprefix(_SPAN): value for key, value in row.items() if key.startswith(_SPAN)}
    return {name: value for name, value in columns.items() if value not in (None, "")}


def _missing(where: str, column: str, row: Row) -> UserError:
    found = ", ".join(row) or "none"
    remedy = "Name it so in the first row." if "clean" in row or column == "clean" else "Add it."
    return UserError(f"{where}: column {column!r} is missing; there are {found}", remedy)


def _unknown(where: str, column: str) -> UserError:
    near = difflib.get_close_matches(column, _OWN, n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(_OWN)} and {_SPAN}NAME; remove it."
    return UserError(f"{where}: column {column!r} is unknown", remedy)


def _invalid(where: str, error: ValidationError) -> UserError:
    problem = error.errors()[0]
    return UserError(f"{where}: {_place(problem['loc'])}: {problem['msg']}, got {problem['input']!r}", "Correct it.")


def _place(location: Sequence[int | str]) -> str:
    return str(location[0]) if location else "row"
