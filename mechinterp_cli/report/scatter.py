"""Two runs against each other: a point per row, one panel per metric, drawn by Altair and vl-convert."""

from dataclasses import dataclass
from functools import partial

import altair as alt
import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.report.beside import DIAGONAL, looks_of
from mechinterp_cli.report.labels import show_text
from mechinterp_cli.report.picture import Drawing, head_lines, inline
from mechinterp_cli.runs.compare import Comparison
from mechinterp_cli.runs.estimators import ESTIMATOR
from mechinterp_cli.runs.sides import Side
from mechinterp_cli.text import counted

SIZE = 320
"""Pixels of a panel's side."""
MAX_PANELS = 6
MAX_POINTS = 5000
"""Of a panel; beyond, the largest magnitudes are drawn and the caption says so."""
ACROSS = 3


@dataclass(frozen=True, kw_only=True)
class ScatterPanel:
    """One metric."""

    title: str
    column: str
    """What the axes are: `normalized`, `effect` or `value`."""
    sites: npt.NDArray[np.object_]
    """`[points]`, the kind of site, the checkpoint or the estimator: what colours tell apart."""
    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    places: tuple[str, ...]
    """`[points]`, where each is."""

    @property
    def domain(self) -> tuple[float, float]:
        """Both axes' range, with 0 and a margin: the diagonal is what two equal runs lie on."""
        everything = np.concatenate([self.a, self.b, [0.0]])
        low, high = float(everything.min()), float(everything.max())
        margin = 0.05 * (high - low) or 1.0
        return low - margin, high + margin


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """One picture."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    kinds: tuple[str, ...]
    """Kinds of sites (or checkpoints, or estimators) in the order of their colours."""
    panels: tuple[ScatterPanel, ...]


def build_scatter(comparison: Comparison) -> Scatter:
    """Arrange the rows that have a number in both runs.

    Args:
        comparison: Two runs.
    """
    rows = comparison.rows[comparison.rows["state"].isin(["compared", "trivial"])]
    metrics = list(dict.fromkeys(rows["metric"]))
    kind = _coloured_by(rows)
    lines = [f"A: {_about(comparison.a)}", f"B: {_about(comparison.b)}"]
    panels = []
    for metric in metrics[:MAX_PANELS]:
        part = rows[rows["metric"] == metric]
        sizes = np.maximum(part["a"].abs(), part["b"].abs()).to_numpy()
        if len(part) > MAX_POINTS:
            lines.append(f"{metric}: the {MAX_POINTS} largest of {len(part)} rows")
        # Ascending, so that the largest are on top.
        shown = part.iloc[np.argsort(sizes, kind="stable")[-MAX_POINTS:]]
        a, b = shown["a"].to_numpy(), shown["b"].to_numpy()
        sites = shown[kind].to_numpy(dtype=object)
        places = tuple(comparison.where(row) for row in shown.to_dict("records"))
        column = str(part["column"].iloc[0])
        panels.append(ScatterPanel(title=metric, column=column, sites=sites, a=a, b=b, places=places))
    if left := len(metrics[MAX_PANELS:]):
        lines.append(f"{counted(left, 'more metric is', 'more metrics are')} in the table alone")
    kinds = tuple(dict.fromkeys(rows[kind]))
    return Scatter(title="A against B", lines=tuple(lines), kinds=kinds, panels=tuple(panels))


def _coloured_by(rows: pd.DataFrame) -> str:
    """Kinds of sites; where several estimators are there, these, and where one kind is there, checkpoints."""
    if ESTIMATOR in rows and rows[ESTIMATOR].nunique() > 1:
        return ESTIMATOR
    along = "checkpoint" in rows and rows["checkpoint"].notna().all() and rows["checkpoint"].nunique() > 1
    return "checkpoint" if along and rows["site"].nunique() == 1 else "site"


def _about(side: Side) -> str:
    model = side.manifest.model
    several = model.get("checkpoints")
    moment = counted(len(several), "checkpoint") if several else model.get("revision")
    words = [side.path.resolve().name, model.get("id"), moment, model.get("dtype")]
    words += [side.section.get("direction"), side.section.get("source")]
    return ", ".join(str(word) for word in words if word is not None)


def chart(scatter: Scatter) -> alt.ConcatChart:
    """The picture as a Vega-Lite chart."""
    room = min(ACROSS, max(1, len(scatter.panels))) * (SIZE + 80)
    title = head_lines(scatter.title, scatter.lines, room)
    last = min(ACROSS, len(scatter.panels)) - 1
    panels = [_panel(panel, scatter.kinds, with_legend=i == last) for i, panel in enumerate(scatter.panels)]
    whole = alt.concat(*panels, columns=ACROSS, title=title, spacing=24).resolve_scale(
        color="independent", shape="independent"
    )
    drawn: alt.ConcatChart = whole.configure_view(stroke="#999999").configure_axis(gridColor="#eeeeee")
    return drawn


def render_png(scatter: Scatter, *, scale: float = 2.0) -> bytes:
    """The picture as PNG.

    Args:
        scatter: What to draw.
        scale: Pixels per unit.
    """
    return Drawing(partial(chart, scatter)).png(scale=scale)


def _panel(panel: ScatterPanel, kinds: tuple[str, ...], *, with_legend: bool) -> alt.LayerChart:
    low, high = panel.domain
    scale = alt.Scale(domain=[low, high], nice=False, zero=False)
    axis = alt.Axis(format=".2~g", tickCount=6)
    x = alt.X("a:Q", scale=scale, axis=axis, title=f"A, {panel.column}")
    y = alt.Y("b:Q", scale=scale, axis=axis, title=f"B, {panel.column}")
    colour, shape = looks_of(kinds, with_legend=with_legend)
    points = [
        {"where": show_text(place), "a": float(a), "b": float(b), "site": show_text(str(site))}
        for a, b, site, place in zip(panel.a, panel.b, panel.sites, panel.places, strict=True)
    ]
    line = alt.Chart(inline([{"a": low, "b": low}, {"a": high, "b": high}]))
    diagonal = line.mark_line(**DIAGONAL).encode(x, y)
    marks = alt.Chart(inline(points)).mark_point(filled=True, size=36, opacity=0.75)
    layers = [diagonal, marks.encode(x, y, colour, shape)]
    return alt.LayerChart(layer=layers, width=SIZE, height=SIZE, title=show_text(panel.title))
