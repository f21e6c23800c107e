"""Executing a plan: every finished unit is saved, and what was saved before is not computed again."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from mechinterp_cli.engine.execute import Done, Executor, execute
from mechinterp_cli.engine.plan import Plan, Unit
from mechinterp_cli.errors import RunError
from mechinterp_cli.methods.job import Job, Swept
from mechinterp_cli.methods.units import UnitValues, from_table, to_table
from mechinterp_cli.runs.recorder import RunRecorder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sweep:
    """A finished sweep, and the units that ran where memory had them halved."""

    values: Swept
    halved: tuple[Unit, ...]


def sweep(
    run: RunRecorder,
    job: Job,
    plan: Plan,
    executor: Executor,
    *,
    prefix: str,
    report: Callable[[int, int], None],
    tick: Callable[[int, int], None],
) -> Sweep:
    """Measure everything that the plan asks for.

    Args:
        run: Keeps the units.
        job: Trials and prompts.
        plan: Its units.
        executor: The one that was proved.
        prefix: Of the units' keys; tells jobs of one run apart.
        report: Told how many units are saved, of how many.
        tick: Told which of the units that are left is at which layer (or trial, where each is a pass of its own).

    Raises:
        RunError: NaN, no memory for a single trial, a file that cannot be written, or the run is another's by now.
    """
    saving = _Saving(run, job, prefix)
    board = _Board(job)
    pieces = [piece for unit in plan.units for piece in saving.pieces(unit)]
    for unit, saved in pieces:
        if saved is not None:
            board.place(unit, saved)
    done = [unit for unit, saved in pieces if saved is not None]
    left = tuple(unit for unit, saved in pieces if saved is None)
    report(len(done), len(pieces))
    for finished in execute(executor, replace(plan, units=left), job.works, job.measures, tick):
        unit, values = finished.unit, _values(job, finished)
        saving.write(unit, values)
        board.place(unit, values)
        done.append(unit)
        report(len(done), max(len(pieces), len(done)))
        _LOG.info("unit %s%s is saved", prefix, unit.key)
    return Sweep(Swept(board.values, board.streams), tuple(done) if set(done) != set(plan.units) else ())


@dataclass(frozen=True, eq=False)
class _Saving:
    """The units of one job on disk."""

    run: RunRecorder
    job: Job
    prefix: str

    def key(self, unit: Unit) -> str:
        return self.prefix + unit.key

    def write(self, unit: Unit, values: UnitValues) -> None:
        self.run.units.write(self.key(unit), to_table(values, self.job.indices(unit.bucket, unit.trials)))

    def pieces(self, unit: Unit) -> Iterator[tuple[Unit, UnitValues | None]]:
        """A unit and its saved values, or its halves where those are what was saved; None for what is to be done."""
        saved = self._saved(unit)
        if saved is None and self._halves_saved(unit):
            for half in unit.halves():
                yield from self.pieces(half)
            return
        yield unit, saved

    def _exists(self, unit: Unit) -> bool:
        return self.run.units.path(self.key(unit)).exists()

    def _halves_saved(self, unit: Unit) -> bool:
        """Whether a half of the unit, or a half of a half, was saved."""
        if len(unit.trials) < 2 or self._exists(unit):
            return False
        return any(self._exists(half) or self._halves_saved(half) for half in unit.halves())

    def _saved(self, unit: Unit) -> UnitValues | None:
        """What an earlier process saved of a unit; a damaged file is as good as none, and that is said."""
        if not self._exists(unit):
            return None
        bucket = self.job.works[unit.bucket].bucket
        shape = UnitValues.empty(len(unit.trials), list(bucket.tokens), bucket.size, len(self.job.metrics))
        try:
            table = self.run.units.read(self.key(unit))
            values = from_table(table, self.job.indices(unit.bucket, unit.trials), shape)
        except RunError:
            values = None
        if values is None:
            self.run.warn(f"units/{self.key(unit)}.parquet was damaged; the unit is computed again")
        return values


def _values(job: Job, done: Done) -> UnitValues:
    bucket = done.unit.bucket
    streams = {name: job.reduced(bucket, measured) for name, measured in done.values.streams.items()}
    return UnitValues(job.reduced(bucket, done.values.trials), streams)


class _Board:
    """Where the units' values are put together: [trials, prompts, draws, metrics], and the streams."""

    def __init__(self, job: Job) -> None:
        self.job = job
        shape = (job.prompts, job.draws, len(job.metrics))
        self.values = np.full((job.trials, *shape), np.nan)
        self.streams = {name: np.full(shape, np.nan) for work in job.works for name in work.bucket.tokens}

    def place(self, unit: Unit, found: UnitValues) -> None:
        """Put a unit's values where they belong: trial and prompt of the set, draw, metric."""
        members = list(self.job.members[unit.bucket])
        for row, index in enumerate(self.job.indices(unit.bucket, unit.trials)):
            self.values[index, members] = found.trials[row].reshape(len(members), *self.values.shape[2:])
        for name, measured in found.streams.items():
            self.streams[name][members] = measured.reshape(len(members), *self.values.shape[2:])
