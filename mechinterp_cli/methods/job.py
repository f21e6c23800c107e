"""A job: trials over prompts, as a method hands them to the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mechinterp_cli.engine.plan import Work
from mechinterp_cli.engine.wavefront import Measure

Floats = npt.NDArray[np.float64]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Job:
    """What the engine is to compute.

    Args:
        trials: How many trials there are over all buckets; a trial's `index` is below it.
        prompts: How many prompts there are.
        members: By bucket, the prompts that are in it; each stands there `draws` times in a row.
        works: By bucket, prompts and trials.
        measures: By bucket, logits to numbers.
        metrics: Names along the last axis of all values, after `reduce`.
        draws: Copies of each prompt.
        reduces: By bucket, from what was measured at each position that is read, [..., prompts, reads, numbers], to
            [..., prompts, metrics]; where there are none, one position is read and the numbers are the metrics.
        name: Tells the jobs of one experiment apart.
    """

    trials: int
    prompts: int
    members: Sequence[Sequence[int]]
    works: tuple[Work, ...]
    measures: tuple[Measure, ...]
    metrics: tuple[str, ...]
    draws: int = 1
    reduces: tuple[Reduce, ...] = ()
    name: str = ""

    def reduced(self, bucket: int, values: Tensor) -> Floats:
        """[..., prompts, metrics] of a bucket's [..., prompts, reads, numbers]."""
        chosen = self.reduces[bucket](values) if self.reduces else values[..., 0, :]
        return chosen.numpy()

    def indices(self, bucket: int, slots: Sequence[int]) -> list[int]:
        """The index of each of some trials of a bucket."""
        trials = self.works[bucket].trials
        return [trials[slot].index for slot in slots]


@dataclass(frozen=True, eq=False)
class Swept:
    """What a job came to.

    Args:
        values: [trials, prompts, draws, metrics]; NaN where nothing was computed.
        streams: Stream name to [prompts, draws, metrics].
    """

    values: Floats
    streams: Mapping[str, Floats]
