"""`ablate` on one model: its trials, a job for every value, and the tables that come of them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mechinterp_cli.engine.clean import CleanLogits, clean_logits_of
from mechinterp_cli.engine.edits import Bucket, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods import tables as common
from mechinterp_cli.methods.ablate import tables
from mechinterp_cli.methods.ablate.designs import lay_out
from mechinterp_cli.methods.ablate.expand import expand, find, names
from mechinterp_cli.methods.ablate.optimal import Fit, Fitted, check_fits, fitting_prompts, too_long
from mechinterp_cli.methods.ablate.options import AblateOptions, CumulativeOptions, ValueName
from mechinterp_cli.methods.ablate.ranking import explain, load_ranking
from mechinterp_cli.methods.ablate.sources import FEWEST, donors, mean_set
from mechinterp_cli.methods.ablate.units import Ablation, Unit, merge
from mechinterp_cli.methods.ablate.values import Values, check_parts, values_of
from mechinterp_cli.methods.ablate.words import continuations
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Experiment, Setting, Tables, prepares
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.metrics import check_prompts, find_metric
from mechinterp_cli.report.terminal import strongest
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.prompts import PromptSet
from mechinterp_cli.token_metrics import TokenMeasurer, check_token_metrics, metric_names


class AblateExperiment(Experiment):
    """An ablation experiment: everything is known but the values.

    Args:
        setting: Config, model, and the prompts that are kept.
        options: The section.
        units: What can be ablated.
        trials: What is ablated together.
        logits: Clean logits [prompts, vocab], where a metric of answers needs them.
        warnings: What a reader must know of the trials.
    """

    def __init__(
        self,
        setting: Setting,
        options: AblateOptions,
        units: Sequence[Unit],
        trials: Sequence[Ablation],
        logits: Tensor | None,
        warnings: Sequence[str],
    ) -> None:
        super().__init__(setting)
        self.options = options
        self.units = units
        self.trials = trials
        self.logits = logits
        self.warnings = warnings
        self.corrupt = all(prompt.corrupt_tokens is not None for prompt in self.prompts.prompts)
        self.asks = asks(self.prompts)

    def seeds(self) -> dict[str, int]:
        """Of every draw the section makes."""
        options = self.options
        seeds = {"resample": options.resample.seed, "noise": options.noise.seed, "optimal": options.optimal.seed}
        used = {f"ablate.{name}": seed for name, seed in seeds.items() if name in options.values}
        return used | ({"ablate.cumulative": options.cumulative.seed} if options.cumulative else {})

    def display(self) -> dict[str, str]:
        """Task and design; what 0 and 1 mean."""
        scale = "0: no effect, 1: as far as the corrupted prompt." if self.corrupt else "Ablated minus unedited."
        return {"title": f"{self.prompts.task}, ablation, {self.options.design}", "scale": scale}

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured of every prompt."""
        return self.loaded.config.metrics

    def compute(self, bench: Bench) -> Tables:
        """Sweep value after value, and put what was measured into tables."""
        for warning in self.warnings:
            bench.warn(warning)
        parts: dict[str, list[Any]] = {}
        for number, value in enumerate(self.options.values):
            for name, table in self._of_value(bench, value, number * len(self.trials)).items():
                parts.setdefault(name, []).append(table)
        return {name: _joined(found) for name, found in parts.items() if name != "baselines"} | {
            "baselines": parts["baselines"][0]
        }

    def _of_value(self, bench: Bench, value: ValueName, first: int) -> dict[str, Any]:
        """The tables of one value; trials are counted from `first`."""
        config = self.loaded.config
        left_out = self._left_out(value)
        values = self._values(value, bench)
        for note in values.notes:
            bench.warn(note)
        members = measuring.split_members(self.prompts, values.draws)
        job = self._job(value, members, values, left_out)
        swept = bench.sweep(job)
        specs = [tables.AblationSpec(trial, self.units, value, self.model.anatomy) for trial in self.trials]
        whole = self._sweep(swept, specs, job.metrics, values.draws > 1, left_out)
        sweep = replace(
            whole,
            metrics=self.metrics,
            values=whole.values[..., : len(self.metrics)],
            streams={name: seen[..., : len(self.metrics)] for name, seen in whole.streams.items()},
        )
        asked = self.options.cumulative.random if self.options.cumulative else 0
        done = tables.Done(sweep, value, self.units, self.trials, config.stats, self.options.margin, asked, left_out)
        summary = tables.unjudged(common.summary_frame(sweep, config.stats, raw_margin=self.options.margin))
        found: dict[str, Any] = {
            "trials": [
                row | values.facts(spec.index) for spec in specs for row in spec.trial_rows(values.reference, first)
            ],
            "baselines": common.baseline_rows(sweep),
            "summary": tables.offset(summary, first),
            "curve": done.curve(),
            "circuits": done.circuits(),
            "interactions": done.interactions(),
        }
        if self.asks:
            found["contrasts"], told = done.contrasts(first)
            sweep.warnings.extend(told)
        else:
            found["positions"] = done.positions(whole, first)
        if self.options.generate:
            bench.stage(f"{value}: continuing prompts")
            found["words"] = self._words(value, values, summary, first)
        if config.output.rows != "summary":
            found["results"] = _shifted(common.result_columns(sweep, config.stats), first)
        for warning in dict.fromkeys(sweep.warnings):
            bench.warn(f"{value}: {warning}")
        return {name: table for name, table in found.items() if len(table)}

    def _words(self, value: ValueName, values: Values, summary: pd.DataFrame, first: int) -> list[dict[str, Any]]:
        """Continuations of the first prompts: unedited once, then with each of the strongest ablations."""
        config = self.loaded.config
        rows = summary[(summary["metric"] == self.metrics[0]) & (summary["group"] == "all") & summary["ranking"].isna()]
        top = strongest(rows.drop_duplicates("trial"), count=config.output.top, quantity="effect")["trial"]
        shown: list[tuple[Ablation | None, str]] = [(None, "unedited")] if first == 0 else []
        shown += [(self.trials[int(i)], str(rows[rows["trial"] == i]["label"].iloc[0])) for i in top]
        chosen = range(min(self.options.generate_prompts, len(self.prompts.prompts)))
        found = []
        for trial, label in shown:
            about: dict[str, Any] = {"label": label, "ablation": None if trial is None else value}
            about |= {"trial": None if trial is None else first + trial.index}
            own = values.of(trial) if isinstance(values, Fitted) and trial is not None else values
            rows_of = continuations(self.model, self.prompts, chosen, self.units, trial, own, self.options.generate)
            found += [row | about for row in rows_of]
        return found

    def _left_out(self, value: ValueName) -> frozenset[int]:
        """Prompts that are not measured, because constants are fitted on them."""
        if value != "optimal":
            return frozenset()
        return fitting_prompts(self.options.optimal, len(self.prompts.prompts))

    def _values(self, value: ValueName, bench: Bench | None = None) -> Values:
        """What stands in place; without a bench, constants are not fitted."""
        if value != "optimal" or bench is None:
            if bench is not None:
                bench.stage(f"{value}: capturing activations")
            return values_of(value, self.options, self.setting, merge(self.units))
        check_parts(value, self.options, self.setting, merge(self.units))
        fit = self._fit
        cost = fit.cost
        bench.stage(f"optimal: fitting constants, {cost['fits']} times {cost['steps']} steps")
        if (long := too_long(cost)) is not None:
            bench.warn(long)
        return fit.run(bench.progress.advance)

    @property
    def _fit(self) -> Fit:
        return Fit(self.model, self.prompts, self.units, self.trials, self.options.optimal, self.asks)

    def _job(
        self,
        value: ValueName,
        members: Sequence[Sequence[int]],
        values: Values,
        left_out: frozenset[int] = frozenset(),
    ) -> Job:
        """Every trial on every prompt but those that are left out."""
        works = tuple(self._work(bucket, values, left_out) for bucket in members)
        shared: dict[str, Any] = {
            "trials": len(self.trials),
            "prompts": len(self.prompts.prompts),
            "members": members,
            "works": works,
            "draws": values.draws,
            "name": value.replace("_", "-"),
        }
        if self.asks:
            metrics = measuring.Metrics.of(self.metrics, self.prompts, self.logits, self.model)
            measures = tuple(metrics.on(_per_draw(bucket, values.draws)) for bucket in members)
            return Job(measures=measures, metrics=self.metrics, **shared)
        longest = max(prompt.length for prompt in self.prompts.prompts)
        clean = self._clean([work.bucket.tokens["clean"] for work in works])
        measurers = [
            TokenMeasurer(self.metrics, work.bucket.tokens["clean"], logits, longest=longest, per_position=True)
            for work, logits in zip(works, clean, strict=True)
        ]
        return Job(
            measures=tuple(measurer.measure for measurer in measurers),
            metrics=metric_names(self.metrics, longest, per_position=True),
            reduces=tuple(measurer.reduce for measurer in measurers),
            **shared,
        )

    def _clean(self, tokens: Sequence[Tensor]) -> Sequence[CleanLogits | None]:
        """The unedited model's predictions, where a metric compares with them; by bucket."""
        if not {"kl", "top1"} & set(self.metrics) or not self.setting.compute:
            return [None] * len(tokens)
        return clean_logits_of(self.model.model, self.model.anatomy, tokens)

    def _work(self, members: Sequence[int], values: Values, left_out: frozenset[int]) -> Work:
        expanded = _per_draw(members, values.draws)
        prompts = [self.prompts.prompts[i] for i in expanded]
        tokens = {"clean": torch.tensor([p.clean_tokens for p in prompts])}
        if self.corrupt:
            tokens["corrupt"] = torch.tensor([p.corrupt_tokens for p in prompts])
        tokens |= values.tokens(members)
        length = tokens["clean"].shape[1]
        read = None if self.asks else torch.arange(length - 1).expand(len(prompts), -1)
        trials = []
        for trial in self.trials:
            merged = merge([self.units[unit] for unit in trial.units])
            measured = [prompt not in left_out and self._positions(trial, prompt) for prompt in expanded]
            computed = tuple(i for i, wanted in enumerate(measured) if wanted)
            if computed:
                source = values.of(trial) if isinstance(values, Fitted) else values
                edits = tuple(edit for one in merged for edit in source.edits(one, members))
                trials.append(Trial(trial.index, "clean", edits, computed))
        return Work(Bucket.of(tokens, read), tuple(trials))

    def _positions(self, trial: Ablation, prompt: int) -> bool:
        """Whether the trial edits anything of the prompt."""
        return any(self.units[unit].place.positions[prompt] for unit in trial.units)

    def _sweep(
        self,
        swept: Swept,
        specs: Sequence[tables.AblationSpec],
        metrics: tuple[str, ...],
        drawn: bool,
        left_out: frozenset[int],
    ) -> common.Sweep:
        status = np.full((len(self.trials), len(self.prompts.prompts)), Status.OK, dtype=np.int8)
        # A unit that a prompt does not have says nothing of it; a set of which it has none leaves it as it is.
        untouched = Status.ABSENT if self.options.design == "single" else Status.TRIVIAL
        for trial in self.trials:
            for prompt in range(status.shape[1]):
                if prompt in left_out:
                    status[trial.index, prompt] = Status.ABSENT
                elif not self._positions(trial, prompt):
                    status[trial.index, prompt] = untouched
        other = "corrupt" if self.corrupt else None
        streams = {name: seen for name, seen in swept.streams.items() if name in ("clean", "corrupt")}
        values = np.where((status == Status.TRIVIAL)[..., None, None], streams["clean"], swept.values)
        return common.Sweep(self.prompts, specs, metrics, values, status, streams, "clean", other, drawn=drawn)

    def plan(self) -> dict[str, Any]:
        """What every value takes; activations are not captured."""
        plan: dict[str, Any] = {"design": self.options.design, "units": len(self.units), "values": {}}
        for value in self.options.values:
            values = self._values(value)
            members = measuring.split_members(self.prompts, values.draws)
            job = self._job(value, members, values, self._left_out(value))
            plan["values"][value] = cost_of(self.loaded.config.engine, self.model, job)
            if value == "optimal":
                plan["values"][value]["fit"] = self._fit.cost
        return plan


def asks(prompts: PromptSet) -> bool:
    """Whether the task asks for answers; else whole texts are measured."""
    return any(prompt.answer for prompt in prompts.prompts)


def _per_draw(members: Sequence[int], draws: int) -> list[int]:
    return [i for i in members for _ in range(draws)]


def _shifted(columns: dict[str, Any], first: int) -> pa.Table:
    """Columns as a table whose trials are counted from `first`."""
    table = pa.table(columns)
    at = table.schema.get_field_index("trial")
    return table.set_column(at, "trial", pc.add(table["trial"], first))


def _joined(found: Sequence[Any]) -> Any:
    """The tables of all values as one."""
    if isinstance(found[0], pa.Table):
        return pa.concat_tables(found)
    if isinstance(found[0], pd.DataFrame):
        return pd.concat(found, ignore_index=True)
    return [row for rows in found for row in rows]


@prepares(AblateOptions)
def prepare(options: AblateOptions, setting: Setting) -> AblateExperiment:
    """Check everything, choose the prompts, and lay out the trials.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    loaded, model = setting.loaded, setting.model
    if asks(setting.prompts):
        check_prompts(
            [find_metric(name) for name in loaded.config.metrics], setting.prompts.prompts, setting.prompts.task
        )
    else:
        check_token_metrics(loaded.config.metrics)
    prompts, logits = _select(setting)
    units = expand(loaded, model.anatomy, prompts, options.units)
    warnings: list[str] = []
    ranking: Sequence[int] = ()
    if options.cumulative is not None and options.design == "cumulative":
        ranking, warnings = _ranking(setting, options.cumulative, units)
    layout = lay_out(loaded, options, units, ranking)
    kept = replace(setting, prompts=prompts)
    _check_values(options, kept, units)
    if "optimal" in options.values:
        check_fits(loaded, options, prompts, units, layout.trials)
    _check_words(options, kept)
    return AblateExperiment(kept, options, units, layout.trials, logits, [*warnings, *layout.warnings])


def _check_values(options: AblateOptions, setting: Setting, units: Sequence[Unit]) -> None:
    """Refuse what a value cannot do, before anything is computed."""
    parts, count = merge(units), len(setting.prompts.prompts)
    for place, value in enumerate(options.values):
        check_parts(value, options, setting, parts)
        if value == "mean":
            mean_set(options.mean, replace(setting, compute=False))
        elif value == "resample":
            donors(options.resample, setting)
        elif value == "optimal" and count < FEWEST:
            problem = f"optimal: constants are fitted on some prompts and measured on others, and there is {count}"
            raise setting.loaded.error(("ablate", "values", place), problem, "Raise the number of prompts.")


def _check_words(options: AblateOptions, setting: Setting) -> None:
    """Refuse continuations that grow longer than the model takes."""
    most = setting.model.anatomy.max_length
    shown = setting.prompts.prompts[: options.generate_prompts]
    longest = max(prompt.length for prompt in shown)
    if not options.generate or most is None or longest + options.generate - 1 <= most:
        return
    problem = f"{options.generate} tokens after a prompt of {longest} are more than the model takes ({most})"
    remedy = f"Generate {max(0, most - longest + 1)} tokens at most, or shorten the prompts."
    raise setting.loaded.error(("ablate", "generate"), problem, remedy)


def _ranking(setting: Setting, cumulative: CumulativeOptions, units: Sequence[Unit]) -> tuple[list[int], list[str]]:
    """Indices of units, most important first, and what a reader must know."""
    loaded, path = setting.loaded, ("ablate", "cumulative", "ranking")
    if isinstance(cumulative.ranking, tuple):
        known = names(units)
        return [find(known, name, loaded, (*path, i)).index for i, name in enumerate(cumulative.ranking)], []
    found = load_ranking(loaded, cumulative.ranking, units, setting.model.anatomy)
    told = explain(found)
    return list(found.units), [told] if told else []


def _select(setting: Setting) -> tuple[PromptSet, Tensor | None]:
    """The prompts that are kept, and their clean logits where a metric needs them."""
    loaded, prompts, model = setting.loaded, setting.prompts, setting.model
    correct = loaded.config.resolved()["task"].get("keep") == "correct"
    if correct and setting.moment.name is not None:
        problem = "task.keep: correct drops the prompts that a model gets wrong, which are others at each checkpoint"
        raise UserError(problem, "Leave out model.checkpoints, or keep all prompts.")
    if not asks(prompts) or (not correct and not measuring.needs_clean_logits(loaded)):
        return prompts, None
    if not setting.compute:
        return prompts, torch.zeros(len(prompts.prompts), model.anatomy.vocab_size)
    setting.progress.stage(f"{setting.moment.heading}running the clean prompts")
    logits = measuring.clean_logits(model, prompts)
    return measuring.keep_correct(prompts, logits, top=False) if correct else (prompts, logits)
