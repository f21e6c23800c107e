"""`patch` on one model: its trials, its job for the engine, and the tables that come of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from mechinterp_cli.engine.capture import Means, group_means
from mechinterp_cli.engine.edits import Bucket, Site, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import tables
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.methods.patch import options as patching
from mechinterp_cli.methods.patch.options import BoundPatch, PatchOptions
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.report.terminal import strongest
from mechinterp_cli.runs.tables import chosen_formats
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.prompts import PromptSet

RESULT_ROW_BYTES = {"parquet": 20, "csv": 140}
"""About what one row of results takes, for `--dry-run`."""


class PatchExperiment(Experiment):
    """A patch experiment: everything is known but the values.

    Args:
        setting: Config, model, and the prompts that are kept.
        bound: The section, checked and expanded into trials.
        logits: Clean logits [prompts, vocab], where a metric needs them.
        noise: Standard deviation of the noise of causal tracing.
    """

    def __init__(self, setting: Setting, bound: BoundPatch, logits: Tensor | None, noise: float | None) -> None:
        super().__init__(setting)
        self.bound = bound
        self.noise = noise
        self.status = _status(bound, self.prompts)
        self.job = self._job(logits)

    def _job(self, logits: Tensor | None) -> Job:
        bound, prompts, model = self.bound, self.prompts, self.model
        members = measuring.split_members(prompts, bound.draws)
        spread = self.noise or 0.0
        buckets = [patching.make_bucket(bound, prompts, m, spread, model.anatomy.d_model) for m in members]
        means = _means(model, prompts, bound, members, buckets, compute=self.setting.compute)
        metrics = measuring.Metrics.of(self.loaded.config.metrics, prompts, logits, model)
        return Job(
            trials=len(bound.specs),
            prompts=len(prompts.prompts),
            members=members,
            works=tuple(Work(b, _trials(bound, prompts, m, means)) for m, b in zip(members, buckets, strict=True)),
            measures=tuple(metrics.on(_per_draw(m, bound.draws)) for m in members),
            metrics=self.loaded.config.metrics,
            draws=bound.draws,
        )

    def seeds(self) -> dict[str, int]:
        """Of the choice of other prompts, and of noise."""
        options = self.bound.options
        return {"patch": options.seed} | ({"noise": options.tracing.seed} if options.tracing else {})

    def facts(self) -> dict[str, Any]:
        """The noise of causal tracing."""
        return {"noise_standard_deviation": self.noise}

    def display(self) -> dict[str, str]:
        """Task, direction and source; what 0 and 1 mean."""
        options = self.bound.options
        direction = "causal tracing" if options.tracing else f"{options.direction}, source {options.source}"
        scales = {
            "denoise": "0: no effect, 1: the clean answer is fully restored.",
            "noise": "0: no effect, 1: the clean answer is fully broken.",
        }
        normalised = self.bound.has_corrupt or options.tracing is not None
        scale = scales[options.direction] if normalised else "Change of the metric."
        return {"title": f"{self.prompts.task}, {direction}", "scale": scale}

    def compute(self, bench: Bench) -> Tables:
        """Sweep, and put the values into tables."""
        sweep = self._sweep(bench.sweep(self.job))
        config, options = self.loaded.config, self.bound.options
        bench.stage("working out statistics")
        source = self.bound.source_stream if options.source in ("pair", "other") else options.source
        rows = tables.trial_rows(self.bound.specs, self.model.anatomy, op=self.bound.operation(), source=source)
        summary = tables.summary_frame(sweep, config.stats)
        written: dict[str, Any] = {"trials": rows, "baselines": tables.baseline_rows(sweep), "summary": summary}
        if config.output.rows != "summary":
            chosen = self._strongest(summary) if config.output.rows == "top" else None
            written["results"] = tables.result_columns(sweep, config.stats, chosen)
        for warning in self._warnings(sweep):
            bench.warn(warning)
        return written

    def _sweep(self, swept: Swept) -> tables.Sweep:
        base = self.bound.base_stream
        return tables.Sweep(
            self.prompts,
            self.bound.specs,
            self.job.metrics,
            swept.values,
            self.status,
            dict(swept.streams),
            base,
            next((name for name in swept.streams if name != base), None),
            drawn=self.bound.options.tracing is not None,
        )

    def _strongest(self, summary: pd.DataFrame) -> npt.NDArray[np.int64]:
        """The trials that are listed as the strongest, by the first metric over all prompts."""
        rows = summary[(summary["metric"] == self.job.metrics[0]) & (summary["group"] == "all")]
        normalised = bool((rows["aggregate"] == "ratio_of_means").any())
        rows = rows[rows["aggregate"] == ("ratio_of_means" if normalised else "mean")]
        quantity = "normalized" if normalised else "effect"
        top = strongest(rows, count=self.loaded.config.output.top, quantity=quantity)
        return np.asarray(top["trial"], dtype=np.int64)

    def _warnings(self, sweep: tables.Sweep) -> list[str]:
        """What a reader of the numbers must know."""
        warnings = list(dict.fromkeys(sweep.warnings))
        for metric, name in enumerate(sweep.metrics):
            status = sweep.observe(metric, self.loaded.config.stats).status
            if count := int((status == Status.UNDEFINED).any(0).sum()):
                prompts = f"on {count} of {status.shape[1]} prompts"
                warnings.append(f"{name}: the two streams hardly differ {prompts}; nothing normalises their effects")
        return warnings

    def plan(self) -> dict[str, Any]:
        """Trials, rows, FLOPs, bytes, seconds; nothing is computed but one matrix product."""
        config = self.loaded.config
        draws, metrics = self.bound.draws, len(config.metrics)
        observations = int((self.status != Status.ABSENT).sum()) * draws * metrics
        rows = observations if config.output.rows == "all" else 0
        formats = chosen_formats(config.output.formats, rows)
        return cost_of(config.engine, self.model, self.job) | {
            "trivial": int((self.status == Status.TRIVIAL).sum()) * draws,
            "result_rows": rows,
            "result_bytes": rows * sum(RESULT_ROW_BYTES[form] for form in formats),
        }


@prepares(PatchOptions)
def prepare(options: PatchOptions, setting: Setting) -> PatchExperiment:
    """Check everything, choose the prompts, and lay out the trials.

    Without forward passes (`setting.compute`) `keep: correct` keeps everything, and means and noise are zero.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    loaded, model = setting.loaded, setting.model
    metrics = [find_metric(name) for name in loaded.config.metrics]
    check_prompts(metrics, setting.prompts.prompts, setting.prompts.task)
    bound = patching.bind(loaded, options, model.anatomy, setting.prompts)
    prompts, logits = _select(setting, options)
    if len(prompts.prompts) < len(setting.prompts.prompts):
        bound = patching.bind(loaded, options, model.anatomy, prompts)
    tracing = options.tracing
    noise = None
    if tracing is not None:
        spread = measuring.embedding_spread(model, prompts, tracing.span) if setting.compute else 1.0
        noise = tracing.scale * spread
    return PatchExperiment(replace(setting, prompts=prompts), bound, logits, noise)


def _select(setting: Setting, options: PatchOptions) -> tuple[PromptSet, Tensor | None]:
    """The prompts that are kept, and their clean logits where a metric needs them."""
    loaded, prompts, model = setting.loaded, setting.prompts, setting.model
    correct = loaded.config.resolved()["task"].get("keep") == "correct" or options.tracing is not None
    if correct and setting.moment.name is not None:
        key = "patch.tracing: drops" if options.tracing else "task.keep: correct drops"
        problem = f"{key} the prompts that a model gets wrong, which are others at each checkpoint"
        raise UserError(problem, "Leave out model.checkpoints, or keep all prompts.")
    if not correct and not measuring.needs_clean_logits(loaded):
        return prompts, None
    if not setting.compute:
        return prompts, torch.zeros(len(prompts.prompts), model.anatomy.vocab_size)
    setting.progress.stage(f"{setting.moment.heading}running the clean prompts")
    logits = measuring.clean_logits(model, prompts)
    if not correct:
        return prompts, logits
    return measuring.keep_correct(prompts, logits, top=options.tracing is not None)


def _means(
    model: LoadedModel,
    prompts: PromptSet,
    bound: BoundPatch,
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


def _trials(bound: BoundPatch, prompts: PromptSet, members: Sequence[int], means: Means | None) -> tuple[Trial, ...]:
    """The trials of one bucket; those that are known to do nothing on all of its prompts are left out."""
    expanded = _per_draw(members, bound.draws)
    others = None
    if bound.options.source == "other":
        others = patching.other_prompts(bound.options.seed, [prompts.prompts[i].template for i in expanded])
    trials = []
    for spec in bound.specs:
        computed = tuple(i for i, prompt in enumerate(expanded) if bound.positions(spec, prompt))
        if computed:
            edits = tuple(bound.edit(spec, layer, expanded, means, others) for layer in spec.layers)
            trials.append(Trial(spec.index, bound.base_stream, edits, computed))
    return tuple(trials)


def _status(bound: BoundPatch, prompts: PromptSet) -> npt.NDArray[np.int8]:
    status = np.full((len(bound.specs), len(prompts.prompts)), Status.OK, dtype=np.int8)
    for spec in bound.specs:
        for prompt in range(len(prompts.prompts)):
            positions = bound.positions(spec, prompt)
            if positions is None:
                status[spec.index, prompt] = Status.ABSENT
            elif not positions:
                status[spec.index, prompt] = Status.TRIVIAL
    return status
