"""The view of a `circuit` run: curves and areas, the graph, tests, overlap with a reference, stability."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import counted_between, figure, interval, missing, number, probability, text
from mechinterp_cli.report.checkpoints import checkpoints_of
from mechinterp_cli.report.circuit_answer import circuit_answer
from mechinterp_cli.report.circuit_curves import circuit_name, edge_dots, faithfulness_curves
from mechinterp_cli.report.circuit_graph import GraphPicture
from mechinterp_cli.report.circuit_words import EDGES, NEURONS, Drawn, Words
from mechinterp_cli.report.neuron_graph import NeuronPicture
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.sentences import level_of, named_tables
from mechinterp_cli.report.shapes import Curves, Dots, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.runs.manifest import Manifest

TABLES = ("quality", "tests", "minimality", "completeness", "stability", "members", "evaluations")
"""Those that a run may lack."""
WHICH = ("score", "rank", "size", "threshold", "metric")
NUMBERS = ("measure", "level", "test", "value", "faithfulness", "ci_low", "ci_high", "random_mean", "random_low")
OTHERS = ("random_high", "kept", "nodes", "statistic", "low", "high", "margin", "p", "n", "verdict", "mean", "draws")
HEADLINE = ("table", *WHICH, *NUMBERS, *OTHERS)
"""Rows of several tables, told apart by `table`; what a table does not have is null."""
LISTED = ("source", "target", "effect", "ci_low", "ci_high", "share", "p_adjusted", "verdict")
TITLES = {
    "quality": "Areas and overlaps",
    "faithfulness": "Faithfulness of circuits",
    "tests": "Tests of a circuit",
    "stability": "Over resampled prompts",
}
AREAS = ("cpr", "cmd")
AREA_OF = {"cpr": "signed", "cmd": "absolute"}
"""By which ranking each area is taken (MIB, 2504.13151)."""
BRIEF = 84
"""Narrower terminals get no intervals."""


@dataclass(frozen=True, eq=False)
class CircuitView:
    """Everything that is shown of a run; empty frames where it has no such table."""

    faithfulness: pd.DataFrame
    quality: pd.DataFrame
    tests: pd.DataFrame
    minimality: pd.DataFrame
    completeness: pd.DataFrame
    stability: pd.DataFrame
    members: pd.DataFrame
    rank: str
    """The ranking whose circuits are drawn."""
    metric: str
    """The first, by which edges were scored."""
    heads: int
    """Query heads of a layer."""
    grouped: int
    """How many of them share a key and a value."""
    about: tuple[str, ...]
    """Task, model, checkpoint: for subtitles."""
    count: int
    """How many edges are listed."""
    level: str = "95"
    """Of intervals, in percent."""
    trained: int = 0
    """Prompts that edges were scored on; 0 where nobody said."""
    words: Words = EDGES
    """What circuits are made of."""

    pages: ClassVar[Sequence[tuple[str, str]]] = ()
    """No page of its own."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """A graph for every score and given circuit, curves of every metric, edges taken out one by one."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import circuit_drawing, curves, dots, neuron_drawing

        def drawing(shape: GraphPicture | NeuronPicture | Curves | Dots) -> Picture:
            if isinstance(shape, NeuronPicture):
                return neuron_drawing.drawing(shape)
            if isinstance(shape, GraphPicture):
                return circuit_drawing.drawing(shape)
            return curves.drawing(shape) if isinstance(shape, Curves) else dots.drawing(shape)

        return [(name, drawing(shape)) for name, shape in self._shapes() if shape is not None]

    def _shapes(self) -> Iterator[tuple[str, GraphPicture | NeuronPicture | Curves | Dots | None]]:
        yield from self._graphs()
        for metric in distinct(self.faithfulness, "metric"):
            rows = having(self.faithfulness, metric=metric)
            yield f"faithfulness-{metric}", faithfulness_curves(rows, self.about, self.level, self.words)
        over = counted_between(self._first(self.faithfulness)["n"], "prompt")
        bars = f"Bars: {self.level} % intervals over {over}."
        yield f"minimality-{self.metric}", edge_dots(self._first(self.minimality), self.about, bars, self.words)

    def _first(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of the first metric."""
        return having(rows, metric=self.metric) if len(rows) else rows

    def _graphs(self) -> Iterator[tuple[str, GraphPicture | NeuronPicture | None]]:
        """Of every ranking the circuit that is tested, or one that can be seen; of others the whole."""
        drawn = Drawn(self.words, self.about, self.metric, self.trained, self.heads, self.grouped)
        for score in distinct(self.members, "score"):
            rows = having(self.members, score=score)
            ranked = having(rows, rank=self.rank)
            for threshold in rows["threshold"].dropna().unique().tolist():
                name = f"graph-{score}-{threshold:g}"
                yield name, drawn.picture(having(rows, threshold=threshold), score, f"threshold {threshold:g}")
            if len(ranked):
                tested = self.tests["size"].dropna().tolist() if len(self.tests) else []
                faithful = having(self._first(self.faithfulness), score=score, rank=self.rank)
                size = drawn.size(ranked, tested, faithful)
                chosen = ranked[(ranked["size"] <= size).fillna(False).to_numpy(dtype=bool)]
                which = f"{100 * size:g} % of all {self.words.several}, {self.rank} scores"
                yield f"graph-{score}", drawn.picture(chosen, score, which)
            elif rows["threshold"].isna().all():
                yield f"graph-{score}", drawn.picture(rows, score, "")

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: areas, curves, overlap, stability, tests, edges."""
        yield from self._areas(width, plain)
        yield from self._curves(width, plain)
        faithful = faithfulness_curves(self._first(self.faithfulness), self.about, self.level, self.words)
        yield from terminal_curves(faithful, width=width, plain=plain)
        yield from self._overlap(width, plain)
        yield from self._tests(width, plain)
        yield from self._edges(width, plain)
        if sentences := list(self._sentences()):
            yield Group(*[line(sentence, plain) for sentence in sentences])

    def _is_drawn(self, row: Row) -> bool:
        """Whether a row is of the chosen ranking, or of none."""
        return missing(row["rank"]) or text(row["rank"]) == self.rank

    @property
    def _area_rows(self) -> list[Row]:
        """CPR of signed rankings and CMD of absolute ones."""
        wanted = set(AREA_OF.items())
        rows = records(self._first(self.quality))
        return [row for row in rows if (text(row["measure"]), text(row["rank"])) in wanted]

    def _areas(self, width: int, plain: bool) -> Iterator[Group]:
        rows, cells = self._area_rows, []
        for score in dict.fromkeys(text(row["score"]) for row in rows):
            own = {text(row["measure"]): row for row in rows if text(row["score"]) == score}
            cells.append({"score": score} | {name: _with_interval(own[name], "value", width) for name in AREAS})
        if cells:
            columns = {"score": Column(left=True), "cpr": Column(), "cmd": Column()}
            random = [
                f"{name} {figure(row['random_mean'], 2)}"
                for name in AREAS
                for row in rows[:2]
                if row["measure"] == name
            ]
            beside = f"; random rankings: {', '.join(random)}" if all(part.split()[1:] for part in random) else ""
            lines = (f"areas of the faithfulness of {self.metric}{beside}",)
            yield text_table(cells, columns, lines=lines, width=width, plain=plain, notes=_AREA_NOTES)

    def _curves(self, width: int, plain: bool) -> Iterator[Group]:
        rows = [row for row in records(self._first(self.faithfulness)) if self._is_drawn(row)]
        if not rows:
            return
        ends = f"whole model {figure(rows[0]['full'])}, all {self.words.several} patched {figure(rows[0]['empty'])}"
        by_size: dict[float, dict[str, str]] = {}
        for row in (row for row in rows if not missing(row["size"])):
            cells = by_size.setdefault(number(row["size"]), {"size": f"{number(row['size']):g}"})
            cells[text(row["score"])] = f"{figure(row['faithfulness'], 2)} ({row['kept']})"
            cells["random"] = interval(row["random_low"], row["random_high"], 2)
        if by_size:
            scores = dict.fromkeys(text(row["score"]) for row in rows if not missing(row["size"]))
            columns = {"size": Column(), **dict.fromkeys(scores, Column()), "random": Column(1)}
            lines = (f"faithfulness ({self.words.several}), {self.rank} scores, {self.metric}: {ends}",)
            notes = {"random": "the middle 95 % of random rankings"}
            yield text_table(list(by_size.values()), columns, lines=lines, width=width, plain=plain, notes=notes)
        others = [
            {
                "circuit": circuit_name(row),
                "kept": text(row["kept"]),
                "nodes": text(row["nodes"]),
                "faithfulness": _with_interval(row, "faithfulness", width),
            }
            for row in rows
            if missing(row["size"])
        ]
        if others:
            lines = (f"circuits of no ranking, {self.metric}: {ends}",)
            yield text_table(others, _OTHERS, lines=lines, width=width, plain=plain)

    def _overlap(self, width: int, plain: bool) -> Iterator[Group]:
        rows = [row for row in records(self._first(self.quality)) if text(row["level"]) and self._is_drawn(row)]
        found: dict[tuple[str, str], dict[str, str]] = {}
        for row in _nearest(rows):
            name = circuit_name({**row, "size": None})
            cells = found.setdefault((name, text(row["level"])), {"circuit": name, "of": text(row["level"])})
            cells["size"] = f"{number(row['size']):g}" if not missing(row["size"]) else cells.get("size", "")
            cells[text(row["measure"]).replace("average_precision", "AP")] = figure(row["value"])
        if found:
            lines = ("beside the reference: how scores rank it, and the circuit that is nearest to it",)
            yield text_table(list(found.values()), _OVERLAP, lines=lines, width=width, plain=plain)

    def _tests(self, width: int, plain: bool) -> Iterator[Group]:
        rows = records(self._first(self.tests))
        cells = [
            {
                "test": text(row["test"]),
                "verdict": text(row["verdict"]),
                "statistic": figure(row["statistic"]),
                "90 %": interval(row["low"], row["high"], 2),
                "p": probability(row["p"]),
                "n": text(row["n"]),
            }
            for row in rows
        ]
        for row in records(self._first(self.completeness))[:1]:
            ends = {"90 %": "", "statistic": figure(row["difference"]), "verdict": text(row["verdict"])}
            cells.append({"test": "completeness", "n": "", "p": "", **ends})
        if cells:
            named = rows or records(self.completeness)
            won = "share of prompts won; HSIC; {} not needed; what the rest still has without it"
            notes = {"statistic": won.format(self.words.several)}
            lines = (f"tests of the circuit {circuit_name(named[0])}",)
            yield text_table(cells, _TESTS, lines=lines, width=width, plain=plain, notes=notes)

    def _edges(self, width: int, plain: bool) -> Iterator[Group]:
        rows = sorted(records(self._first(self.minimality)), key=lambda row: -abs(_zero(row["effect"])))
        cells = [
            {
                self.words.one: self.words.named(row),
                "effect": _with_interval(row, "effect", width),
                "share": figure(row["share"], 2),
                "p": probability(row["p_adjusted"]),
                "needed": text(row["verdict"]),
            }
            for row in rows[: self.count]
        ]
        if cells:
            more = f", the first {len(cells)} of {len(rows)} tried" if len(rows) > len(cells) else ""
            lines = (f"{self.words.several} taken out one by one{more}: what is lost of the faithfulness",)
            notes = {"share": f"of needless {self.words.several} that matter less", "p": "adjusted"}
            columns = {self.words.one: Column(left=True), **_EDGES}
            yield text_table(cells, columns, lines=lines, width=width, plain=plain, notes=notes)

    def _sentences(self) -> Iterator[str]:
        stable = {"jaccard": "Jaccard of the circuit", "spearman": f"rank correlation of all {self.words.several}"}
        for score in distinct(self.stability, "score"):
            rows = {text(row["measure"]): row for row in records(having(self.stability, score=score))}
            parts = [
                f"{words} {figure(rows[name]['mean'], 2)} {interval(rows[name]['low'], rows[name]['high'], 2)}"
                for name, words in stable.items()
                if name in rows
            ]
            if parts:
                yield f"{score} over resampled training prompts: {', '.join(parts)}."

    def headline(self) -> list[dict[str, Any]]:
        """Areas and overlaps, circuits, tests and stability as plain data."""
        chosen = records(self._first(self.faithfulness))
        found: dict[str, list[Row]] = {
            "quality": records(self.quality),
            "faithfulness": [row for row in chosen if self._is_drawn(row)],
            "tests": records(self.tests),
            "stability": records(self.stability),
        }
        return [
            {name: None if missing(row.get(name)) else row[name] for name in HEADLINE}
            for table, rows in found.items()
            for row in ({**row, "table": table} for row in rows)
        ]

    def answer(self) -> str:
        """The areas of the first score, and what the tests say."""
        return " ".join(self._told()) or "No circuit was run."

    def _told(self) -> Iterator[str]:
        areas = self._area_rows
        first = text(areas[0]["score"]) if areas else ""
        given = [row for row in records(self._first(self.faithfulness)) if missing(row["rank"])]
        sized = [(row, self.words.counted(int(row["kept"]))) for row in given]
        tests = records(self._first(self.tests))
        return circuit_answer([row for row in areas if text(row["score"]) == first], sized, tests)

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """Areas, circuits, tests, stability, and the edges that were taken out."""
        edges = sorted(records(self._first(self.minimality)), key=lambda row: -abs(_zero(row["effect"])))
        listed = [{name: None if missing(row[name]) else row[name] for name in LISTED} for row in edges[:count]]
        found = list(named_tables(self.headline(), TITLES))
        return [*found, (f"{self.words.several.capitalize()} taken out one by one", listed)] if listed else found


_OTHERS = {"circuit": Column(left=True), "kept": Column(1), "nodes": Column(2), "faithfulness": Column()}
_OVERLAP = {
    "circuit": Column(left=True),
    "of": Column(left=True),
    "auroc": Column(1),
    "AP": Column(2),
    "size": Column(1),
    "precision": Column(1),
    "recall": Column(1),
    "jaccard": Column(1),
}
_TESTS = {
    "test": Column(left=True),
    "verdict": Column(left=True),
    "statistic": Column(1),
    "90 %": Column(2),
    "p": Column(1),
    "n": Column(3),
}
_EDGES = {
    "effect": Column(),
    "share": Column(2),
    "p": Column(1),
    "needed": Column(left=True),
}
_AREA_NOTES = {"cpr": "area below the curve, signed scores", "cmd": "area between it and 1, absolute scores"}


def _zero(value: object) -> float:
    known = number(value)
    return 0.0 if math.isnan(known) else known


def _with_interval(row: Row, name: str, width: int) -> str:
    ends = "" if width < BRIEF else f" {interval(row['ci_low'], row['ci_high'], 2)}"
    return f"{figure(row[name])}{ends}".rstrip() or "undefined"


def _nearest(rows: Sequence[Row]) -> list[Row]:
    """Of every score what is said of all sizes, and of the size of the largest Jaccard index."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if text(row["measure"]) == "jaccard" and not missing(row["size"]):
            key = text(row["score"]), text(row["rank"]), text(row["level"])
            if key not in best or _zero(row["value"]) > _zero(best[key]["value"]):
                best[key] = row
    return [
        row
        for row in rows
        if missing(row["size"])
        or number(row["size"]) == number(best[text(row["score"]), text(row["rank"]), text(row["level"])]["size"])
    ]


def circuit_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> CircuitView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `faithfulness`, and of `TABLES` those that there are.
    """
    config, checkpoints = manifest.config, checkpoints_of(tables["faithfulness"])
    layer = manifest.model["anatomy"]["first_layer"]
    heads = layer.get("heads") or {"query": 1, "key_value": 1}

    def last(name: str) -> pd.DataFrame:
        found = tables.get(name)
        return pd.DataFrame() if found is None else checkpoints.last(found)

    named = (str(manifest.task.get("name", "")), str(manifest.model.get("id", "")), checkpoints.about)
    return CircuitView(
        faithfulness=last("faithfulness"),
        **{name: last(name) for name in TABLES if name != "evaluations"},
        rank=str(config["circuit"]["rank"]),
        metric=str(config["metrics"][0]),
        heads=int(heads["query"]),
        grouped=max(1, int(heads["query"]) // max(1, int(heads["key_value"]))),
        about=tuple(filter(None, named)),
        count=config["output"]["top"],
        level=level_of(config),
        trained=len(manifest.task.get("train") or ()),
        words=NEURONS if config["circuit"]["granularity"] == "neurons" else EDGES,
    )
