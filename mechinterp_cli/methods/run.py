"""Running an experiment: from a checked config to a finished run directory."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine.determinism import deterministic
from mechinterp_cli.engine.execute import EXECUTORS, Done, Executor, execute, executor_named
from mechinterp_cli.engine.plan import (
    CPU_ROWS_PER_CALL,
    GPU_ROWS_PER_CALL,
    Plan,
    cost,
    free_memory,
    make_plan,
)
from mechinterp_cli.engine.proof import Proof, prove, unfit
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.methods import pictures, tables
from mechinterp_cli.methods.prepare import Prepared, prepare, settings_of
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.report.grid import Heatmap
from mechinterp_cli.report.heatmap import render_png, render_svg
from mechinterp_cli.report.terminal import strongest, strongest_table, terminal_heatmap
from mechinterp_cli.runs.outcome import Progress, RunOutcome, SilentProgress
from mechinterp_cli.runs.recorder import RunRecorder, record
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows

RESULT_ROW_BYTES = 60
"""About what one row of results takes in Parquet and CSV together, for `--dry-run`."""


def run_experiment(loaded: LoadedConfig, *, out: Path | None, progress: Progress) -> RunOutcome:
    """Run one experiment and leave a run directory.

    Args:
        loaded: The config.
        out: Folder of runs; that of the config where None.
        progress: Where to tell how far it is.

    Raises:
        UserError: The config asks for something that is not there.
        ProofError: No executor gives this model's own numbers.
        RunError: The model gives NaN, memory ran out, or a file cannot be written.
    """
    with deterministic(loaded.config.deterministic):
        prepared = prepare(loaded, progress)
        with record(loaded, out) as run:
            _describe(run, prepared)
            proof, plan, executor = _prove(prepared, progress)
            run.manifest.engine = {"proof": asdict(proof), "plan": plan.to_json(), "halved": []}
            run.save()
            sweep = _sweep(run, prepared, plan, executor, progress)
            progress.stage("writing tables and pictures")
            return _finish(run, prepared, proof, sweep)


def _describe(run: RunRecorder, prepared: Prepared) -> None:
    """Fill the manifest with model and task, and write the prompts."""
    model, prompts = prepared.model, prepared.prompts
    anatomy = model.anatomy
    run.manifest.model = asdict(model.source) | {
        "anatomy": {
            "layers": anatomy.n_layers,
            "d_model": anatomy.d_model,
            "vocab_size": anatomy.vocab_size,
            "max_length": anatomy.max_length,
            "causal": anatomy.causal,
            "sites": list(anatomy.sites),
            "first_layer": asdict(anatomy.layers[0]),
        }
    }
    run.manifest.task = {
        "name": prompts.task,
        "sha256": content_hash(prompts),
        "prompts": len(prompts.prompts),
        "dropped": [asdict(dropped) for dropped in prompts.dropped],
        "add_bos": prompts.add_bos,
        "chat_template": prompts.chat_template,
        "noise_standard_deviation": prepared.noise,
    }
    run.manifest.seeds = settings_of(prepared)
    run.manifest.hardware |= {"device": str(device_of(model.model)), "threads": torch.get_num_threads()}
    run.write_table("prompts", prompt_rows(prompts, model.tokenizer))


def _settings(prepared: Prepared) -> Settings:
    engine = prepared.loaded.config.engine
    on_gpu = device_of(prepared.model.model).type != "cpu"
    rows = engine.rows_per_call or (GPU_ROWS_PER_CALL if on_gpu else CPU_ROWS_PER_CALL)
    return Settings(rows_per_call=rows, check_finite=engine.on_nan == "error")


def _prove(prepared: Prepared, progress: Progress) -> tuple[Proof, Plan, Executor]:
    """Choose the executor that proves itself, and fix the plan."""
    engine, model = prepared.loaded.config.engine, prepared.model
    settings = _settings(prepared)
    progress.stage("proving the engine on this model")
    proof = prove(
        model.model,
        model.anatomy,
        prepared.works,
        executor=engine.executor,
        settings=settings,
        per_kind=engine.proof_trials,
    )
    plan = _plan(prepared, proof.executor)
    return proof, plan, executor_named(proof.executor, model.model, model.anatomy, settings)


def _plan(prepared: Prepared, executor: str) -> Plan:
    model = prepared.model.model
    budget = memory_bytes(prepared.loaded.config.engine.max_memory, free_memory(device_of(model)))
    rows = _settings(prepared).rows_per_call
    return make_plan(
        model, prepared.model.anatomy, prepared.works, executor=executor, rows_per_call=rows, budget=budget
    )


def _sweep(run: RunRecorder, prepared: Prepared, plan: Plan, executor: Executor, progress: Progress) -> tables.Sweep:
    """Execute the plan, saving every unit as it ends."""
    draws = prepared.bound.draws
    n_layers = prepared.model.anatomy.n_layers
    names = prepared.loaded.config.metrics
    shape = (len(prepared.bound.specs), len(prepared.prompts.prompts), draws, len(names))
    values = np.full(shape, np.nan)
    streams: dict[str, tables.Floats] = {}
    progress.stage("sweeping")
    total = max(1, len(plan.units)) * n_layers

    def tick(unit: int, layer: int) -> None:
        progress.advance(min(total, unit * n_layers + layer + 1), total)

    run.units_done(0, len(plan.units))
    done_units = []
    for number, done in enumerate(execute(executor, plan, prepared.works, prepared.measures, tick)):
        _place(prepared, done, values, streams)
        run.units.write(number, _unit_table(prepared, done))
        done_units.append(done.unit)
        run.units_done(number + 1, max(len(plan.units), number + 1))
    if tuple(done_units) != plan.units:
        run.manifest.engine["halved"] = [asdict(unit) for unit in done_units]
        run.warn("memory ran out and units were halved; the units that ran are in the manifest")
    for bucket, work in enumerate(prepared.works):
        if not work.trials:
            empty = executor.run(work.bucket, (), prepared.measures[bucket])
            _place_streams(prepared, bucket, empty.streams, streams, shape[1:])
    base = prepared.bound.base_stream
    other = next((name for name in streams if name != base), None)
    return tables.Sweep(
        prepared.prompts,
        prepared.bound.specs,
        names,
        values,
        prepared.status,
        streams,
        base,
        other,
        drawn=prepared.bound.options.tracing is not None,
    )


def _place(prepared: Prepared, done: Done, values: tables.Floats, streams: dict[str, tables.Floats]) -> None:
    """Put a unit's values where they belong: trial and prompt of the set, draw, metric."""
    members = list(prepared.members[done.unit.bucket])
    trials = prepared.works[done.unit.bucket].trials
    found = done.values.trials[:, :, 0].numpy()
    for row, slot in enumerate(done.unit.trials):
        values[trials[slot].index, members] = found[row].reshape(len(members), values.shape[2], -1)
    _place_streams(prepared, done.unit.bucket, done.values.streams, streams, values.shape[1:])


def _place_streams(
    prepared: Prepared, bucket: int, found: Any, streams: dict[str, tables.Floats], shape: tuple[int, ...]
) -> None:
    members = list(prepared.members[bucket])
    for name, measured in found.items():
        into = streams.setdefault(name, np.full(shape, np.nan))
        into[members] = measured[:, 0].numpy().reshape(len(members), *shape[1:])


def _unit_table(prepared: Prepared, done: Done) -> pa.Table:
    """A unit as it is kept until the run is complete: trial, prompt of the bucket, metric, value."""
    found = done.values.trials[:, :, 0].numpy()
    trial, prompt, metric = np.indices(found.shape).reshape(3, -1)
    indices = np.array([prepared.works[done.unit.bucket].trials[slot].index for slot in done.unit.trials])
    columns = {"trial": indices[trial], "prompt": prompt, "metric": metric, "value": found.reshape(-1)}
    return pa.table({"bucket": np.full(len(trial), done.unit.bucket), **columns})


def _finish(run: RunRecorder, prepared: Prepared, proof: Proof, sweep: tables.Sweep) -> RunOutcome:
    """Write tables and pictures; tell what was found."""
    config = prepared.loaded.config
    options = prepared.bound.options
    source = options.source_stream if options.source in ("pair", "other") else options.source
    rows = tables.trial_rows(sweep.specs, prepared.model.anatomy, op=prepared.bound.operation(), source=source)
    run.write_table("trials", rows)
    run.write_table("baselines", tables.baseline_rows(sweep))
    summary = tables.summary_frame(sweep, config.stats)
    _write_results(run, sweep, summary, config)
    run.write_table("summary", summary.drop(columns="block"), formats=run.formats)
    tokens = pictures.decoded_tokens(prepared.prompts, prepared.model.tokenizer)
    maps = list(_maps(prepared, summary, sweep, tokens))
    for name, heatmap in maps:
        if "png" in config.output.figures:
            run.write_file(f"figures/{name}.png", render_png(heatmap))
        if "svg" in config.output.figures:
            run.write_file(f"figures/{name}.svg", render_svg(heatmap).encode())
    for warning in _warnings(prepared, proof, sweep):
        run.warn(warning)
    main = _main_rows(summary, sweep)
    quantity = "effect" if sweep.other is None else "normalized"

    def draw(width: int, plain: bool) -> Iterator[Any]:
        for _, heatmap in maps:
            yield terminal_heatmap(heatmap, width=width, plain=plain)
        yield strongest_table(main, tokens=tokens, count=config.output.top, quantity=quantity, width=width, plain=plain)

    return RunOutcome(
        run.path,
        _headline(strongest(main, count=config.output.top, quantity=quantity)),
        draw,
        (_proof_note(proof), *run.manifest.warnings),
    )


def _write_results(run: RunRecorder, sweep: tables.Sweep, summary: pd.DataFrame, config: Any) -> None:
    """Every observation, those of the strongest trials, or none."""
    if config.output.rows == "summary":
        return
    chosen = None
    if config.output.rows == "top":
        quantity = "effect" if sweep.other is None else "normalized"
        top = strongest(_main_rows(summary, sweep), count=config.output.top, quantity=quantity)
        chosen = top["trial"].to_numpy(dtype=np.int64)
    run.write_table("results", tables.result_columns(sweep, config.stats, chosen), formats=run.formats)


def _main_rows(summary: pd.DataFrame, sweep: tables.Sweep) -> pd.DataFrame:
    """The rows that are shown: first metric, all prompts, the default aggregate."""
    aggregate = "mean" if sweep.other is None else "ratio_of_means"
    chosen = (summary["metric"] == sweep.metrics[0]) & (summary["group"] == "all")
    return summary[chosen & (summary["aggregate"] == aggregate)]


def _headline(rows: pd.DataFrame) -> list[dict[str, Any]]:
    names = ("label", "metric", "value", "effect", "normalized", "ci_low", "ci_high", "p_adjusted", "n", "verdict")
    return [{name: None if row[name] is pd.NA else row[name] for name in names} for row in rows.to_dict("records")]


def _maps(
    prepared: Prepared, summary: pd.DataFrame, sweep: tables.Sweep, tokens: dict[str, list[str]]
) -> Iterator[tuple[str, Heatmap]]:
    options, source = prepared.bound.options, prepared.loaded.config
    direction = "causal tracing" if options.tracing else f"{options.direction}, source {options.source}"
    meaning = {
        "denoise": "0: no effect, 1: the clean answer is fully restored.",
        "noise": "0: no effect, 1: the clean answer is fully broken.",
    }
    return pictures.heatmaps(
        summary,
        sweep.specs,
        prepared.prompts,
        tokens,
        metric=sweep.metrics[0],
        normalised=sweep.other is not None,
        title=f"{prepared.prompts.task}, {direction}",
        subtitle=f"{source.model.id}, {sweep.metrics[0]}, {len(prepared.prompts.prompts)} prompts",
        normalization=meaning[options.direction] if sweep.other is not None else "Change of the metric.",
    )


def _warnings(prepared: Prepared, proof: Proof, sweep: tables.Sweep) -> list[str]:
    """What a reader of the numbers must know."""
    warnings = list(dict.fromkeys(sweep.warnings))
    if prepared.prompts.dropped:
        reasons = pd.Series([d.reason for d in prepared.prompts.dropped]).value_counts()
        warnings += [f"{count} prompts dropped: {reason}" for reason, count in reasons.items()]
    if proof.run_dtype_deviation is not None:
        noise = proof.noise * proof.scale
        warnings.append(
            f"{prepared.model.source.dtype} moves logits by {noise:.2g} between implementations: "
            "smaller effects on logits are noise"
        )
    if proof.routing_flips:
        warnings.append(
            f"rounding to {prepared.model.source.dtype} sent tokens to other experts on {proof.routing_flips} of "
            f"{proof.trials} proof trials; in float32 they agree"
        )
    if proof.rejected:
        warnings += [f"executor {name} was not used: {reason}" for name, reason in proof.rejected.items()]
    return warnings


def _proof_note(proof: Proof) -> str:
    return (
        f"proved: executor {proof.executor} agrees with plain hooks to {proof.deviation:.1e} of the logits' scale "
        f"({proof.tolerance:.0e} allowed) on {proof.trials} trials of {proof.length} tokens"
    )


def dry_run(loaded: LoadedConfig) -> dict[str, Any]:
    """The plan of an experiment: trials, rows, FLOPs, bytes, seconds; nothing is computed but one matrix product.

    Raises:
        UserError: As `run_experiment`.
    """
    prepared = prepare(loaded, SilentProgress(), compute=False)
    model, anatomy = prepared.model.model, prepared.model.anatomy
    wanted = loaded.config.engine.executor
    candidates = EXECUTORS if wanted == "auto" else (wanted,)
    executor = next((name for name in candidates if unfit(name, anatomy) is None), candidates[-1])
    plan = _plan(prepared, executor)
    costs = [cost(model, anatomy, work, executor) for work in prepared.works]
    total = sum(costs[1:], costs[0])
    observations = int((prepared.status != 4).sum()) * prepared.bound.draws * len(loaded.config.metrics)
    return {
        "executor": f"{executor}, if it proves itself",
        "trials": len(prepared.bound.specs),
        "prompts": len(prepared.prompts.prompts),
        "computed": total.items,
        "trivial": int((prepared.status == 1).sum()) * prepared.bound.draws,
        "units": len(plan.units),
        "rows": total.rows,
        "flops": total.flops,
        "bytes": total.bytes,
        "seconds": round(total.flops / matmul_rate(device_of(model)), 1),
        "result_rows": observations if loaded.config.output.rows == "all" else 0,
        "result_bytes": observations * RESULT_ROW_BYTES if loaded.config.output.rows == "all" else 0,
        "sites": list(anatomy.sites),
        "first_prompt": describe(prepared.prompts.prompts[0], prepared.model.tokenizer).lines(),
    }


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of one float32 matrix product of a layer's size, measured now; an estimate's denominator."""
    a, b = torch.ones(1024, 512, device=device), torch.ones(512, 2048, device=device)
    (a @ b).sum().item()
    start = time.perf_counter()
    for _ in range(4):
        (a @ b).sum().item()
    return 4 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / (time.perf_counter() - start)
