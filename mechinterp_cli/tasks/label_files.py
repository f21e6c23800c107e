"""What the columns of a file of labelled texts mean; nothing here knows a tokenizer."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.labelled import check_labels_differ
from mechinterp_cli.tasks.prompts import Label
from mechinterp_cli.tasks.reading import Row, Rows
from mechinterp_cli.tasks.spans import find_text
from mechinterp_cli.tasks.tokenise import Range
from mechinterp_cli.tasks.words import word_ranges

Kind = Literal["classes", "numbers"]
Marks = tuple[str, str]
_COLUMNS = ("text", "label", "labels", "group", "target", "target_start", "target_end")
_CHARACTERS = re.compile(r"(\d{1,9}):(\d{1,9})")
_MOST_CLASSES = 10
"""So many different whole numbers are taken for classes, and more for numbers."""


@dataclass(frozen=True)
class LabelledText:
    """A row of the file: a text and its label, or the labels of its words."""

    where: str
    """What an error calls it, such as `reviews.csv line 7`."""
    text: str
    labels: tuple[Label, ...]
    """One, or one for each word."""
    group: str
    target: Range | None
    """Characters of the text."""


@dataclass(frozen=True)
class LabelledTexts:
    """The rows of a file."""

    per_word: bool
    texts: tuple[LabelledText, ...]


def labelled_texts(rows: Rows, kind: Kind | None = None, marks: Marks | None = None) -> LabelledTexts:
    """Read a file's rows as labelled texts.

    Args:
        rows: The file.
        kind: Whether labels are names of classes or numbers. None: numbers where all are, unless they are at most 10
            different whole ones, which are classes.
        marks: What stands before and after the target in every text, and is taken out of it.

    Raises:
        UserError: A column is missing or unknown, a label is empty or none, labels do not match the words, all labels
            are the same, they are the texts, or a target is not in its text; the message names the file and the row.
    """
    column = _label_column(rows)
    cells = [_cells(where, row, column) for where, row in rows.rows]
    numeric = kind == "numbers" or (kind is None and _look_like_numbers([c for row in cells for c in row]))
    texts = tuple(
        _text(where, row, tuple(_label(cell, where, numeric=numeric) for cell in row_cells), marks)
        for (where, row), row_cells in zip(rows.rows, cells, strict=True)
    )
    if column == "labels":
        for text in texts:
            _check_words(text)
    else:
        _check_labels_are_labels(rows, texts)
    check_labels_differ([label for text in texts for label in text.labels], rows.name)
    return LabelledTexts(column == "labels", texts)


def _label_column(rows: Rows) -> str:
    """`label` or `labels`, the same in every row; checks all columns on the way."""
    found = ""
    for where, row in rows.rows:
        _check_columns(where, row)
        here = [name for name in ("label", "labels") if name in row]
        if len(here) == 2:
            raise UserError(f"{where}: has columns 'label' and 'labels'", "A text has a label, or its words have.")
        if found and here[0] != found:
            cause = f"{where}: has {here[0]!r}, and {rows.rows[0][0]} has {found!r}"
            raise UserError(cause, "Label the text, or its words, in every row.")
        found = here[0]
    return found


def _check_columns(where: str, row: Row) -> None:
    for column in row:
        if column not in _COLUMNS:
            near = difflib.get_close_matches(column, _COLUMNS, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(_COLUMNS)}; remove it."
            raise UserError(f"{where}: column {column!r} is unknown", remedy)
    for column, present in (("text", "text" in row), ("label", "label" in row or "labels" in row)):
        if not present:
            cause = f"{where}: column {column!r} is missing; there are {', '.join(row) or 'none'}"
            raise UserError(cause, "A row needs text, and label (or labels, one for each word).")


def _cells(where: str, row: Row, column: str) -> tuple[Any, ...]:
    value = row[column]
    if column == "label":
        return (value,)
    cells = value.split() if isinstance(value, str) else value
    if not isinstance(cells, list):
        raise UserError(f"{where}: labels {value!r} are no list", 'Write ["a", "b"], or "a b" with blanks between.')
    return tuple(cells)


def _look_like_numbers(cells: Sequence[Any]) -> bool:
    # Cells that are none are refused one by one later.
    numbers = [_number(cell) for cell in cells if cell not in (None, "")]
    if any(number is None for number in numbers):
        return False
    found = {number for number in numbers if number is not None}
    return len(found) > _MOST_CLASSES or any(not number.is_integer() for number in found)


def _number(cell: Any) -> float | None:
    """A JSON number, or a text that is one; NaN and infinity are numbers here, and refused as labels."""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float):
        return None
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


def _label(cell: Any, where: str, *, numeric: bool) -> Label:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise UserError(f"{where}: the label is empty", "Give one, or take the row out.")
    if not isinstance(cell, str | int | float):
        raise UserError(f"{where}: label {cell!r} is no text and no number", "Give the name of a class, or a number.")
    number = _number(cell)
    if number is not None and math.isnan(number):
        raise UserError(f"{where}: label {cell!r} is not a number", "Give one, or take the row out.")
    if not numeric:
        return _class(cell)
    if number is None:
        raise UserError(f"{where}: label {cell!r} is no number", "Correct it, or set task.labels to classes.")
    if math.isinf(number):
        raise UserError(f"{where}: label {cell!r} is not finite", "Give a finite number, or take the row out.")
    return number


def _class(cell: str | float) -> str:
    if isinstance(cell, bool):
        return str(cell).lower()
    return cell.strip() if isinstance(cell, str) else f"{cell:.17g}"


def _text(where: str, row: Row, labels: tuple[Label, ...], marks: Marks | None) -> LabelledText:
    text = row["text"]
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"{where}: text {text!r} is {'empty' if text in (None, '') else 'no text'}", "Give it some text."
        )
    target = _target(where, row, text)
    if marks is not None:
        if target is not None:
            raise UserError(f"{where}: the target is given by task.marks and by a column", "Leave out one of them.")
        text, target = _unmarked(where, text, marks)
    return LabelledText(where, text, labels, _group(where, row), target)


def _group(where: str, row: Row) -> str:
    group = row.get("group")
    if group is None or group == "":
        return ""
    if not isinstance(group, str | int):
        raise UserError(f"{where}: group {group!r} is no text", "Give its name, or leave it out.")
    return str(group)


def _target(where: str, row: Row, text: str) -> Range | None:
    given = row.get("target")
    ends = [row.get(name) for name in ("target_start", "target_end")]
    ends = [None if end == "" else end for end in ends]
    if given in (None, "") and ends == [None, None]:
        return None
    if given not in (None, "") and ends != [None, None]:
        raise UserError(f"{where}: the target is given twice", "Give target, or target_start and target_end.")
    if given in (None, ""):
        return _within(where, ends, text)
    if isinstance(given, list):
        return _within(where, given, text)
    if not isinstance(given, str):
        raise UserError(f"{where}: target {given!r} is no text", 'Give "start:end", or a text that occurs once.')
    match = _CHARACTERS.fullmatch(given)
    return _within(where, match.groups(), text) if match else find_text(text, given, f"{where}: target")


def _within(where: str, ends: Sequence[Any], text: str) -> Range:
    """Start and end as characters of the text, given as numbers or, in CSV, as their digits."""
    found = [_index(end) for end in ends]
    start, end = found if len(found) == 2 else (None, None)
    if start is None or end is None:
        shown = " to ".join("nothing" if end is None else repr(end) for end in ends)
        raise UserError(f"{where}: target: {shown or 'nothing'} is no start and end", "Give two whole numbers.")
    if not start < end <= len(text):
        cause = f"{where}: target: characters {start} to {end} are not within 0 to {len(text)} of {text!r}"
        raise UserError(cause, "Give start and end, with the end after the last character.")
    return start, end


def _index(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and number.is_integer() and number >= 0 else None


def _unmarked(where: str, text: str, marks: Marks) -> tuple[str, Range]:
    """The text without its marks, and the characters between them."""
    before, rest = text.split(marks[0], 1) if marks[0] in text else (text, "")
    target, after = rest.split(marks[1], 1) if marks[1] in rest else ("", "")
    if not target.strip() or any(mark in part for mark in marks for part in (before, target, after)):
        cause = f"{where}: {text!r} has not one target between {marks[0]!r} and {marks[1]!r}"
        raise UserError(cause, "Put task.marks around one part of every text.")
    return before + target + after, (len(before), len(before) + len(target))


def _check_words(text: LabelledText) -> None:
    words = [text.text[start:end] for start, end in word_ranges(text.text)]
    if len(words) != len(text.labels):
        counts = " for ".join(
            f"{count} {what}{'' if count == 1 else 's'}"
            for count, what in ((len(text.labels), "label"), (len(words), "word"))
        )
        cause = f"{text.where}: {counts}: {' | '.join(words)}"
        raise UserError(cause, "Words are what blanks separate; give one label for each.")


def _check_labels_are_labels(rows: Rows, texts: Sequence[LabelledText]) -> None:
    labels = [text.labels[0] for text in texts]
    if all(label == text.text.strip() for label, text in zip(labels, texts, strict=True)):
        raise UserError(f"{texts[0].where}: the label is the text itself, in every row", "Give labels of their own.")
    if isinstance(labels[0], str) and len(labels) == len(set(labels)) > 2:
        cause = f"{rows.name}: its {len(labels)} rows have {len(labels)} different labels, such as {labels[0]!r}"
        raise UserError(cause, "Is the column the label? Classes must occur more than once.")
