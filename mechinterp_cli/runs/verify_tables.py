"""Checking the tables of a run: schema, rows, words and keys; read in pieces, so that size does not matter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mechinterp_cli.runs.atomic import FileInfo
from mechinterp_cli.runs.schema import STATUSES, table_keys, table_schema

_CHUNK = 1 << 20
_KEYS = {"trial": "trials", "prompt": "prompts"}
"""A key column, and the table that lists what it may hold."""
_WATCHED = (*_KEYS, "status")
_TOO_LONG = ("results", "sequences")
"""Tables with a row per observation: whether each stands there once is not looked up."""


@dataclass
class _Content:
    """What a Parquet file holds, as far as it is checked."""

    schema: pa.Schema
    rows: int = 0
    values: dict[str, set[Any]] = field(default_factory=dict)
    """The distinct values of the watched columns; null is none."""
    keys: list[pa.RecordBatch] = field(default_factory=list)
    """The columns that name the rows."""

    def twice(self) -> str | None:
        """A row's name that stands there twice, in words; None where each stands there once."""
        if not self.keys:
            return None
        named = pa.Table.from_batches(self.keys)
        counts = named.group_by(named.column_names).aggregate([([], "count_all")])
        if counts.num_rows == named.num_rows:
            return None
        first = counts.filter(pc.greater(counts["count_all"], 1)).slice(0, 1).drop_columns(["count_all"])
        (row,) = first.to_pylist()
        return ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)


def table_problems(run: Path, outputs: Mapping[str, FileInfo], method: str) -> Iterator[tuple[str, str]]:
    """Check every table of a run.

    Args:
        run: The run directory.
        outputs: The files to check, with what is recorded of them; their bytes are as recorded.
        method: The subcommand; its columns are registered.

    Yields:
        File name, and what is wrong with it.
    """
    contents: dict[str, _Content] = {}
    tables = [name for name in outputs if PurePosixPath(name).suffix in (".parquet", ".csv") and "/" not in name]
    for name in sorted(tables, key=lambda name: not name.endswith(".parquet")):
        table = PurePosixPath(name).stem
        try:
            schema = table_schema(table, method)
        except KeyError:
            yield name, f"{method} has no table of this name"
            continue
        if name.endswith(".parquet"):
            content = _read(run / name, () if table in _TOO_LONG else table_keys(table))
            if isinstance(content, str):
                yield name, content
                continue
            contents[table] = content
            problems = [*_schema_differences(content.schema, schema), *_row_problems(content.rows, outputs[name])]
        else:
            problems = list(_csv_problems(run / name, schema, outputs[name], contents.get(table)))
        yield from ((name, problem) for problem in problems)
    for table, content in contents.items():
        yield from ((f"{table}.parquet", problem) for problem in _value_problems(table, content, contents))


def _read(path: Path, keys: Sequence[str]) -> _Content | str:
    """Read a whole Parquet file, page by page with their checksums; or say why that cannot be done."""
    try:
        with path.open("rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            content = _Content(parquet.schema_arrow)
            # A table of an earlier version may lack a key; the others may then name its rows or not.
            named = bool(keys) and all(content.schema.names.count(key) == 1 for key in keys)
            for batch in parquet.iter_batches():
                content.rows += batch.num_rows
                if named:
                    content.keys.append(batch.select(list(keys)))
                for name in set(_WATCHED) & set(batch.schema.names):
                    distinct = pc.unique(batch.column(name)).to_pylist()
                    content.values.setdefault(name, set()).update(value for value in distinct if value is not None)
            return content
    # A file that was made to mislead can break the reader in many ways.
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, MemoryError) as error:
        return f"does not read: {error}"


def _schema_differences(found: pa.Schema, wanted: pa.Schema) -> Iterator[str]:
    if found.equals(wanted, check_metadata=False):
        return
    names = list(found.names)
    yield from (f"column {name} is missing" for name in wanted.names if name not in names)
    yield from (f"column {name} is not in the schema" for name in names if name not in wanted.names)
    for item in wanted:
        if names.count(item.name) != 1:
            continue
        here = found.field(item.name)
        if here.type != item.type:
            yield f"column {item.name} is {here.type}, the schema says {item.type}"
        elif here.nullable != item.nullable:
            yield f"column {item.name}: null is {'allowed' if here.nullable else 'refused'} against the schema"
    if names != wanted.names and sorted(names) == sorted(wanted.names):
        yield "columns stand in another order than in the schema"
    yield from (f"column {name} stands there twice" for name in sorted({n for n in names if names.count(n) > 1}))


def _row_problems(rows: int, info: FileInfo) -> Iterator[str]:
    if info.rows != rows:
        yield f"{rows:,} rows, recorded were {'none' if info.rows is None else f'{info.rows:,}'}"


def _csv_problems(path: Path, schema: pa.Schema, info: FileInfo, twin: _Content | None) -> Iterator[str]:
    try:
        header, rows = _csv_shape(path)
    except OSError as error:
        yield f"cannot be read: {error.strerror or error}"
        return
    if header != ",".join(f'"{name}"' for name in schema.names).encode():
        yield "the first line does not name the columns of the schema"
    yield from _row_problems(rows, info)
    if twin is not None and twin.rows != rows:
        yield f"{rows:,} rows, {path.stem}.parquet has {twin.rows:,}"


def _csv_shape(path: Path) -> tuple[bytes, int]:
    """Give the header and the number of rows below it; line breaks within quotes end no row."""
    with path.open("rb") as file:
        header = file.readline(_CHUNK).rstrip(b"\n")
        rows, quoted = 0, False
        while chunk := file.read(_CHUNK):
            parts = chunk.split(b'"')
            # Every quote changes sides; a doubled one changes twice, around nothing.
            rows += sum(part.count(b"\n") for part in parts[int(quoted) :: 2])
            quoted ^= len(parts) % 2 == 0
    return header, rows


def _value_problems(table: str, content: _Content, contents: Mapping[str, _Content]) -> Iterator[str]:
    """Words that are none, rows that stand there twice, and keys that lead nowhere."""
    unknown = sorted(map(str, content.values.get("status", set()) - {*STATUSES}))
    if unknown:
        yield f"status: {unknown[0]!r} is not one of {', '.join(STATUSES)}"
    if twice := content.twice():
        yield f"this row stands there twice: {twice}"
    for key, home in _KEYS.items():
        if home == table or home not in contents:
            continue
        lost = content.values.get(key, set()) - contents[home].values.get(key, set())
        if lost:
            yield f"{key} {min(lost, key=str)} is not in {home}.parquet"
