"""Named sets kept or removed: how much of the behaviour a set alone has, and how much is left without it."""

from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import counted_between, figure, interval, text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import dot_of
from mechinterp_cli.report.shapes import DotPanel, Dots
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.trials import members_text
from mechinterp_cli.text import counted

SHARES = ("faithfulness", "completeness")
BRIEF = 72
"""Narrower terminals get no intervals."""
MAX_TOLD = 3
"""Sets that are told of in sentences."""
MAX_SETS = 40
"""More are in the table alone."""
_COLUMNS = {
    "set": Column(left=True, broken=True),
    "size": Column(3),
    "alone": Column(5, together=True),
    "without": Column(5, together=True),
    "faithfulness": Column(),
    "completeness": Column(1),
    "n": Column(6),
    "units": Column(4, left=True),
}


def circuit_dots(rows: pd.DataFrame, about: Sequence[str], level: str = "95") -> Dots | None:
    """Faithfulness and completeness of every set, a panel per ablation.

    Args:
        rows: The circuits table's rows of one metric and checkpoint.
        about: What stands in the subtitle.
        level: Of intervals, in percent.

    Returns:
        None where there are no rows.
    """
    if rows.empty:
        return None
    sets = distinct(rows, "set")
    panels = []
    for ablation in distinct(rows, "ablation"):
        part = records(having(rows, ablation=ablation, set=tuple(sets[:MAX_SETS])))
        dots = [
            dot_of(text(row["set"]), share, row, share, (f"{share}_low", f"{share}_high"))
            for row in part
            for share in SHARES
        ]
        share = "share of unedited minus everything ablated"
        panels.append(DotPanel(title=f"{ablation} ablation", x_title=share, dots=tuple(dots), references=(0.0, 1.0)))
    left = len(sets) - MAX_SETS
    caption = "Faithfulness: what the set alone has. Completeness 1: without the set nothing is left."
    caption += f" Bars: {level} % intervals over {counted_between(rows['n'], 'prompt')}."
    more = f"{counted(left, 'more set is', 'more sets are')} in the table alone." if left > 0 else ""
    return Dots(
        title="Faithfulness and completeness by set",
        lines=tuple(filter(None, (", ".join(filter(None, about)), f"{caption} {more}".strip()))),
        panels=tuple(panels),
    )


def circuit_tables(
    rows: pd.DataFrame, sets: Mapping[str, Sequence[str]], *, width: int, plain: bool
) -> Iterator[Group]:
    """One table per ablation: what a set alone has, and what is left without it.

    Args:
        rows: The circuits table's rows of one metric and checkpoint.
        sets: Names of the units in each set.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    for ablation in distinct(rows, "ablation"):
        part = records(having(rows, ablation=ablation))
        metric = unit_of(text(part[0]["metric"]))
        ends = [f"{figure(part[0][name])} {words}" for name, words in _ENDS.items() if figure(part[0][name])]
        cells = [
            {
                "set": text(row["set"]),
                "size": text(row["size"]),
                "alone": figure(row["alone"]),
                "without": figure(row["without"]),
                **{share: _share(row, share, brief=width < BRIEF) for share in SHARES},
                "n": text(row["n"]),
                "units": members_text(sets[text(row["set"])]) if text(row["set"]) in sets else "",
            }
            for row in part
        ]
        lines = (": ".join(filter(None, (f"sets, {ablation} ablation: {metric}", ", ".join(ends)))),)
        yield text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain, notes=_NOTES)


def set_sentences(rows: pd.DataFrame) -> Iterator[str]:
    """What the first sets alone have of the behaviour, and what is lost without them, under the first ablation.

    Args:
        rows: The circuits table's rows of one metric and checkpoint.
    """
    first = records(having(rows, ablation=distinct(rows, "ablation")[0])) if len(rows) else []
    for row in first[:MAX_TOLD]:
        alone, without = (_share(row, share, brief=False) for share in SHARES)
        known = f"{text(row['ablation'])} ablation, n = {text(row['n'])}"
        yield (
            f'The set "{text(row["set"])}" alone has {alone} of the behaviour (faithfulness); what is lost without it '
            f"is {without} (completeness; {known})."
        )


def _share(row: Row, share: str, *, brief: bool) -> str:
    ends = "" if brief else f" {interval(row[f'{share}_low'], row[f'{share}_high'], 2)}"
    return f"{figure(row[share])}{ends}".rstrip() if figure(row[share]) else "undefined"


_NOTES = {"alone": "all but the set ablated", "without": "the set ablated"}
_ENDS = {"full": "unedited", "empty": "with everything ablated"}
