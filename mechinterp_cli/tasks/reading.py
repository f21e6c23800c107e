"""Files of prompts as rows or pieces: what is read, and the line it stood in. Nothing here knows what it means."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mechinterp_cli.errors import UserError

Row = Mapping[str, Any]
Unit = Literal["line", "paragraph", "file"]
_LARGEST = 256 * 2**20
"""Bytes; no file of prompts comes near, and what does is something else."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file: what an error calls each one, and its columns. `kind` is csv, jsonl or json."""

    name: str
    kind: str
    rows: tuple[tuple[str, Row], ...]


def read_rows(path: str, key: str = "task.file") -> Rows:
    """Read a CSV, JSONL or JSON file.

    A byte-order mark and either line ending are accepted.

    Args:
        path: The file.
        key: The config's key that names it.

    Raises:
        UserError: The file cannot be read, is empty, or is malformed; the message names the line.
    """
    kind = Path(path).suffix.lower().lstrip(".")
    readers = {"csv": _csv, "jsonl": _jsonl, "json": _json}
    if kind not in readers:
        raise UserError(f"{key}: {path!r} is no .csv, .jsonl or .json file", "Convert it, or rename it.")
    rows = tuple(readers[kind](_text(path, key, "a .csv, .jsonl or .json file"), path))
    if not rows:
        raise UserError(f"{path}: has no prompts", "Give it at least one row.")
    return Rows(path, kind, rows)


def read_pieces(path: str, unit: Unit) -> list[tuple[str, str]]:
    """Read a text file and take it apart.

    A byte-order mark and either line ending are accepted; line endings become single line feeds. What is blank is
    left out. Blank lines separate paragraphs. Line feeds at a piece's end are no part of it.

    Args:
        path: The file.
        unit: What one piece is.

    Returns:
        For each piece, what an error calls it (file and line of its beginning), and its text.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or is blank; the message names the line.
    """
    text = _text(path, "task.path", "a text file").replace("\r\n", "\n")
    pieces = [(f"{path} line {line}", piece) for line, piece in _CUTS[unit](text)]
    if not pieces:
        raise UserError(f"{path}: has no text", "Give it at least one line.")
    return pieces


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not splitlines: that also splits at form feeds, U+2028 and others.
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    begins, paragraph = 0, list[str]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if line.strip():
            begins = begins if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield begins, "\n".join(paragraph)
            paragraph = []


def _whole(text: str) -> Iterator[tuple[int, str]]:
    if text.strip():
        yield 1, text.rstrip("\n")


_CUTS: Mapping[Unit, Callable[[str], Iterator[tuple[int, str]]]] = {
    "line": _lines,
    "paragraph": _paragraphs,
    "file": _whole,
}


def _text(path: str, key: str, wanted: str) -> str:
    file = Path(path)
    if not file.is_file():
        state = "is not an ordinary file" if file.exists() else "does not exist"
        raise UserError(f"{key}: {path!r} {state}", f"Give the path of {wanted}.")
    try:
        if file.stat().st_size > _LARGEST:
            raise UserError(f"{path}: is larger than {_LARGEST >> 20} MiB", "Split it.")
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        cause = f"{path} line {line}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8"
        raise UserError(cause, "Save the file as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{key}: {path!r} cannot be read: {error.strerror}", "Check its permissions.") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path} line {line}: holds a NUL character", "Take it out; is it a text file?")
    return text


def _csv(text: str, path: str) -> Iterator[tuple[str, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    before = 0
    try:
        for cells in reader:
            where, before = f"{path} line {before + 1}", reader.line_num
            if not cells:
                continue
            if header is None:
                header = _header(cells, where)
                continue
            _check_width(cells, header, where)
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}", "Check the quotes in this line.") from None


def _header(cells: list[str], where: str) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise UserError(f"{where}: column {twice[0]!r} stands twice", "Rename or remove one of them.")
    return cells


def _check_width(cells: list[str], header: list[str], where: str) -> None:
    if len(cells) != len(header):
        cause = f"{where}: has {len(cells)} cells and the header has {len(header)}"
        raise UserError(cause, 'Put texts that hold a comma into quotes: "When Mary, ...".')


def _jsonl(text: str, path: str) -> Iterator[tuple[str, Row]]:
    # Not splitlines: that also splits at U+2028 and others, which may stand inside JSON strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, _object(_parse(line, where), where)


def _json(text: str, path: str) -> Iterator[tuple[str, Row]]:
    if not text.strip():
        return
    data = _parse(text, path)
    if isinstance(data, dict) and "prompts" in data:
        data = data["prompts"]
    if not isinstance(data, list):
        raise UserError(f"{path}: is no list of prompts", 'Write [{"clean": ...}, ...] or {"prompts": [...]}.')
    for i, row in enumerate(data):
        where = f"{path} prompts[{i}]"
        yield where, _object(row, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, where))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if "\n" in text else f"column {error.colno}"
        raise UserError(f"{where}: is not JSON at {place}: {error.msg}", "Correct it.") from None
    except (RecursionError, ValueError) as error:
        # Nesting beyond Python's stack, or an integer of thousands of digits.
        raise UserError(f"{where}: is not JSON that can be read: {error}", "Correct it.") from None


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise UserError(f"{where}: key {twice[0]!r} stands twice in one object", "Remove one of them.")
    return dict(pairs)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no object", 'Write {"clean": ..., "answer": ...}.')
    return row
