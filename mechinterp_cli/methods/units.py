"""A finished work unit as a table, and back: bit for bit what was measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class UnitValues:
    """What one unit measured.

    Args:
        trials: [trials of the unit, prompts of the bucket, metrics]; NaN where a trial leaves a prompt out.
        streams: Stream name to [prompts of the bucket, metrics].
    """

    trials: Floats
    streams: Mapping[str, Floats]

    @classmethod
    def empty(cls, trials: int, streams: Sequence[str], prompts: int, metrics: int) -> "UnitValues":
        """Values of these shapes, all NaN."""
        blank = np.full((prompts, metrics), np.nan)
        return cls(np.full((trials, prompts, metrics), np.nan), {name: blank for name in streams})


def to_table(values: UnitValues, trials: Sequence[int]) -> pa.Table:
    """One row per trial (or stream), prompt and metric.

    Args:
        values: What was measured.
        trials: Index in the run of each of the unit's trials.
    """
    names = sorted(values.streams)
    everything = np.concatenate([values.trials, *(values.streams[name][None] for name in names)])
    row, prompt, metric = np.indices(everything.shape, dtype=np.int32).reshape(3, -1)
    is_stream = row >= len(trials)
    index = np.concatenate([np.asarray(trials, dtype=np.int64), np.full(len(names), -1)])[row]
    stream = pa.array([None] * len(trials) + names, pa.string()).take(pa.array(row))
    return pa.table(
        {
            "trial": pa.array(index, mask=is_stream),
            "stream": stream,
            "prompt": prompt,
            "metric": metric,
            "value": pa.array(everything.reshape(-1), from_pandas=False),
        }
    )


def from_table(table: pa.Table, trials: Sequence[int], shape: UnitValues) -> UnitValues | None:
    """What a table holds, or None where it is not this unit's.

    Args:
        table: From `to_table`.
        trials: As there.
        shape: Values of the shapes that are wanted (`UnitValues.empty`).
    """
    if "value" not in table.column_names:
        return None
    wanted = to_table(shape, trials)
    if not table.drop_columns(["value"]).equals(wanted.drop_columns(["value"])):
        return None
    names = sorted(shape.streams)
    values = table["value"].to_numpy().reshape(-1, *shape.trials.shape[1:])
    return UnitValues(values[: len(trials)], {name: values[len(trials) + i] for i, name in enumerate(names)})
