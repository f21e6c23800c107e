"""Where samples of each class lie along a probe's direction."""

from collections.abc import Sequence

import pandas as pd

from mechinterp_cli.report.cells import figure, number, text
from mechinterp_cli.report.probe_scores import Scores
from mechinterp_cli.report.rows import distinct, having
from mechinterp_cli.report.shapes import Histogram, HistogramPanel

MAX_PANELS = 6


def projection_histograms(rows: pd.DataFrame, scores: Scores, classes: Sequence[str]) -> Histogram | None:
    """A panel for the best place of each kind of site and probe.

    Args:
        rows: The table `projections`, of one checkpoint.
        scores: Which tell the best places.
        classes: Both, in the order of the probes.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    panels = []
    for kind in distinct(rows, "site"):
        for probe in distinct(having(rows, site=kind), "probe"):
            part = having(rows, site=kind, probe=probe)
            best = having(scores.own, probe=probe, label=tuple(distinct(part, "label")))
            if len(best):
                first = best.sort_values("score", ascending=False, kind="stable").iloc[0]
                panels.append(_panel(having(part, label=text(first["label"])), number(first["score"]), classes))
    if not panels:
        return None
    counts = ", ".join(f"{len(values)} {name}" for name, values in panels[0].series.items())
    known = classes[1] if len(classes) > 1 else "the second class"
    notes = f"Of each kind of site and probe the best place. Right of 0 the probe says {known}. {counts}."
    more = f" The first {MAX_PANELS} of {len(panels)}." if len(panels) > MAX_PANELS else ""
    return Histogram(
        title=f"{scores.about[0]}: held-out samples along the probe's direction",
        lines=(", ".join(scores.about[1:]), notes + more),
        x_title="distance from the boundary (standard deviations)",
        panels=tuple(panels[:MAX_PANELS]),
        across=2,
    )


def _panel(rows: pd.DataFrame, score: float, classes: Sequence[str]) -> HistogramPanel:
    names = [name for name in classes if name in distinct(rows, "class")] or sorted(distinct(rows, "class"))
    series = {name: tuple(number(value) for value in having(rows, **{"class": name})["projection"]) for name in names}
    title = f"{text(rows['label'].iloc[0])}, {text(rows['probe'].iloc[0])}: accuracy {figure(score, 2)}"
    return HistogramPanel(title=title, series=series)
