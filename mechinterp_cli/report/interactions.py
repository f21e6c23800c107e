"""Pairs of units: what ablating both does beyond the sum of what each does."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.behind import Behind, behind
from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import counted_between, figure, interval, number, text
from mechinterp_cli.report.grid import Heatmap, Panel
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.text import counted

_COLUMNS = {
    "#": Column(5),
    "a": Column(left=True, broken=True),
    "b": Column(left=True, broken=True),
    "ablation": Column(1, left=True),
    "effect a": Column(4, together=True),
    "effect b": Column(4, together=True),
    "joint": Column(3),
    "interaction": Column(),
    "interval": Column(2),
    "n": Column(6),
}


def strongest_pairs(rows: pd.DataFrame, count: int) -> list[Row]:
    """The pairs with the largest interactions, either way.

    Args:
        rows: The interactions table's rows of one metric and checkpoint; those without a number are left out.
        count: How many.
    """
    known = [row for row in records(rows) if np.isfinite(number(row["interaction"]))]
    return sorted(known, key=lambda row: -abs(number(row["interaction"])))[:count]


def interaction_map(rows: pd.DataFrame, about: Sequence[str]) -> Heatmap | None:
    """Names on both axes, a panel per ablation; a pair stands on both sides of the diagonal.

    Args:
        rows: The interactions table's rows of one metric and checkpoint.
        about: What stands in the subtitle.

    Returns:
        None where there are no rows.
    """
    if rows.empty:
        return None
    ablations = distinct(rows, "ablation")
    metric = unit_of(text(rows["metric"].iloc[0]))
    return Heatmap(
        title="Interactions of pairs of units",
        subtitle=", ".join(filter(None, (*about, counted_between(rows["n"], "prompt")))),
        caption=f"Effect on {metric} of ablating both, minus the sum of the effects of ablating each. 0: they add up.",
        quantity="interaction",
        panels=tuple(_panel(having(rows, ablation=name), f"{name} ablation") for name in ablations),
    )


def _panel(rows: pd.DataFrame, title: str) -> Panel:
    names = list(dict.fromkeys([*distinct(rows, "a"), *distinct(rows, "b")]))
    place = {name: i for i, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    status = np.full(values.shape, "absent", dtype=object)
    details: dict[tuple[int, int], Behind] = {}
    for row in records(rows):
        a, b, value = place[text(row["a"])], place[text(row["b"])], number(row["interaction"])
        values[[a, b], [b, a]] = value
        status[[a, b], [b, a]] = "ok" if np.isfinite(value) else "undefined"
        details |= dict.fromkeys(((a, b), (b, a)), behind(row))
    labels = tuple(show_text(name) for name in names)
    return Panel(
        title=title,
        column_title="other unit",
        columns=labels,
        layers=labels,
        values=values,
        status=status,
        row_title="unit",
        details=details,
    )


def interaction_sentence(rows: pd.DataFrame) -> str:
    """The strongest interaction of all pairs; empty where there are none.

    Args:
        rows: The interactions table's rows of one metric and checkpoint.
    """
    for row in strongest_pairs(rows, 1) if len(rows) else ():
        value = f"{figure(row['interaction'], sign=True)} {interval(row['ci_low'], row['ci_high'])}".strip()
        pair, joint = f"{text(row['a'])} and {text(row['b'])}", figure(row["joint"], sign=True)
        return (
            f"Of {counted(len(rows), 'pair')}, the effects of {pair} add up least ({text(row['ablation'])} ablation): "
            f"without both it is {joint}, which differs by {value} from the sum of the two."
        )
    return ""


def interaction_table(rows: pd.DataFrame, *, count: int, width: int, plain: bool) -> Group | None:
    """The strongest interactions.

    Args:
        rows: The interactions table's rows of one metric and checkpoint.
        count: How many.
        width: Columns of the terminal.
        plain: ASCII only, no colour.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    several = len(distinct(rows, "ablation")) > 1
    cells = [
        {
            "#": str(at),
            "a": text(row["a"]),
            "b": text(row["b"]),
            "ablation": text(row["ablation"]) if several else "",
            "effect a": figure(row["effect_a"]),
            "effect b": figure(row["effect_b"]),
            "joint": figure(row["joint"]),
            "interaction": figure(row["interaction"], sign=True),
            "interval": interval(row["ci_low"], row["ci_high"]),
            "n": text(row["n"]),
        }
        for at, row in enumerate(strongest_pairs(rows, count), start=1)
    ]
    metric = unit_of(text(rows["metric"].iloc[0]))
    if not cells:
        return Group(line(f"no interaction on {metric} is defined", plain, "bold"))
    strongest = f"strongest of {counted(len(rows), 'interaction')}"
    lines = (f"{strongest}: joint effect on {metric} minus the sum of the single effects",)
    return text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain)
