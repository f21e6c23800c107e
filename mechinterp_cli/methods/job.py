"""A job: trials over prompts, as a method hands them to the engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp_cli.engine.plan import Plan, Work
from mechinterp_cli.engine.wavefront import Measure
from mechinterp_cli.metrics import Measurer

Floats = npt.NDArray[np.float64]
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class SetMeasure:
    """The measure of a bucket whose prompts belong to a set that has its metrics.

    Args:
        measurer: Of the whole set.
        members: By prompt of the bucket its place in the set.
    """

    measurer: Measurer
    members: Tensor

    def __call__(self, logits: Tensor, prompt: Tensor, _read: Tensor) -> Tensor:
        """Metrics [n, metrics] of logits [n, vocab] of some prompts [n] of the bucket."""
        return self.measurer(logits, self.members.to(prompt.device)[prompt])

    @property
    def tokens(self) -> set[int] | None:
        """Ids whose logits are all that is looked at; None where it may be any."""
        found = self.measurer.tokens(self.members.to(self.measurer.device))
        return None if found is None else set(found.tolist())

    def on_columns(self, tokens: Sequence[int]) -> "SetMeasure":
        """The same of logits [n, tokens] of some tokens alone."""
        ids = torch.tensor(tokens, device=self.measurer.device)
        return replace(self, measurer=self.measurer.on_columns(ids))


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

    @property
    def tokens(self) -> tuple[int, ...] | None:
        """Ids whose logits are all that the measures look at, in order; None where one may look at any."""
        found: set[int] = set()
        for measure in self.measures:
            tokens = measure.tokens if isinstance(measure, SetMeasure) else None
            if tokens is None:
                return None
            found |= tokens
        return tuple(sorted(found))

    def planned(self, plan: Plan) -> "Job":
        """The same job, measuring the logits that the plan computes: all, or those of its `tokens` alone."""
        tokens = self.tokens
        if plan.columns is None or tokens is None:
            return self
        measures = (measure.on_columns(tokens) for measure in self.measures if isinstance(measure, SetMeasure))
        return replace(self, measures=tuple(measures))

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
