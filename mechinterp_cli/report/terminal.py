"""The terminal's view: a heat map of numbers and the strongest trials.

Everything is built of `Text`, never of markup, and passes through `show_token`: a token cannot colour, move or break
the terminal. `plain` gives ASCII without colour, for pipes, logs and terminals that know no better.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

import pandas as pd
from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mechinterp_cli.report.cells import figure, interval, missing, probability
from mechinterp_cli.report.grid import ColourScale, Heatmap, Panel
from mechinterp_cli.report.labels import show_text, show_token

POSITIVE, NEGATIVE = (33, 102, 172), (178, 24, 43)
WHITE = (255, 255, 255)
TABLE_COLUMNS = {"#": 0, "where": 0, "effect": 0, "interval": 76, "p adj.": 0, "n": 100, "verdict": 100}
"""Columns of the table of the strongest trials, and the terminal width from which each is shown."""
STATE_MARKS = {"trivial": ".", "undefined": "?", "nan": "NaN", "absent": ""}
STATE_NAMES = {"trivial": ". exactly 0 (trivial)", "undefined": "? undefined"}
WIDE_CELL, NARROW_CELL = 5, 4
"""Two decimals where they fit, else hundredths."""
NO_BREAK = "\N{NO-BREAK SPACE}"
MAX_BLOCKS = 3
"""Panels wider than the terminal are broken into this many at most."""


def terminal_heatmap(heatmap: Heatmap, *, width: int, plain: bool = False) -> Group:
    """The heat map as lines of text.

    Cells are two-decimal numbers where the width allows, else hundredths. Columns that do not fit are left to the
    picture, and a line says so.

    Args:
        heatmap: What to draw.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    lines = [_line(heatmap.title, plain, "bold"), _line(heatmap.subtitle, plain), _line(heatmap.caption, plain, "dim")]
    for panel in heatmap.panels:
        lines += _panel_lines(panel, heatmap.colours, width, plain)
    marks = [STATE_NAMES[state] for state in heatmap.states if state in STATE_NAMES]
    if marks:
        lines.append(_line("   ".join(marks), plain, "dim"))
    return Group(*[line for line in lines if line.plain])


def _line(text: str, plain: bool, style: str = "") -> Text:
    return Text(show_text(text, plain=plain), style="" if plain else style)


def _panel_lines(panel: Panel, colours: ColourScale, width: int, plain: bool) -> list[Text]:
    margin = max(len("layer"), max(len(str(layer)) for layer in panel.layers)) + 1
    room, columns = max(NARROW_CELL, width - margin), len(panel.columns)
    cell = WIDE_CELL if WIDE_CELL * columns <= room else NARROW_CELL
    across = room // cell
    shown = min(columns, across * MAX_BLOCKS)
    lines = [_line(panel.title, plain, "bold")]
    for start in range(0, shown, across):
        lines += _block(panel, range(start, min(start + across, shown)), colours, margin, cell, plain)
    if shown < columns:
        lines.append(_line(f"columns 1 to {shown} of {columns}; the picture has all", plain, "dim"))
    if cell == NARROW_CELL:
        lines.append(_line("cells are hundredths", plain, "dim"))
    return [*lines, *_legend(panel, shown, width, plain)]


def _block(panel: Panel, columns: range, colours: ColourScale, margin: int, cell: int, plain: bool) -> list[Text]:
    lines = [_header(panel, columns, margin, cell, plain)]
    for i in reversed(range(len(panel.layers))):
        line = Text(f"{panel.layers[i]:>{margin - 1}} ")
        for j in columns:
            line.append_text(_cell(float(panel.values[i, j]), str(panel.status[i, j]), colours, cell, plain))
        lines.append(line)
    return lines


def _short(label: str) -> str:
    """What stands above a column: a position's number, or the label itself."""
    return label.split(" ", 1)[0]


def _header(panel: Panel, columns: range, margin: int, cell: int, plain: bool) -> Text:
    names = [show_text(_short(panel.columns[j]), plain=plain) for j in columns]
    fitted = [set_cell_size(name, min(cell - 1, cell_len(name))) for name in names]
    padded = [" " * (cell - cell_len(name)) + name for name in fitted]
    return Text("layer".rjust(margin - 1) + " " + "".join(padded), style="" if plain else "dim")


def _legend(panel: Panel, shown: int, width: int, plain: bool) -> list[Text]:
    """The columns' full names, where the header had no room for them; no name is broken."""
    names = [show_text(label, plain=plain) for label in panel.columns[:shown]]
    if all(len(name) < NARROW_CELL for name in names):
        return []
    text = f"{panel.column_title}: " + "  ".join(name.replace(" ", NO_BREAK) for name in names)
    lines = textwrap.wrap(text, max(20, width), break_on_hyphens=False)
    return [Text(line.replace(NO_BREAK, " "), style="" if plain else "dim") for line in lines]


def _cell(value: float, status: str, colours: ColourScale, width: int, plain: bool) -> Text:
    if status != "ok":
        mark = STATE_MARKS.get(status, "?")[: width - 1]
        return Text(mark.rjust(width), style="" if plain else "dim")
    number = _number(value, width)
    return Text(number.rjust(width), style="" if plain else shade(colours.share(value)))


def _number(value: float, width: int) -> str:
    if width >= WIDE_CELL and abs(value) < 99:
        text = f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"
        return "0" if float(text) == 0 else text
    hundredths = f"{value * 100:.0f}".replace("-0", "0") if abs(value) < 0.005 else f"{value * 100:.0f}"
    # A number that does not fit would push its neighbours: say only that it is large.
    return hundredths if len(hundredths) < width else (">>" if value > 0 else "<<")[: width - 1]


def shade(share: float) -> Style:
    """White at 0 to full colour at ±1; dark or light letters, whichever reads better.

    Args:
        share: As `ColourScale.share` gives it.
    """
    strength = min(1.0, abs(share))
    end = POSITIVE if share > 0 else NEGATIVE
    red, green, blue = (round(w + (e - w) * strength) for w, e in zip(WHITE, end, strict=True))
    letters = "#ffffff" if strength > 0.55 else "#000000"
    return Style.parse(f"{letters} on #{red:02x}{green:02x}{blue:02x}")


def strongest(summary: pd.DataFrame, *, count: int = 10, quantity: str = "normalized") -> pd.DataFrame:
    """The rows with the largest magnitude, of those that were computed and are defined.

    Args:
        summary: Rows of one metric, group and aggregate.
        count: How many.
        quantity: `normalized`, or `effect` where there is nothing to normalise by.
    """
    sizes = pd.to_numeric(summary[quantity], errors="coerce").astype("float64").abs()
    usable = (summary["status"] == "ok") & sizes.map(math.isfinite)
    order = sizes[usable].sort_values(ascending=False, kind="stable").index[:count]
    return summary.loc[order]


def strongest_table(
    summary: pd.DataFrame,
    *,
    tokens: Mapping[str, Sequence[str]] | None = None,
    count: int = 10,
    quantity: str = "normalized",
    width: int = 100,
    plain: bool = False,
) -> Table:
    """A table of the strongest trials: where, effect, interval, adjusted p, number of prompts, verdict.

    Args:
        summary: Rows of one metric, group and aggregate, as `strongest` takes them.
        tokens: Decoded tokens by template, as in `HeatmapSpec`.
        count: How many.
        quantity: See `strongest`.
        width: Columns of the terminal; below 100 the number of prompts and the verdict, below 76 the interval are
            left out.
        plain: ASCII only, no colour.
    """
    table = Table(box=box.ASCII if plain else box.SIMPLE_HEAD, show_edge=plain)
    names = [name for name, needed in TABLE_COLUMNS.items() if width >= needed]
    for name in names:
        justify: Literal["left", "right"] = "left" if name in ("where", "verdict") else "right"
        table.add_column(Text(name), justify=justify, no_wrap=name != "where")
    for place, row in enumerate(strongest(summary, count=count, quantity=quantity).to_dict("records"), start=1):
        cells = {"#": str(place), **_row_cells(row, tokens or {}, quantity, plain)}
        table.add_row(*[Text(cells[name]) for name in names])
    return table


def _row_cells(
    row: Mapping[object, object], tokens: Mapping[str, Sequence[str]], quantity: str, plain: bool
) -> dict[str, str]:
    return {
        "where": describe_place({str(name): value for name, value in row.items()}, tokens, plain=plain),
        "effect": figure(row[quantity]),
        "interval": interval(row.get("ci_low"), row.get("ci_high")),
        "p adj.": probability(row.get("p_adjusted")),
        "n": "" if missing(row.get("n")) else str(row["n"]),
        "verdict": "" if missing(row.get("verdict")) else str(row["verdict"]),
    }


def describe_place(row: Mapping[str, object], tokens: Mapping[str, Sequence[str]], *, plain: bool = False) -> str:
    """Where a trial edits, in words: `resid_pre, layer 8, position 10 ·John`; the template where there are several."""
    if row.get("site") == "path":  # from whom to whom is no place
        return show_text(str(row["label"]), plain=plain)
    template = "" if missing(row.get("template")) else str(row["template"])
    parts = [show_text(str(row["site"]), plain=plain)] if not missing(row.get("site")) else []
    for name, title in (("layer", "layer"), ("head", "head"), ("kv_head", "key/value head"), ("neuron", "neuron")):
        if not missing(row.get(name)):
            parts.append(f"{title} {int(float(str(row[name])))}")
    if not missing(row.get("span")):
        parts.append(show_token(str(row["span"]), plain=plain))
    if not missing(row.get("position")):
        position = int(float(str(row["position"])))
        words = tokens.get(template, ())
        word = " " + show_token(words[position], plain=plain) if 0 <= position < len(words) else ""
        parts.append(f"position {position}{word}")
    if template and "" not in tokens:
        parts.append(show_text(template, plain=plain)[:40])
    return ", ".join(parts)
