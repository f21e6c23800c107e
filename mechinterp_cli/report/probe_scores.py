"""What probes read, by layer, beside what could be had without the model: curves and the table of the best places."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.behind import Behind
from mechinterp_cli.report.cells import figure, interval, number, probability, text
from mechinterp_cli.report.rows import Row, distinct, having, records, without
from mechinterp_cli.report.series import curve_of
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range
from mechinterp_cli.report.tables import Column, text_table

TWIN = "random_weights"
NAMES = {"majority": "majority class", "bag": "bag of tokens", "embedding": "token embeddings", TWIN: "random weights"}
CONTROL = "control labels"
MAX_VIEWS = 4
"""Views that curves are drawn of: those that are read best."""
MAX_BANDS = 3
"""More probes than this are drawn without their intervals, which would hide the lines."""
FLOOR = -0.5
"""R² below this is drawn here: how bad a prediction is that is worse than the mean says nothing."""
_COLUMNS = {
    "where": Column(left=True, broken=True),
    "probe": Column(1, left=True),
    "score": Column(),
    "interval": Column(2),
    "p": Column(1),
    "selectivity": Column(2),
    "majority": Column(1),
    "bag": Column(1),
    "embedding": Column(2),
    "random weights": Column(1),
    "n": Column(3),
}


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a run."""

    rows: pd.DataFrame
    """`probes` over all folds."""
    about: tuple[str, ...]
    """Task, model, samples: for titles."""
    scale: str
    """What scores are."""
    level: str = "95"
    """Of intervals, in percent."""

    @property
    def measure(self) -> str:
        """`accuracy` or `R²`."""
        return "R²" if distinct(self.rows, "measure") == ["r2"] else "accuracy"

    @cached_property
    def own(self) -> pd.DataFrame:
        """Of the model's own activations and the labels themselves."""
        return without(having(self.rows, target="label"), "baseline")

    @cached_property
    def baselines(self) -> list[str]:
        """Names of the baselines, in the order of the table."""
        return distinct(self.rows, "baseline")

    def best(self, count: int) -> list[Row]:
        """The places that are read best.

        Args:
            count: How many.
        """
        return records(self.own.sort_values("score", ascending=False, kind="stable").head(count))

    def views(self, kind: str, count: int) -> list[str]:
        """The views that a kind of site is read best in, in the order of the table.

        Args:
            kind: Of site.
            count: How many.
        """
        rows = having(self.own, site=kind)
        tops = {view: float(having(rows, view=view)["score"].max()) for view in distinct(rows, "view")}
        kept = sorted(tops, key=lambda view: -tops[view])[:count]
        return [view for view in tops if view in kept]

    def baseline(self, name: str, row: Row) -> float:
        """What a baseline scores where a probe reads; NaN where there is none.

        Args:
            name: Of the baseline.
            row: Of `probes`.
        """
        found = having(self.rows, baseline=name, view=text(row["view"]))
        own = having(found, label=text(row["label"]))
        scores = [number(one["score"]) for one in records(own if name == TWIN else found)]
        return scores[0] if scores else math.nan


def score_curves(scores: Scores, kind: str) -> Curves:
    """Of each view a panel of scores with their baselines, and one of selectivity where there is any.

    Args:
        scores: All.
        kind: Of site.
    """
    rows = having(scores.rows, site=kind)
    views = distinct(rows, "view")
    kept = scores.views(kind, MAX_VIEWS)
    read = [_score_panel(scores, view, having(rows, view=view)) for view in kept]
    gained = [_selectivity_panel(view, having(scores.own, site=kind, view=view)) for view in kept]
    gained = [panel for panel in gained if panel.curves]
    low, high = y_range(read, zero=False)
    read = [_within(panel, low, high) for panel in read]
    low, high = y_range(gained)
    gained = [_within(panel, low, high) for panel in gained]
    panels = [panel for pair in zip(read, gained, strict=True) for panel in pair] if len(gained) == len(read) else read
    notes = [
        scores.scale,
        "Of several heads, each layer's best." if _has_heads(rows) else "",
        f"Bands: {scores.level} % intervals over groups of samples." if _banded(rows) else "",
        f"The {len(kept)} of {len(views)} views that are read best." if len(views) > len(kept) else "",
        "Selectivity: accuracy less that on control labels." if gained else "",
        f"R² below {FLOOR} is drawn there." if scores.measure == "R²" and float(rows["score"].min()) < FLOOR else "",
    ]
    return Curves(
        title=f"{scores.about[0]}, {kind}",
        lines=(", ".join(scores.about[1:]), " ".join(filter(None, notes))),
        x_title="layer",
        panels=tuple(panels),
        across=2,
        one_legend=len(panels) > 1 and not gained,
        width=300,
        linear=True,
    )


def _has_heads(rows: pd.DataFrame) -> bool:
    return bool(rows["head"].notna().any() or rows["kv_head"].notna().any())


def _banded(rows: pd.DataFrame) -> bool:
    return len(distinct(without(rows, "baseline"), "probe")) <= MAX_BANDS


def _score_panel(scores: Scores, view: str, rows: pd.DataFrame) -> CurvePanel:
    """Probes, control labels where one probe is drawn, random weights; what knows no layer is flat."""
    own = without(rows, "baseline")
    probes = distinct(own, "probe")
    lines = [by_layer(name, having(own, probe=name, target="label"), bands=_banded(rows)) for name in probes]
    beside = [(CONTROL, having(own, target="control"))] if len(probes) == 1 else []
    beside.append((NAMES[TWIN], having(rows, baseline=TWIN)))
    lines += [by_layer(name, part) for name, part in beside if len(part)]
    x = lines[0].x if lines else ()
    for name in scores.baselines:
        for row in records(having(scores.rows, baseline=name, view=view))[: int(name != TWIN)]:
            y = drawn(number(row["score"]))
            lines.append(Curve(name=NAMES.get(name, name), x=x, y=(y,) * len(x), look="reference"))
    return CurvePanel(title=view, y_title=scores.measure, curves=tuple(lines))


def _selectivity_panel(view: str, rows: pd.DataFrame) -> CurvePanel:
    known = rows[rows["selectivity"].notna()]
    lines = [by_layer(name, having(known, probe=name), "selectivity") for name in distinct(known, "probe")]
    return CurvePanel(title=f"{view}, selectivity", y_title="selectivity", curves=tuple(lines))


def by_layer(name: str, rows: pd.DataFrame, column: str = "score", *, bands: bool = False) -> Curve:
    """A number by layer; of several at a layer that of the best score.

    Args:
        name: Of the curve.
        rows: Of `probes`.
        column: The number.
        bands: Whether the score's interval is drawn.
    """
    best: dict[int, Row] = {}
    for row in records(rows):
        layer = int(number(row["layer"]))
        if layer not in best or number(row["score"]) > number(best[layer]["score"]):
            best[layer] = row
    told = None if column == "score" else _behind_selectivity
    layers = [best[layer] for layer in sorted(best)]
    return curve_of(name, layers, "layer", column, band=bands, floor=FLOOR, told=told)


def _behind_selectivity(row: Row) -> Behind:
    """No interval: that of the table is of the score."""
    return {"n": text(row["n"])}


def drawn(value: float) -> float:
    """A number as it is drawn: not below the floor.

    Args:
        value: NaN stays.
    """
    return max(value, FLOOR) if math.isfinite(value) else math.nan


def _within(panel: CurvePanel, low: float, high: float) -> CurvePanel:
    return CurvePanel(title=panel.title, y_title=panel.y_title, curves=panel.curves, y_range=(low, high))


def score_tables(scores: Scores, *, count: int, width: int, plain: bool) -> Iterator[Group]:
    """The best places beside their baselines.

    Args:
        scores: All.
        count: How many.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    rows = scores.best(count)
    if rows:
        # What all places share stands above the table.
        shared = [found[0] for name in ("site", "view") if len(found := distinct(scores.own, name)) == 1]
        yield text_table(
            [_cells(scores, row, shared) for row in rows],
            _COLUMNS,
            lines=(
                f"{scores.about[0]}: {scores.measure} of the best probes",
                ", ".join([*scores.about[1:], *shared]),
            ),
            width=width,
            plain=plain,
            notes={
                "score": scores.scale.rstrip("."),
                "interval": f"{scores.level} %, over groups of samples",
                "p": p_note(rows),
                "selectivity": "accuracy less that on labels drawn once per word type",
            },
        )


def p_note(rows: Sequence[Row]) -> str:
    """What p is.

    Args:
        rows: Of `probes`.
    """
    corrected = any(text(row.get("p_adjusted")) for row in rows)
    return "of permuted labels" + (", corrected over all places" if corrected else "")


def p_of(row: Row) -> object:
    """The corrected p of a score where there is one, else its own."""
    return row["p_adjusted"] if text(row.get("p_adjusted")) else row.get("p")


def _cells(scores: Scores, row: Row, shared: Sequence[str]) -> Mapping[str, str]:
    return {
        "where": ", ".join(part for part in text(row["label"]).split(", ") if part not in shared),
        "probe": text(row["probe"]),
        "score": figure(row["score"]),
        "interval": interval(row["ci_low"], row["ci_high"]),
        "p": probability(p_of(row)),
        "selectivity": figure(row["selectivity"]),
        **{name: figure(scores.baseline(name, row)) for name in ("majority", "bag", "embedding")},
        "random weights": figure(scores.baseline(TWIN, row)),
        "n": text(row["n"]),
    }
