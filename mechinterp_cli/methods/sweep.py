"""Executing a plan: every finished unit is saved, and what was saved before is not computed again."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np

from mechinterp_cli.engine.execute import Done, Executor, execute
from mechinterp_cli.engine.plan import Plan, Unit
from mechinterp_cli.errors import RunError
from mechinterp_cli.methods import tables
from mechinterp_cli.methods.prepare import Prepared
from mechinterp_cli.methods.units import UnitValues, from_table, to_table
from mechinterp_cli.runs.outcome import Progress
from mechinterp_cli.runs.recorder import RunRecorder

_LOG = logging.getLogger(__name__)


def sweep(run: RunRecorder, prepared: Prepared, plan: Plan, executor: Executor, progress: Progress) -> tables.Sweep:
    """Measure everything that the plan asks for.

    Args:
        run: Keeps the units.
        prepared: The experiment.
        plan: Its units.
        executor: The one that was proved.
        progress: Where to tell.

    Raises:
        RunError: NaN, no memory for a single trial, a file that cannot be written, or the run is another's by now.
    """
    board = _Board(prepared)
    pieces = [piece for unit in plan.units for piece in _pieces(run, prepared, unit)]
    for unit, saved in pieces:
        if saved is not None:
            board.place(unit, saved)
    done = [unit for unit, saved in pieces if saved is not None]
    left = tuple(unit for unit, saved in pieces if saved is None)
    progress.stage("sweeping")
    run.units_done(len(done), len(pieces))
    for unit, values in _computed(prepared, replace(plan, units=left), executor, progress):
        run.units.write(unit.key, to_table(values, _indices(prepared, unit)))
        board.place(unit, values)
        done.append(unit)
        run.units_done(len(done), max(len(pieces), len(done)))
        _LOG.info("unit %s is saved", unit.key)
    if set(done) != set(plan.units):
        run.manifest.engine["halved"] = [asdict(unit) for unit in done]
        run.warn("memory ran out and units were halved; the units that ran are in the manifest")
    return board.sweep()


def _pieces(run: RunRecorder, prepared: Prepared, unit: Unit) -> Iterator[tuple[Unit, UnitValues | None]]:
    """A unit and its saved values, or its halves where those are what was saved; None for what is to be computed."""
    saved = _saved(run, prepared, unit)
    if saved is None and _halves_saved(run, unit):
        for half in unit.halves():
            yield from _pieces(run, prepared, half)
        return
    yield unit, saved


def _halves_saved(run: RunRecorder, unit: Unit) -> bool:
    """Whether a half of the unit, or a half of a half, was saved."""
    if len(unit.trials) < 2 or run.units.path(unit.key).exists():
        return False
    return any(run.units.path(half.key).exists() or _halves_saved(run, half) for half in unit.halves())


def _saved(run: RunRecorder, prepared: Prepared, unit: Unit) -> UnitValues | None:
    """What an earlier process saved of a unit; a damaged file is as good as none, and that is said."""
    if not run.units.path(unit.key).exists():
        return None
    bucket = prepared.works[unit.bucket].bucket
    shape = UnitValues.empty(len(unit.trials), list(bucket.tokens), bucket.size, len(prepared.loaded.config.metrics))
    try:
        values = from_table(run.units.read(unit.key), _indices(prepared, unit), shape)
    except RunError:
        values = None
    if values is None:
        run.warn(f"units/{unit.key}.parquet was damaged; the unit is computed again")
    return values


def _indices(prepared: Prepared, unit: Unit) -> list[int]:
    trials = prepared.works[unit.bucket].trials
    return [trials[slot].index for slot in unit.trials]


def _computed(
    prepared: Prepared, plan: Plan, executor: Executor, progress: Progress
) -> Iterator[tuple[Unit, UnitValues]]:
    """Units as they are finished."""
    layers = prepared.model.anatomy.n_layers
    total = max(1, len(plan.units)) * layers

    def tick(unit: int, layer: int) -> None:
        progress.advance(min(total, unit * layers + layer + 1), total)

    for done in execute(executor, plan, prepared.works, prepared.measures, tick):
        yield done.unit, _values(done)


def _values(done: Done) -> UnitValues:
    streams = {name: measured[:, 0].numpy() for name, measured in done.values.streams.items()}
    return UnitValues(done.values.trials[:, :, 0].numpy(), streams)


class _Board:
    """Where the units' values are put together: [trials, prompts, draws, metrics], and the streams."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.names = prepared.loaded.config.metrics
        shape = (len(prepared.prompts.prompts), prepared.bound.draws, len(self.names))
        self.values = np.full((len(prepared.bound.specs), *shape), np.nan)
        self.streams = {name: np.full(shape, np.nan) for work in prepared.works for name in work.bucket.tokens}

    def place(self, unit: Unit, found: UnitValues) -> None:
        """Put a unit's values where they belong: trial and prompt of the set, draw, metric."""
        members = list(self.prepared.members[unit.bucket])
        for row, index in enumerate(_indices(self.prepared, unit)):
            self.values[index, members] = found.trials[row].reshape(len(members), *self.values.shape[2:])
        for name, measured in found.streams.items():
            self.streams[name][members] = measured.reshape(len(members), *self.values.shape[2:])

    def sweep(self) -> tables.Sweep:
        """Everything, once all units are in place."""
        bound = self.prepared.bound
        other = next((name for name in self.streams if name != bound.base_stream), None)
        return tables.Sweep(
            self.prepared.prompts,
            bound.specs,
            self.names,
            self.values,
            self.prepared.status,
            self.streams,
            bound.base_stream,
            other,
            drawn=bound.options.tracing is not None,
        )
