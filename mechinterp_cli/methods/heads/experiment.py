"""`heads` on one model: scores of every head, and ablations of the strongest."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine.capture import stream_means, token_losses
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.patterns import BUDGET, check_reach
from mechinterp_cli.engine.plan import free_memory
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.methods.heads import tables
from mechinterp_cli.methods.heads.ablations import Ablations
from mechinterp_cli.methods.heads.attention import ATTENTION_SCORES
from mechinterp_cli.methods.heads.causal import Head, Means, lay_out, make_job
from mechinterp_cli.methods.heads.options import ATTENTION, METRICS, CausalOptions, HeadsOptions
from mechinterp_cli.methods.heads.scoring import (
    Scored,
    buckets_of,
    score_heads,
    shown_patterns,
    strongest,
    tokens_of,
)
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.checkpoints import last_of, moments_of
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.token_metrics import TokenMeasurer, both_kinds


class HeadsExperiment(Experiment):
    """A `heads` experiment that is ready to be computed.

    Args:
        setting: Config, model and prompts.
        options: The section.
        scores: The scores, in order.
        layers: Whose heads.
        scored: The prompts that scores are taken on.
        ablated: The prompts that ablations are measured on; none without `causal`.
    """

    def __init__(
        self,
        setting: Setting,
        options: HeadsOptions,
        scores: Sequence[str],
        layers: Sequence[int],
        scored: Sequence[int],
        ablated: Sequence[int],
    ) -> None:
        super().__init__(setting)
        self.options = options
        self.scores = scores
        self.layers = layers
        self.scored = scored
        self.ablated = ablated

    def seeds(self) -> dict[str, int]:
        """Of sampled tokens and random heads."""
        return {"heads": self.options.seed}

    def display(self) -> dict[str, str]:
        """The task, and how scores are to be read."""
        scale = "Scores of attention: mean over sequences of the attention that is where the score's name says."
        return {"title": f"heads, {self.prompts.task}", "scale": scale}

    def facts(self) -> dict[str, Any]:
        """Which prompts served for what."""
        return {"prompts_scored": len(self.scored), "prompts_ablated": len(self.ablated)}

    @property
    def _budget(self) -> int:
        free = free_memory(device_of(self.model.model))
        return min(BUDGET, memory_bytes(self.loaded.config.engine.max_memory, free))

    def compute(self, bench: Bench) -> Tables:
        """Score, draw, ablate."""
        stats, anatomy = self.loaded.config.stats, self.model.anatomy
        found = self._scores(bench)
        clusters = [self.prompts.prompts[i].cluster for i in self.scored]
        rows = tables.score_rows(found, self.scores, self.layers, anatomy, clusters, stats)
        # All checkpoints are scored on the same sequences.
        for warning in tables.few_sequences(rows) if self._is_first() else ():
            bench.run.warn(warning)
        written: dict[str, Any] = {"scores": rows}
        if self.loaded.config.output.rows == "all":
            sequences = tables.sequence_rows(found, self.scores, self.layers, anatomy, self.prompts, self.scored)
            written["sequences"] = sequences
        if found.pairs:
            written["compositions"] = tables.composition_rows(found, self.scores)
        shown = self._shown(found)
        if any(shown.values()):
            drawn = shown_patterns(self.model, self.prompts, self._shortest(), shown, self._budget)
            written["patterns"] = tables.pattern_rows(drawn)
        if self.options.causal is not None or self.setting.moment.name is not None:
            bench.stage("measuring losses")
            written["baselines"] = tables.loss_rows(self._losses(), self.prompts)
        if self.options.causal is not None and self._is_ablated():
            written |= self._ablate(bench, self.options.causal, found)
        return written

    def _scores(self, bench: Bench) -> Scored:
        bench.stage("scoring heads")
        found = score_heads(
            self.model,
            self.prompts,
            self.scored,
            self.scores,
            self.layers,
            tokens=self.options.tokens,
            seed=self.options.seed,
            budget=self._budget,
            tick=bench.progress.advance,
        )
        for warning in found.warnings:
            bench.warn(warning)
        if found.proof.by_layer:
            bench.note({"patterns": {"deviation": found.proof.deviation, "tolerance": found.proof.tolerance}})
        return found

    def _shown(self, found: Scored) -> dict[str, list[Head]]:
        """The strongest heads, by score, whose attention is drawn: those of layers that have a pattern."""
        hidden = [layer.index for layer in self.model.anatomy.layers if "pattern" in layer.missing]
        shown = {}
        for name in self.scores:
            if name in (*ATTENTION, "direct_effect"):
                values = found.mean(name).clone()
                values[hidden] = torch.nan
                shown[name] = strongest(values, self.options.show)
        return shown

    def _shortest(self) -> int:
        return min(self.scored, key=lambda i: self.prompts.prompts[i].length)

    def _losses(self) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """[prompts, metrics] of the unedited model."""
        losses = np.full((len(self.prompts.prompts), len(METRICS)), np.nan)
        for bucket in buckets_of(self.prompts, range(len(self.prompts.prompts))):
            tokens = tokens_of(self.prompts, bucket)
            seen = token_losses(self.model.model, self.model.anatomy, tokens)
            losses[bucket] = TokenMeasurer(METRICS, tokens).reduce(seen[..., None]).numpy()
        return losses

    def _is_first(self) -> bool:
        """Whether there is no checkpoint before this one."""
        return self.setting.moment.name in (None, moments_of(self.loaded.config.model)[0].name)

    def _is_ablated(self) -> bool:
        """Whether this is one of the checkpoints whose heads are ablated."""
        causal, name = self.options.causal, self.setting.moment.name
        if causal is None or name is None or causal.checkpoints == "all":
            return causal is not None
        return last_of(moments_of(self.loaded.config.model)).name == name

    def _ablate(self, bench: Bench, causal: CausalOptions, found: Scored) -> dict[str, Any]:
        config = self.loaded.config
        ranking = {str(name): strongest(found.mean(name), max(causal.k)) for name in causal.scores}
        trials, warnings = lay_out(causal, ranking, self.model.anatomy, self.options.seed)
        for warning in warnings:
            bench.warn(warning)
        if not trials:
            return {}
        layers = sorted({layer for trial in trials for layer, _ in trial.heads})
        means = self._means(layers) if "mean" in causal.values else {}
        job = make_job(trials, self.prompts, self.ablated, means)
        swept = bench.sweep(job)
        done = Ablations(trials, swept, self.ablated, self.prompts, self.model.anatomy)
        summary, told = done.summary(causal, config.stats)
        if bool(summary.loc[summary["design"] == "top", "ci_low"].isna().all()):
            told = [f"no effect has an interval with {len(self.ablated)} prompts; raise heads.causal.prompts", *told]
        for warning in told:
            bench.warn(f"causal: {warning.removeprefix('group all: ')}")
        written: dict[str, Any] = {
            "trials": done.trial_rows(),
            "summary": summary,
            "causal": done.causal_rows(summary, causal, config.stats),
        }
        return written | ({"results": done.result_rows()} if config.output.rows == "all" else {})

    def _means(self, layers: Sequence[int]) -> Means:
        """Mean z of every head of some layers, over all tokens of the scored prompts."""
        batches = [tokens_of(self.prompts, bucket) for bucket in buckets_of(self.prompts, self.scored)]
        sites = {Site("z", layer) for layer in layers}
        found: dict[Site, Tensor] = stream_means(self.model.model, self.model.anatomy, sites, batches)
        return {site.layer: mean for site, mean in found.items()}

    def plan(self) -> dict[str, Any]:
        """Scores and prompts; of the ablations what they cost if the highest scores were in the earliest layers."""
        counts = {layer: tables.head_count(self.model.anatomy, layer) for layer in self.layers}
        plan: dict[str, Any] = {"scores": list(self.scores), "layers": list(self.layers), "heads": sum(counts.values())}
        plan |= {"prompts_scored": len(self.scored), "prompts_ablated": len(self.ablated)}
        if self.options.causal is None:
            return plan
        places = [(layer, head) for layer, count in counts.items() for head in range(count)]
        worst = {str(name): places[: max(self.options.causal.k)] for name in self.options.causal.scores}
        trials, _ = lay_out(self.options.causal, worst, self.model.anatomy, self.options.seed)
        means = {layer: torch.zeros(count, 1) for layer, count in counts.items()}
        job = make_job(trials, self.prompts, self.ablated, means)
        return plan | {"ablations": cost_of(self.loaded.config.engine, self.model, job)}


@prepares(HeadsOptions)
def prepare(options: HeadsOptions, setting: Setting) -> HeadsExperiment:
    """Check scores, layers and prompts against the model.

    Raises:
        UserError: A score that the task's prompts do not allow, a layer without softmax attention, prompts that reach
            beyond a sliding window, too few prompts; names file, line and key.
    """
    loaded, anatomy, prompts = setting.loaded, setting.model.anatomy, setting.prompts
    if loaded.config.resolved()["task"].get("keep") == "correct":
        raise UserError("task.keep: correct has no meaning for heads, which scores all prompts", "Leave the key out.")
    scores = _scores(loaded, options, prompts)
    layers = _layers(setting, options, scores)
    scored, ablated = _split(loaded, options, prompts)
    if setting.compute and set(scores) & set(ATTENTION):
        longest = max(scored, key=lambda i: prompts.prompts[i].length)
        try:
            check_reach(setting.model.model, anatomy, tokens_of(prompts, [longest]), layers)
        except UserError as error:
            raise loaded.error(("task",), error.cause, error.remedy) from error
    if "direct_effect" in scores:
        _check_answers(loaded, prompts)
    return HeadsExperiment(setting, options, scores, layers, scored, ablated)


def _scores(loaded: LoadedConfig, options: HeadsOptions, prompts: PromptSet) -> tuple[str, ...]:
    spans = all("first" in prompt.spans and "second" in prompt.spans for prompt in prompts.prompts)
    if options.scores is None:
        scores: tuple[str, ...] = (*[n for n, s in ATTENTION_SCORES.items() if spans or not s.needs_spans], "copying")
    else:
        scores = options.scores
    proved = options.causal.scores if options.causal else ()
    for path, names in ((("heads", "scores"), scores), (("heads", "causal", "scores"), proved)):
        for place, name in enumerate(names):
            if name in ATTENTION_SCORES and ATTENTION_SCORES[name].needs_spans and not spans:
                problem = f"{name} needs a block of tokens and its repetition, task {prompts.task} has none"
                remedy = "Use the task repeats, or the score prefix_matching."
                raise loaded.error((*path, place), problem, remedy)
    for place, name in enumerate(proved):
        if name not in scores:
            problem = f"{name} is not among heads.scores"
            remedy = f"Add it there, or choose from {', '.join(scores)}."
            raise loaded.error(("heads", "causal", "scores", place), problem, remedy)
    return scores


def _layers(setting: Setting, options: HeadsOptions, scores: Sequence[str]) -> tuple[int, ...]:
    """Whose heads are scored: of layers with heads, and with attention patterns where a score reads them."""
    loaded, anatomy = setting.loaded, setting.model.anatomy
    reads = bool(set(scores) & set(ATTENTION))
    lacking = {
        layer.index: layer.missing["pattern"]
        for layer in anatomy.layers
        if "pattern" in layer.missing and (reads or layer.heads is None)
    }
    have = [layer.index for layer in anatomy.layers if layer.index not in lacking]
    if not have:
        problem = f"no layer has an attention pattern: {lacking[anatomy.n_layers - 1]}"
        weights = ", or scores of weights alone: scores: [copying]" if any(x.heads for x in anatomy.layers) else ""
        raise loaded.error(("heads",), problem, f"Use another model{weights}.")
    if options.layers == "all":
        if lacking:
            named, reason = ", ".join(map(str, lacking)), next(iter(lacking.values()))
            setting.progress.message(f"layers without attention patterns are left out: {named} ({reason})")
        return tuple(have)
    for place, layer in enumerate(options.layers):
        path = ("heads", "layers", place)
        if layer >= anatomy.n_layers:
            remedy = f"{loaded.config.model.id} has {anatomy.n_layers} layers, counted from 0."
            raise loaded.error(path, f"{layer} is outside 0..{anatomy.n_layers - 1}", remedy)
        if layer in lacking:
            problem = f"layer {layer} has no attention pattern: {lacking[layer]}"
            raise loaded.error(path, problem, f"Layers that have one: {', '.join(map(str, have))}.")
    return tuple(sorted(options.layers))


def _split(loaded: LoadedConfig, options: HeadsOptions, prompts: PromptSet) -> tuple[list[int], list[int]]:
    """The prompts that are scored, and those that ablations are measured on: the last ones that can be."""
    everyone = list(range(len(prompts.prompts)))
    if options.causal is None:
        return everyone, []
    path = ("heads", "causal", "prompts")
    fit = [i for i in everyone if both_kinds(prompts.prompts[i].clean_tokens)]
    if len(fit) < options.causal.prompts:
        problem = (
            f"{options.causal.prompts} prompts are asked for, and {len(fit)} of {len(everyone)} have both a repeated "
            "pair of tokens and tokens that occur for the first time"
        )
        raise loaded.error(path, problem, "Lower it, raise task.n, or use the task repeats.")
    ablated = fit[-options.causal.prompts :]
    scored = [i for i in everyone if i not in set(ablated)]
    if not scored:
        problem = f"all {len(everyone)} prompts would be kept for ablations, and none left to be scored"
        raise loaded.error(path, problem, "Lower it, or raise task.n.")
    return scored, ablated


def _check_answers(loaded: LoadedConfig, prompts: PromptSet) -> None:
    if all(prompt.answer and prompt.wrong_answer for prompt in prompts.prompts):
        return
    place = loaded.config.resolved()["heads"]["scores"].index("direct_effect")
    problem = f"direct_effect needs prompts with an answer and a wrong answer, task {prompts.task} has none"
    raise loaded.error(("heads", "scores", place), problem, "Use a task such as ioi, or leave the score out.")
