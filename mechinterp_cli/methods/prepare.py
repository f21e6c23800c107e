"""Everything before the first edited forward pass: model, prompts, trials, buckets, metrics."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.capture import Means, group_means
from mechinterp_cli.engine.edits import Bucket, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.wavefront import Measure
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import patch
from mechinterp_cli.metrics import find_metric
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import Progress
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.prompts import PromptSet


@dataclass(frozen=True, eq=False)
class Prepared:
    """An experiment that is ready to be computed."""

    loaded: LoadedConfig
    model: LoadedModel
    prompts: PromptSet
    bound: patch.BoundPatch
    members: tuple[tuple[int, ...], ...]
    """By bucket, the prompts of the set that are in it."""
    works: tuple[Work, ...]
    measures: tuple[Measure, ...]
    status: npt.NDArray[np.int8]
    """[trials, prompts] of `Status`."""
    noise: float | None
    """Standard deviation of the noise of causal tracing."""


def prepare(loaded: LoadedConfig, progress: Progress, *, compute: bool = True) -> Prepared:
    """Load the model, build the prompts, check everything, and lay out the trials.

    Args:
        loaded: The config.
        progress: Where to tell.
        compute: Whether forward passes may be made; without them `keep: correct` keeps everything, and
            means and noise are zero (`--dry-run`).

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    options = loaded.config.method
    assert isinstance(options, patch.PatchOptions)
    for name in loaded.config.metrics:
        find_metric(name)
    progress.stage(f"loading {loaded.config.model.id}")
    model = load_model(loaded.config.model)
    prompts = measuring.build_prompts(loaded, model)
    bound = patch.bind(loaded, options, model.anatomy, prompts)
    prompts, logits = _select(loaded, model, prompts, options, progress, compute=compute)
    if len(prompts.prompts) < len(bound.specs[0].place.positions):
        bound = patch.bind(loaded, options, model.anatomy, prompts)
    tracing = options.tracing
    noise = None if tracing is None else tracing.scale * _spread(model, prompts, tracing.span, compute)
    members = tuple(measuring.split_members(prompts, bound.draws))
    buckets = [patch.make_bucket(bound, prompts, m, noise or 0.0, model.anatomy.d_model) for m in members]
    means = _means(model, prompts, bound, members, buckets, compute=compute)
    metrics = measuring.Metrics.of(loaded.config.metrics, prompts, logits, model)
    works = tuple(Work(bucket, _trials(bound, prompts, m, means)) for m, bucket in zip(members, buckets, strict=True))
    measures = tuple(metrics.on(_per_draw(m, bound.draws)) for m in members)
    return Prepared(loaded, model, prompts, bound, members, works, measures, _status(bound, prompts), noise)


def _select(
    loaded: LoadedConfig,
    model: LoadedModel,
    prompts: PromptSet,
    options: patch.PatchOptions,
    progress: Progress,
    *,
    compute: bool,
) -> tuple[PromptSet, Tensor | None]:
    """The prompts that are kept, and their clean logits where a metric needs them."""
    correct = loaded.config.resolved()["task"].get("keep") == "correct" or options.tracing is not None
    if not correct and not measuring.needs_clean_logits(loaded):
        return prompts, None
    if not compute:
        return prompts, torch.zeros(len(prompts.prompts), model.anatomy.vocab_size)
    progress.stage("running the clean prompts")
    logits = measuring.clean_logits(model, prompts)
    if not correct:
        return prompts, logits
    return measuring.keep_correct(prompts, logits, top=options.tracing is not None)


def _spread(model: LoadedModel, prompts: PromptSet, span: str, compute: bool) -> float:
    return measuring.embedding_spread(model, prompts, span) if compute else 1.0


def _means(
    model: LoadedModel,
    prompts: PromptSet,
    bound: patch.BoundPatch,
    members: Sequence[Sequence[int]],
    buckets: Sequence[Bucket],
    *,
    compute: bool,
) -> Means | None:
    """Data-set means of the source stream by template and length, for `source: mean`."""
    if bound.options.source != "mean":
        return None
    stream = bound.options.source_stream if bound.has_corrupt else "clean"
    keys = [(p.template, p.length) for p in prompts.prompts]
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    sites = {Site(spec.kind, layer) for spec in bound.specs for layer in spec.layers}
    if not compute:
        return Means({site: torch.zeros(len(order), 1, 1) for site in sites}, [order[key] for key in keys])
    tokens = [bucket.tokens[stream] for bucket in buckets]
    return group_means(model.model, model.anatomy, sites, tokens, members, [order[key] for key in keys])


def _per_draw(members: Sequence[int], draws: int) -> list[int]:
    return [i for i in members for _ in range(draws)]


def _trials(
    bound: patch.BoundPatch, prompts: PromptSet, members: Sequence[int], means: Means | None
) -> tuple[Trial, ...]:
    """The trials of one bucket; those that are known to do nothing on all of its prompts are left out."""
    expanded = _per_draw(members, bound.draws)
    others = None
    if bound.options.source == "other":
        others = patch.other_prompts(bound.options.seed, [prompts.prompts[i].template for i in expanded])
    trials = []
    for spec in bound.specs:
        computed = tuple(i for i, prompt in enumerate(expanded) if bound.positions(spec, prompt))
        if computed:
            edits = tuple(bound.edit(spec, layer, expanded, means, others) for layer in spec.layers)
            trials.append(Trial(spec.index, bound.base_stream, edits, computed))
    return tuple(trials)


def _status(bound: patch.BoundPatch, prompts: PromptSet) -> npt.NDArray[np.int8]:
    status = np.full((len(bound.specs), len(prompts.prompts)), Status.OK, dtype=np.int8)
    for spec in bound.specs:
        for prompt in range(len(prompts.prompts)):
            positions = bound.positions(spec, prompt)
            if positions is None:
                status[spec.index, prompt] = Status.ABSENT
            elif not positions:
                status[spec.index, prompt] = Status.TRIVIAL
    return status


def settings_of(prepared: Prepared) -> dict[str, Any]:
    """Seeds, for the manifest."""
    options = prepared.bound.options
    task = prepared.loaded.config.resolved()["task"]
    seeds = {"task": task.get("seed", 0), "stats": prepared.loaded.config.stats.seed, "patch": options.seed}
    return seeds | ({"noise": options.tracing.seed} if options.tracing else {})
