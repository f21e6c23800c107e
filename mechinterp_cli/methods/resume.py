"""Going on with a run that did not come to its end."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.engine.determinism import deterministic
from mechinterp_cli.methods import run as running
from mechinterp_cli.methods.bench import Recorded
from mechinterp_cli.report.view import read_outcome
from mechinterp_cli.runs.changes import changes, refuse_changes, version_changes
from mechinterp_cli.runs.directory import find_run
from mechinterp_cli.runs.lock import hold
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.outcome import Progress, RunOutcome
from mechinterp_cli.runs.reading import read_manifest
from mechinterp_cli.runs.recorder import reopen
from mechinterp_cli.runs.signals import stop_requests


def resume_experiment(path: Path, *, progress: Progress, given: LoadedConfig | None = None) -> RunOutcome:
    """Go on with a run: what it saved is used, the rest is computed with the plan it began with.

    The tables are those, byte for byte, of a run that nothing stopped.

    Args:
        path: The run directory.
        progress: Where to tell.
        given: A config that must be the run's; the run's own where None.

    Raises:
        UserError: It is no run, another process works on it, or config, model, prompts or packages are not what they
            were when it began; the message names what changed.
        ProofError: As for a new run.
        RunError: As for a new run.
    """
    find_run(path)
    with stop_requests(), hold(path) as lock:
        manifest = read_manifest(path)
        if manifest.status == "complete":
            told = read_outcome(path)
            return replace(told, notes=("this run is complete; nothing was computed", *told.notes))
        loaded = given or recorded_config(path)
        refuse_changes(path, "config", changes(manifest.config, loaded.config.resolved()))
        refuse_changes(path, "versions", version_changes(manifest))
        with deterministic(loaded.config.deterministic), _threads(manifest.hardware.get("threads")):
            prepared = running.prepare(loaded, progress)
            _refuse_other_inputs(path, manifest, prepared)
            with reopen(path, lock, loaded.config.output.formats) as run:
                return running.carry_out(run, prepared, progress, recorded_parts(manifest))


def recorded_config(path: Path) -> LoadedConfig:
    """The config that a run was made with.

    Raises:
        UserError: The file is gone or no config any more.
    """
    return load_config(path / "config.resolved.yaml")


def recorded_parts(manifest: Manifest) -> Recorded:
    """The plans in a manifest, as far as the run came."""
    parts: Any = manifest.engine.get("parts", [])
    return list(parts)


def _refuse_other_inputs(path: Path, manifest: Manifest, prepared: "running.Prepared") -> None:
    """Refuse another model or other prompts than those the run began with."""
    if not manifest.model:  # it was stopped before it wrote down what it had loaded
        return
    before, now = dict(manifest.model), running.describe_model(prepared)
    listed, found = (", ".join(part["checkpoint"] for part in model.get("checkpoints", [])) for model in (before, now))
    refuse_changes(path, "checkpoints", changes(listed, found, "model.checkpoints"))
    if "checkpoints" in now:  # those after the first are compared when they are loaded
        before["checkpoints"] = [*before["checkpoints"][:1], *now["checkpoints"][1:]]
    refuse_changes(path, "model", changes(before, now))
    refuse_changes(path, "task", changes(manifest.task, running.describe_task(prepared)))


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """As many threads as the run began with: sums over more or fewer parts differ in the last bits."""
    now = torch.get_num_threads()
    torch.set_num_threads(wanted or now)
    try:
        yield
    finally:
        torch.set_num_threads(now)
