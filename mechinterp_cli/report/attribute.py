"""The view of an `attribute` run: estimates and how far to trust them, direct attribution, lens, prompts' tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, missing, number, text
from mechinterp_cli.report.checkpoints import Checkpoints, checkpoints_of
from mechinterp_cli.report.direct import Parts, direct_tables, head_map, part_dots, part_name, parts_of
from mechinterp_cli.report.estimates import (
    Estimates,
    EstimateScatter,
    estimate_maps,
    estimate_scatter,
    estimates_of,
    strongest_rows,
    strongest_tables,
)
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec
from mechinterp_cli.report.labels import show_token
from mechinterp_cli.report.lens import by_layer, lens_curves, lens_grids, lens_tables
from mechinterp_cli.report.patch import first_tokens, names_vary
from mechinterp_cli.report.rows import Row, chosen_metric, having, records
from mechinterp_cli.report.sentences import level_of, named_tables, strongest_sentence
from mechinterp_cli.report.shapes import Curves, Dots, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.report.tables import line
from mechinterp_cli.report.terminal import describe_place, terminal_heatmap
from mechinterp_cli.report.token_page import token_page
from mechinterp_cli.report.token_spans import completeness_lines, span_dots, span_table
from mechinterp_cli.report.tokens import terminal_tokens, token_strip
from mechinterp_cli.report.training import trial_curves
from mechinterp_cli.report.trust import subset_lines, trust_tables
from mechinterp_cli.report.wordgrid import WordGrid
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

_ESTIMATED = ("summary", "verification", "missed", "subsets")
TABLES = (*_ESTIMATED, "direct", "components", "sources", "lens", "inputs", "input_spans", "input_completeness")
"""Those that a run may lack."""
TABLE_TITLES = {
    "summary": "Strongest estimates", "verification": "Estimates against exact effects", "direct": "Direct parts",
    "lens": "Logit lens by layer", "inputs": "Tokens of the first prompt",
}  # fmt: skip
MAX_MAPS = 6
"""Maps that the terminal shows."""
WHERE = ("site", "layer", "head", "kv_head", "neuron", "position", "component", "token")
NUMBERS = ("value", "effect", "normalized", "ci_low", "ci_high", "estimate", "exact", "exact_normalized", "part", "n")
TRUST = ("nodes", "rows", "pearson", "spearman", "sign_agreement", "mean_difference", "above", "threshold", "reason")
BOUND = ("upper_count", "upper_fraction", "level")
LENS = ("answer_probability", "answer_rank", "kl")
HEADLINE = ("table", "estimator", "steps", "metric", "label", *WHERE, *NUMBERS, *TRUST, *BOUND, *LENS, "prompt")
"""Rows of several tables, told apart by `table`; what a table does not have is null."""
Shape = Heatmap | EstimateScatter | Curves | Dots | WordGrid


@dataclass(frozen=True, eq=False)
class AttributeView:
    """Everything that is shown of a run; empty frames where it has no such part."""

    estimates: Estimates
    """Of the first metric, the last checkpoint."""
    everywhere: Estimates
    """The same of every checkpoint."""
    checkpoints: Checkpoints
    verification: pd.DataFrame
    """Of the first metric, as are `missed` and `subsets`."""
    missed: pd.DataFrame
    subsets: pd.DataFrame
    parts: Parts
    lens: pd.DataFrame
    inputs: pd.DataFrame
    spans: pd.DataFrame
    completeness: pd.DataFrame
    metric: str
    """The first that the tokens are told of."""
    tokens: Mapping[int, Sequence[str]]
    """Decoded tokens of every clean prompt."""
    about: tuple[str, ...]
    """Task, model, checkpoint: for subtitles."""
    count: int
    """How many of the strongest are listed."""
    level: str = "95"
    """Of intervals, in percent."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """Every map, estimates against exact effects, direct attribution, lens, tokens."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import beside, curves, dots, heatmap, wordpicture

        def drawing(shape: Shape) -> Picture:
            if isinstance(shape, Heatmap):
                return heatmap.drawing(shape)
            if isinstance(shape, EstimateScatter):
                return beside.drawing(shape)
            if isinstance(shape, WordGrid):
                return wordpicture.drawing(shape)
            return curves.drawing(shape) if isinstance(shape, Curves) else dots.drawing(shape)

        return [(name, drawing(shape)) for name, shape in self._shapes() if shape is not None]

    @cached_property
    def maps(self) -> tuple[tuple[str, Heatmap], ...]:
        """(file name without ending, map) of every estimator and site block."""
        return tuple(estimate_maps(self.estimates))

    def _shapes(self) -> Iterator[tuple[str, Shape | None]]:
        yield from self.maps
        yield f"verified-{self.estimates.metric}", estimate_scatter(self.estimates, self.verification)
        yield "training", self._along_training()
        yield "direct-heads", head_map(self.parts, self.about)
        yield "direct", part_dots(self.parts, self.about, self.level)
        for grid in lens_grids(self.lens, self.tokens, self.about):
            yield f"lens-{grid.title.split()[3].rstrip(',')}", grid
        yield "lens", lens_curves(self.lens, self.about)
        yield f"tokens-{self.metric}", token_strip(self.inputs, self.metric, self.about)
        yield f"spans-{self.metric}", span_dots(self.spans, self.metric, self.about, self.level)

    def _along_training(self) -> Curves | None:
        """The strongest estimates of the first estimator at every checkpoint."""
        if not self.checkpoints.several or self.estimates.rows.empty:
            return None
        followed = strongest_rows(self.estimates, self.estimates.estimators[0], self.count)
        about = (*(part for part in self.about if part != self.checkpoints.about), self.estimates.metric)
        tokens = self.estimates.spec.tokens or {}
        if followed.empty:
            return None
        estimates = self.estimates
        return trial_curves(
            self.everywhere.rows, followed, self.checkpoints, tokens, estimates.quantity, about, level=self.level
        )

    @property
    def pages(self) -> Sequence[tuple[str, str]]:
        """The page of tokens, where tokens are told of."""
        return [] if self.inputs.empty else [("tokens", token_page(self.inputs, self.about))]

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: maps, strongest, how far to trust them; direct attribution, lens and tokens."""
        for _, heatmap in self.maps[:MAX_MAPS]:
            yield terminal_heatmap(heatmap, width=width, plain=plain)
        if len(self.maps) > MAX_MAPS:
            yield line(f"the first {MAX_MAPS} of {len(self.maps)} maps; the pictures have all", plain, "dim")
        yield from strongest_tables(self.estimates, count=self.count, width=width, plain=plain)
        yield from trust_tables(self.estimates, self.verification, self.missed, width=width, plain=plain)
        if sentences := list(subset_lines(self.estimates, self.subsets)):
            yield Group(*[line(sentence, plain) for sentence in sentences])
        yield from direct_tables(self.parts, self.about, count=self.count, width=width, plain=plain)
        yield from lens_tables(self.lens, self.tokens, self.about, width=width, plain=plain)
        yield from terminal_curves(lens_curves(self.lens, self.about), width=width, plain=plain)
        yield from terminal_curves(self._along_training(), width=width, plain=plain)
        yield from terminal_tokens(self.inputs, self.metric, width=width, plain=plain)
        yield from span_table(self.spans, self.metric, width=width, plain=plain)
        yield from completeness_lines(self.completeness, self.metric, plain=plain)

    def headline(self) -> list[dict[str, Any]]:
        """The strongest estimates, how far to trust them, direct parts, lens by layer, tokens, as plain data."""
        found: dict[str, list[Row]] = {
            "summary": [
                row
                for name in self.estimates.estimators
                for row in records(strongest_rows(self.estimates, name, self.count))
            ],
            "verification": self._trust(),
            "direct": [{**row, "label": part_name(row)} for row in self.parts.of("total")[: self.count]],
            "lens": records(by_layer(self.lens)) if len(self.lens) else [],
            "inputs": self._first_tokens(),
        }
        return [
            {name: None if missing(row.get(name)) else row[name] for name in HEADLINE}
            for table, rows in found.items()
            for row in ({**row, "table": table} for row in rows)
        ]

    def answer(self) -> str:
        """The strongest estimate and how far to trust it; else the strongest part, answer of the lens, or token."""
        if self.estimates.estimators:
            return " ".join(self._estimated())
        if parts := self.parts.of("total"):
            value = figure(parts[0]["value"], sign=True)
            return f"The largest direct part is that of {part_name(parts[0])}: {value} of the logit difference."
        if len(self.lens):
            last = records(by_layer(self.lens))[-1]
            return f"After the last layer the answer has probability {figure(last['answer_probability'])}."
        if tokens := self._first_tokens():
            token, value = show_token(text(tokens[0].get("token"))), figure(tokens[0]["value"], sign=True)
            return f"On the first prompt {token} at position {text(tokens[0]['position'])} counts most: {value}."
        return "Nothing was asked of the model."

    def _estimated(self) -> Iterator[str]:
        """What the first estimator says, and beside exact effects."""
        name, estimates = self.estimates.estimators[0], self.estimates
        first = next(iter(records(strongest_rows(estimates, name, 1))), None)
        yield strongest_sentence(
            first,
            where=describe_place(first, estimates.spec.tokens or {}) if first else "",
            quantity=estimates.quantity,
            measured=f"estimated {'normalised effect' if estimates.quantity == 'normalized' else 'effect'}"
            f" ({estimates.called(name)})",
            on=estimates.metric,
            count=len(estimates.of(name)),
        )
        if first and not missing(first.get(estimates.exact)):
            yield f"Exactly it is {figure(first[estimates.exact], sign=True)}."
        for row in records(having(self.verification, estimator=name, part="random", site="all"))[:1]:
            pearson = "undefined" if missing(row["pearson"]) else figure(row["pearson"], 2)
            drawn, nodes = (int(number(row[name])) for name in ("rows", "nodes"))
            among = f"Over {drawn:,} of {counted(nodes, 'node')}, drawn at random"
            yield f"{among}, Pearson with exact effects is {pearson}."

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """What the headline lists, by table."""
        return named_tables(replace(self, count=max(count, self.count)).headline(), TABLE_TITLES)

    def _trust(self) -> list[Row]:
        """Rows of the verification, those of the random part with the bound on what is missed."""
        bounds = having(self.missed, stratum="all") if len(self.missed) else self.missed
        known = {(text(row["estimator"]), text(row["site"])): row for row in records(bounds)}
        rows: list[Row] = []
        for row in records(self.verification):
            bound = known.get((text(row["estimator"]), text(row["site"])), {}) if row["part"] == "random" else {}
            rows.append({**row, **{name: bound.get(name) for name in BOUND}})
        return rows

    def _first_tokens(self) -> list[Row]:
        """The tokens of the first prompt that count most, by estimator."""
        if self.inputs.empty:
            return []
        first = having(self.inputs, prompt=min(int(prompt) for prompt in self.inputs["prompt"]), metric=self.metric)
        rows = sorted(records(first), key=lambda row: -abs(number(row["value"])) if not missing(row["value"]) else 1)
        counts: dict[str, int] = {}
        chosen = []
        for row in rows:
            name = text(row["estimator"])
            counts[name] = counts.get(name, 0) + 1
            chosen += [row] if counts[name] <= self.count else []
        return chosen


def attribute_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> AttributeView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `prompts`, and of `TABLES` those that there are.
    """
    nothing, prompts, config = pd.DataFrame(), tables["prompts"], manifest.config
    there = {name: tables.get(name, nothing) for name in TABLES}
    checkpoints = checkpoints_of(next((rows for rows in there.values() if len(rows)), nothing))
    last = {name: checkpoints.last(rows) for name, rows in there.items()}
    metrics = config.get("metrics", ())
    metric = chosen_metric(there["summary"], metrics)
    model = (str(manifest.model.get("id", "")), checkpoints.about)
    title = str(manifest.display.get("title", manifest.name))
    spec = HeatmapSpec(
        title=title,
        subtitle=", ".join(filter(None, (*model, metric, counted(prompts["prompt"].nunique(), "prompt")))),
        normalization=str(manifest.display.get("scale", "")),
        tokens=first_tokens(prompts),
        names_vary=names_vary(prompts),
        unit=unit_of(metric).removeprefix(metric).strip(),
    )

    def of_metric(name: str) -> pd.DataFrame:
        return having(last[name], metric=metric) if len(last[name]) else last[name]

    return AttributeView(
        estimates=estimates_of(last["summary"], metric, spec),
        everywhere=estimates_of(there["summary"], metric, spec),
        checkpoints=checkpoints,
        verification=of_metric("verification"),
        missed=of_metric("missed"),
        subsets=of_metric("subsets"),
        parts=parts_of(last["direct"], last["components"], last["sources"]),
        lens=last["lens"],
        inputs=last["inputs"],
        spans=last["input_spans"],
        completeness=last["input_completeness"],
        metric=chosen_metric(there["inputs"], metrics),
        tokens=_tokens(prompts),
        about=tuple(filter(None, (str(manifest.task.get("name", "")), *model))),
        count=config["output"]["top"],
        level=level_of(config),
    )


def _tokens(prompts: pd.DataFrame) -> dict[int, Sequence[str]]:
    """Decoded tokens of every clean prompt."""
    clean = having(prompts, stream="clean")
    return {int(at): list(words) for at, words in zip(clean["prompt"], clean["tokens"], strict=True)}
