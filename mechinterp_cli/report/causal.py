"""The proof by intervention: what ablating a score's strongest heads does, beside as many random heads."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import figure, interval, number, probability, text
from mechinterp_cli.report.scores import head_name
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range
from mechinterp_cli.report.tables import Column, text_table

VERDICT_DRAWS = 199
"""Fewer draws of random heads give a band, but no p-value and no verdict."""
_COLUMNS = {
    "k": Column(),
    "effect": Column(),
    "interval": Column(1),
    "random": Column(),
    "random band": Column(3),
    "p": Column(4),
    "verdict": Column(2, left=True),
}

Row = Mapping[str, object]


_UNITS = {
    **dict.fromkeys(("loss", "repeated_loss", "first_loss", "loss_gap"), "nats per token"),
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
            records: list[Row] = [
                {str(name): value for name, value in row.items()} for row in part.sort_values("k").to_dict("records")
            ]
            yield str(score), str(ablation), records


def causal_curves(
    rows: pd.DataFrame,
    about: Sequence[str],
    *,
    title: str = "Effect of ablating a score's strongest heads",
    noun: str = "heads",
) -> Curves | None:
    """Effect against k, a panel per score and ablation; the panels of one score have one scale.

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        about: What stands in the subtitle.
        title: The picture's.
        noun: What is ablated.

    Returns:
        None where there are no rows.
    """
    if rows.empty:
        return None
    parts = list(_parts(rows))
    metric = str(rows["metric"].iloc[0])
    panels = [(score, _panel(score, ablation, metric, records, noun)) for score, ablation, records in parts]
    ranges = {score: y_range([panel for other, panel in panels if other == score]) for score, _ in panels}
    draws = sorted({int(number(count)) for count in rows["draws"].dropna()})
    baseline = sorted({figure(value) for value in rows["baseline"].dropna()})
    captions = [
        f"{metric} without ablation: {' to '.join(dict.fromkeys((baseline[0], baseline[-1])))}." if baseline else "",
        f"{' to '.join(map(str, dict.fromkeys((draws[0], draws[-1]))))} draws of random {noun}, of the same layers."
        if draws
        else "",
    ]
    across = max(sum(1 for other, *_ in parts if other == score) for score, *_ in parts)
    return Curves(
        title=title,
        lines=tuple(words for words in (", ".join(filter(None, about)), " ".join(filter(None, captions))) if words),
        x_title=f"k, {noun} ablated together",
        panels=tuple(_within(panel, ranges[score]) for score, panel in panels),
        across=max(2, across),
        one_legend=True,
    )


def _within(panel: CurvePanel, ends: tuple[float, float]) -> CurvePanel:
    return CurvePanel(title=panel.title, y_title=panel.y_title, curves=panel.curves, y_range=ends)


def _panel(score: str, ablation: str, metric: str, records: Sequence[Row], noun: str) -> CurvePanel:
    x = tuple(number(row["k"]) for row in records)

    def column(name: str) -> tuple[float, ...]:
        return tuple(number(row[name]) for row in records)

    strongest, random = f"strongest {noun}, interval", f"random {noun}, middle 95 % of draws"
    curves = (
        Curve(name=strongest, x=x, y=column("effect"), low=column("ci_low"), high=column("ci_high")),
        Curve(name=random, x=x, y=column("random_effect"), low=column("random_low"), high=column("random_high")),
    )
    return CurvePanel(title=_heading(score, ablation), y_title=f"effect on {unit_of(metric)}", curves=curves)


def _heading(score: str, ablation: str) -> str:
    return ", ".join(filter(None, (score, f"{ablation} ablation")))


def causal_tables(rows: pd.DataFrame, *, width: int, plain: bool, noun: str = "heads") -> Iterator[Group]:
    """One table per score and ablation: effect, interval, random heads, p and verdict where there are.

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
        noun: What is ablated.
    """
    for score, ablation, records in _parts(rows):
        metric = unit_of(text(records[0]["metric"]))
        without = figure(records[0]["baseline"])
        lines = (
            f"{_heading(score, ablation)}: effect on {metric}" + (f", {without} without" if without else ""),
            # A smaller k takes the first of them.
            f"{noun}, strongest first: {text(records[-1]['heads']).replace('+', ' ')}",
        )
        cells = [_cells(row) for row in records]
        yield text_table(cells, _COLUMNS, lines=lines, width=width, plain=plain)


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

    Args:
        rows: The causal table's rows of one metric and checkpoint.
        single: Summary rows of heads ablated one by one, of the same metric and checkpoint; with a column `score`
            where they are told apart by it, and `ablation` likewise.
        noun: What is ablated.
    """
    sentences: dict[str, str] = {}
    for score, ablation, records in _parts(rows):
        if score in sentences:
            continue
        told = [row for row in records if np.isfinite(number(row["effect"]))]
        alone = _alone(single, score, ablation, records)
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
    words = f"without {text(row['heads'])} ({ablation}) {metric} changes by {figure(row['effect'], sign=True)}"
    words += f" {interval(row['ci_low'], row['ci_high'])}".rstrip()
    if draws and text(row["random_effect"]):
        words += f", without as many random {noun} by {figure(row['random_effect'], sign=True)}"
        words += f" {interval(row['random_low'], row['random_high'])}".rstrip()
        p = probability(row["p"])
        verdict = f"{text(row['verdict'])}, p = {p}" if p else f"no verdict below {VERDICT_DRAWS}"
        words += f" ({draws} draws: {verdict})"
    return words


def _alone(single: pd.DataFrame, score: str, ablation: str, records: Sequence[Row]) -> str:
    candidates = {name for row in records for name in text(row["heads"]).split("+")}
    rows = [{str(name): value for name, value in row.items()} for row in single.to_dict("records")]
    rows = [row for row in rows if text(row.get("score", score)) == score]
    rows = [row for row in rows if text(row.get("ablation", ablation)) == ablation and head_name(row) in candidates]
    rows.sort(key=lambda row: -abs(number(row["effect"])))
    matter = list(dict.fromkeys(head_name(row) for row in rows if text(row["verdict"]) == "yes"))
    if matter:
        named = " and ".join([", ".join(matter[:-1]), matter[-1]] if len(matter) > 1 else matter)
        return f"{named} {'matter' if len(matter) > 1 else 'matters'}, ablated alone; "
    return "no head alone is shown to matter; " if rows else ""
