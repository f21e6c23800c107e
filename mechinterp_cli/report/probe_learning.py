"""How many samples a probe needs: scores by how many it was fitted on."""

from collections.abc import Iterator, Mapping

import pandas as pd

from mechinterp_cli.report.cells import counted_between, number, text
from mechinterp_cli.report.probe_scores import FLOOR, NAMES, Scores
from mechinterp_cli.report.rows import Row, distinct, having, records, without
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range

MAX_LINES = 6


def learning_curves(rows: pd.DataFrame, scores: Scores) -> Curves | None:
    """A panel for each kind of site: each probe at its best place, of one probe at the first and last layer too.

    Args:
        rows: The table `learning`, of one checkpoint.
        scores: Which tell the best places.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    panels = [_panel(scores, kind, having(rows, site=kind)) for kind in distinct(rows, "site")]
    low, high = y_range(panels, zero=False)
    notes = f"Scores of {counted_between(rows['n'], 'held-out sample')}."
    return Curves(
        title=f"{scores.about[0]}: learning curve",
        lines=(", ".join(scores.about[1:]), f"{notes} Bands: {scores.level} % intervals over groups of samples."),
        x_title="training samples",
        panels=tuple(
            CurvePanel(title=panel.title, y_title=panel.y_title, curves=panel.curves, y_range=(low, high))
            for panel in panels
        ),
        across=2,
        width=300,
    )


def _panel(scores: Scores, kind: str, rows: pd.DataFrame) -> CurvePanel:
    curves = []
    for name, (label, probe) in list(_shown(scores, kind, rows).items())[:MAX_LINES]:
        told = sorted(records(having(rows, label=label, probe=probe)), key=lambda row: number(row["n_train"]))
        curves.append(curve_of(name, told, "n_train", "score", floor=FLOOR))
    levels = {number(row["score"]) for row in records(having(scores.rows, baseline="majority"))}
    if curves and len(levels) == 1:
        curves.append(
            Curve(name=NAMES["majority"], x=curves[0].x, y=tuple(levels) * len(curves[0].x), look="reference")
        )
    return CurvePanel(title=kind, y_title=scores.measure, curves=tuple(curves))


def _shown(scores: Scores, kind: str, rows: pd.DataFrame) -> Mapping[str, tuple[str, str]]:
    """What lines are called, and their labels and probes."""
    probes = distinct(rows, "probe")
    found = {}
    for probe in probes:
        known = having(scores.own, site=kind, probe=probe, label=tuple(distinct(having(rows, probe=probe), "label")))
        best = known.sort_values("score", ascending=False, kind="stable")
        for row in _chosen(records(best), records(known), alone=len(probes) == 1):
            place = text(row["label"]).removeprefix(f"{kind}, ")
            found[place if len(probes) == 1 else f"{probe}, {place}"] = text(row["label"]), probe
    return found


def _chosen(best: list[Row], known: list[Row], *, alone: bool) -> Iterator[Row]:
    """The best place; of one probe, at the same head and view, the first and last layer too."""
    yield from best[:1]
    if best and alone:
        frame = pd.DataFrame(known)
        same = having(frame, view=text(best[0]["view"]))
        for name in ("head", "kv_head"):
            value = best[0][name]
            same = without(same, name) if pd.isna(value) else having(same, **{name: value})
        layers = sorted(records(same), key=lambda row: number(row["layer"]))
        yield from [layers[0], layers[-1]]
