"""Grids of words that colours stand behind: what a lens reads at every layer, what each token of a prompt counts."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from mechinterp_cli.report.grid import ColourScale
from mechinterp_cli.report.labels import show_text, show_token
from mechinterp_cli.report.tables import line
from mechinterp_cli.report.terminal import shade

LONGEST = 9
"""Letters of a word in a cell."""
LETTER, MARGIN, ROOM = 6.4, 10, 1020
"""Of a picture, in pixels: a letter in a cell, what is beside the word, and all cells beside each other."""
LABEL = 14
"""Letters of a row's name."""


@dataclass(frozen=True, kw_only=True)
class WordPanel:
    """One grid."""

    title: str
    row_title: str
    rows: tuple[str, ...]
    """Distinct; the first is drawn at the top."""
    column_title: str
    columns: tuple[str, ...]
    """Distinct."""
    words: tuple[tuple[str, ...], ...]
    """`[rows][columns]`, tokens as decoded; empty where there is nothing."""
    values: npt.NDArray[np.float64]
    """`[rows, columns]`, what colours stand for; NaN where there is no number."""
    numbers: tuple[tuple[str, ...], ...]
    """`[rows][columns]`, the number beside the word."""

    def last(self, count: int) -> "WordPanel":
        """The panel with its last columns alone."""
        if count >= len(self.columns):
            return self
        words, numbers = (tuple(row[-count:] for row in rows) for rows in (self.words, self.numbers))
        return WordPanel(
            title=self.title,
            row_title=self.row_title,
            rows=self.rows,
            column_title=self.column_title,
            columns=self.columns[-count:],
            words=words,
            values=self.values[:, -count:],
            numbers=numbers,
        )


@dataclass(frozen=True, kw_only=True)
class WordGrid:
    """One picture."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    quantity: str
    """What the colour stands for."""
    scale: ColourScale
    panels: tuple[WordPanel, ...]
    cut: str = "columns"
    """What the columns are, where not all have room."""


def cell_pixels(words: Iterable[str], numbers: Iterable[str]) -> float:
    """How wide a picture's cells are.

    Args:
        words: Tokens as decoded.
        numbers: What stands below them.
    """
    longest = max([*(len(show_token(word, longest=LONGEST)) for word in words), *map(len, numbers), 3])
    return longest * LETTER + MARGIN


def terminal_words(grid: WordGrid, *, width: int, plain: bool) -> Group:
    """A grid as lines of text; columns that have no room are left out, the last are kept.

    Args:
        grid: What to show.
        width: Columns of the terminal.
        plain: ASCII only, no colour: the number stands beside the word.
    """
    head = [line(grid.title, plain, "bold"), *(line(words, plain, "dim") for words in grid.lines if words)]
    for panel in grid.panels:
        head += _panel(panel, grid, width, plain)
    return Group(*head)


def _panel(panel: WordPanel, grid: WordGrid, width: int, plain: bool) -> Iterator[Text]:
    names = [set_cell_size(show_text(name, plain=plain), LABEL).rstrip() for name in (panel.row_title, *panel.rows)]
    margin = max(map(cell_len, names)) + 1
    cell = _cell_width(panel, plain)
    room = max(1, (width - margin) // cell)
    shown = panel.last(room)
    if panel.title:
        yield line(panel.title, plain, "bold")
    if len(shown.columns) < len(panel.columns):
        kept = f"the last {len(shown.columns)} of {len(panel.columns)} {grid.cut}; the picture has more"
        yield line(kept, plain, "dim")
    header = "".join(_fit(show_text(name, plain=plain), cell) for name in shown.columns)
    yield Text(_fit(names[0], margin) + header, style="" if plain else "dim")
    for at, name in enumerate(names[1:]):
        row = Text(_fit(name, margin))
        for place in range(len(shown.columns)):
            row.append_text(_word(shown, at, place, grid.scale, cell, plain))
        yield row


def _fit(text: str, cells: int) -> str:
    """A text in so many cells, a blank at its end."""
    return set_cell_size(set_cell_size(text, min(cell_len(text), cells - 1)), cells)


def _cell_width(panel: WordPanel, plain: bool) -> int:
    words = [cell_len(_said(panel, i, j, plain)) for i in range(len(panel.rows)) for j in range(len(panel.columns))]
    return max([*words, 4]) + 1


def _said(panel: WordPanel, row: int, column: int, plain: bool) -> str:
    word, number = panel.words[row][column], panel.numbers[row][column]
    if not word and not number:
        return ""
    shown = show_token(word, longest=LONGEST, plain=plain)
    return f"{shown} {number}".strip() if plain else shown


def _word(panel: WordPanel, row: int, column: int, scale: ColourScale, cell: int, plain: bool) -> Text:
    said, value = _said(panel, row, column, plain), float(panel.values[row, column])
    style = "" if plain or not np.isfinite(value) else shade(scale.share(value))
    return Text(_fit(said, cell), style=style)
