"""What a page of several runs says of them together: each beside the first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechinterp_cli.errors import UserError
from mechinterp_cli.report.cells import missing
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.page.pack import packed, plain
from mechinterp_cli.runs.compare import Comparison, compare
from mechinterp_cli.runs.sides import Side, differing, read_side

WORST = 10
"""Rows that differ most, of each pair."""
AGREEMENT = {
    "checkpoint": "checkpoint", "estimator": "estimator", "ablation": "ablation", "metric": "metric", "site": "site",
    "column": "compared as", "compared": "rows", "mean_difference": "mean difference",
    "max_difference": "largest difference",
    "pearson": "Pearson", "spearman": "Spearman", "top_overlap": "overlap of the strongest",
    "sign_agreement": "same sign",
}  # fmt: skip
"""Columns of the agreement that are shown, and their names."""


def comparison_content(paths: Sequence[Path]) -> dict[str, Any]:
    """Every later run beside the first.

    Args:
        paths: Run directories, two at least.
    """
    return {"pairs": [_pair(at, paths[0], path) for at, path in enumerate(paths[1:], start=2)]}


def _pair(at: int, first: Path, other: Path) -> dict[str, Any]:
    """One run beside the first, or why that cannot be."""
    title = f"Run {at} (B) beside run 1 (A)"
    try:
        sides = read_side(first), read_side(other)
        found = compare(*sides)
    except UserError as error:
        return {"title": title, "reason": show_text(f"Not compared: {error.cause}")}
    return {"title": title, **_compared(sides, found)}


def _compared(sides: tuple[Side, Side], found: Comparison) -> dict[str, Any]:
    from mechinterp_cli.report.scatter import build_scatter, chart

    spec = chart(build_scatter(found)).to_dict()
    worst = found.worst(WORST)
    tables = [_table("How far they agree", found.agreement, AGREEMENT)]
    tables += [_table("Rows that differ most (B − A)", worst, {name: name for name in worst[0]})] if worst else []
    return {
        "changes": [show_text(change) for change in differing(*sides)],
        "figure": {"name": "scatter", "title": "A against B", "rows": len(found.rows), **packed(spec)},
        "tables": tables,
    }


def _table(title: str, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    """The columns that are there, under their names."""
    there = [name for name in names if any(not missing(row.get(name)) for row in rows)]
    return {
        "title": title,
        "columns": [names[name] for name in there],
        "rows": [[_cell(row.get(name)) for name in there] for row in rows],
    }


def _cell(value: Any) -> Any:
    return None if missing(value) else show_text(value) if isinstance(value, str) else plain(value)
