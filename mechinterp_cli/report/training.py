"""Pictures and tables along training: scores of heads, in-context loss, effects of trials."""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import counted_between, figure, number
from mechinterp_cli.report.checkpoints import Checkpoints
from mechinterp_cli.report.scores import head_name, look_of, of_score, strongest_heads
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.report.terminal import describe_place
from mechinterp_cli.text import counted

LINES = 3
"""Heads or trials drawn per panel."""
MAX_SCORES = 4
"""Scores drawn; the others are in the tables."""
WIDTH = 520


def axis(checkpoints: Checkpoints) -> tuple[str, tuple[float | str, ...]]:
    """The x axis: its title, and where every checkpoint stands."""
    if checkpoints.tokens is not None:
        return "tokens seen in training", checkpoints.tokens
    return "checkpoint", checkpoints.names


def losses(baselines: pd.DataFrame | None, checkpoints: Checkpoints) -> dict[str, tuple[float, ...]]:
    """In-context loss of the unedited model at every checkpoint, mean over prompts, by metric.

    Args:
        baselines: The table; None where the run has none.
        checkpoints: The run's.

    Returns:
        `repeated_loss` and `first_loss` where there are both, else `loss_gap`; empty where there is neither.
    """
    if baselines is None or baselines.empty:
        return {}
    clean = baselines[(baselines["stream"] == "clean").fillna(False).astype(bool)]
    there = set(clean["metric"])
    chosen = ("repeated_loss", "first_loss") if {"repeated_loss", "first_loss"} <= there else ("loss_gap",)
    return {metric: _means(clean, metric, checkpoints) for metric in chosen if metric in there}


def _means(rows: pd.DataFrame, metric: str, checkpoints: Checkpoints) -> tuple[float, ...]:
    found: dict[str, list[float]] = {name: [] for name in checkpoints.names}
    for name, of, value in zip(rows["checkpoint"], rows["metric"], rows["value"], strict=True):
        if of == metric and str(name) in found and math.isfinite(number(value)):
            found[str(name)].append(number(value))
    return tuple(sum(values) / len(values) if values else math.nan for values in found.values())


def score_curves(
    rows: pd.DataFrame,
    baselines: pd.DataFrame | None,
    checkpoints: Checkpoints,
    scores: Sequence[str],
    about: Sequence[str],
    level: str = "95",
) -> Curves | None:
    """The strongest heads' scores against training, and below them the in-context loss.

    Args:
        rows: The scores of all checkpoints.
        baselines: Metrics of the unedited model; None where the run has none.
        checkpoints: The run's.
        scores: Which scores, the most important first.
        about: What stands in the subtitle.
        level: Of intervals, in percent.

    Returns:
        None where there is no number at all.
    """
    x_title, x = axis(checkpoints)
    panels = [_score_panel(of_score(rows, score), score, checkpoints, x) for score in scores[:MAX_SCORES]]
    # A score that no head has at the last checkpoint has no lines.
    panels = [panel for panel in panels if panel.curves]
    found = losses(baselines, checkpoints)
    if found:
        curves = tuple(Curve(name=metric, x=x, y=values) for metric, values in found.items())
        panels.append(CurvePanel(title="in-context loss", y_title="nats per token", curves=curves))
    if not panels:
        return None
    left = counted(len(scores) - MAX_SCORES, "more score is", "more scores are")
    left_out = f"{left} in the table alone." if len(scores) > MAX_SCORES else ""
    over = counted_between(rows["n"], "sequence") or "sequences"
    caption = f"Heads are the {LINES} strongest at the last checkpoint. Bands: {level} % intervals over {over}."
    return Curves(
        title="Scores of heads along training",
        lines=tuple(filter(None, (", ".join(filter(None, about)), caption, left_out))),
        x_title=x_title,
        panels=tuple(panels),
        across=1,
        width=WIDTH,
    )


def _score_panel(rows: pd.DataFrame, score: str, checkpoints: Checkpoints, x: tuple[float | str, ...]) -> CurvePanel:
    heads = [head_name(row) for row in strongest_heads(checkpoints.last(rows), LINES)]
    along: dict[tuple[str, str], Mapping[str, object]] = {}
    for record in rows.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        along[head_name(row), str(row["checkpoint"])] = row
    scale = look_of(score).scale
    ends = (scale.low, scale.high + 0.05 * (scale.high - scale.low)) if scale is not None else None
    return CurvePanel(
        title=score,
        y_title="score",
        curves=tuple(_head_curve(head, along, checkpoints, x) for head in heads),
        y_range=ends,
    )


def _head_curve(
    head: str,
    along: Mapping[tuple[str, str], Mapping[str, object]],
    checkpoints: Checkpoints,
    x: tuple[float | str, ...],
) -> Curve:
    rows = [along.get((head, name), {}) for name in checkpoints.names]
    return curve_of(f"head {head}", rows, x, "value")


def trial_curves(
    everywhere: pd.DataFrame,
    strongest: pd.DataFrame,
    checkpoints: Checkpoints,
    tokens: Mapping[str, Sequence[str]],
    quantity: str,
    about: Sequence[str],
    named: Callable[[Mapping[str, object], Mapping[str, Sequence[str]]], str] = describe_place,
    level: str = "95",
) -> Curves:
    """The strongest trials' effect against training.

    Args:
        everywhere: Summary rows of one metric, group and aggregate, of all checkpoints.
        strongest: The rows to follow, of the last checkpoint.
        checkpoints: The run's.
        tokens: Decoded tokens by template.
        quantity: `normalized` or `effect`.
        about: What stands in the subtitle.
        named: What a trial is called, of its row and the tokens.
        level: Of intervals, in percent.
    """
    x_title, x = axis(checkpoints)
    curves = []
    for record in strongest.head(LINES).to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        same = everywhere[everywhere["trial"] == row["trial"]]
        at = {str(other["checkpoint"]): other for other in same.to_dict("records")}
        rows = [at.get(name, {}) for name in checkpoints.names]
        curves.append(curve_of(named(row, tokens), rows, x, quantity))
    over = counted_between(everywhere["n"], "prompt") if "n" in everywhere else "prompts"
    caption = f"The strongest at the last checkpoint. Bands: {level} % intervals over {over}."
    return Curves(
        title="Effect of the strongest trials along training",
        lines=tuple(filter(None, (", ".join(filter(None, about)), caption))),
        x_title=x_title,
        panels=(
            CurvePanel(
                title="", y_title="normalised effect" if quantity == "normalized" else "effect", curves=tuple(curves)
            ),
        ),
        across=1,
        width=WIDTH,
    )


def checkpoint_table(
    rows: pd.DataFrame,
    baselines: pd.DataFrame | None,
    checkpoints: Checkpoints,
    scores: Sequence[str],
    *,
    width: int,
    plain: bool,
) -> Group:
    """The strongest head of every score and the loss, checkpoint by checkpoint.

    Args:
        rows: The scores of all checkpoints.
        baselines: Metrics of the unedited model; None where the run has none.
        checkpoints: The run's.
        scores: Which scores, the most important first; those that do not fit are left out.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    found = losses(baselines, checkpoints)
    cells = [
        {
            "checkpoint": name,
            "tokens": f"{checkpoints.tokens[i]:,.0f}" if checkpoints.tokens else "",
            **{score: _best(of_score(rows, score), name) for score in scores},
            **{metric: figure(values[i]) for metric, values in found.items()},
        }
        for i, name in enumerate(checkpoints.names)
    ]
    columns = {
        "checkpoint": Column(left=True, broken=True),
        "tokens": Column(3),
        # The first score, the losses, the tokens; then the other scores as there is room.
        **{score: Column(1 if at == 0 else 3 + at) for at, score in enumerate(scores)},
        **{metric: Column(2) for metric in found},
    }
    return text_table(
        cells, columns, lines=("along training: the strongest head, and the loss",), width=width, plain=plain
    )


def _best(rows: pd.DataFrame, checkpoint: str) -> str:
    at = strongest_heads(rows[(rows["checkpoint"] == checkpoint).fillna(False).astype(bool)], 1)
    return f"{figure(at[0]['value'])} ({head_name(at[0])})" if at else ""
