"""Running an experiment: from a checked config to a finished run directory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.schema import OutputOptions
from mechinterp_cli.engine.determinism import determinism_state, deterministic
from mechinterp_cli.methods.bench import Bench, Recorded, Tally
from mechinterp_cli.methods.experiment import Experiment, Setting, experiment_of
from mechinterp_cli.methods.measure import build_prompts
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.checkpoints import Moment, check_same, moments_of
from mechinterp_cli.models.load import load_model
from mechinterp_cli.report.page.build import FILE_NAME, page_tables, run_page
from mechinterp_cli.report.view import View, outcome, tables_needed, view_of
from mechinterp_cli.runs.changes import changes, refuse_changes
from mechinterp_cli.runs.outcome import Progress, RunOutcome, SilentProgress
from mechinterp_cli.runs.recorder import RunRecorder, record
from mechinterp_cli.runs.schema import PARQUET_ONLY, validate
from mechinterp_cli.runs.tables import Formats, to_frame
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows

ONE_FORMAT: Formats = ("parquet",)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run that is ready to begin: every model it runs on, and the experiment on the first."""

    loaded: LoadedConfig
    moments: tuple[Moment, ...]
    first: Experiment


def run_experiment(
    loaded: LoadedConfig, *, out: Path | None, progress: Progress, recorded: Recorded = ()
) -> RunOutcome:
    """Run one experiment and leave a run directory.

    Args:
        loaded: The config.
        out: Folder of runs; that of the config where None.
        progress: Where to tell how far it is.
        recorded: The plans of an earlier run of the same experiment, to be used again (`engine.parts`).

    Raises:
        UserError: The config asks for something that is not there.
        ProofError: No executor gives this model's own numbers.
        RunError: The model gives NaN, memory ran out, or a file cannot be written.
    """
    with deterministic(loaded.config.deterministic):
        prepared = prepare(loaded, progress)
        with record(loaded, out) as run:
            return carry_out(run, prepared, progress, recorded)


def prepare(loaded: LoadedConfig, progress: Progress, *, compute: bool = True) -> Prepared:
    """Load the (first) model, build the prompts, check everything.

    Args:
        loaded: The config.
        progress: Where to tell.
        compute: Whether forward passes may be made.

    Raises:
        UserError: Anything that the config, the model or the task cannot do.
    """
    moments = moments_of(loaded.config.model)
    moment = moments[0]
    progress.stage(f"{moment.heading}loading {moment.options.id}")
    model = load_model(moment.options)
    prompts = build_prompts(loaded.config.task, model)
    return Prepared(loaded, moments, experiment_of(Setting(loaded, model, moment, prompts, progress, compute)))


def carry_out(run: RunRecorder, prepared: Prepared, progress: Progress, recorded: Recorded) -> RunOutcome:
    """Compute, and write everything that a run leaves.

    Args:
        run: The run; units that it has saved are not computed again.
        prepared: The experiment.
        progress: Where to tell.
        recorded: The plans to be used, where they hold these trials.

    Raises:
        ProofError: As `run_experiment`.
        RunError: As `run_experiment`.
    """
    prompts = _describe(run, prepared)
    tally, parts = Tally(), []
    try:
        for part in range(len(prepared.moments)):
            parts.append(_compute(run, prepared, part, progress, tally, recorded))
        if run.manifest.units_total is None:
            run.manifest.units_total = 0  # an experiment without trials
        progress.stage("writing tables and pictures")
        view = _write(run, prepared, parts, prompts)
    except BaseException:
        progress.message(f"what was computed is kept; to go on: mechinterp resume {run.path}")
        raise
    return outcome(run.path, run.manifest, view)


def _compute(
    run: RunRecorder, prepared: Prepared, part: int, progress: Progress, tally: Tally, recorded: Recorded
) -> dict[str, pa.Table]:
    """The tables of one of the run's models. But for the first, none stays in memory when they are there."""
    config, moment = prepared.loaded.config, prepared.moments[part]
    experiment = prepared.first if part == 0 else _later(run, prepared, part, progress)
    count = len(prepared.moments)
    bench = Bench(run, experiment.model, config.engine, moment, part, count, progress, tally, recorded)
    tables = experiment.compute(bench)
    return {name: _stamped(validate(name, data, config.method_name), moment) for name, data in tables.items()}


def _later(run: RunRecorder, prepared: Prepared, part: int, progress: Progress) -> Experiment:
    """The experiment on a checkpoint after the first; in a run that goes on, its weights must be what they were."""
    moment = prepared.moments[part]
    progress.stage(f"{moment.heading}loading {moment.options.id}")
    model = load_model(moment.options)
    check_same(part, moment, model, prepared.moments[0].name, prepared.first.model)
    loaded, known = _describe_moment(moment, asdict(model.source)), run.manifest.model["checkpoints"]
    if "weight_files" in known[part]:  # a process before this one loaded it
        refuse_changes(run.path, f"checkpoint {moment.name}", changes(known[part], loaded))
    known[part] = loaded
    return experiment_of(replace(prepared.first.setting, model=model, moment=moment))


def _describe_moment(moment: Moment, source: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the manifest; `source` is empty until it is loaded."""
    return {"checkpoint": moment.name, "tokens_seen": moment.tokens_seen, **source}


def _stamped(table: pa.Table, moment: Moment) -> pa.Table:
    """The table with its checkpoint filled in."""
    if moment.name is None:
        return table
    for name, value in (("checkpoint", moment.name), ("tokens_seen", moment.tokens_seen)):
        field = table.schema.field(name)
        column = pa.repeat(pa.scalar(value, field.type), table.num_rows)
        table = table.set_column(table.schema.get_field_index(name), field, column)
    return table


def _describe(run: RunRecorder, prepared: Prepared) -> pa.Table:
    """Fill the manifest with model and task, and write the prompts."""
    experiment, config = prepared.first, prepared.loaded.config
    manifest = run.manifest
    later = manifest.model.get("checkpoints", [])[1:]  # as a process before this one left them
    manifest.model = describe_model(prepared)
    if later:
        manifest.model["checkpoints"][1:] = later
    manifest.task = describe_task(prepared)
    seeds = {"task": config.resolved()["task"].get("seed", 0), "stats": config.stats.seed}
    manifest.seeds = seeds | experiment.seeds()
    manifest.display = experiment.display()
    manifest.engine.setdefault("parts", [])
    manifest.hardware |= {"device": str(device_of(experiment.model.model)), "threads": torch.get_num_threads()}
    manifest.determinism = determinism_state(config.deterministic)
    if not config.deterministic:
        run.warn("deterministic: false: a repetition may differ in the last bits even on the same machine")
    for warning in experiment.prompts.warnings:
        run.warn(warning)
    dropped = experiment.prompts.dropped
    if dropped:
        reasons = pd.Series([d.reason for d in dropped]).value_counts()
        for reason, count in reasons.items():
            run.warn(f"{count} {'prompt' if count == 1 else 'prompts'} dropped: {reason}")
    return run.write_table("prompts", prompt_rows(experiment.prompts, experiment.model.tokenizer))


def describe_model(prepared: Prepared) -> dict[str, Any]:
    """Where the (first) model came from, the hashes of its files, and its anatomy: for the manifest."""
    model, anatomy = prepared.first.model, prepared.first.model.anatomy
    first, *later = prepared.moments
    checkpoints = [_describe_moment(first, asdict(model.source)), *(_describe_moment(moment, {}) for moment in later)]
    return {
        **asdict(model.source),
        "id": prepared.loaded.config.model.id,
        "anatomy": {
            "layers": anatomy.n_layers,
            "d_model": anatomy.d_model,
            "vocab_size": anatomy.vocab_size,
            "max_length": anatomy.max_length,
            "causal": anatomy.causal,
            "sites": list(anatomy.sites),
            "first_layer": asdict(anatomy.layers[0]),
        },
        **({} if first.name is None else {"checkpoints": checkpoints}),
    }


def describe_task(prepared: Prepared) -> dict[str, Any]:
    """Which prompts, their hash, and which were dropped: for the manifest."""
    prompts = prepared.first.prompts
    return {
        "name": prompts.task,
        "sha256": content_hash(prompts),
        "prompts": len(prompts.prompts),
        "dropped": [asdict(dropped) for dropped in prompts.dropped],
        "add_bos": prompts.add_bos,
        "chat_template": prompts.chat_template,
    } | prepared.first.facts()


def _write(run: RunRecorder, prepared: Prepared, parts: Sequence[dict[str, pa.Table]], prompts: pa.Table) -> View:
    """Write tables and pictures; give the view of them."""
    config = prepared.loaded.config
    written = {"prompts": prompts}
    for name in dict.fromkeys(name for part in parts for name in part):
        table = pa.concat_tables([part[name] for part in parts if name in part])
        formats = ONE_FORMAT if name in PARQUET_ONLY else run.formats
        written[name] = run.write_table(name, table, formats=formats)
    needed = tables_needed(config.method_name)
    tables = {name: to_frame(written[name]) for name in needed if name in written}
    view = view_of(run.manifest, tables)
    _draw(run, view, tables | page_tables(written), config.output)
    return view


def _draw(run: RunRecorder, view: View, tables: Mapping[str, pd.DataFrame], output: OutputOptions) -> None:
    """Write the pictures, the pages and the report in the formats that are asked for."""
    pictures = view.pictures if output.figures else ()
    for name, picture in pictures:
        for form in output.figures:
            if form != "html":
                run.write_file(f"figures/{name}.{form}", picture.drawn_as(form))
    for name, page in view.pages if output.figures else ():
        run.write_file(f"figures/{name}.html", page.encode("utf-8", "backslashreplace"))
    if "html" in output.figures:  # last: warnings that come before are told in it
        run.write_file(FILE_NAME, run_page(run.path, run.manifest, view, tables, pictures))


def dry_run(loaded: LoadedConfig) -> dict[str, Any]:
    """The plan of an experiment: trials, rows, FLOPs, bytes, seconds; nothing is computed but one matrix product.

    Raises:
        UserError: As `run_experiment`.
    """
    prepared = prepare(loaded, SilentProgress(), compute=False)
    experiment = prepared.first
    names = [moment.name for moment in prepared.moments if moment.name is not None]
    return {
        **({"checkpoints": names} if names else {}),
        "prompts": len(experiment.prompts.prompts),
        **experiment.plan(),
        "sites": list(experiment.model.anatomy.sites),
        "first_prompt": describe(experiment.prompts.prompts[0], experiment.model.tokenizer).lines(),
    }
