"""Ablating the heads with the highest scores, beside as many others of the same layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.methods.heads.options import METRICS, Ablation, CausalOptions
from mechinterp_cli.methods.heads.scoring import buckets_of, tokens_of
from mechinterp_cli.methods.job import Job
from mechinterp_cli.methods.matched import matched_sets, too_few
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.token_metrics import TokenMeasurer

Head = tuple[int, int]
Design = Literal["single", "top", "random"]
Means = Mapping[int, Float[Tensor, "heads d_value"]]
"""Layer to the mean of each head's z."""


@dataclass(frozen=True)
class Ablated:
    """One trial: which heads are ablated, and why these."""

    index: int
    score: str
    ablation: Ablation
    design: Design
    k: int
    heads: tuple[Head, ...]
    """(layer, head); strongest first, or in the order drawn."""
    draw: int | None = None

    @property
    def name(self) -> str:
        """The heads in words: `5.1+7.2`."""
        return "+".join(f"{layer}.{head}" for layer, head in self.heads)

    @property
    def label(self) -> str:
        """The trial in words."""
        what = {"single": "head", "top": f"top {self.k}", "random": f"random {self.k}"}[self.design]
        return f"{self.ablation} {what} by {self.score}: {self.name}"


def lay_out(
    options: CausalOptions, ranking: Mapping[str, Sequence[Head]], anatomy: Anatomy, seed: int
) -> tuple[list[Ablated], list[str]]:
    """All trials: each strong head alone, the strongest k together, and random ones of the same layers.

    Args:
        options: The section.
        ranking: By score, the heads with a score, strongest first.
        anatomy: How many heads each layer has.
        seed: Of the random heads; both ablations share the draws.

    Returns:
        The trials, and what a reader must know.
    """
    trials: list[Ablated] = []
    warnings: list[str] = []

    def add(design: Design, k: int, heads: Sequence[Head], draw: int | None = None) -> None:
        trials.append(Ablated(len(trials), score, ablation, design, k, tuple(heads), draw))

    for score in options.scores:
        ranked = list(ranking[score])
        grid = [k for k in sorted(options.k) if k <= len(ranked)]
        if not ranked:
            warnings.append(f"causal: {score} is defined for no head; nothing is ablated by it")
        elif len(grid) < len(options.k):
            warnings.append(f"causal: {score} is defined for {len(ranked)} heads; larger k are left out")
        sets = {k: random_sets(ranked[:k], anatomy, options.random, seed) for k in grid}
        told = [too_few(f"the top {k} by {score}", drawn, options.random) for k, drawn in sets.items()]
        warnings += [f"causal: {words}" for words in told if words]
        for ablation in options.values:
            if ablation == options.values[0]:
                for head in ranked[: max(grid, default=0)]:
                    add("single", 1, [head])
            for k in grid:
                add("top", k, ranked[:k])
                for draw, heads in enumerate(sets[k]):
                    add("random", k, heads, draw)
    return trials, warnings


def random_sets(chosen: Sequence[Head], anatomy: Anatomy, draws: int, seed: int) -> list[tuple[Head, ...]]:
    """Sets of as many heads of the same layers, none of them among the chosen; none where a layer has too few."""
    layers = sorted({layer for layer, _ in chosen})
    wanted = {layer: sum(1 for other, _ in chosen if other == layer) for layer in layers}
    counts = {layer: heads.query if (heads := anatomy.layers[layer].heads) else 0 for layer in layers}
    others = {layer: [(layer, h) for h in range(counts[layer]) if (layer, h) not in chosen] for layer in layers}
    return matched_sets(wanted, others, draws=draws, seed=seed * 1_000_003 + len(chosen))


def make_job(
    trials: Sequence[Ablated], prompts: PromptSet, members: Sequence[int], means: Means, name: str = ""
) -> Job:
    """The engine's job: every trial on every prompt, the loss of every next token.

    Args:
        trials: The trials.
        prompts: The prompts.
        members: Those that are measured; the job counts them from 0.
        means: For the ablation `mean`.
        name: Of the job.
    """
    local = {prompt: place for place, prompt in enumerate(members)}
    buckets = buckets_of(prompts, members)
    works, measurers = [], []
    for bucket in buckets:
        tokens = tokens_of(prompts, bucket)
        measurers.append(TokenMeasurer(METRICS, tokens))
        works.append(_work(trials, tokens, measurers[-1].read, means))
    return Job(
        trials=len(trials),
        prompts=len(members),
        members=[[local[i] for i in bucket] for bucket in buckets],
        works=tuple(works),
        measures=tuple(measurer.measure for measurer in measurers),
        metrics=METRICS,
        reduces=tuple(measurer.reduce for measurer in measurers),
        name=name,
    )


def _work(trials: Sequence[Ablated], tokens: Tensor, read: Tensor, means: Means) -> Work:
    prompts, length = tokens.shape
    everywhere = (tuple(range(length)),) * prompts
    bucket = Bucket.of({"clean": tokens}, read)
    every = tuple(range(prompts))
    return Work(bucket, tuple(Trial(trial.index, "clean", _edits(trial, everywhere, means), every) for trial in trials))


def _edits(trial: Ablated, positions: tuple[tuple[int, ...], ...], means: Means) -> tuple[Edit, ...]:
    """One edit per layer."""
    edits = []
    for layer in sorted({layer for layer, _ in trial.heads}):
        units = tuple(sorted(head for other, head in trial.heads if other == layer))
        site = Site("z", layer)
        if trial.ablation == "zero":
            edits.append(Edit(site, "zero", positions, units))
        else:
            edits.append(Edit(site, "constant", positions, units, values=means[layer][None, None, list(units)]))
    return tuple(edits)
