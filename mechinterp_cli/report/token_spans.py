"""What spans of the prompt count, over all prompts, and how far sums over tokens miss the whole."""

import math
import statistics
from collections.abc import Iterator, Sequence

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import counted_between, figure, interval, missing, number, text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import dot_of
from mechinterp_cli.report.shapes import DotPanel, Dots
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.report.tokens import NAMES, SHARES, unit_of
from mechinterp_cli.text import counted

MAX_SPANS = 30
_COLUMNS = {
    "span": Column(left=True, broken=True),
    "estimator": Column(left=True),
    "mean": Column(),
    "interval": Column(1),
    "n": Column(2),
}


def _spans(rows: pd.DataFrame, metric: str) -> dict[str, list[Row]]:
    """Rows of spans by estimator: those of all templates where there are such, else of the first one."""
    if rows.empty:
        return {}
    spans = rows[rows["span"].notna().to_numpy(dtype=bool)]
    spans = spans[[text(row["metric"]) == metric or text(row["estimator"]) in SHARES for row in records(spans)]]
    whole = spans[spans["template"].isna().to_numpy(dtype=bool)]
    chosen = whole if len(whole) else having(spans, template=tuple(distinct(spans, "template")[:1]))
    return {name: records(having(chosen, estimator=name)) for name in distinct(chosen, "estimator")}


def span_table(rows: pd.DataFrame, metric: str, *, width: int, plain: bool) -> Iterator[Group]:
    """Means over prompts by span and estimator.

    Args:
        rows: The table `input_spans`, of one checkpoint; may be empty.
        metric: Which metric.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    cells = [
        {
            "estimator": NAMES.get(name, name) if at == 0 else "",
            "span": text(row["span"]),
            "mean": figure(row["mean"]),
            "interval": interval(row["ci_low"], row["ci_high"]),
            "n": text(row["n"]),
        }
        for name, of_one in _spans(rows, metric).items()
        for at, row in enumerate(of_one[:MAX_SPANS])
    ]
    if cells:
        order = {name: _COLUMNS[name] for name in ("estimator", "span", "mean", "interval", "n")}
        heading = (f"what spans count for {metric}: sums over their tokens, means over prompts",)
        yield text_table(cells, order, lines=heading, width=width, plain=plain)


def span_dots(rows: pd.DataFrame, metric: str, about: Sequence[str], level: str = "95") -> Dots | None:
    """The same as a picture: a panel per unit, a colour per estimator.

    Args:
        rows: The table `input_spans`, of one checkpoint; may be empty.
        metric: Which metric.
        about: What stands in the subtitle.
        level: Of intervals, in percent.

    Returns:
        None where there is no span.
    """
    found = _spans(rows, metric)
    panels = []
    for names in ([name for name in found if name not in SHARES], [name for name in found if name in SHARES]):
        dots = [
            dot_of(text(row["span"]), NAMES.get(name, name), row, "mean")
            for name in names
            for row in found[name][:MAX_SPANS]
        ]
        if dots:
            panels.append(DotPanel(title="", x_title=unit_of(names[0], metric), dots=tuple(dots)))
    if not panels:
        return None
    n = counted_between((row["n"] for part in found.values() for row in part), "prompt")
    caption = f"Dots: sums over a span's tokens, means over {n}; bars: {level} % intervals. 0: the span counts nothing."
    return Dots(
        title=f"What spans of the prompt count for {metric}",
        lines=tuple(filter(None, (", ".join(filter(None, about)), caption))),
        panels=tuple(panels),
    )


def completeness_lines(rows: pd.DataFrame, metric: str, *, plain: bool) -> Iterator[Group]:
    """How far sums over tokens miss the difference that they should be, in a sentence per estimator.

    Args:
        rows: The table `input_completeness`, of one checkpoint; may be empty.
        metric: Which metric.
        plain: ASCII only, no colour.
    """
    for name in distinct(rows, "estimator"):
        part = records(having(rows, estimator=name, metric=metric))
        errors = [abs(number(row["relative_error"])) for row in part if not missing(row["relative_error"])]
        errors = [error for error in errors if math.isfinite(error)]
        if errors:
            middle, most = (_percent(error) for error in (statistics.median(errors), max(errors)))
            said = (
                f"{NAMES.get(name, name)}: sums over tokens miss M(input) - M(baseline) by {middle} of it at the "
                f"median prompt and {most} at most, of {counted(len(errors), 'prompt')}"
            )
            yield Group(line(said, plain))


def _percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
