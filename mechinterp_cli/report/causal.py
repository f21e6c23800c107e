"""The proof by intervention: what ablating a score's strongest heads does, beside as many random heads."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import counted_between, figure, interval, number, probability, text
from mechinterp_cli.report.rows import Row, records
from mechinterp_cli.report.scores import head_name
from mechinterp_cli.report.series import curve_of, random_curve
from mechinterp_cli.report.shapes import CurvePanel, Curves, y_range
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.text import counted

VERDICT_DRAWS = 199
"""Where fewer random sets are asked for there is a band, but no p-value and no verdict."""
LOSSES = ("loss", "repeated_loss", "first_loss", "loss_gap")
"""What a model loses raises these."""
MAX_NAMED = 8
"""More heads are told by their number in a sentence."""
_COLUMNS = {
    "k": Column(),
    "effect": Column(),
    "interval": Column(1),
    "random": Column(),
    "random band": Column(3),
    "p": Column(4),
    "verdict": Column(2, left=True),
}

_UNITS = {
    **dict.fromkeys(LOSSES, "nats per token"),
    "kl": "nats",
    "logit_diff": "logits",
}


def unit_of(metric: str) -> str:
    """A metric's name and unit."""
    return f"{metric} ({_UNITS[metric]})" if metric in _UNITS else metric


def _parts(rows: pd.DataFrame) -> Iterator[tuple[str, str, list[Row]]]:
    """Rows of every score and ablation, by k; none where nothing was ablated."""
    if rows.empty:
        return
    for score, of_score in rows.groupby("score", sort=False):
        for ablation, part in of_score.groupby("ablation", sort=False):
            yield str(score), str(ablation), records(part.sort_values("k"))


def causal_curves(
    rows: pd.DataFrame,
    about: Sequence[str],
    *,
    title: str = "Effect of ablating a score's strongest heads",
    noun: str = "heads",
    level: str = "95",
) -> Curves | None:
    """Effect against k, a panel per score and ablation; the panels of one score have one scale.

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        about: What stands in the subtitle.
        title: The picture's.
        noun: What is ablated.
        level: Of intervals, in percent.

    Returns:
        None where there are no rows.
    """
    if rows.empty:
        return None
    parts = list(_parts(rows))
    metric = str(rows["metric"].iloc[0])
    panels = [(score, _panel(score, ablation, metric, told, noun)) for score, ablation, told in parts]
    ranges = {score: y_range([panel for other, panel in panels if other == score]) for score, _ in panels}
    across = max(sum(1 for other, *_ in parts if other == score) for score, *_ in parts)
    return Curves(
        title=title,
        lines=tuple(words for words in (", ".join(filter(None, about)), _caption(rows, noun, level)) if words),
        x_title=f"k, {noun} ablated together",
        panels=tuple(_within(panel, ranges[score]) for score, panel in panels),
        across=max(2, across),
        one_legend=True,
    )


def _caption(rows: pd.DataFrame, noun: str, level: str) -> str:
    """The metric of the unedited model, and what bands are."""
    baseline = sorted({figure(value) for value in rows["baseline"].dropna()})
    ends = " to ".join(dict.fromkeys((*baseline[:1], *baseline[-1:])))
    unedited = f"{rows['metric'].iloc[0]} without ablation: {ends}. " if ends else ""
    prompts = counted_between(rows["n"], "prompt")
    draws = counted_between((count for count in rows["draws"] if number(count) > 0), "random set")
    beside = f"; of {draws} of {noun} in the same layers, the middle 95 %" if draws else ""
    over = f" over {prompts}" if prompts else ""
    return f"{unedited}Bands: {level} % intervals{over}{beside}."


def _within(panel: CurvePanel, ends: tuple[float, float]) -> CurvePanel:
    return CurvePanel(title=panel.title, y_title=panel.y_title, curves=panel.curves, y_range=ends)


def _panel(score: str, ablation: str, metric: str, told: Sequence[Row], noun: str) -> CurvePanel:
    curves = (
        curve_of(f"strongest {noun}", told, "k", "effect"),
        random_curve(f"random {noun}", told, "k"),
    )
    return CurvePanel(title=_heading(score, ablation), y_title=f"effect on {unit_of(metric)}", curves=curves)


def _heading(score: str, ablation: str) -> str:
    return ", ".join(filter(None, (score, f"{ablation} ablation")))


def causal_tables(
    rows: pd.DataFrame, *, width: int, plain: bool, noun: str = "heads", other: pd.DataFrame | None = None
) -> Iterator[Group]:
    """One table per score and ablation: effect, interval, random heads, p and verdict where there are.

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
        noun: What is ablated.
        other: Rows of another metric, whose effects stand in a last column where there is room.
    """
    beside = {_place(row): row for row in records(other)} if other is not None else {}
    columns = {**_COLUMNS, **{text(row["metric"]): Column(5) for row in beside.values()}}
    for score, ablation, told in _parts(rows):
        metric = unit_of(text(told[0]["metric"]))
        unedited = figure(told[0]["baseline"])
        lines = (
            f"{_heading(score, ablation)}: effect on {metric}" + (f", {unedited} unedited" if unedited else ""),
            # A smaller k takes the first of them.
            f"{noun}, strongest first: {text(told[-1]['heads']).replace('+', ' ')}",
        )
        cells = [_cells(row) | _effect(beside.get(_place(row))) for row in told]
        yield text_table(cells, columns, lines=lines, width=width, plain=plain)


def _place(row: Row) -> tuple[str, str, int]:
    return text(row["score"]), text(row["ablation"]), int(number(row["k"]))


def _effect(row: Row | None) -> dict[str, str]:
    """The effect on another metric, under that metric's name."""
    return {} if row is None else {text(row["metric"]): figure(row["effect"]) or "undefined"}


def _cells(row: Row) -> dict[str, str]:
    return {
        "k": str(int(number(row["k"]))),
        "effect": figure(row["effect"]) or "undefined",
        "interval": interval(row["ci_low"], row["ci_high"]),
        "random": figure(row["random_effect"]),
        "random band": interval(row["random_low"], row["random_high"]),
        "p": probability(row["p"]),
        "verdict": text(row["verdict"]),
    }


def causal_sentences(rows: pd.DataFrame, single: pd.DataFrame, *, noun: str = "heads") -> list[str]:
    """One sentence per score: which heads matter alone, and what ablating the strongest does.

    A head matters whose verdict is `yes` and, where a loss is measured, whose ablation raises it.

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        single: Summary rows of heads ablated one by one, of the same metric and checkpoint; with a column `score`
            where they are told apart by it, and `ablation` likewise.
        noun: What is ablated.
    """
    sentences: dict[str, str] = {}
    for score, ablation, ranked in _parts(rows):
        if score in sentences:
            continue
        told = [row for row in ranked if np.isfinite(number(row["effect"]))]
        alone = _alone(single, score, ablation, ranked)
        group = _group(max(told, key=_standing), ablation, noun) if told else "no effect is defined"
        sentences[score] = f"{score}: {alone}{group}.".removeprefix(": ")
    return list(sentences.values())


def _standing(row: Row) -> tuple[bool, float, float]:
    """The fewest heads that have a verdict; else the largest difference to random heads."""
    shown = text(row["verdict"]) == "yes"
    difference = abs(number(row["difference"])) if np.isfinite(number(row["difference"])) else -1.0
    return shown, -number(row["k"]) if shown else 0.0, difference


def _group(row: Row, ablation: str, noun: str) -> str:
    metric, draws = text(row["metric"]), int(number(row["draws"])) if text(row["draws"]) else 0
    words = f"without {_group_name(row, noun)} ({ablation}) {metric} changes by {figure(row['effect'], sign=True)}"
    words += f" {interval(row['ci_low'], row['ci_high'])}".rstrip()
    if draws and text(row["random_effect"]):
        words += f", without as many random {noun} by {figure(row['random_effect'], sign=True)}"
        words += f" {interval(row['random_low'], row['random_high'])}".rstrip()
        p = probability(row["p"])
        verdict = f"{text(row['verdict'])}, p = {p}" if p else f"no verdict below {VERDICT_DRAWS} draws"
        words += f" ({counted(draws, 'random set')}: {verdict})"
    return words


def _group_name(row: Row, noun: str) -> str:
    """The heads by name, or how many of the strongest where they are many: the table has their names."""
    k = int(number(row["k"]))
    return text(row["heads"]) if k <= MAX_NAMED else f"the {k} strongest {noun}"


def _alone(single: pd.DataFrame, score: str, ablation: str, ranked: Sequence[Row]) -> str:
    candidates = {name for row in ranked for name in text(row["heads"]).split("+")}
    rows = [row for row in records(single) if text(row.get("score", score)) == score]
    rows = [row for row in rows if text(row.get("ablation", ablation)) == ablation and head_name(row) in candidates]
    if not rows:
        return ""
    matter = sorted((row for row in rows if _matters(row)), key=lambda row: -abs(number(row["effect"])))
    if not matter:
        return "no head alone is shown to matter; "
    *rest, last = map(head_name, matter)
    named = f"{', '.join(rest)} and {last} matter" if rest else f"{last} matters"
    lost = ", ".join(figure(row["effect"], sign=True) for row in matter)
    return f"{named} alone ({text(ranked[0]['metric'])} {lost}); "


def _matters(row: Row) -> bool:
    """A verdict, and that something is lost: another change of a loss is no need for the head."""
    lost = number(row["effect"]) > 0 or text(row["metric"]) not in LOSSES
    return text(row["verdict"]) == "yes" and lost
