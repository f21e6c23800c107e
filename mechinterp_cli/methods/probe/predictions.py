"""What every probe says of every sample that it was not fitted on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from mechinterp_cli.methods.probe.readout import Readout, Row
from mechinterp_cli.methods.probe.scoring import Outcome
from mechinterp_cli.methods.probe.sites import Reading


def prediction_table(
    readouts: Sequence[Readout],
    labels: Sequence[Row],
    classes: Sequence[str] | None,
    place: Callable[[Reading], Row],
) -> pd.DataFrame:
    """A row per place, probe and sample.

    Args:
        readouts: All places, whose probes are fitted.
        labels: Of the table `labels`.
        classes: Their names; None where targets are numbers.
        place: A reading's columns.
    """
    frames = []
    for readout in readouts:
        where = place(readout.reading)
        own = [labels[i] for i in readout.reading.examples]
        for name, outcome in readout.outcomes.items():
            columns = where | {"probe": name} | dict(_columns(outcome, own, classes))
            frames.append(pd.DataFrame(columns, index=range(len(own)), dtype=object))
    return pd.concat(frames, ignore_index=True)


def _columns(outcome: Outcome, labels: Sequence[Row], classes: Sequence[str] | None) -> Mapping[str, Any]:
    predicted, chances = outcome.held_out.tolist(), outcome.chances
    return {
        **{name: [row[name] for row in labels] for name in ("prompt", "word", "class", "target")},
        "fold": outcome.problem.nested.outer.test.double().argmax(0).tolist(),
        "predicted": predicted,
        "predicted_class": None if classes is None else [classes[int(one)] for one in predicted],
        "probability": None if chances is None else chances.tolist(),
    }
