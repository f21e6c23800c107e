"""Making the page: of a run that is being written, or of finished runs from their directories."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from mechinterp_cli.errors import RunError
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.page.comparison import comparison_content
from mechinterp_cli.report.page.content import PageSource, run_content
from mechinterp_cli.report.page.prompts import USES
from mechinterp_cli.report.shapes import Picture
from mechinterp_cli.report.view import View, read_view
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.reading import read_manifest
from mechinterp_cli.runs.tables import read_parquet, to_frame

FILE_NAME = "report.html"
NEEDED = ("prompts", *USES)
"""Tables that the page reads beside those of the view."""
MAX_READ = 5_000_000
"""Rows of such a table; a larger one is left out, and the page says so."""


def run_page(
    path: Path,
    manifest: Manifest,
    view: View,
    tables: Mapping[str, pd.DataFrame],
    pictures: Sequence[tuple[str, Picture]] | None = None,
) -> bytes:
    """The page of one run.

    Args:
        path: Its directory, which holds `config.yaml`.
        manifest: Its manifest.
        view: Its view.
        tables: Those of `NEEDED` that there are.
        pictures: The view's, where they have been made already.
    """
    # Altair takes half a second to import, which a run without a page need not wait for.
    from mechinterp_cli.report.page.document import document

    content = _content(path, manifest, view, tables, pictures)
    return document(content["title"], {"runs": [content]})


def _content(
    path: Path,
    manifest: Manifest,
    view: View,
    tables: Mapping[str, pd.DataFrame],
    pictures: Sequence[tuple[str, Picture]] | None,
) -> dict[str, Any]:
    """What the page says of a run; as `run_page`."""
    # As it will be read from the file, so that the page is the same when it is made again.
    manifest = Manifest.from_json(manifest.to_json())
    source = PageSource(manifest, view, tables, _config(path / "config.yaml"))
    return run_content(source, view.pictures if pictures is None else pictures)


def _config(file: Path) -> str:
    try:
        return file.read_text("utf-8", "backslashreplace")
    except OSError as error:
        raise RunError(f"{file}: cannot be read: {error.strerror}", "`mechinterp verify` says what else is.") from error


def page_of_runs(paths: Sequence[Path]) -> bytes:
    """The page of finished runs: several are compared with the first.

    Args:
        paths: Run directories, one at least.

    Raises:
        UserError: One is no run directory, or has nothing to show.
        RunError: A table is damaged, or `config.yaml` is gone.
    """
    from mechinterp_cli.report.page.document import document

    contents = [_finished(path) for path in paths]
    if len(contents) == 1:
        return document(contents[0]["title"], {"runs": contents})
    # A page of one run is the same wherever the run lies.
    contents = [one | {"directory": show_text(path.resolve().name)} for one, path in zip(contents, paths, strict=True)]
    title = f"{len(contents)} runs compared"
    return document(title, {"title": title, "runs": contents, "comparison": comparison_content(paths)})


def _finished(path: Path) -> dict[str, Any]:
    manifest, view, tables = read_view(path)
    return _content(path, manifest, view, tables | read_tables(path, tables), None)


def read_tables(path: Path, known: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables of `NEEDED` that a run has and nobody has read yet."""
    files = {name: path / f"{name}.parquet" for name in NEEDED if name not in known}
    rows = {name: info.rows for name, info in read_manifest(path).outputs.items()}
    there = {name: file for name, file in files.items() if file.exists() and (rows.get(file.name) or 0) <= MAX_READ}
    return {name: to_frame(read_parquet(file)) for name, file in there.items()}


def page_tables(written: Mapping[str, pa.Table]) -> dict[str, pd.DataFrame]:
    """The tables of `NEEDED` among those that a run has just written.

    Args:
        written: By name.
    """
    return {name: to_frame(written[name]) for name in NEEDED if name in written and written[name].num_rows <= MAX_READ}
