"""What is measured along a text: the loss, and its change, at every position, with and without ablations."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import counted_between, missing, number, text
from mechinterp_cli.report.rows import Row, chosen_metric, distinct, having, records
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves
from mechinterp_cli.report.trials import Trials, key_of

UNEDITED = "unedited"
MAX_TRIALS, MAX_BANDS = 6, 3
"""Trials that are drawn, and up to how many of them with their intervals, which hide each other."""
MAX_TEMPLATES = 4
MAX_POINTS = 256
"""Longer texts are drawn as means over as many stretches."""
WIDTH = 560
AGAINST_UNEDITED = ("kl", "top1")
"""Metrics that compare with the unedited model: their change is what they are, or is 1 less, and is not drawn."""


def position_curves(
    rows: pd.DataFrame, trials: Trials, about: Sequence[str], level: str = "95"
) -> Iterator[tuple[str, Curves]]:
    """A picture per template: the loss by position, below it the change.

    Args:
        rows: The positions table, of one checkpoint.
        trials: Tells which trials are followed, where the table has more than can be drawn.
        about: What stands in the subtitle.
        level: Of intervals, in percent.

    Yields:
        (file name without ending, picture).
    """
    metric = chosen_metric(rows, ("loss",)) if len(rows) else ""
    rows = having(rows, metric=metric) if metric else rows.head(0)
    templates = distinct(rows, "template")
    for at, template in enumerate(templates[:MAX_TEMPLATES] or ([None] if len(rows) else [])):
        part = rows if template is None else having(rows, template=template)
        left = len(templates) - MAX_TEMPLATES
        words = f"Template {template}, {at + 1} of {len(templates)}." if len(templates) > 1 else ""
        words += f" {left} more are in the table." if left > 0 else ""
        yield (
            f"positions-{at + 1}" if len(templates) > 1 else "positions",
            _picture(part, metric, trials, (*filter(None, (", ".join(filter(None, about)),)), words), level),
        )


def _picture(rows: pd.DataFrame, metric: str, trials: Trials, lines: Sequence[str], level: str) -> Curves:
    runs: dict[tuple[str, int] | None, list[Row]] = {}
    # Every value has its own rows of the unedited model; one of them is drawn.
    unedited = rows["trial"].isna().to_numpy(dtype=bool)
    once = rows[~(unedited & rows.assign(of=unedited).duplicated(["of", "position"]).to_numpy(dtype=bool))]
    for row in records(once.sort_values("position")):
        runs.setdefault(None if missing(row["trial"]) else key_of(row), []).append(row)
    chosen = _chosen(list(runs), trials)
    several = len({key[0] for key in chosen}) > 1
    stretch = -(-max(len(run) for run in runs.values()) // MAX_POINTS)
    names = _distinct({key: trials.called(runs[key][0], several=several) for key in chosen})
    value = [_curve(UNEDITED, runs[None], "value", stretch)] if None in runs else []
    value += [_curve(names[key], runs[key], "value", stretch) for key in chosen]
    # Panels without a curve have nothing to say.
    panels = [CurvePanel(title="", y_title=unit_of(metric), curves=tuple(value))] if value else []
    if chosen and metric not in AGAINST_UNEDITED:
        # The change of the unedited model is nothing; the name keeps every run's colour the same in both panels.
        change = [Curve(name=UNEDITED, x=(), y=())] if None in runs else []
        change += [_curve(names[key], runs[key], "effect", stretch, band=len(chosen) <= MAX_BANDS) for key in chosen]
        title = f"change of {unit_of(metric)}"
        panels.append(CurvePanel(title="", y_title=title, curves=tuple(change)))
    banded = any(curve.low is not None for panel in panels for curve in panel.curves)
    captions = (*lines, _caption(rows, len(runs) - (None in runs), len(chosen), stretch, level if banded else ""))
    return Curves(
        title=f"{metric} by position, with and without ablations",
        lines=tuple(filter(None, captions)),
        x_title="position of the predicted token",
        panels=tuple(panels),
        across=1,
        one_legend=True,
        width=WIDTH,
        linear=True,
    )


def _caption(rows: pd.DataFrame, there: int, drawn: int, stretch: int, level: str) -> str:
    prompts = counted_between(rows["n"], "prompt")
    parts = [f"Means over {prompts}." if prompts else ""]
    parts.append(f"{drawn} of {there} ablations." if drawn < there else "")
    parts.append(f"Every point is the mean over {stretch} positions." if stretch > 1 else "")
    parts.append(f"Bands: {level} % intervals." if level else "")
    return " ".join(filter(None, parts))


def _chosen(keys: Sequence[tuple[str, int] | None], trials: Trials) -> list[tuple[str, int]]:
    """Of the trials that the table has: sets, the top k, the strongest; then any."""
    there = [key for key in keys if key is not None]
    leading = [key_of(row) for row in trials.leading(len(trials.rows))] if len(trials.rows) else []
    ordered = dict.fromkeys([*[key for key in leading if key in there], *there])
    return list(ordered)[:MAX_TRIALS]


def _distinct(names: dict[tuple[str, int], str]) -> dict[tuple[str, int], str]:
    """Names that no two trials share: curves of one name would be one line."""
    taken = list(names.values())
    return {key: f"{name}, trial {key[1]}" if taken.count(name) > 1 else name for key, name in names.items()}


def _curve(name: str, run: Sequence[Row], column: str, stretch: int, *, band: bool = False) -> Curve:
    def means(of: str) -> tuple[float, ...]:
        return tuple(_mean([number(row[of]) for row in part], [number(row["n"]) for row in part]) for part in parts)

    if stretch == 1:
        # What stands behind the value itself no table has: intervals are of the change.
        told = None if column == "effect" else lambda row: {"n": text(row["n"])}
        return curve_of(name, run, "position", column, band=band, told=told)
    parts = [run[i : i + stretch] for i in range(0, len(run), stretch)]
    x = tuple(float(np.mean([number(row["position"]) for row in part])) for part in parts)
    return Curve(name=name, x=x, y=means(column))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    pairs = [(value, weight) for value, weight in zip(values, weights, strict=True) if np.isfinite(value)]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total > 0 else np.nan
