"""Running an experiment: from a checked config to a finished run directory."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.config.schema import memory_bytes
from mechinterp_cli.engine.determinism import determinism_state, deterministic
from mechinterp_cli.engine.execute import EXECUTORS, Executor, executor_named
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
from mechinterp_cli.methods import tables
from mechinterp_cli.methods.prepare import Prepared, prepare, settings_of
from mechinterp_cli.methods.sweep import sweep as carry_out_plan
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.report.heatmap import render_png, render_svg
from mechinterp_cli.report.view import View, outcome, view_of
from mechinterp_cli.runs.outcome import Progress, RunOutcome, SilentProgress
from mechinterp_cli.runs.recorder import RunRecorder, record
from mechinterp_cli.runs.tables import chosen_formats, to_frame
from mechinterp_cli.stats import Status
from mechinterp_cli.tasks.rows import content_hash, describe, prompt_rows

RESULT_ROW_BYTES = {"parquet": 20, "csv": 140}
"""About what one row of results takes, for `--dry-run`."""


def run_experiment(
    loaded: LoadedConfig, *, out: Path | None, progress: Progress, recorded: Plan | None = None
) -> RunOutcome:
    """Run one experiment and leave a run directory.

    Args:
        loaded: The config.
        out: Folder of runs; that of the config where None.
        progress: Where to tell how far it is.
        recorded: The plan of an earlier run of the same experiment, to be used again.

    Raises:
        UserError: The config asks for something that is not there.
        ProofError: No executor gives this model's own numbers.
        RunError: The model gives NaN, memory ran out, or a file cannot be written.
    """
    with deterministic(loaded.config.deterministic):
        prepared = prepare(loaded, progress)
        with record(loaded, out) as run:
            return carry_out(run, prepared, progress, recorded)


def carry_out(run: RunRecorder, prepared: Prepared, progress: Progress, recorded: Plan | None) -> RunOutcome:
    """Prove, sweep, and write everything that a run leaves.

    Args:
        run: The run; units that it has saved are not computed again.
        prepared: The experiment.
        progress: Where to tell.
        recorded: The plan to be used; a new one is made where None, or where it does not hold these trials.

    Raises:
        ProofError: As `run_experiment`.
        RunError: As `run_experiment`.
    """
    prompts = _describe(run, prepared)
    plan, executor = _prove(run, prepared, progress, recorded)
    try:
        sweep = carry_out_plan(run, prepared, plan, executor, progress)
        progress.stage("writing tables and pictures")
        view = _finish(run, prepared, sweep, prompts)
    except BaseException:
        progress.message(f"what was computed is kept; to go on: mechinterp resume {run.path}")
        raise
    return outcome(run.path, run.manifest, view)


def _describe(run: RunRecorder, prepared: Prepared) -> pa.Table:
    """Fill the manifest with model and task, and write the prompts."""
    model, prompts = prepared.model, prepared.prompts
    run.manifest.model = describe_model(prepared)
    run.manifest.task = describe_task(prepared)
    run.manifest.seeds = settings_of(prepared)
    run.manifest.display = _display(prepared)
    run.manifest.hardware |= {"device": str(device_of(model.model)), "threads": torch.get_num_threads()}
    run.manifest.determinism = determinism_state(prepared.loaded.config.deterministic)
    if not prepared.loaded.config.deterministic:
        run.warn("deterministic: false: a repetition may differ in the last bits even on the same machine")
    return run.write_table("prompts", prompt_rows(prompts, model.tokenizer))


def describe_model(prepared: Prepared) -> dict[str, Any]:
    """Where the model came from, the hashes of its files, and its anatomy: for the manifest."""
    anatomy = prepared.model.anatomy
    return asdict(prepared.model.source) | {
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


def describe_task(prepared: Prepared) -> dict[str, Any]:
    """Which prompts, their hash, and which were dropped: for the manifest."""
    prompts = prepared.prompts
    return {
        "name": prompts.task,
        "sha256": content_hash(prompts),
        "prompts": len(prompts.prompts),
        "dropped": [asdict(dropped) for dropped in prompts.dropped],
        "add_bos": prompts.add_bos,
        "chat_template": prompts.chat_template,
        "noise_standard_deviation": prepared.noise,
    }


def _display(prepared: Prepared) -> dict[str, str]:
    """What pictures say of the run."""
    options = prepared.bound.options
    direction = "causal tracing" if options.tracing else f"{options.direction}, source {options.source}"
    scales = {
        "denoise": "0: no effect, 1: the clean answer is fully restored.",
        "noise": "0: no effect, 1: the clean answer is fully broken.",
    }
    normalised = prepared.bound.has_corrupt or options.tracing is not None
    scale = scales[options.direction] if normalised else "Change of the metric."
    return {"title": f"{prepared.prompts.task}, {direction}", "scale": scale}


def _settings(prepared: Prepared) -> Settings:
    engine = prepared.loaded.config.engine
    on_gpu = device_of(prepared.model.model).type != "cpu"
    rows = engine.rows_per_call or (GPU_ROWS_PER_CALL if on_gpu else CPU_ROWS_PER_CALL)
    return Settings(rows_per_call=rows, check_finite=engine.on_nan == "error")


def _prove(run: RunRecorder, prepared: Prepared, progress: Progress, recorded: Plan | None) -> tuple[Plan, Executor]:
    """Choose the executor that proves itself, fix the plan, and put both into the manifest."""
    engine, model = prepared.loaded.config.engine, prepared.model
    usable = recorded if recorded is not None and recorded.fits(prepared.works) else None
    settings = _settings(prepared)
    progress.stage("proving the engine on this model")
    proof = prove(
        model.model,
        model.anatomy,
        prepared.works,
        executor=engine.executor if usable is None else usable.executor,
        settings=settings,
        per_kind=engine.proof_trials,
    )
    plan = usable or _plan(prepared, proof.executor)
    run.manifest.engine = {"proof": asdict(proof), "plan": plan.to_json(), "halved": []}
    run.save()
    for warning in _proof_warnings(prepared, proof):
        run.warn(warning)
    settings = replace(settings, rows_per_call=plan.rows_per_call)
    return plan, executor_named(proof.executor, model.model, model.anatomy, settings)


def _plan(prepared: Prepared, executor: str) -> Plan:
    model = prepared.model.model
    budget = memory_bytes(prepared.loaded.config.engine.max_memory, free_memory(device_of(model)))
    rows = _settings(prepared).rows_per_call
    return make_plan(
        model, prepared.model.anatomy, prepared.works, executor=executor, rows_per_call=rows, budget=budget
    )


def _finish(run: RunRecorder, prepared: Prepared, sweep: tables.Sweep, prompts: pa.Table) -> View:
    """Write tables and pictures; give the view of them."""
    config = prepared.loaded.config
    options = prepared.bound.options
    source = options.source_stream if options.source in ("pair", "other") else options.source
    rows = tables.trial_rows(sweep.specs, prepared.model.anatomy, op=prepared.bound.operation(), source=source)
    run.write_table("trials", rows)
    run.write_table("baselines", tables.baseline_rows(sweep))
    summary = run.write_table("summary", tables.summary_frame(sweep, config.stats), formats=run.formats)
    view = view_of(run.manifest, to_frame(summary), to_frame(prompts))
    _write_results(run, sweep, view, config)
    renderers: dict[str, Callable[[Any], bytes]] = {"png": render_png, "svg": lambda m: render_svg(m).encode()}
    for name, heatmap in view.maps:
        for form in config.output.figures:
            run.write_file(f"figures/{name}.{form}", renderers[form](heatmap))
    for warning in _warnings(prepared, sweep):
        run.warn(warning)
    return view


def _write_results(run: RunRecorder, sweep: tables.Sweep, view: View, config: Any) -> None:
    """Every observation, those of the strongest trials, or none."""
    if config.output.rows == "summary":
        return
    chosen = None
    if config.output.rows == "top":
        chosen = view.strongest["trial"].to_numpy(dtype=np.int64)
    run.write_table("results", tables.result_columns(sweep, config.stats, chosen), formats=run.formats)


def _warnings(prepared: Prepared, sweep: tables.Sweep) -> list[str]:
    """What a reader of the numbers must know."""
    warnings = list(dict.fromkeys(sweep.warnings))
    for metric, name in enumerate(sweep.metrics):
        status = sweep.observe(metric, prepared.loaded.config.stats).status
        if count := int((status == Status.UNDEFINED).any(0).sum()):
            prompts = f"on {count} of {status.shape[1]} prompts"
            warnings.append(f"{name}: the two streams hardly differ {prompts}; nothing normalises their effects")
    if prepared.prompts.dropped:
        reasons = pd.Series([d.reason for d in prepared.prompts.dropped]).value_counts()
        warnings += [f"{count} prompts dropped: {reason}" for reason, count in reasons.items()]
    return warnings


def _proof_warnings(prepared: Prepared, proof: Proof) -> list[str]:
    """What the proof found that a reader of the numbers must know."""
    warnings = []
    dtype = prepared.model.source.dtype
    if proof.run_dtype_deviation is not None:
        noise = f"{proof.noise * proof.scale:.2g}"
        warnings.append(f"{dtype} moves logits by {noise} between implementations: smaller effects on logits are noise")
    if proof.routing_flips:
        warnings.append(
            f"rounding to {dtype} sent tokens to other experts on {proof.routing_flips} of {proof.trials} proof "
            "trials; in float32 they agree"
        )
    return warnings + [f"executor {name} was not used: {reason}" for name, reason in proof.rejected.items()]


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
    output = loaded.config.output
    observations = int((prepared.status != Status.ABSENT).sum()) * prepared.bound.draws * len(loaded.config.metrics)
    rows = observations if output.rows == "all" else 0
    return {
        "executor": f"{executor}, if it proves itself",
        "trials": len(prepared.bound.specs),
        "prompts": len(prepared.prompts.prompts),
        "computed": total.items,
        "trivial": int((prepared.status == Status.TRIVIAL).sum()) * prepared.bound.draws,
        "units": len(plan.units),
        "rows": total.rows,
        "flops": total.flops,
        "bytes": total.bytes,
        "seconds": round(total.flops / matmul_rate(device_of(model)), 1),
        "result_rows": rows,
        "result_bytes": rows * sum(RESULT_ROW_BYTES[form] for form in chosen_formats(output.formats, rows)),
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
