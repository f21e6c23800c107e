"""Trials of several designs told apart: which count as results, what they are called, and the strongest in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, interval, missing, number, probability, text
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.rows import Row, distinct, having, records, without
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.terminal import describe_place, strongest

TOLD = ("single", "set")
"""Designs whose trials are results by themselves; the others are read beside each other, in tables of their own."""
_COLUMNS = {
    "#": Column(),
    "ablated": Column(left=True, broken=True),
    "ablation": Column(1, left=True),
    "effect": Column(),
    "interval": Column(3),
    "p adj.": Column(2),
    "n": Column(5),
    "verdict": Column(4, left=True),
}


@dataclass(frozen=True, eq=False)
class Trials:
    """The summary's rows of one metric, over all prompts.

    Random rankings are not among them: they are the background of others.
    """

    rows: pd.DataFrame
    """One row per trial and ablation."""
    metric: str
    quantity: str
    """`normalized`, or `effect` where there is nothing to normalise by."""
    tokens: Mapping[str, Sequence[str]]
    """Decoded tokens of each template's first prompt; the one template of a set also under ``""``."""

    @property
    def aggregate(self) -> str:
        """That of the rows."""
        return "ratio_of_means" if self.quantity == "normalized" else "mean"

    @property
    def several(self) -> bool:
        """Whether what stands in an ablated part's place has to be named."""
        return len(distinct(self.rows, "ablation")) > 1

    @property
    def measured(self) -> str:
        """The quantity in words."""
        return f"normalised effect on {self.metric}" if self.quantity == "normalized" else f"effect on {self.unit}"

    @property
    def unit(self) -> str:
        """The metric with its unit."""
        return unit_of(self.metric)

    @property
    def told(self) -> pd.DataFrame:
        """Rows of single units and sets."""
        return having(self.rows, design=TOLD)

    def strongest(self, count: int) -> pd.DataFrame:
        """The single units and sets with the largest magnitude.

        Args:
            count: How many.
        """
        told = self.told
        return strongest(told, count=count, quantity=self.quantity) if len(told) else told

    def leading(self, count: int) -> list[Row]:
        """Trials to be followed closer: sets, then the top k of a ranking, then the strongest units.

        Args:
            count: How many.
        """
        parts = [having(self.rows, design=("keep", "set")), having(self.rows, design="cumulative")]
        found = [row for part in parts for row in records(part)]
        found += records(self.strongest(count)) if len(found) < count else []
        unique = {key_of(row): row for row in reversed(found)}
        return list(reversed(unique.values()))[:count]

    @cached_property
    def _known(self) -> dict[tuple[str, int], Row]:
        """The rows by what names a trial."""
        return {key_of(row): row for row in records(self.rows)}

    def known(self, row: Row) -> Row:
        """The summary's row of the trial that a row of another table is about; itself where there is none."""
        return self._known.get(key_of(row), row)

    def called(self, row: Row, *, several: bool = False) -> str:
        """What a trial is called.

        Args:
            row: Of `summary`, or of a table that has trials, too.
            several: Whether what stands in the units' place is named, as there is more than one such value.
        """
        return called(self.known(row), self.tokens) + (f" ({text(row.get('ablation'))})" if several else "")


def trials_of(
    summary: pd.DataFrame, metrics: Sequence[str], tokens: Mapping[str, Sequence[str]], *, metric: str = ""
) -> Trials:
    """The rows that are shown.

    Args:
        summary: The table, of one checkpoint or all.
        metrics: The config's.
        tokens: Decoded tokens by template.
        metric: Which metric; the config's first where it is empty.
    """
    whole = without(summary[~summary["group"].notna() | (summary["group"] == "all").fillna(False)], "ranking")
    there = distinct(whole, "metric")
    metric = metric or next((name for name in metrics if name in there), there[0] if there else "")
    rows = having(whole, metric=metric)
    normalised = len(having(rows, aggregate="ratio_of_means")) > 0
    rows = having(rows, aggregate="ratio_of_means" if normalised else "mean")
    return Trials(rows=rows, metric=metric, quantity="normalized" if normalised else "effect", tokens=tokens)


def key_of(row: Row) -> tuple[str, int]:
    """What names a trial within a checkpoint."""
    return text(row.get("ablation")), int(number(row["trial"]))


def called(row: Row, tokens: Mapping[str, Sequence[str]]) -> str:
    """A trial's set, its k, or its units and the token that they stand at where there is one.

    Args:
        row: Of `summary`.
        tokens: Decoded tokens by template.
    """
    by_design = {"set": text(row.get("set")), "keep": f"all but {text(row.get('set'))}"}
    by_design["cumulative"] = f"top {text(row.get('k'))}"
    if not missing(row.get("design")) and text(row["design"]) in by_design:
        return by_design[text(row["design"])]
    if missing(row.get("label")):
        return describe_place(row, tokens)
    words = tokens.get(text(row.get("template")), ())
    position = -1 if missing(row.get("position")) else int(number(row["position"]))
    token = f" {show_token(words[position])}" if 0 <= position < len(words) else ""
    # What stands in place is told apart.
    return text(row["label"]).removesuffix(f", {text(row.get('ablation'))}") + token


def trials_table(trials: Trials, baseline: str, *, count: int, width: int, plain: bool) -> Group | None:
    """The strongest trials.

    Args:
        trials: All.
        baseline: The metric of the unedited model, as text; empty where it is not known.
        count: How many.
        width: Columns of the terminal.
        plain: ASCII only, no colour.

    Returns:
        None where there is nothing to show.
    """
    rows = records(trials.strongest(count))
    cells = [
        {
            "#": str(place),
            "ablated": trials.called(row),
            "ablation": text(row.get("ablation")) if trials.several else "",
            "effect": figure(row[trials.quantity]),
            "interval": interval(row.get("ci_low"), row.get("ci_high")),
            "p adj.": probability(row.get("p_adjusted")),
            "n": text(row.get("n")),
            "verdict": text(row.get("verdict")),
        }
        for place, row in enumerate(rows, start=1)
    ]
    lines = (f"strongest ablations: {trials.measured}" + (f", {baseline} without" if baseline else ""),)
    return text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain) if cells else None
