"""The view of a `patch` run: a map per site block and the strongest trials."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import text
from mechinterp_cli.report.checkpoints import Checkpoints, checkpoints_of
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.rows import records
from mechinterp_cli.report.sentences import level_of, strongest_sentence
from mechinterp_cli.report.series import dot_of
from mechinterp_cli.report.shapes import Curves, DotPanel, Dots, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.report.terminal import describe_place, strongest, strongest_table, terminal_heatmap
from mechinterp_cli.report.training import trial_curves
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

HEADLINE = ("label", "metric", "value", "effect", "normalized", "ci_low", "ci_high", "p_adjusted", "n", "verdict")


@dataclass(frozen=True, eq=False)
class PatchView:
    """Maps, strongest trials and notes of a run."""

    maps: tuple[tuple[str, Heatmap], ...]
    """(file name without ending, picture) of every site block."""
    paths: tuple[tuple[str, Dots], ...]
    """(file name without ending, picture) of every block of paths that were listed one by one."""
    rows: pd.DataFrame
    """Summary rows of the first metric, all prompts, the main aggregate, the last checkpoint."""
    tokens: Mapping[str, Sequence[str]]
    """Decoded tokens of each template's first prompt; the one template of a set also under ``""``."""
    quantity: str
    """`normalized`, or `effect` where there is nothing to normalise by."""
    count: int
    """How many of the strongest are listed."""
    everywhere: pd.DataFrame
    """The same rows of every checkpoint."""
    checkpoints: Checkpoints
    """Those of the run; `rows` are of the last."""
    about: tuple[str, ...]
    """Task and model, for the subtitle of what is drawn along training."""
    level: str = "95"
    """Of intervals, in percent."""

    pages: ClassVar[Sequence[tuple[str, str]]] = ()
    """No page of its own."""

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """Every map, paths that were listed, then the strongest trials along training."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import curves, dots, heatmap

        found: list[tuple[str, Picture]] = [(name, heatmap.drawing(grid)) for name, grid in self.maps]
        found += [(name, dots.drawing(shape)) for name, shape in self.paths]
        along = self._along_training()
        return [*found, ("training", curves.drawing(along))] if along is not None else found

    def _along_training(self) -> Curves | None:
        if not self.checkpoints.several or self.strongest.empty:
            return None
        return trial_curves(
            self.everywhere,
            self.strongest,
            self.checkpoints,
            self.tokens,
            self.quantity,
            self.about,
            level=self.level,
        )

    @property
    def strongest(self) -> pd.DataFrame:
        """The rows with the largest magnitude."""
        return strongest(self.rows, count=self.count, quantity=self.quantity)

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: every map, then the strongest trials."""
        for _, heatmap in self.maps:
            yield terminal_heatmap(heatmap, width=width, plain=plain)
        yield strongest_table(
            self.rows, tokens=self.tokens, count=self.count, quantity=self.quantity, width=width, plain=plain
        )
        yield from terminal_curves(self._along_training(), width=width, plain=plain)

    def headline(self) -> list[dict[str, Any]]:
        """The strongest rows as plain data."""
        return [
            {name: None if pd.isna(row[name]) else row[name] for name in HEADLINE}
            for row in self.strongest.to_dict("records")
        ]

    def answer(self) -> str:
        """Which trial is the strongest."""
        first = next(iter(records(self.strongest)), None)
        return strongest_sentence(
            first,
            where=describe_place(first, self.tokens) if first else "",
            quantity=self.quantity,
            measured="normalised effect" if self.quantity == "normalized" else "effect",
            on=self.about[-1],
            count=len(self.rows),
        )

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """The strongest trials, with the tokens that they stand at."""
        more = replace(self, count=max(count, self.count))
        places = [describe_place(row, self.tokens) for row in records(more.strongest)]
        rows = [{**row, "label": place} for row, place in zip(more.headline(), places, strict=True)]
        return [("Strongest trials", rows)]


def patch_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> PatchView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `summary` and `prompts`.
    """
    summary, prompts = tables["summary"], tables["prompts"]
    metric = manifest.config["metrics"][0]
    normalised = bool((summary["aggregate"] == "ratio_of_means").any())
    aggregate = "ratio_of_means" if normalised else "mean"
    chosen = (summary["metric"] == metric) & (summary["group"] == "all") & (summary["aggregate"] == aggregate)
    everywhere, tokens = summary[chosen], first_tokens(prompts)
    checkpoints = checkpoints_of(summary)
    rows = checkpoints.last(everywhere)
    about = (manifest.model.get("id", ""), checkpoints.about, metric, counted(prompts["prompt"].nunique(), "prompt"))
    spec = HeatmapSpec(
        title=manifest.display.get("title", manifest.name),
        subtitle=", ".join(part for part in about if part),
        normalization=manifest.display.get("scale", ""),
        aggregate=aggregate,
        tokens=tokens,
        names_vary=names_vary(prompts),
        unit=unit_of(metric).removeprefix(metric).strip(),
    )
    level = level_of(manifest.config)
    return PatchView(
        maps=tuple(_maps(rows, spec, metric, one_template="" in tokens)),
        paths=tuple(_paths(rows, spec, metric, level)),
        rows=rows,
        tokens=tokens,
        quantity="normalized" if normalised else "effect",
        count=manifest.config["output"]["top"],
        everywhere=everywhere,
        checkpoints=checkpoints,
        about=(spec.title, str(manifest.model.get("id", "")), metric),
        level=level,
    )


def _maps(rows: pd.DataFrame, spec: HeatmapSpec, metric: str, *, one_template: bool) -> Iterator[tuple[str, Heatmap]]:
    if one_template and "template" in rows:
        rows = rows.assign(template=pd.Series(pd.NA, index=rows.index, dtype=object))
    for block, part in rows.groupby("block", sort=True):
        kind = str(part["site"].iloc[0])
        if not _is_listed(part):
            title = f"{kind}, {spec.title}"
            yield f"{int(str(block)):02d}-{kind}-{metric}", build_heatmap(part, replace(spec, title=title))


def _is_listed(part: pd.DataFrame) -> bool:
    """Whether a block has not a path from each head, or each MLP, but paths that were listed: no grid has room."""
    path = part["site"].iloc[0] == "path"
    return bool(path and part["head"].isna().any() and part["layer"].duplicated().any())


def _paths(rows: pd.DataFrame, spec: HeatmapSpec, metric: str, level: str) -> Iterator[tuple[str, Dots]]:
    """A line for each path that was listed, with its interval."""
    quantity = "effect" if spec.aggregate == "mean" else "normalized"
    unit = f"effect on {unit_of(metric)}" if quantity == "effect" else "normalised effect"
    for block, part in rows.groupby("block", sort=True):
        if _is_listed(part):
            names, shared = _apart([text(label).removeprefix("path ") for label in part["label"]])
            rows_of = zip(names, records(part), strict=True)
            dots = tuple(dot_of(name, "", row, quantity) for name, row in rows_of)
            told = (spec.normalization, f"In all: {shared}." if shared else "", f"Bars: {level} % intervals.")
            caption = " ".join(filter(None, told))
            yield (
                f"{int(str(block)):02d}-path-{metric}",
                Dots(
                    title=f"paths, {spec.title}",
                    lines=(spec.subtitle, caption),
                    panels=(DotPanel(title="", x_title=unit, dots=dots),),
                ),
            )


def _apart(labels: Sequence[str]) -> tuple[list[str], str]:
    """Labels without what stands behind the comma of all of them, and that."""
    ends = {label.partition(", ")[2] for label in labels}
    shared = ends.pop() if len(ends) == 1 else ""
    return [label.removesuffix(f", {shared}") if shared else label for label in labels], shared


def first_tokens(prompts: pd.DataFrame) -> dict[str, Sequence[str]]:
    """Decoded tokens of each template's first prompt; those of the one template of a set also under ``""``.

    Args:
        prompts: The table.
    """
    clean = prompts[prompts["stream"] == "clean"].drop_duplicates("template")
    tokens: dict[str, Sequence[str]] = {
        str(name): list(words) for name, words in zip(clean["template"], clean["tokens"], strict=True)
    }
    if len(tokens) == 1:
        tokens[""] = next(iter(tokens.values()))
    return tokens


def names_vary(prompts: pd.DataFrame) -> bool:
    """Whether prompts of one template hold different tokens somewhere.

    Args:
        prompts: The table.
    """
    clean = prompts[prompts["stream"] == "clean"]
    first: dict[str, tuple[int, ...]] = {}
    pairs = zip(clean["template"], clean["token_ids"], strict=True)
    return any(first.setdefault(str(name), tuple(ids)) != tuple(ids) for name, ids in pairs)
