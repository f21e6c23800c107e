"""What a page says of a run, as plain data: made of tables and manifest alone, so it is the same every time."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechinterp_cli.report.cells import missing, number
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.page.pack import packed, plain, row_count
from mechinterp_cli.report.page.prompts import prompt_content
from mechinterp_cli.report.shapes import Picture
from mechinterp_cli.report.view import View, proof_notes
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

LISTED = 100
"""Rows of a table of the strongest results, at least."""
MAX_ROWS = 120_000
"""Rows of data in all charts of a run together; the pictures beyond are named and left to `figures/`."""
COLUMN_NAMES = {
    "label": "where", "ci_low": "interval from", "ci_high": "interval to", "p_adjusted": "adjusted p",
    "normalized": "normalised effect", "n": "n", "kv_head": "key/value head",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class PageSource:
    """A run, as a page is made of it."""

    manifest: Manifest
    view: View
    tables: Mapping[str, pd.DataFrame]
    """`prompts`, and what single prompts' effects are read from (`prompts.USES`), as far as they are there."""
    config: str
    """The YAML file as it was given."""


def run_content(source: PageSource, pictures: Sequence[tuple[str, Picture]]) -> dict[str, Any]:
    """Everything that the page says of one run.

    Args:
        source: The run.
        pictures: The view's.
    """
    manifest, answer = source.manifest, source.view.answer()
    level = (manifest.config.get("stats") or {}).get("ci")
    return {
        "title": show_text(manifest.display.get("title", manifest.name)),
        "name": manifest.name,
        "asked": list(_asked(manifest)),
        "answer": answer,
        "interval": ""
        if missing(level) or "[" not in answer
        else f"In brackets: the {100 * number(level):g} % interval.",
        "figures": list(_figures(pictures)),
        "tables": [_table(title, rows) for title, rows in source.view.tables(LISTED) if rows],
        "prompts": prompt_content(manifest, source.tables),
        "warnings": [show_text(words) for words in manifest.warnings],
        "proof": proof_notes(manifest.engine),
        "repeat": _repeat(manifest),
        "surroundings": list(_surroundings(manifest)),
        "config": source.config,
        "overrides": list(manifest.overrides),
    }


def _asked(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What was asked, as (what, words)."""
    config, model, task = manifest.config, manifest.model, manifest.task
    dropped = len(task.get("dropped") or ())
    left = f", {dropped} dropped" if dropped else ""
    yield "task", f"{task.get('name', '')}: {counted(int(task.get('prompts') or 0), 'prompt')}{left}"
    moments = model.get("checkpoints")
    along = f", {counted(len(moments), 'checkpoint')}" if moments else ""
    kind = f"{model['dtype']} on {model['device']}" if model.get("dtype") and model.get("device") else ""
    revision = "" if moments else str(model.get("revision") or "")
    yield "model", ", ".join(filter(None, (str(model.get("id", "")) + along, revision, kind)))
    yield "method", f"{manifest.subcommand}: {manifest.display.get('title', manifest.name)}"
    if manifest.subcommand != "probe" or (config.get("probe") or {}).get("causal"):
        yield "metrics", ", ".join(map(str, config.get("metrics") or ()))
    if manifest.display.get("scale"):
        yield "scale", manifest.display["scale"]


def _figures(pictures: Sequence[tuple[str, Picture]]) -> Iterator[dict[str, Any]]:
    """Every picture's specification with its data; those that are too much are named alone."""
    total = 0
    for name, picture in pictures:
        spec = picture.spec()
        rows = row_count(spec)
        title = _title(spec) or name
        if total + rows > MAX_ROWS:
            yield {"name": name, "title": title, "rows": rows}
            continue
        total += rows
        yield {"name": name, "title": title, "rows": rows, **packed(spec)}


def _title(spec: Mapping[str, Any]) -> str:
    """A picture's title on one line."""
    title = spec.get("title") or ""
    words = title.get("text", "") if isinstance(title, Mapping) else title
    return " ".join(words) if isinstance(words, list) else str(words)


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A table without the columns that hold nothing."""
    names = [name for name in rows[0] if name != "table" and any(not missing(row[name]) for row in rows)]
    cells = [[_cell(row[name]) for name in names] for row in rows]
    return {
        "title": title,
        "columns": [COLUMN_NAMES.get(name, name.replace("_", " ")) for name in names],
        "rows": cells,
    }


def _cell(value: Any) -> Any:
    if missing(value):
        return None
    return show_text(value) if isinstance(value, str) else plain(value.item() if hasattr(value, "item") else value)


def _repeat(manifest: Manifest) -> list[tuple[str, str]]:
    """Commands, as (what for, command)."""
    overrides = "".join(f" --set {shlex.quote(text)}" for text in manifest.overrides)
    return [
        ("As it was run", shlex.join(manifest.command)),
        ("The same with the config below", f"mechinterp {manifest.subcommand} config.yaml{overrides}"),
        ("From the run directory, compared number by number", "mechinterp reproduce RUN"),
    ]


def _surroundings(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What the numbers were made with, as (what, words)."""
    yield "mechinterp", manifest.mechinterp_version
    yield "versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    git = manifest.git or {}
    if git.get("commit"):
        yield "commit", f"{git['commit']}{', with uncommitted changes' if git.get('dirty') else ''}"
    yield "machine", ", ".join(f"{name} {value}" for name, value in manifest.hardware.items())
    yield "seeds", ", ".join(f"{name} {seed}" for name, seed in manifest.seeds.items())
    yield "started", manifest.started
    yield "config sha256", manifest.config_sha256
    if digest := manifest.task.get("sha256"):
        yield "prompts sha256", str(digest)
