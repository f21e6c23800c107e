r"""Tables on disk: Parquet with page checksums, and CSV that reads back to the same values.

How the CSV files are written: UTF-8, comma, one header line, lines end in LF. Text is always quoted (a quote inside is
doubled; line breaks stand inside the quotes as they are), so `"NA"`, `""`, `"nan"` and `"\r"` are text. Null is an
empty cell without quotes. `nan`, `inf` and `-inf` without quotes are numbers. Numbers have all the digits they need.
`read_csv` reads them back exactly. Elsewhere: Python's `csv` module and pandas with `keep_default_na=False` give every
text exactly, but cannot tell null from "". Tokens may begin with `=`, `+`, `-` or `@`: a spreadsheet takes such a cell
for a formula, so import the file there with all columns as text.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs.atomic import FileInfo, file_info, open_atomic

AUTO_CSV_ROWS = 1_000_000
"""Up to here `auto` writes a table as CSV too: about what a spreadsheet opens, and CSV is several times as large."""
Formats: TypeAlias = Literal["auto"] | Sequence[Literal["parquet", "csv"]]
"""`auto`: Parquet always, CSV up to `AUTO_CSV_ROWS`."""


def chosen_formats(formats: Formats, rows: int) -> Sequence[Literal["parquet", "csv"]]:
    """Which formats a table of so many rows is written in."""
    if formats != "auto":
        return formats
    return ("parquet", "csv") if rows <= AUTO_CSV_ROWS else ("parquet",)


def write_parquet(table: pa.Table, path: Path) -> FileInfo:
    """Write a table as Parquet, atomically, with a checksum in every page.

    Args:
        table: What to write.
        path: Where.

    Returns:
        Hash, size and rows.

    Raises:
        RunError: It cannot be written.
    """
    with open_atomic(path) as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
    return file_info(path, table.num_rows)


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file, checking every page.

    Args:
        path: Which file.
        columns: Which columns; all where None.

    Raises:
        RunError: It is missing, cut off or changed.
    """
    try:
        with path.open("rb") as file:
            return pq.read_table(io.BytesIO(file.read()), columns=columns, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: missing or damaged: {error}", "Run the experiment again.") from error


def to_frame(table: pa.Table) -> pd.DataFrame:
    """Give a table as a frame with Arrow-backed types: null and NaN stay different."""
    frame: pd.DataFrame = table.to_pandas(types_mapper=pd.ArrowDtype)
    return frame


def write_csv(table: pa.Table, path: Path) -> FileInfo:
    """Write a table of plain columns as CSV, atomically; see the module for the form.

    Args:
        table: What to write; no column may hold lists.
        path: Where.

    Returns:
        Hash, size and rows.

    Raises:
        RunError: It cannot be written.
    """
    with open_atomic(path) as file:
        pacsv.write_csv(table, file, pacsv.WriteOptions(quoting_style="needed"))
    return file_info(path, table.num_rows)


def read_csv(path: Path, schema: pa.Schema) -> pa.Table:
    """Read what `write_csv` wrote, to the same values.

    Args:
        path: Which file.
        schema: The table's schema.

    Raises:
        RunError: It is missing, or its cells do not fit the schema.
    """
    convert = pacsv.ConvertOptions(
        column_types=schema,
        include_columns=schema.names,
        strings_can_be_null=True,
        quoted_strings_can_be_null=False,
        null_values=[""],
        true_values=["true"],
        false_values=["false"],
    )
    parsing = pacsv.ParseOptions(newlines_in_values=True)
    try:
        table = pacsv.read_csv(path, parse_options=parsing, convert_options=convert)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: missing or damaged: {error}", "Use the Parquet file beside it.") from error
    return table.cast(schema)
