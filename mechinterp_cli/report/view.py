"""What a person is shown of a run, made from its tables alone: so a run looks the same the day after."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mechinterp_cli.errors import UserError
from mechinterp_cli.report.grid import Heatmap, HeatmapSpec, build_heatmap
from mechinterp_cli.report.terminal import strongest, strongest_table, terminal_heatmap
from mechinterp_cli.runs.directory import find_run
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.outcome import RunOutcome
from mechinterp_cli.runs.reading import read_manifest
from mechinterp_cli.runs.tables import read_parquet, to_frame

HEADLINE = ("label", "metric", "value", "effect", "normalized", "ci_low", "ci_high", "p_adjusted", "n", "verdict")


@dataclass(frozen=True, eq=False)
class View:
    """Maps, strongest trials and notes of a run."""

    maps: tuple[tuple[str, Heatmap], ...]
    """(file name without ending, picture) of every site block."""
    rows: pd.DataFrame
    """Summary rows of the first metric, all prompts, the main aggregate."""
    tokens: Mapping[str, Sequence[str]]
    """Decoded tokens of each template's first prompt; the one template of a set also under ``""``."""
    quantity: str
    """`normalized`, or `effect` where there is nothing to normalise by."""
    count: int
    """How many of the strongest are listed."""

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

    def headline(self) -> list[dict[str, Any]]:
        """The strongest rows as plain data."""
        return [
            {name: None if pd.isna(row[name]) else row[name] for name in HEADLINE}
            for row in self.strongest.to_dict("records")
        ]


def view_of(manifest: Manifest, summary: pd.DataFrame, prompts: pd.DataFrame) -> View:
    """The view of a run.

    Args:
        manifest: The run's.
        summary: Its summary table.
        prompts: Its prompts table.
    """
    metric = manifest.config["metrics"][0]
    normalised = bool((summary["aggregate"] == "ratio_of_means").any())
    aggregate = "ratio_of_means" if normalised else "mean"
    chosen = (summary["metric"] == metric) & (summary["group"] == "all") & (summary["aggregate"] == aggregate)
    rows, tokens = summary[chosen], _first_tokens(prompts)
    spec = HeatmapSpec(
        title=manifest.display.get("title", manifest.name),
        subtitle=f"{manifest.model.get('id', '')}, {metric}, {prompts['prompt'].nunique()} prompts",
        normalization=manifest.display.get("scale", ""),
        aggregate=aggregate,
        tokens=tokens,
        names_vary=_names_vary(prompts),
    )
    maps = tuple(_maps(rows, spec, metric, one_template="" in tokens))
    count = manifest.config["output"]["top"]
    return View(maps, rows, tokens, "normalized" if normalised else "effect", count)


def read_outcome(path: Path) -> RunOutcome:
    """A run's view again, from its directory.

    Raises:
        UserError: It is no run directory, or the run never came to a summary.
        RunError: A table is damaged.
    """
    manifest = read_manifest(find_run(path))
    if not (path / "summary.parquet").exists():
        remedy = f"Go on with it: mechinterp resume {path}" if manifest.status != "complete" else "Run it again."
        raise UserError(f"{path}: the run is {manifest.status} and has no summary to show", remedy)
    summary, prompts = (to_frame(read_parquet(path / f"{name}.parquet")) for name in ("summary", "prompts"))
    return outcome(path, manifest, view_of(manifest, summary, prompts))


def outcome(path: Path, manifest: Manifest, view: View) -> RunOutcome:
    """What the command line tells of a run."""
    unfinished = [] if manifest.status in ("complete", "running") else [f"this run is {manifest.status}"]
    notes = [*unfinished, *_proof_notes(manifest.engine.get("proof")), *manifest.warnings]
    return RunOutcome(path, view.headline(), view.draw, tuple(notes))


def _proof_notes(proof: Mapping[str, Any] | None) -> list[str]:
    if not proof:
        return []
    return [
        f"proved: executor {proof['executor']} agrees with plain hooks to {proof['deviation']:.1e} of the logits' "
        f"scale ({proof['tolerance']:.0e} allowed) on {proof['trials']} trials of {proof['length']} tokens"
    ]


def _maps(rows: pd.DataFrame, spec: HeatmapSpec, metric: str, *, one_template: bool) -> Iterator[tuple[str, Heatmap]]:
    if one_template and "template" in rows:
        rows = rows.assign(template=pd.Series(pd.NA, index=rows.index, dtype=object))
    for block, part in rows.groupby("block", sort=True):
        kind = str(part["site"].iloc[0])
        title = f"{kind}, {spec.title}"
        yield f"{int(str(block)):02d}-{kind}-{metric}", build_heatmap(part, replace(spec, title=title))


def _first_tokens(prompts: pd.DataFrame) -> dict[str, Sequence[str]]:
    clean = prompts[prompts["stream"] == "clean"].drop_duplicates("template")
    tokens: dict[str, Sequence[str]] = {
        str(name): list(words) for name, words in zip(clean["template"], clean["tokens"], strict=True)
    }
    if len(tokens) == 1:
        tokens[""] = next(iter(tokens.values()))
    return tokens


def _names_vary(prompts: pd.DataFrame) -> bool:
    """Whether prompts of one template hold different tokens somewhere."""
    clean = prompts[prompts["stream"] == "clean"]
    first: dict[str, tuple[int, ...]] = {}
    pairs = zip(clean["template"], clean["token_ids"], strict=True)
    return any(first.setdefault(str(name), tuple(ids)) != tuple(ids) for name, ids in pairs)
