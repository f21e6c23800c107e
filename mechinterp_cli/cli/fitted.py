"""Tables of plain data as text: whole and aligned for programs, fitted to the window for a person."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mechinterp_cli.text import visible

_DIGITS = 4
_LAST = 9
"""Rank of columns that nobody ranked."""
_SHORT = 16
"""Letters: shorter text is not broken."""
_BORDER = 3
"""Columns of the window between two of the table."""
Rows = Sequence[Mapping[str, Any]]


def aligned(rows: Rows) -> str:
    """Lay rows out in columns: numbers to the right, text to the left, two blanks between.

    Args:
        rows: All with the same keys; all of them are shown, however wide that is.
    """
    names = list(rows[0]) if rows else []
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    right = [_is_number(rows, name) for name in names]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [names, *cells]
    ]
    return "".join(f"{line}\n" for line in lines)


def fitted(rows: Rows, ranks: Mapping[str, int], *, width: int, plain: bool) -> str:
    """The same for a window: columns that hold nothing, or have no room, are left out; long text is broken.

    What has no room is named below the table. Cells of the first column are broken only where columns that are always
    shown have no room else.

    Args:
        rows: All with the same keys, one at least.
        ranks: By column; those of low rank are shown first, those of rank 0 always.
        width: Columns of the window.
        plain: ASCII only, no colour.
    """
    from rich.console import Console

    from mechinterp_cli.report.tables import Column, text_table

    names = list(rows[0])
    cells = [{name: _cell(row.get(name)) for name in names} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in names}
    always = sum(widths[name] + _BORDER for name in names if ranks.get(name, _LAST) == 0)
    columns = {name: Column(rank=ranks.get(name, _LAST), left=not _is_number(rows, name)) for name in names}
    for name, look in columns.items():
        if look.left and name != names[0] and widths[name] > _SHORT:
            columns[name] = replace(look, broken=True)
        elif look.left and name == names[0] and always > width:
            columns[name] = replace(look, broken=True, room=widths[name])
    table = text_table(cells, columns, lines=(), width=width, plain=plain, whole="a pipe and --json get them")
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=not plain, markup=False, emoji=False, highlight=False)
    console.print(table)
    return buffer.getvalue()


def _is_number(rows: Rows, name: str) -> bool:
    return all(isinstance(row.get(name), int | float | None) for row in rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return visible({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))
