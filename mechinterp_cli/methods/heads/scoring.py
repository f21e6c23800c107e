"""Every score that a config asks for, of every head: from attention, from weights, from a task's answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.patterns import BUDGET, PatternProof, attention_patterns
from mechinterp_cli.methods.heads.attention import ATTENTION_SCORES, Sequences
from mechinterp_cli.methods.heads.composition import COMPOSITIONS, Compositions, compositions
from mechinterp_cli.methods.heads.direct import direct_effects
from mechinterp_cli.methods.heads.successor import successor_scores
from mechinterp_cli.methods.heads.weights import Circuits, HeadScores, circuits, copying_scores, sample_tokens
from mechinterp_cli.methods.measure import split_members
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import PromptSet

Tick = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class PromptScores:
    """A score that every prompt has."""

    score: str
    values: Float[Tensor, "prompts layers heads"]
    """Float64; NaN for layers that were not asked for, and for prompts where no position counts."""
    chance: Float[Tensor, " prompts"] | None
    """Of attention that is uniform over the visible keys."""


@dataclass(eq=False)
class Scored:
    """What was found out about the heads of one model."""

    by_prompt: dict[str, PromptScores] = field(default_factory=dict)
    by_weights: dict[str, HeadScores] = field(default_factory=dict)
    pairs: dict[str, Compositions] = field(default_factory=dict)
    proof: PatternProof = field(default_factory=PatternProof)
    warnings: list[str] = field(default_factory=list)

    def mean(self, score: str) -> Float[Tensor, "layers heads"]:
        """A score of every head: the mean over prompts, or over no prompts at all for weights; NaN where undefined.

        Of compositions the strongest with any earlier head.
        """
        if score in self.by_prompt:
            return self.by_prompt[score].values.nanmean(0)
        if score in self.by_weights:
            return self.by_weights[score].values
        values = self.pairs[score].values.flatten(2)
        strongest = values.nan_to_num(-torch.inf).amax(-1)
        return torch.where(torch.isfinite(strongest), strongest, torch.nan)


def score_heads(
    model: LoadedModel,
    prompts: PromptSet,
    members: Sequence[int],
    scores: Sequence[str],
    layers: Sequence[int],
    *,
    tokens: int,
    seed: int,
    budget: int = BUDGET,
    tick: Tick = lambda done, total: None,
) -> Scored:
    """Measure every head of some layers.

    Args:
        model: The model.
        prompts: The prompts.
        members: Those of them that are scored.
        scores: Which scores.
        layers: Whose heads.
        tokens: Ordinary tokens sampled for copying.
        seed: Of that sample.
        budget: Bytes for attention patterns.
        tick: Told how many (prompt, layer) pairs are done, of how many.

    Raises:
        UserError: A layer has no pattern, or a prompt lacks what a score needs.
        ProofError: A pattern does not give the model's own attention output.
        RunError: NaN, or a pattern beyond the budget.
    """
    found = Scored()
    wanted = [name for name in scores if name in ATTENTION_SCORES]
    if wanted:
        _from_attention(found, model, prompts, members, wanted, layers, budget, tick)
    if len(wanted) < len(scores):
        with circuits(model) as shared:
            _from_weights(found, shared, scores, layers, tokens, seed)
            if "direct_effect" in scores:
                _direct(found, shared, prompts, members, layers)
    return found


def buckets_of(prompts: PromptSet, members: Sequence[int]) -> list[list[int]]:
    """Some prompts by exact length, shortest first, not too many tokens together."""
    chosen = set(members)
    return [kept for bucket in split_members(prompts) if (kept := [i for i in bucket if i in chosen])]


def tokens_of(prompts: PromptSet, members: Sequence[int]) -> Tensor:
    """Ids [prompts, positions] of prompts of one length."""
    return torch.tensor([prompts.prompts[i].clean_tokens for i in members])


def sequences_of(prompts: PromptSet, members: Sequence[int]) -> Sequences:
    """What detectors need to know of prompts of one length."""
    spans = [prompts.prompts[i].spans for i in members]
    return Sequences(tokens_of(prompts, members), spans, skip=int(prompts.add_bos))


def _from_attention(
    found: Scored,
    model: LoadedModel,
    prompts: PromptSet,
    members: Sequence[int],
    names: Sequence[str],
    layers: Sequence[int],
    budget: int,
    tick: Tick,
) -> None:
    anatomy = model.anatomy
    heads = max(layer.heads.query for layer in anatomy.layers if layer.heads)
    values = {name: torch.full((len(prompts.prompts), anatomy.n_layers, heads), torch.nan).double() for name in names}
    chance = {name: torch.full((len(prompts.prompts),), torch.nan).double() for name in names}
    total, done = len(members) * len(layers), 0

    def score(bucket: Sequence[int], before: int) -> PatternProof:
        sequences = sequences_of(prompts, bucket)
        cells = {name: ATTENTION_SCORES[name].cells(sequences) for name in names}
        for name in names:
            chance[name][bucket] = cells[name].chance()

        def visit(layer: int, pattern: Tensor, part: slice, which: slice) -> None:
            for name, of in cells.items():
                values[name][bucket[part], layer, which] = of.mean(pattern, part)

        def told(pairs: int) -> None:
            tick(before + pairs, total)

        return attention_patterns(model.model, anatomy, sequences.tokens, layers, visit, budget=budget, tick=told)

    deviations = dict.fromkeys(layers, 0.0)
    for bucket in buckets_of(prompts, members):
        proof = score(bucket, done)
        done += len(bucket) * len(layers)
        deviations |= {layer: max(deviations[layer], value) for layer, value in proof.by_layer.items()}
        found.proof = PatternProof(deviations, max(found.proof.tolerance, proof.tolerance))
    at = list(members)
    for name in names:
        found.by_prompt[name] = PromptScores(name, values[name][at], chance[name][at])
        if bool(chance[name][at].isnan().all()):
            found.warnings.append(f"{name} is undefined: no scored prompt has a position that counts")


def _from_weights(
    found: Scored, shared: Circuits, scores: Sequence[str], layers: Sequence[int], tokens: int, seed: int
) -> None:
    if {"copying", "copying_eigenvalues"} & set(scores):
        for result in copying_scores(shared, layers, sample_tokens(shared, tokens, seed)):
            if result.score in scores:
                found.by_weights[result.score] = result
    if "successor" in scores:
        found.by_weights["successor"] = successor_scores(shared, layers)
    for name in COMPOSITIONS:
        if name in scores:
            found.pairs[name] = compositions(shared, name, layers)
    results: list[HeadScores | Compositions] = [*found.by_weights.values(), *found.pairs.values()]
    for one in results:
        found.warnings += _undefined(one.score, one.reasons)
    for pairs in found.pairs.values():
        found.warnings += _undefined(f"{pairs.score} with earlier heads", pairs.unread)


def _direct(found: Scored, shared: Circuits, prompts: PromptSet, members: Sequence[int], layers: Sequence[int]) -> None:
    effects = direct_effects(shared, [prompts.prompts[i] for i in members])
    if isinstance(effects, str):
        found.warnings.append(f"direct_effect is undefined: {effects}")
        shape = (len(members), shared.model.anatomy.n_layers, shared.n_heads)
        values = torch.full(shape, torch.nan, dtype=torch.float64)
    else:
        values = effects.heads.clone()
        values[:, [layer for layer in range(values.shape[1]) if layer not in set(layers)]] = torch.nan
        reasons = {layer: reason for layer, reason in effects.reasons.items() if layer in set(layers)}
        found.warnings += _undefined("direct_effect", reasons)
    found.by_prompt["direct_effect"] = PromptScores("direct_effect", values, None)


def _undefined(score: str, reasons: Mapping[int, str]) -> Iterator[str]:
    """One sentence per reason, with the layers that it holds for."""
    for reason in dict.fromkeys(reasons.values()):
        layers = [str(layer) for layer, why in reasons.items() if why == reason]
        yield f"{score} is undefined in layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}: {reason}"


def strongest(values: Float[Tensor, "layers heads"], count: int) -> list[tuple[int, int]]:
    """(layer, head) of the heads with the highest scores, highest first; undefined ones are not among them."""
    flat = values.nan_to_num(nan=-torch.inf, neginf=-torch.inf).flatten()
    order = flat.argsort(descending=True, stable=True)[:count].tolist()
    return [divmod(place, values.shape[1]) for place in order if flat[place] > -torch.inf]


@dataclass(frozen=True, eq=False)
class ShownPattern:
    """The attention of one head on one prompt."""

    score: str
    layer: int
    head: int
    prompt: int
    pattern: Float[Tensor, "queries keys"]


SHOWN_TOKENS = 64
"""Longer prompts are drawn as far as this."""


def shown_patterns(
    model: LoadedModel, prompts: PromptSet, prompt: int, heads: Mapping[str, Sequence[tuple[int, int]]], budget: int
) -> list[ShownPattern]:
    """The attention of chosen heads on one prompt.

    Args:
        model: The model.
        prompts: The prompts.
        prompt: Which of them.
        heads: By score, (layer, head).
        budget: Bytes for attention patterns.
    """
    layers = sorted({layer for chosen in heads.values() for layer, _ in chosen})
    kept: dict[tuple[int, int], Tensor] = {}
    wanted = {place for chosen in heads.values() for place in chosen}

    def visit(layer: int, pattern: Tensor, _prompts: slice, which: slice) -> None:
        for head in range(which.start, which.start + pattern.shape[1]):
            if (layer, head) in wanted:
                part = pattern[0, head - which.start, :SHOWN_TOKENS, :SHOWN_TOKENS]
                kept[layer, head] = part.double().cpu().clone()

    attention_patterns(model.model, model.anatomy, tokens_of(prompts, [prompt]), layers, visit, budget=budget)
    return [ShownPattern(score, *place, prompt, kept[place]) for score, chosen in heads.items() for place in chosen]
