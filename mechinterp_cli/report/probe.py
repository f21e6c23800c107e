"""The view of a `probe` run: what can be read where, beside what needs no model, and whether the model uses it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd

from mechinterp_cli.report.cells import figure, missing, number, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.grid import Heatmap
from mechinterp_cli.report.patch import first_tokens
from mechinterp_cli.report.probe_causal import PROBE, Effects, layer_curves
from mechinterp_cli.report.probe_code import code_curves
from mechinterp_cli.report.probe_dose import dose_curves, downstream_curves, labelled_prompts
from mechinterp_cli.report.probe_learning import learning_curves
from mechinterp_cli.report.probe_maps import score_maps
from mechinterp_cli.report.probe_projections import projection_histograms
from mechinterp_cli.report.probe_scores import NAMES, Scores, score_curves, score_tables
from mechinterp_cli.report.probe_verdicts import adjusted, questions, telling, verdict_sentences, verdict_tables
from mechinterp_cli.report.rows import Row, chosen_metric, distinct, having, without
from mechinterp_cli.report.sentences import certainty, level_of, named_tables
from mechinterp_cli.report.shapes import Curves, Histogram, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

SCORES = ("label", "probe", "measure", "score", "ci_low", "ci_high", "p", "p_adjusted", "selectivity")
BASELINES = ("majority", "bag", "embedding", "random_weights")
VERDICTS = ("site", "layer", "head", "kv_head", "position", "span", "intervention", "strength", "stream", "metric")
ANSWERS = ("readable", "effect", "difference", "difference_low", "difference_high", "size", "margin", "used")
HEADLINE = ("table", *SCORES, *BASELINES, "n", *VERDICTS, *ANSWERS)
"""Rows of two tables, told apart by `table`; what a table does not have is null."""
TABLE_TITLES = {"probes": "Best probes", "causal_verdicts": "Readable? Used?"}
_CAUSAL = ("causal_effects", "causal_verdicts", "causal_prompts", "causal_downstream")
TABLES = ("code", "learning", "projections", *_CAUSAL, "labels", "prompts")
"""Those that a run may lack."""
Shape = Heatmap | Curves | Histogram


@dataclass(frozen=True, eq=False)
class ProbeView:
    """Everything that is shown of a run; empty frames where it has no such part."""

    scores: Scores
    code: pd.DataFrame
    learning: pd.DataFrame
    projections: pd.DataFrame
    effects: Effects
    verdicts: pd.DataFrame
    """Of the first metric."""
    downstream: pd.DataFrame
    tokens: Mapping[str, Sequence[str]]
    """Decoded tokens of each template's first prompt."""
    classes: tuple[str, ...]
    """In the order of the probes; none where labels are numbers."""
    count: int
    """How many of the best are listed."""

    pages: ClassVar[Sequence[tuple[str, str]]] = ()
    """No page of its own."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """Scores by layer, maps, code length, learning curve, projections; effects by layer, strength, downstream."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import curves, heatmap, histogram

        def drawing(shape: Shape) -> Picture:
            if isinstance(shape, Heatmap):
                return heatmap.drawing(shape)
            return curves.drawing(shape) if isinstance(shape, Curves) else histogram.drawing(shape)

        return [(name, drawing(shape)) for name, shape in self._shapes() if shape is not None]

    def _shapes(self) -> Iterator[tuple[str, Shape | None]]:
        for kind in distinct(self.scores.own, "site"):
            yield f"scores-{kind}", score_curves(self.scores, kind)
        yield from score_maps(self.scores, self.tokens)
        yield "code", code_curves(self.code, self.scores.about)
        yield "learning", learning_curves(self.learning, self.scores)
        yield "projections", projection_histograms(self.projections, self.scores, self.classes)
        for kind in distinct(self.effects.rows, "site"):
            yield f"causal-{kind}", layer_curves(self.effects, kind)
            yield f"steering-{kind}", dose_curves(self.effects, kind)
        yield "downstream", downstream_curves(self.downstream, self.scores.about, self.scores.measure)

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: the best places beside their baselines, scores by layer, then whether they are used."""
        yield from score_tables(self.scores, count=self.count, width=width, plain=plain)
        for kind in distinct(self.scores.own, "site"):
            yield from terminal_curves(score_curves(self.scores, kind), width=width, plain=plain)
        yield from verdict_tables(self.verdicts, self.effects.rows, count=self.count, width=width, plain=plain)
        for kind in distinct(self.effects.rows, "site"):
            yield from terminal_curves(layer_curves(self.effects, kind), width=width, plain=plain)

    def headline(self) -> list[dict[str, Any]]:
        """The best places and the verdicts as plain data."""
        best = [{"table": "probes"} | dict(row) | self._beside(row) for row in self.scores.best(self.count)]
        judged = [
            {"table": "causal_verdicts"} | dict(row) | {"p": row["score_p"], "p_adjusted": adjusted(row)}
            for _, rows in questions(self.verdicts)
            for row in telling(rows, self.count)
        ]
        return [{name: None if missing(row.get(name)) else row[name] for name in HEADLINE} for row in [*best, *judged]]

    def _beside(self, row: Row) -> dict[str, float]:
        return {name: self.scores.baseline(name, row) for name in BASELINES}

    def answer(self) -> str:
        """The best probe beside its baselines, and where interventions show that it is used."""
        best = next(iter(self.scores.best(1)), None)
        if best is None:
            return "No probe has a score."
        known = [(NAMES[name], score) for name, score in self._beside(best).items() if not math.isnan(score)]
        control = number(best["score"]) - number(best.get("selectivity"))
        known += [] if math.isnan(control) else [("control labels", control)]
        beside = ", ".join(f"{name} {figure(score)}" for name, score in known)
        told = f"The best of {len(self.scores.own):,} probes is {text(best['probe'])} at {text(best['label'])}:"
        told += f" {self.scores.measure} {figure(best['score'])}{certainty(best)}"
        told += f"{f', beside {beside}' if beside else ''}."
        if control >= number(best["score"]):
            told += " Labels drawn for each word are learnt as well (control): the score shows little of the model."
        verdicts = (f"{words[:1].upper()}{words[1:]}" for words in verdict_sentences(self.verdicts))
        return " ".join([told, *verdicts])

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """The best probes, and the verdicts."""
        return named_tables(replace(self, count=max(count, self.count)).headline(), TABLE_TITLES)


def probe_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> ProbeView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `probes`, and of `TABLES` those that there are.
    """
    nothing, config = pd.DataFrame(), manifest.config
    checkpoints = checkpoints_of(tables["probes"])
    last = {name: checkpoints.last(tables.get(name, nothing)) for name in TABLES}
    metric = chosen_metric(last["causal_effects"], config.get("metrics") or ())

    def first(name: str) -> pd.DataFrame:
        return having(last[name], metric=metric) if len(last[name]) else last[name]

    named = (str(manifest.display.get("title", manifest.name)), str(manifest.model.get("id", "")), checkpoints.about)
    title = tuple(part for part in named if part)
    samples = counted(int(manifest.task.get("samples") or 0), "sample")
    level = level_of(config)
    moved = first("causal_prompts")
    moved = labelled_prompts(having(moved, direction=PROBE) if len(moved) else moved, last["labels"])
    return ProbeView(
        scores=Scores(
            rows=without(checkpoints.last(tables["probes"]), "fold"),
            about=(*title, samples),
            scale=str(manifest.display.get("scale", "")),
            level=level,
        ),
        code=last["code"],
        learning=last["learning"],
        projections=last["projections"],
        effects=Effects(rows=first("causal_effects"), prompts=moved, about=title, level=level),
        verdicts=first("causal_verdicts"),
        downstream=last["causal_downstream"],
        tokens=first_tokens(last["prompts"]) if len(last["prompts"]) else {},
        classes=tuple(map(str, manifest.task.get("classes") or ())),
        count=config["output"]["top"],
    )
