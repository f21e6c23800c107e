"""The view of an `ablate` run: maps of single units, rankings, sets, pairs, groups, positions and words."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import causal_curves, causal_sentences, causal_tables, unit_of
from mechinterp_cli.report.cells import figure, missing, number, text
from mechinterp_cli.report.checkpoints import Checkpoints, checkpoints_of
from mechinterp_cli.report.circuits import circuit_dots, circuit_tables, set_sentences
from mechinterp_cli.report.contrasts import Contrasts, contrast_dots, contrast_tables
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.interactions import interaction_map, interaction_sentence, interaction_table, strongest_pairs
from mechinterp_cli.report.patch import first_tokens, names_vary
from mechinterp_cli.report.positions import position_curves
from mechinterp_cli.report.rows import Row, chosen_metric, distinct, having, records, without
from mechinterp_cli.report.sentences import level_of, named_tables, strongest_sentence
from mechinterp_cli.report.shapes import Curves, Dots, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.report.tables import line
from mechinterp_cli.report.terminal import terminal_heatmap
from mechinterp_cli.report.training import trial_curves
from mechinterp_cli.report.trials import Judged, Trials, called, trials_of, trials_table
from mechinterp_cli.report.words import word_tables
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

SUMMARY = ("label", "ablation", "design", "set", "metric", "value", "effect", "normalized", "ci_low", "ci_high")
CURVE = ("k", "units", "random_effect", "random_low", "random_high", "draws", "difference", "p")
CIRCUITS = ("size", "full", "empty", "alone", "without", "faithfulness", "completeness")
PAIRS = ("a", "b", "effect_a", "effect_b", "joint", "interaction", "group_a", "group_b")
HEADLINE = ("table", *SUMMARY, "p_adjusted", "n", "verdict", *CURVE, *CIRCUITS, *PAIRS)
"""Rows of several tables, told apart by `table`; what a table does not have is null."""
TABLE_TITLES = {
    "summary": "Strongest ablations", "curve": "Top of the ranking beside random ones", "circuits": "Sets",
    "interactions": "Strongest interactions of pairs", "contrasts": "Differences between groups",
}  # fmt: skip
KINDS = {
    "head": "heads", "kv_head": "key/value heads", "neuron": "neurons", "attention": "attention blocks",
    "mlp": "MLP blocks", "layer": "layers", "direction": "directions", "edge": "attention edges",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AblateView:
    """Everything that is shown of a run; empty frames where its design has no such table."""

    maps: tuple[tuple[str, Heatmap], ...]
    """(file name without ending, picture) of every block of single units and value."""
    trials: Trials
    """Of the first metric, the last checkpoint."""
    everywhere: Trials
    """The same of every checkpoint."""
    checkpoints: Checkpoints
    curve: pd.DataFrame
    """All metrics."""
    circuits: pd.DataFrame
    interactions: pd.DataFrame
    contrasts: Contrasts
    positions: pd.DataFrame
    words: pd.DataFrame
    prompts: pd.DataFrame
    baseline: str
    """The first metric of the unedited model, mean over prompts, as text; empty where it is not known."""
    about: tuple[str, ...]
    """Task, model, checkpoint: for subtitles."""
    noun: str
    """What is ablated: `heads`; `units` where there are several kinds."""
    count: int
    """How many of the strongest are listed."""
    level: str = "95"
    """Of intervals, in percent."""

    pages: ClassVar[Sequence[tuple[str, str]]] = ()
    """No page of its own."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """Every map, rankings, interactions, sets, groups, positions; then the strongest trials along training."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import curves, dots, heatmap

        def drawing(shape: Heatmap | Curves | Dots) -> Picture:
            if isinstance(shape, Heatmap):
                return heatmap.drawing(shape)
            return curves.drawing(shape) if isinstance(shape, Curves) else dots.drawing(shape)

        return [(name, drawing(shape)) for name, shape in self._shapes()]

    def _shapes(self) -> Iterator[tuple[str, Heatmap | Curves | Dots]]:
        about = (*self.about, self.trials.metric)
        yield from self.maps
        for metric in distinct(self.curve, "metric"):
            made = self._ranking_curves(having(self.curve, metric=metric))
            yield from [(f"curve-{metric}", made)] if made is not None else []
        pairs, sets = interaction_map(self.interactions, about), circuit_dots(self.circuits, about, self.level)
        yield from [("interactions", pairs)] if pairs is not None else []
        yield from [("circuits", sets)] if sets is not None else []
        yield from contrast_dots(self.contrasts, about, count=self.count, level=self.level)
        yield from position_curves(self.positions, self.trials, self.about, self.level)
        yield from [("training", self._along_training())] if self.checkpoints.several and len(self.followed) else []

    def _ranking_curves(self, curve: pd.DataFrame) -> Curves | None:
        title = "Effect of ablating the top of a ranking"
        return causal_curves(_ranked(curve), self.about, title=title, noun=self.noun, level=self.level)

    @property
    def followed(self) -> pd.DataFrame:
        """The trials that are drawn along training: of the first value, as others would be the same units again."""
        first = distinct(self.trials.rows, "ablation")[:1]
        trials = replace(self.trials, rows=having(self.trials.rows, ablation=tuple(first)))
        there = trials.strongest(self.count)
        return there if len(there) else having(trials.rows, design="cumulative")

    def _along_training(self) -> Curves:
        followed, everywhere = self.followed, self.everywhere
        rows = having(everywhere.rows, ablation=str(followed["ablation"].iloc[0]))
        about = tuple(part for part in self.about if part != self.checkpoints.about)
        title = (*about, self.trials.metric, f"{followed['ablation'].iloc[0]} ablation")
        return trial_curves(
            rows,
            followed,
            self.checkpoints,
            everywhere.tokens,
            everywhere.quantity,
            title,
            named=called,
            level=self.level,
        )

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: the first map, the strongest trials, and the tables of the design."""
        if self.maps:
            yield terminal_heatmap(self.maps[0][1], width=width, plain=plain)
            more = len(self.maps) - 1
            yield from [line(f"the first of {more + 1} maps; the report has all", plain, "dim")] if more else []
        told = trials_table(self.trials, self.baseline, count=self.count, width=width, plain=plain)
        yield from [told] if told is not None else []
        ranked = _ranked(self._first(self.curve))
        yield from causal_tables(ranked, width=width, plain=plain, noun=self.noun)
        if not plain:  # the tables above have the same few numbers
            yield from terminal_curves(self._ranking_curves(self._first(self.curve)), width=width, plain=plain)
        if sentences := causal_sentences(ranked, pd.DataFrame(), noun=self.noun):
            yield Group(*[line(sentence, plain) for sentence in sentences])
        yield from circuit_tables(self.circuits, self.trials.sets, width=width, plain=plain)
        pairs = interaction_table(self.interactions, count=10, width=width, plain=plain)
        yield from [pairs] if pairs is not None else []
        yield from contrast_tables(self.contrasts, count=self.count, width=width, plain=plain)
        for _, along in position_curves(self.positions, self.trials, self.about, self.level):
            yield from terminal_curves(along, width=width, plain=plain)
        if self.checkpoints.several and len(self.followed):
            yield from terminal_curves(self._along_training(), width=width, plain=plain)
        yield from word_tables(self.words, self.prompts, self.trials, width=width, plain=plain)

    def _first(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of the first metric."""
        return having(rows, metric=self.trials.metric) if len(rows) else rows

    def headline(self) -> list[dict[str, Any]]:
        """The strongest trials, then what the design's own tables hold of the first metric, as plain data."""
        contrasts = [row for a, b in self.contrasts.pairs for row in self.contrasts.strongest(a, b, self.count)]
        found: dict[str, list[Row]] = {
            "summary": records(self.trials.strongest(self.count)),
            "curve": records(self._first(self.curve)),
            "circuits": records(self.circuits),
            "interactions": strongest_pairs(self.interactions, self.count) if len(self.interactions) else [],
            "contrasts": contrasts,
        }
        return [
            {name: None if missing(row.get(name)) else row[name] for name in HEADLINE}
            for table, rows in found.items()
            for row in ({**row, "table": table} for row in rows)
        ]

    def answer(self) -> str:
        """What the design's own table says: of sets or of a ranking; else which ablation is the strongest."""
        if sets := list(set_sentences(self.circuits)):
            return " ".join(sets)
        first = next(iter(records(self.trials.strongest(1))), None)
        told = strongest_sentence(
            first,
            where=self._named(first) if first else "",
            quantity=self.trials.quantity,
            measured="normalised effect" if self.trials.quantity == "normalized" else "effect",
            on=self.trials.metric,
            count=len(self.trials.told),
        )
        ranked = causal_sentences(_ranked(self._first(self.curve)), pd.DataFrame(), noun=self.noun)
        sentences = [f"{words[:1].upper()}{words[1:]}" for words in ranked]
        sentences += filter(None, [interaction_sentence(self.interactions)])
        return " ".join([told, *sentences] if first else sentences or [told])

    def _named(self, row: Row) -> str:
        """A trial in a sentence: `head 0.3 (mean ablation)`; a head's own name is its numbers alone."""
        name, value = self.trials.called(row), text(row.get("ablation"))
        kind = ("heads " if "+" in name else "head ") if name[:1].isdigit() and text(row.get("site")) == "head" else ""
        return f"{kind}{name}{f' ({value} ablation)' if value else ''}"

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """The strongest trials, and what the design's own tables hold."""
        return named_tables(replace(self, count=max(count, self.count)).headline(), TABLE_TITLES)


def ablate_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> AblateView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `summary` and `prompts`, and of the others those that there are.
    """
    summary, prompts, config = tables["summary"], tables["prompts"], manifest.config
    checkpoints = checkpoints_of(summary)
    metrics = [str(name) for name in config.get("metrics") or ()]
    everywhere = trials_of(summary, metrics, first_tokens(prompts))
    everywhere = replace(everywhere, sets=_sets(manifest), judged=_judged(manifest, everywhere.quantity))
    trials = replace(everywhere, rows=checkpoints.last(everywhere.rows))

    def last(name: str) -> pd.DataFrame:
        found = tables.get(name)
        return pd.DataFrame() if found is None else checkpoints.last(found)

    def first(name: str) -> pd.DataFrame:
        rows = last(name)
        return having(rows, metric=chosen_metric(rows, [trials.metric])) if len(rows) else rows

    named = (manifest.display.get("title", manifest.name), str(manifest.model.get("id", "")), checkpoints.about)
    about = tuple(part for part in named if part)
    contrasts = first("contrasts")
    return AblateView(
        maps=_alike(list(_maps(trials, manifest, prompts, about))) if last("interactions").empty else (),
        trials=trials,
        everywhere=everywhere,
        checkpoints=checkpoints,
        curve=last("curve"),
        circuits=first("circuits"),
        interactions=first("interactions"),
        contrasts=Contrasts(
            rows=contrasts,
            trials=trials,
            groups=_by_group(checkpoints.last(summary), trials.metric),
            margin=text((config.get("ablate") or {}).get("margin")),
        ),
        positions=last("positions"),
        words=last("words"),
        prompts=prompts,
        baseline=_baseline(last("baselines"), trials.metric),
        about=about,
        noun=_noun(manifest),
        count=config["output"]["top"],
        level=level_of(config),
    )


def _by_group(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Effects in the metric's own unit, of single groups."""
    rows = without(having(summary, metric=metric, aggregate="mean"), "ranking")
    return rows[(rows["group"].notna() & (rows["group"] != "all")).fillna(False).to_numpy(dtype=bool)]


def _sets(manifest: Manifest) -> dict[str, list[str]]:
    """The config's named sets."""
    named = (manifest.config.get("ablate") or {}).get("sets") or {}
    return {str(name): [str(unit) for unit in units] for name, units in named.items()}


def _judged(manifest: Manifest, quantity: str) -> Judged:
    """What the summary's verdicts are read off: a share where effects are shares."""
    stats, section = manifest.config.get("stats") or {}, manifest.config.get("ablate") or {}
    margin = stats.get("smallest_effect") if quantity == "normalized" else section.get("margin")
    return Judged(margin=text(margin), interval="" if missing(stats.get("ci")) else level_of(manifest.config))


def _blocks(manifest: Manifest) -> list[dict[str, Any]]:
    """The blocks of units in the config."""
    return list((manifest.config.get("ablate") or {}).get("units") or [])


def _block_name(block: dict[str, Any]) -> str:
    """What a block's units are; attention edges by where they lead, as two blocks often differ in this alone."""
    name = KINDS.get(block["kind"], str(block["kind"]))
    keys = block.get("keys")
    listed = keys if isinstance(keys, str) else ", ".join(map(str, keys or ()))
    return f"{name} to {listed}" if listed else name


def _noun(manifest: Manifest) -> str:
    kinds = {str(block["kind"]) for block in _blocks(manifest)}
    return KINDS.get(kinds.pop(), "units") if len(kinds) == 1 else "units"


def _baseline(baselines: pd.DataFrame, metric: str) -> str:
    if baselines.empty:
        return ""
    values = [number(value) for value in having(baselines, stream="clean", metric=metric)["value"]]
    known = [value for value in values if value == value]
    return figure(sum(known) / len(known)) if known else ""


def _ranked(curve: pd.DataFrame) -> pd.DataFrame:
    """The curve as a proof by ablation is told, of no score."""
    return curve.rename(columns={"units": "heads"}).assign(score="") if len(curve) else curve


def _maps(
    trials: Trials, manifest: Manifest, prompts: pd.DataFrame, about: Sequence[str]
) -> Iterator[tuple[str, Heatmap]]:
    """A map per block and value of the units that were ablated alone."""
    blocks = _blocks(manifest)
    counts = counted(prompts["prompt"].nunique(), "prompt")
    spec = HeatmapSpec(
        title="",
        subtitle=", ".join((*about[1:], trials.metric, counts)),
        normalization=manifest.display.get("scale", ""),
        aggregate=trials.aggregate,
        tokens=trials.tokens,
        names_vary=names_vary(prompts),
        unit=unit_of(trials.metric).removeprefix(trials.metric).strip(),
    )
    rows = having(trials.rows, design="single")
    # The rows of all prompts may be of no group; the one template of a set needs no name.
    rows = rows.assign(group="all")
    if "" in trials.tokens and "template" in rows:
        rows = rows.assign(template=pd.Series(pd.NA, index=rows.index, dtype=object))
    for ablation in distinct(rows, "ablation"):
        for number_of, part in having(rows, ablation=ablation).groupby("block", sort=True):
            block = int(str(number_of))
            of = blocks[block] if block < len(blocks) else {"kind": str(part["site"].iloc[0])}
            kind = str(of["kind"])
            task = about[0].replace(", ablation, single", "")
            title = f"{_block_name(of)}, {ablation} ablation, {task}"
            made = build_heatmap(part, replace(spec, title=title, normalization=_caption(spec, part, of)))
            yield f"{block:02d}-{kind}-{ablation}-{trials.metric}", made


def _alike(maps: Sequence[tuple[str, Heatmap]]) -> tuple[tuple[str, Heatmap], ...]:
    """The maps of one block's values with one scale of colours, as they are compared."""
    limits: dict[str, float] = {}
    for name, made in maps:
        block = name.split("-")[0]
        limits[block] = max(limits.get(block, 0.0), made.limit)
    return tuple((name, replace(made, least=limits[name.split("-")[0]])) for name, made in maps)


def _caption(spec: HeatmapSpec, part: pd.DataFrame, block: Mapping[str, Any]) -> str:
    """What 0 and 1 mean; that a row is a window of layers; and that units share a cell, where some do."""
    layers = block.get("layers")
    wide = layers.get("window") if isinstance(layers, Mapping) else None
    window = f"Each row is a window of {wide} layers, by its centre." if wide else ""
    columns = [name for name in ("layer", "head", "kv_head", "neuron", "span", "position", "template") if name in part]
    shared = "Each cell is the strongest that it holds." if part.duplicated(columns).any() else ""
    return " ".join(filter(None, (spec.normalization, window, shared)))
