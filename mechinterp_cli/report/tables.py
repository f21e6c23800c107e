"""Tables for the terminal: columns that give way where it is narrow, text that cannot act."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mechinterp_cli.report.labels import show_text

BREAK = 24
"""Longer cells of a column that may be broken mostly do not claim more room than this."""


@dataclass(frozen=True)
class Column:
    """How a column is shown."""

    rank: int = 0
    """Where the terminal is too narrow for all, lower ranks are shown first; rank 0 always is."""
    left: bool = False
    """Text, to the left."""
    broken: bool = False
    """Whether its cells may be broken into lines."""
    room: int = BREAK
    """Letters that cells claim before columns of higher ranks, where they may be broken; they may get more."""
    together: bool = False
    """Whether the columns of its rank that are so are shown all or none: one alone would mislead."""


def text_table(
    rows: Sequence[Mapping[str, str]],
    columns: Mapping[str, Column],
    *,
    lines: Sequence[str],
    width: int,
    plain: bool,
    notes: Mapping[str, str] | None = None,
    whole: str = "",
) -> Group:
    """A table below its title.

    Args:
        rows: Cells by column; columns that are empty throughout are left out.
        columns: Names in order.
        lines: What stands above: a title, and what it needs.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
        notes: What columns mean, by name; below the table, of those that are shown.
        whole: Where the columns are that there is no room for; below the table, with their names.
    """
    shown = [{name: show_text(row.get(name, ""), plain=plain) for name in columns} for row in rows]
    table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD, show_edge=plain)
    names = _fitting(shown, columns, width)
    for name in names:
        look = columns[name]
        title = Text(show_text(name, plain=plain))
        table.add_column(title, justify="left" if look.left else "right", no_wrap=not look.broken, overflow="fold")
    for row in shown:
        table.add_row(*[Text(row[name]) for name in names])
    said = "; ".join(f"{show_text(name)}: {words}" for name, words in (notes or {}).items() if name in names)
    below = [line(said, plain, "dim")] if said else []
    narrow = [name for name in columns if name not in names and any(row[name] for row in shown)]
    below += [line(f"no room for {', '.join(narrow)}: {whole}", plain, "dim")] if narrow and whole else []
    return Group(*[line(words, plain, "" if at else "bold") for at, words in enumerate(lines)], table, *below)


def _fitting(rows: Sequence[Mapping[str, str]], columns: Mapping[str, Column], width: int) -> list[str]:
    """Names of the columns that there is room for, in their order."""
    filled = [name for name in columns if any(row[name] for row in rows)]
    room, chosen = width - 1, set()
    for block in _blocks(filled, columns):
        needed = sum(_needed(name, rows, columns[name]) for name in block)
        if needed <= room or columns[block[0]].rank == 0:
            chosen.update(block)
            room -= needed
    return [name for name in filled if name in chosen]


def _blocks(names: Sequence[str], columns: Mapping[str, Column]) -> list[list[str]]:
    """Columns by rank, those that come together in one list."""
    blocks: list[list[str]] = []
    ranks: dict[int, list[str]] = {}
    for name in sorted(names, key=lambda name: columns[name].rank):
        look = columns[name]
        if look.together and look.rank in ranks:
            ranks[look.rank].append(name)
            continue
        blocks.append([name])
        if look.together:
            ranks[look.rank] = blocks[-1]
    return blocks


def _needed(name: str, rows: Sequence[Mapping[str, str]], look: Column) -> int:
    """Room for a column, with a border and a blank on either side."""
    longest = max(cell_len(name), *(cell_len(row[name]) for row in rows))
    return 3 + (min(longest, look.room) if look.broken else longest)


def line(words: str, plain: bool, style: str = "") -> Text:
    """A sentence, styled where colour is wanted."""
    return Text(show_text(words, plain=plain), style="" if plain else style)
