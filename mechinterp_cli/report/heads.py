"""The view of a `heads` run: maps of scores, attention of the strongest heads, the proof by ablation, training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import causal_curves, causal_sentences, causal_tables
from mechinterp_cli.report.cells import figure, interval, missing, number, text
from mechinterp_cli.report.checkpoints import Checkpoints, checkpoints_of
from mechinterp_cli.report.grid import Heatmap
from mechinterp_cli.report.rows import chosen_metric, having
from mechinterp_cli.report.scores import from_name, head_name, of_score, score_map, scores_in, strongest_heads
from mechinterp_cli.report.sentences import certainty, level_of
from mechinterp_cli.report.shapes import AttentionPanel, AttentionPicture, Curves, Picture
from mechinterp_cli.report.sparkline import terminal_curves
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.report.terminal import terminal_heatmap
from mechinterp_cli.report.training import checkpoint_table, score_curves
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.text import counted

HEADLINE_SCORE = ("score", "layer", "head", "kv_head", "value", "ci_low", "ci_high", "chance", "n")
HEADLINE_CAUSAL = ("ablation", "k", "heads", "metric", "effect", "random_effect", "random_low", "random_high")
HEADLINE = tuple(dict.fromkeys((*HEADLINE_SCORE, *HEADLINE_CAUSAL, "draws", "difference", "p", "verdict")))
"""Rows of scores and rows of ablations, told apart by `ablation`, which is null for scores."""
GAP = "loss_gap"
"""The metric whose effect stands beside that of the first: what is lost of the gain from repetition."""
_COLUMNS = {
    "score": Column(left=True),
    "head": Column(),
    "kv": Column(1),
    "value": Column(),
    "interval": Column(2),
    "chance": Column(3),
    "n": Column(4),
}


@dataclass(frozen=True, eq=False)
class HeadsView:
    """Scores, attention, ablations and training of a run."""

    everywhere: pd.DataFrame
    """Scores of all checkpoints."""
    checkpoints: Checkpoints
    maps: tuple[tuple[str, Heatmap], ...]
    """(score, map) of the last checkpoint."""
    attention: tuple[tuple[str, AttentionPicture], ...]
    """(score, attention of its strongest heads)."""
    causal: pd.DataFrame
    """Ablations of the last checkpoint and one metric; empty where there were none."""
    single: pd.DataFrame
    """Heads ablated alone, of the same checkpoint and metric."""
    gap: pd.DataFrame
    """Ablations of the last checkpoint and `loss_gap`, where `causal` is of another metric."""
    baselines: pd.DataFrame | None
    """Metrics of the unedited model."""
    about: tuple[str, ...]
    """Model and task, for subtitles."""
    count: int
    """How many of the strongest heads are listed."""
    level: str = "95"
    """Of intervals, in percent."""

    pages: ClassVar[Sequence[tuple[str, str]]] = ()
    """No page of its own."""

    @property
    def scores(self) -> list[str]:
        """Names of the scores: those that were proved first, then as in the config."""
        proved = [str(name) for name in dict.fromkeys(self.causal["score"])] if len(self.causal) else []
        return list(dict.fromkeys([*proved, *scores_in(self.everywhere)]))

    @property
    def pictures(self) -> Sequence[tuple[str, Picture]]:
        """A map per score, attention, ablations, and scores along training where there are checkpoints."""
        # Altair takes half a second to import, which the terminal's view need not wait for.
        from mechinterp_cli.report import attention, curves, heatmap

        found: list[tuple[str, Picture]] = [(f"scores-{name}", heatmap.drawing(grid)) for name, grid in self.maps]
        found += [(f"attention-{name}", attention.drawing(picture)) for name, picture in self.attention]
        proof = causal_curves(self.causal, (*self.about, self.checkpoints.about), level=self.level)
        if proof is not None:
            found.append(("causal", curves.drawing(proof)))
        if self.checkpoints.several:
            along = self._along_training()
            found += [("training", curves.drawing(along))] if along is not None else []
        return found

    def _along_training(self) -> Curves | None:
        return score_curves(self.everywhere, self.baselines, self.checkpoints, self.scores, self.about, self.level)

    def draw(self, width: int, plain: bool) -> Iterator[Any]:
        """What rich prints: the first map, the strongest heads, the ablations, checkpoints, a sentence per score."""
        if self.maps:
            yield terminal_heatmap(self.maps[0][1], width=width, plain=plain)
            yield self._heads_table(width, plain)
        if self.checkpoints.several:
            yield from terminal_curves(self._along_training(), width=width, plain=plain)
            yield checkpoint_table(
                self.everywhere, self.baselines, self.checkpoints, self.scores, width=width, plain=plain
            )
        yield from causal_tables(self.causal, width=width, plain=plain, other=self.gap)
        if not plain:  # the tables above have the same few numbers
            yield from terminal_curves(causal_curves(self.causal, ()), width=width, plain=plain)
        if sentences := causal_sentences(self.causal, self.single):
            yield Group(*[line(sentence, plain) for sentence in sentences])

    def headline(self) -> list[dict[str, Any]]:
        """The strongest heads of every score, then the ablations, as plain data."""
        rows = [row for _, row in self._strongest(self.count)]
        rows += [{str(name): value for name, value in row.items()} for row in self.causal.to_dict("records")]
        return [{name: None if missing(row.get(name)) else row[name] for name in HEADLINE} for row in rows]

    def answer(self) -> str:
        """The strongest head of the first score, and what ablating the strongest does."""
        first = next((row for _, row in self._strongest(1) if row["score"] == self.scores[0]), None)
        found = f"Head {head_name(first)} has the highest {first['score']} score: " if first else ""
        found += f"{figure(first['value'])}{certainty(first)}." if first else "No score has a number."
        return " ".join(
            [found, *(f"{words[:1].upper()}{words[1:]}" for words in causal_sentences(self.causal, self.single))]
        )

    def tables(self, count: int) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
        """The strongest heads, then the ablations."""
        rows = replace(self, count=max(count // max(1, len(self.scores)), self.count)).headline()
        ablated = [row for row in rows if row["ablation"] is not None]
        return [("Strongest heads", [row for row in rows if row["ablation"] is None]), ("Ablations", ablated)]

    def _strongest(self, count: int) -> Iterator[tuple[bool, dict[str, object]]]:
        """The strongest heads of every score in turn, and whether each is its score's first."""
        last = self.checkpoints.last(self.everywhere)
        for score in scores_in(last):
            for place, row in enumerate(strongest_heads(of_score(last, score), count)):
                yield place == 0, row

    def _heads_table(self, width: int, plain: bool) -> Group:
        count = min(self.count, 5 if len(self.maps) <= 4 else 3)
        shown = list(self._strongest(count))
        shared = any(text(row["kv_head"]) != text(row["head"]) for _, row in shown)
        cells = [
            {
                "score": text(row["score"]) if first else "",
                "head": " from ".join(filter(None, (head_name(row), from_name(row)))),
                "kv": text(row["kv_head"]) if shared else "",
                "value": figure(row["value"]),
                "interval": interval(row["ci_low"], row["ci_high"], 2),
                "chance": figure(row["chance"]),
                "n": text(row["n"]),
            }
            for first, row in shown
        ]
        return text_table(cells, _COLUMNS, lines=("strongest heads (layer.head)",), width=width, plain=plain)


def heads_view(manifest: Manifest, tables: Mapping[str, pd.DataFrame]) -> HeadsView:
    """The view of a run.

    Args:
        manifest: The run's.
        tables: `scores`, and of `patterns`, `prompts`, `causal`, `summary`, `baselines` those that there are.
    """
    everywhere = tables["scores"]
    checkpoints = checkpoints_of(everywhere)
    about = (str(manifest.model.get("id", "")), str(manifest.task.get("name", "")))
    last = checkpoints.last(everywhere)
    proof = checkpoints.last(tables.get("causal", pd.DataFrame()))
    metric = chosen_metric(proof, manifest.config.get("metrics", ()))
    return HeadsView(
        everywhere=everywhere,
        checkpoints=checkpoints,
        maps=tuple(_maps(last, (*about, checkpoints.about))),
        attention=tuple(_attention(checkpoints, tables, last, about)),
        causal=having(proof, metric=metric),
        single=_single(checkpoints.last(tables.get("summary", pd.DataFrame())), metric),
        gap=having(proof, metric=GAP) if metric != GAP else pd.DataFrame(),
        baselines=tables.get("baselines"),
        about=about,
        count=manifest.config["output"]["top"],
        level=level_of(manifest.config),
    )


def _single(summary: pd.DataFrame, metric: str) -> pd.DataFrame:
    if summary.empty or "design" not in summary:
        return pd.DataFrame()
    whole = summary["group"].isna() | (summary["group"] == "all")
    chosen = (summary["design"] == "single") & (summary["metric"] == metric) & whole
    return summary[chosen.fillna(False).astype(bool)]


def _maps(last: pd.DataFrame, about: Sequence[str]) -> Iterator[tuple[str, Heatmap]]:
    for score in scores_in(last):
        rows = of_score(last, score)
        counts = [int(number(n)) for n in rows["n"] if not missing(n)]
        basis = counted(max(counts), "sequence") if counts else "from the weights"
        yield score, score_map(rows, score, (*about, basis))


def _attention(
    checkpoints: Checkpoints, tables: Mapping[str, pd.DataFrame], last: pd.DataFrame, about: Sequence[str]
) -> Iterator[tuple[str, AttentionPicture]]:
    """One picture per score whose strongest heads' patterns were kept."""
    patterns = tables.get("patterns")
    if patterns is None or patterns.empty:
        return
    rows = checkpoints.last(patterns)
    for score in scores_in(rows):
        part = of_score(rows, score)
        part = part[part["prompt"] == part["prompt"].iloc[0]]
        prompt = int(number(part["prompt"].iloc[0]))
        tokens = _tokens(tables.get("prompts"), checkpoints, prompt, length=int(part["query"].max()) + 1)
        values = {head_name(row): number(row["value"]) for row in strongest_heads(of_score(last, score), len(last))}
        yield (
            score,
            AttentionPicture(
                title=f"Attention of the heads with the strongest {score} score",
                lines=(", ".join(filter(None, (*about, checkpoints.about, f"prompt {prompt}"))),),
                tokens=tokens,
                panels=tuple(_panels(part, score, values, len(tokens))),
            ),
        )


def _panels(part: pd.DataFrame, score: str, values: Mapping[str, float], length: int) -> Iterator[AttentionPanel]:
    for key, rows in part.groupby(["layer", "head"], sort=False):
        layer, head = key if isinstance(key, tuple) else (key, 0)
        name = f"{layer}.{head}"
        pattern = np.full((length, length), np.nan)
        known = rows["value"].to_numpy(dtype=np.float64, na_value=np.nan)
        pattern[rows["query"].to_numpy(dtype=np.int64), rows["key"].to_numpy(dtype=np.int64)] = known
        title = f"head {name}, {score} {figure(values[name], 2)}" if name in values else f"head {name}"
        yield AttentionPanel(title=title, pattern=np.where(np.tri(length, dtype=bool), pattern, np.nan))


def _tokens(prompts: pd.DataFrame | None, checkpoints: Checkpoints, prompt: int, *, length: int) -> tuple[str, ...]:
    """The prompt's tokens; `?` for those that the tables do not have."""
    words: list[str] = []
    if prompts is not None and len(prompts):
        there = checkpoints.last(prompts)
        there = there[(there["prompt"] == prompt) & (there["stream"] == "clean")]
        words = [str(word) for word in there["tokens"].iloc[0]] if len(there) else []
    return (*words[:length], *["?"] * (length - len(words)))
