"""Executing a plan, unit by unit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn

from mechinterp_cli.engine.edits import Bucket, Trial
from mechinterp_cli.engine.hooks import PlainHooks
from mechinterp_cli.engine.plan import Plan, Unit, Work
from mechinterp_cli.engine.wavefront import Measure, Settings, Values, Wavefront
from mechinterp_cli.errors import RunError
from mechinterp_cli.models.anatomy import Anatomy

EXECUTORS = ("packed", "resume", "hooks")
"""In the order in which they are tried: least work first."""


class Executor(Protocol):
    """Computes trials on a bucket."""

    def run(
        self, bucket: Bucket, trials: Sequence[Trial], measure: Measure, tick: Callable[[int], None] = ...
    ) -> Values:
        """Metrics of every trial and of the streams."""


def executor_named(name: str, model: nn.Module, anatomy: Anatomy, settings: Settings) -> Executor:
    """The executor of that name."""
    if name == "hooks":
        return PlainHooks(model, anatomy, settings)
    return Wavefront(model, anatomy, packed=name == "packed", settings=settings)


@dataclass(frozen=True, eq=False)
class Done:
    """A finished unit and its values, [trials of the unit, prompts, reads, metrics]."""

    unit: Unit
    values: Values


def execute(
    executor: Executor,
    plan: Plan,
    works: Sequence[Work],
    measures: Sequence[Measure],
    tick: Callable[[int, int], None] = lambda unit, layer: None,
) -> Iterator[Done]:
    """Run the plan's units in order; each result is there to be saved before the next unit begins.

    A unit that runs out of memory is halved, and its halves are what is yielded; the caller records them.

    Args:
        executor: The proved executor.
        plan: Units.
        works: Trials by bucket.
        measures: By bucket, logits to metrics.
        tick: Called with (unit, layer) as work goes on.

    Raises:
        RunError: One trial alone runs out of memory, or a layer gives NaN.
    """
    waiting = list(plan.units)
    count = 0
    while waiting:
        unit = waiting.pop(0)
        work = works[unit.bucket]
        trials = [work.trials[i] for i in unit.trials]
        values = _attempt(executor, work.bucket, trials, measures[unit.bucket], partial(tick, count))
        if values is None:
            if len(unit.trials) <= 1:
                raise RunError(
                    f"one trial on {work.bucket.size} prompts of {work.bucket.length} tokens runs out of memory",
                    "Lower task.n or engine.rows_per_call.",
                )
            waiting[:0] = unit.halves()
            continue
        count += 1
        yield Done(unit, values)


def _attempt(
    executor: Executor, bucket: Bucket, trials: Sequence[Trial], measure: Measure, tick: Callable[[int], None]
) -> Values | None:
    """The unit's values, or None when memory ran out."""
    try:
        return executor.run(bucket, trials, measure, tick)
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
