"""`patch` on one model: its trials, its job for the engine, and the tables that come of it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import tables
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.binder import Binder
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.methods.interchange import Interchange, refuse_mean_of_keys
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.methods.patch.options import PatchOptions
from mechinterp_cli.methods.patch.paths import PathSpec, check_setting, expand_paths, path_status, path_values
from mechinterp_cli.methods.patch.subspaces import Subspaces, along, of_the_file, read_subspaces
from mechinterp_cli.methods.patch.tracing import bind, make_bucket
from mechinterp_cli.methods.specs import TrialSpec
from mechinterp_cli.metrics import check_prompts, find_metric
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
        options: The section.
        bound: Its streams and sources, checked.
        specs: Its trials at sites.
        paths: Its paths, numbered after them.
        logits: Clean logits [prompts, vocab], where a metric needs them.
        noise: Standard deviation of the noise of causal tracing.
        subspaces: The directions of blocks that patch along some.
    """

    def __init__(
        self,
        setting: Setting,
        options: PatchOptions,
        bound: Interchange,
        specs: Sequence[TrialSpec],
        paths: Sequence[PathSpec],
        logits: Tensor | None,
        noise: float | None,
        subspaces: Subspaces,
    ) -> None:
        super().__init__(setting)
        self.options = options
        self.bound = bound
        self.specs = specs
        self.paths = paths
        self.noise = noise
        self.subspaces = subspaces
        self.status = np.concatenate([bound.status(specs), path_status(paths, bound)])
        self.job = self._job(logits)

    def _job(self, logits: Tensor | None) -> Job:
        bound, prompts, model = self.bound, self.prompts, self.model
        members = measuring.split_members(prompts, bound.draws)
        spread, d_model = self.noise or 0.0, model.anatomy.d_model
        buckets = [make_bucket(bound, self.options.tracing, m, spread, d_model) for m in members]
        sites = {Site(spec.kind, layer) for spec in self.specs for layer in spec.layers}
        means = bound.means_of(model, sites, members, compute=self.setting.compute)
        metrics = measuring.Metrics.of(self.loaded.config.metrics, prompts, logits, model)
        trials = (along(bound.trials(self.specs, m, means), self.specs, self.subspaces) for m in members)
        return Job(
            trials=len(self.specs),
            prompts=len(prompts.prompts),
            members=members,
            works=tuple(Work(bucket, own) for bucket, own in zip(buckets, trials, strict=True)),
            measures=tuple(metrics.on(bound.expanded(m)) for m in members),
            metrics=self.loaded.config.metrics,
            draws=bound.draws,
        )

    def seeds(self) -> dict[str, int]:
        """Of the choice of other prompts, and of noise."""
        options = self.options
        return {"patch": options.seed} | ({"noise": options.tracing.seed} if options.tracing else {})

    def facts(self) -> dict[str, Any]:
        """The noise of causal tracing."""
        return {"noise_standard_deviation": self.noise}

    def display(self) -> dict[str, str]:
        """Task, direction and source; what 0 and 1 mean."""
        options = self.options
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
        sweep = self._sweep(bench.sweep(self.job), bench)
        config, bound = self.loaded.config, self.bound
        bench.stage("working out statistics")
        rows = tables.trial_rows(self.specs, self.model.anatomy, op=bound.operation, source=bound.source_name)
        swaps = {spec.index for spec in self.specs if spec.block in self.subspaces}
        rows = [row | ({"op": "swap"} if row["trial"] in swaps else {}) for row in rows]
        rows += [row for path in self.paths for row in path.rows(bound.source_name)]
        summary = tables.summary_frame(sweep, config.stats)
        written: dict[str, Any] = {"trials": rows, "baselines": tables.baseline_rows(sweep), "summary": summary}
        if config.output.rows != "summary":
            chosen = self._strongest(summary) if config.output.rows == "top" else None
            written["results"] = tables.result_columns(sweep, config.stats, chosen)
        for warning in self._warnings(sweep):
            bench.warn(warning)
        return written

    def _sweep(self, swept: Swept, bench: Bench) -> tables.Sweep:
        base, values = self.bound.base_stream, swept.values
        if self.paths:
            values = np.concatenate([values, path_values(self.paths, self.bound, self.model, self.job, bench)])
        return tables.Sweep(
            self.prompts,
            (*self.specs, *self.paths),
            self.job.metrics,
            values,
            self.status,
            dict(swept.streams),
            base,
            next((name for name in swept.streams if name != base), None),
            drawn=self.options.tracing is not None,
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
        cost, sent = cost_of(config.engine, self.model, self.job), self.status[len(self.specs) :] == Status.OK
        return cost | {
            "trials": cost["trials"] + len(self.paths),
            "computed": cost["computed"] + int(sent.sum()),
            "paths": len(self.paths),
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
    subspaces = read_subspaces(loaded, options, model.anatomy)
    options = of_the_file(options, subspaces)
    bound, specs, paths = _lay_out(setting, options, setting.prompts)
    prompts, logits = measuring.select(setting, top=options.tracing is not None)
    if len(prompts.prompts) < len(setting.prompts.prompts):
        bound, specs, paths = _lay_out(setting, options, prompts)
    tracing = options.tracing
    noise = None
    if tracing is not None:
        spread = measuring.embedding_spread(model, prompts, tracing.span) if setting.compute else 1.0
        noise = tracing.scale * spread
    return PatchExperiment(replace(setting, prompts=prompts), options, bound, specs, paths, logits, noise, subspaces)


def _lay_out(
    setting: Setting, options: PatchOptions, prompts: PromptSet
) -> tuple[Interchange, Sequence[TrialSpec], Sequence[PathSpec]]:
    """The streams and the trials, checked against model and prompts."""
    loaded, anatomy = setting.loaded, setting.model.anatomy
    bound = bind(loaded, options, anatomy, prompts)
    specs = Binder(loaded, "patch", anatomy, prompts).expand(options.sites)
    refuse_mean_of_keys(loaded, options, specs)
    paths = expand_paths(loaded, options.sites, anatomy, len(specs))
    if paths:
        check_setting(loaded, paths[0].block, bound, setting.model)
    if not specs and not paths:
        raise loaded.error(("patch", "sites"), "there is no trial", "Name at least one site.")
    return bound, specs, paths
