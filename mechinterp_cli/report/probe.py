"""The view of a `probe` run: scores by layer, beside what could be had without the model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from mechinterp_cli.report.cells import figure, interval, missing, number, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.rows import Row, distinct, having, records, without
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, Picture
from mechinterp_cli.report.tables import Column, text_table
from mechinterp_cli.runs.manifest import Manifest

HEADLINE = (
    *("label", "probe", "measure", "score", "ci_low", "ci_high", "selectivity"),
    *("majority", "bag", "random_weights", "n"),
)
FLAT = ("majority", "bag")
"""Baselines that know no site."""
TWIN = "random_weights"
NAMES = {"majority": "majority class", "bag": "bag of tokens", TWIN: "random weights", "control": "control labels"}
_COLUMNS = {
    "where": Column(left=True, broken=True),
    "probe": Column(1, left=True),
    "score": Column(),
    "interval": Column(2),
    "selectivity": Column(2),
    "majority": Column(1),
    "bag": Column(1),
    "random weights": Column(1),
    "n": Column(3),
}


@dataclass(frozen=True, eq=False)
class ProbeView:
    """Scores of a run."""

    rows: pd.DataFrame
    """`probes` over all folds."""
    about: tuple[str, ...]
    """Task, model, samples: for titles."""
    scale: str
    """What scores are."""
    count: int
    """How many of the best are listed."""

    @property
    def measure(self) -> str:
        """`accuracy` or `R²`."""
        found = distinct(self.rows, "measure")
        return "R²" if found == ["r2"] else "accuracy"

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Of the model's own activations and the labels themselves."""
        return without(having(self.rows, target="label"), "baseline")

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """Scores by layer."""
        from mechinterp_cli.report import curves  # Altair takes half a second to import

        return [(f"scores-{kind}", curves.drawing(self._by_layer(kind))) for kind in distinct(self.scores, "site")]

    @property
    def pages(self) -> Sequence[tuple[str, str]]:
        """None."""
        return ()

    def _by_layer(self, kind: str) -> Curves:
        """A panel for each view: probes, control labels, baselines; of heads the best of each layer."""
        rows = having(self.rows, site=kind)
        panels = tuple(self._panel(view, having(rows, view=view)) for view in distinct(rows, "view"))
        several = bool(rows["head"].notna().any() or rows["kv_head"].notna().any())
        heads = " Of several heads, each layer's best." if several else ""
        lines = (", ".join(self.about[1:]), f"{self.scale}{heads} Bands: intervals over groups of samples.")
        title = f"{self.about[0]}, {kind}"
        return Curves(title=title, lines=lines, x_title="layer", panels=panels, across=2, one_legend=True, linear=True)

    def _panel(self, view: str, rows: pd.DataFrame) -> CurvePanel:
        own = without(rows, "baseline")
        named = []
        for name in distinct(own, "probe"):
            named.append((name, having(own, probe=name, target="label")))
            named.append((f"{NAMES['control']}, {name}", having(own, probe=name, target="control")))
        named.append((NAMES[TWIN], having(rows, baseline=TWIN)))
        lines = [_line(name, part) for name, part in named if len(part)]
        x = lines[0].x if lines else ()
        for name in FLAT:
            for row in records(having(self.rows, baseline=name, view=view)):
                lines.append(Curve(name=NAMES[name], x=x, y=(number(row["score"]),) * len(x)))
        return CurvePanel(title=view, y_title=self.measure, curves=tuple(lines))

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: the best places, beside their baselines."""
        yield text_table(
            [self._cells(row) for row in self._best()],
            _COLUMNS,
            lines=(f"{self.about[0]}: {self.measure} of the best probes", ", ".join(self.about[1:])),
            width=width,
            plain=plain,
            notes={"score": self.scale, "selectivity": "accuracy less that on labels drawn once per word type"},
        )

    def _best(self) -> list[Row]:
        order = self.scores.sort_values("score", ascending=False, kind="stable")
        return records(order.head(self.count))

    def _baseline(self, name: str, row: Row) -> float:
        """What a baseline scores where a probe reads."""
        found = having(self.rows, baseline=name, view=text(row["view"]))
        if name == TWIN:
            found = having(found, label=text(row["label"]))
        scores = [number(one["score"]) for one in records(found)]
        return scores[0] if scores else math.nan

    def _cells(self, row: Row) -> Mapping[str, str]:
        return {
            "where": text(row["label"]),
            "probe": text(row["probe"]),
            "score": figure(row["score"]),
            "interval": interval(row["ci_low"], row["ci_high"]),
            "selectivity": figure(row["selectivity"]),
            "majority": figure(self._baseline("majority", row)),
            "bag": figure(self._baseline("bag", row)),
            "random weights": figure(self._baseline(TWIN, row)),
            "n": text(row["n"]),
        }

    def headline(self) -> list[dict[str, Any]]:
        """The best places as plain data."""
        return [self._plain(row) for row in self._best()]

    def _plain(self, row: Row) -> dict[str, Any]:
        found: dict[str, Any] = {name: row[name] for name in HEADLINE if name in row}
        found |= {name: self._baseline(name, row) for name in (*FLAT, TWIN)}
        return {name: None if missing(found[name]) else found[name] for name in HEADLINE}


def _line(name: str, rows: pd.DataFrame) -> Curve:
    """A score by layer; of several at a layer the best."""
    best: dict[int, Row] = {}
    for row in records(rows):
        layer = int(number(row["layer"]))
        if layer not in best or number(row["score"]) > number(best[layer]["score"]):
            best[layer] = row
    order = sorted(best)
    low, high = (tuple(number(best[layer][end]) for layer in order) for end in ("ci_low", "ci_high"))
    y = tuple(number(best[layer]["score"]) for layer in order)
    return Curve(name=name, x=tuple(float(layer) for layer in order), y=y, low=low, high=high)


def probe_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> ProbeView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `probes`.
    """
    rows = tables["probes"]
    checkpoints = checkpoints_of(rows)
    whole = without(checkpoints.last(rows), "fold")
    samples = f"{manifest.task.get('samples', '')} samples"
    title = manifest.display.get("title", manifest.name)
    about = (title, str(manifest.model.get("id", "")), checkpoints.about, samples)
    return ProbeView(
        rows=whole,
        about=tuple(part for part in about if part),
        scale=manifest.display.get("scale", ""),
        count=manifest.config["output"]["top"],
    )
