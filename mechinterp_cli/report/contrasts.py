"""Two groups of prompts: whether a trial's effect is another in one than in the other."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import between, counted_between, figure, interval, missing, number, probability, text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import dot_of
from mechinterp_cli.report.shapes import Dot, DotPanel, Dots
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.report.trials import ALONE, Trials, key_of, verdict_of
from mechinterp_cli.text import counted

SENTENCES = 5
"""Trials whose verdict is told in words: the strongest of each block of units, or sets. The table has the others."""


@dataclass(frozen=True, eq=False)
class Contrasts:
    """The contrasts of one metric."""

    rows: pd.DataFrame
    """The contrasts table's rows of the metric and checkpoint."""
    trials: Trials
    """For what trials are called."""
    groups: pd.DataFrame
    """Summary rows of the metric by group, for the intervals of each group's effect."""
    margin: str = ""
    """The smallest difference that matters, as text; empty where nobody said."""

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two groups that are compared."""
        if self.rows.empty:
            return []
        return list(dict.fromkeys(zip(self.rows["group_a"], self.rows["group_b"], strict=True)))

    def strongest(self, a: str, b: str, count: int) -> list[Row]:
        """Trials by their larger effect in either group.

        Args:
            a: A group.
            b: The other.
            count: How many.
        """
        known = [row for row in records(having(self.rows, group_a=a, group_b=b)) if np.isfinite(_size(row))]
        return sorted(known, key=lambda row: -_size(row))[:count]

    def leading(self, a: str, b: str) -> list[Row]:
        """The strongest trial of each block of units and value; sets each.

        Args:
            a: A group.
            b: The other.
        """
        first: dict[tuple[object, ...], Row] = {}
        for row in self.strongest(a, b, len(self.rows)):
            block = self.trials.known(row).get("block")
            first.setdefault(key_of(row) if missing(block) else (text(row["ablation"]), block, "block"), row)
        return list(first.values())[:SENTENCES]

    def corrected(self, row: Row) -> int:
        """How many trials a row's p is corrected over."""
        alike = {name: text(row[name]) for name in ("group_a", "group_b", "ablation")}
        return len(having(self.rows, **alike))

    def name(self, row: Row) -> str:
        """What a trial is called."""
        several = len(distinct(self.rows, "ablation")) > 1
        return self.trials.called(row, several=several)


def _size(row: Row) -> float:
    sizes = [abs(number(row[name])) for name in ("effect_a", "effect_b")]
    return max((size for size in sizes if np.isfinite(size)), default=np.nan)


def contrast_dots(
    contrasts: Contrasts, about: Sequence[str], *, count: int, level: str = "95"
) -> Iterator[tuple[str, Dots]]:
    """A picture for every two groups: the strongest trials' effects by group, and the differences.

    Args:
        contrasts: What is compared.
        about: What stands in the subtitle.
        count: Trials drawn.
        level: Of intervals, in percent.

    Yields:
        (file name without ending, picture).
    """
    for at, (a, b) in enumerate(contrasts.pairs):
        rows = contrasts.strongest(a, b, count)
        if not rows:
            continue
        known = {(*key_of(row), text(row["group"])): row for row in records(contrasts.groups)}
        effects = [_effect(contrasts, row, side, known) for row in rows for side in ("a", "b")]
        differences = [_difference(contrasts, row) for row in rows]
        left = len(having(contrasts.rows, group_a=a, group_b=b)) - len(rows)
        shown = f"The {counted(len(rows), 'trial')} with the largest effects"
        more = f"{shown}; {counted(left, 'more is', 'more are')} in the table." if left > 0 else ""
        effect = f"effect on {contrasts.trials.unit}"
        # Of normalised runs the summary has intervals of shares, not of these numbers.
        barred = any(np.isfinite(dot.low) for dot in effects)
        sizes = f"{between(row['n_a'] for row in rows)} and {counted_between((row['n_b'] for row in rows), 'prompt')}"
        bars = f"Bars: {level} % intervals over {sizes}{'' if barred else '; effects in one group have none'}."
        more = " ".join(filter(None, (more, bars)))
        yield (
            f"contrasts-{at + 1}" if len(contrasts.pairs) > 1 else "contrasts",
            Dots(
                title=f"Effects by group: {a} and {b}",
                lines=tuple(filter(None, (", ".join(filter(None, about)), more))),
                panels=(
                    DotPanel(title="", x_title=effect, dots=tuple(effects)),
                    DotPanel(title="", x_title=f"{a} - {b}, {contrasts.trials.unit}", dots=tuple(differences)),
                ),
                one_axis=True,
            ),
        )


def _effect(contrasts: Contrasts, row: Row, side: str, known: Mapping[tuple[str, int, str], Row]) -> Dot:
    group = text(row[f"group_{side}"])
    summary = known.get((*key_of(row), group), {})
    value = number(row[f"effect_{side}"])
    # The interval belongs to this number only if it is the same number.
    same = np.isclose(number(summary.get("effect")), value, rtol=1e-4, atol=1e-9)
    behind_it: Row = summary if same else {"n": row[f"n_{side}"]}
    return dot_of(contrasts.name(row), group, {**behind_it, "effect": value}, "effect")


def _difference(contrasts: Contrasts, row: Row) -> Dot:
    made = dot_of(contrasts.name(row), "difference", row, "difference")
    return replace(made, behind={**made.behind, "n": _sizes(row)})


def _sizes(row: Row) -> str:
    """Prompts of both groups."""
    return "+".join(filter(None, (text(row["n_a"]), text(row["n_b"]))))


def contrast_tables(contrasts: Contrasts, *, count: int, width: int, plain: bool) -> Iterator[Group]:
    """For every two groups the strongest trials in a table, and a sentence with the verdict for each of the first.

    Args:
        contrasts: What is compared.
        count: Trials in the table.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    for a, b in contrasts.pairs:
        rows = contrasts.strongest(a, b, count)
        title = f"{contrasts.trials.unit}: effects in {a} and in {b} (difference: {a} - {b})"
        if not rows:
            yield Group(line(f"{title}: none is defined", plain, "bold"))
            continue
        # Groups may have any name, also that of another column.
        names = dict(zip(_COLUMNS, ("#", "ablated", f"in {a}", f"in {b}", *list(_COLUMNS)[4:]), strict=True))
        cells = [{names[key]: cell for key, cell in _cells(contrasts, row, at).items()} for at, row in enumerate(rows)]
        columns = {names[key]: look for key, look in _COLUMNS.items()}
        judged = replace(contrasts.trials.judged, margin=contrasts.margin)
        told = judged.notes(_over(contrasts, rows[0]))
        notes = {names[key]: words for key, words in told.items()}
        yield text_table(cells, columns, lines=(title,), width=width, plain=plain, notes=notes)
        yield Group(*[line(sentence(contrasts, row), plain) for row in contrasts.leading(a, b)])


_COLUMNS = {
    "#": Column(6),
    "ablated": Column(left=True, broken=True),
    "a": Column(2, together=True),
    "b": Column(2, together=True),
    "difference": Column(),
    "interval": Column(3),
    "p adj.": Column(4),
    "n": Column(5),
    "verdict": Column(1, left=True),
}


def _over(contrasts: Contrasts, row: Row) -> str:
    """The trials that p is corrected over, in words."""
    count = contrasts.corrected(row)
    return f"all {counted(count, 'trial')}" if count > 1 else "one trial"


def _cells(contrasts: Contrasts, row: Row, at: int) -> dict[str, str]:
    return {
        "#": str(at + 1),
        "ablated": contrasts.name(row),
        "a": figure(row["effect_a"]),
        "b": figure(row["effect_b"]),
        "difference": figure(row["difference"], sign=True),
        "interval": interval(row["ci_low"], row["ci_high"]),
        "p adj.": probability(row["p_adjusted"]),
        "n": _sizes(row),
        "verdict": verdict_of(row),
    }


def sentence(contrasts: Contrasts, row: Row) -> str:
    """One trial's verdict in words, with the difference and its interval.

    Args:
        contrasts: What is compared.
        row: One trial.
    """
    a, b = text(row["group_a"]), text(row["group_b"])
    name = contrasts.name(row)
    question = f"does the effect of {name} differ between {a} and {b}"
    answer = text(row["verdict"]) or "no verdict"
    if text(row["verdict"]) == "no" and contrasts.margin:
        answer += f" within {contrasts.margin}"
    if answer == "yes" and verdict_of(row) == ALONE:
        answer = "yes for this trial alone"
    difference = f"difference {figure(row['difference'], sign=True)} {interval(row['ci_low'], row['ci_high'])}".rstrip()
    if missing(row["difference"]):
        difference = "the difference is not defined"
    known = probability(row["p_adjusted"])
    corrected = f"; p = {known}, corrected over {_over(contrasts, row)}" if known else ""
    return f"{question}? {answer}: {difference}{corrected}"
