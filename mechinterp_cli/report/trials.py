"""Trials of several designs told apart: which count as results, what they are called, and the strongest in a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, interval, missing, number, probability, text
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.rows import Row, distinct, having, records, without
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.terminal import describe_place, strongest

TOLD = ("single", "set", "keep")
"""Designs whose trials are results by themselves; the others are read beside each other, in tables of their own."""
SIGNIFICANT = 0.05
"""A corrected p above this says so beside a verdict of `yes`, which is one trial's own."""
ALONE = "yes (alone)"
MEMBERS = 32
"""Letters that the members of a set take in a table."""
_COLUMNS = {
    "#": Column(),
    "ablated": Column(left=True, broken=True),
    "ablation": Column(1, left=True),
    "effect": Column(),
    "interval": Column(3),
    "p adj.": Column(2),
    "n": Column(5),
    "verdict": Column(4, left=True),
    "set's units": Column(6, left=True),
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What verdicts are read off."""

    margin: str = ""
    """The smallest effect that matters, as text; empty where nobody said."""
    interval: str = ""
    """Of which intervals are shown, in percent; empty where nobody said."""

    def notes(self, corrected: str) -> dict[str, str]:
        """What a table's columns mean.

        Args:
            corrected: What p is corrected over.
        """
        margin = f" of {self.margin}" if self.margin else ""
        return {
            **({"interval": f"{self.interval} %"} if self.interval else {}),
            "p adj.": f"against 0, corrected over {corrected}",
            "verdict": f"one trial's own, its 90 % interval against the margin{margin}, not corrected",
        }


def verdict_of(row: Row) -> str:
    """A verdict; that it is one trial's alone, where the corrected p does not bear it out.

    Args:
        row: With `verdict` and `p_adjusted`.
    """
    corrected = number(row.get("p_adjusted"))
    return ALONE if text(row.get("verdict")) == "yes" and corrected > SIGNIFICANT else text(row.get("verdict"))


def members_text(members: Sequence[str], longest: int = MEMBERS) -> str:
    """Names of units on one line; how many more there are, where they do not fit.

    Args:
        members: Names.
        longest: Letters.
    """
    for shown in range(len(members), 0, -1):
        left = len(members) - shown
        words = " ".join(members[:shown]) + (f" +{left} more" if left else "")
        if len(words) <= longest:
            return words
    return f"{len(members)} units" if len(members) != 1 else members[0][: longest - 3] + "..."


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
    sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the units in each named set."""
    judged: Judged = Judged()

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
        """Trials to be followed closer: all but a set, sets, the top k of a ranking, then the strongest units.

        Args:
            count: How many.
        """
        parts = [having(self.rows, design=name) for name in ("keep", "set", "cumulative")]
        found = [row for part in parts for row in records(part)]
        found += records(self.strongest(count)) if len(found) < count else []
        unique: dict[tuple[str, int], Row] = {}
        for row in found:
            unique.setdefault(key_of(row), row)
        return list(unique.values())[:count]

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
        known = self.known(row)
        # Beside "all but X" it has to be said which X is.
        what = "the set " if self.kept and text(known.get("design")) == "set" and text(known.get("set")) else ""
        return what + called(known, self.tokens) + (f" ({text(row.get('ablation'))})" if several else "")

    @cached_property
    def kept(self) -> bool:
        """Whether there are trials that ablate all but a set."""
        return len(having(self.rows, design="keep")) > 0

    def members(self, row: Row) -> str:
        """The units of a trial's set, shortened; empty where it has none."""
        known = self.known(row)
        named = self.sets.get(text(known.get("set")), ())
        return members_text(named) if named and text(known.get("design")) in ("set", "keep") else ""


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
            "verdict": verdict_of(row),
            "set's units": trials.members(row),
        }
        for place, row in enumerate(rows, start=1)
    ]
    if not cells:
        return None
    lines = (f"strongest ablations: {trials.measured}" + (f", {baseline} unedited" if baseline else ""),)
    notes = trials.judged.notes("the trials of a design, value and block of units")
    return text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain, notes=notes)
