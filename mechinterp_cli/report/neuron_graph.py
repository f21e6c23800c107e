"""A circuit of heads and single neurons as a picture: a box for every head, and one for all neurons of an MLP."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mechinterp_cli.report.cells import number, text
from mechinterp_cli.report.rows import records

_HEAD = re.compile(r"a(\d+)\.h(\d+)")
_NEURON = re.compile(r"m(\d+)\.n\d+")
_Place = tuple[int, int]
"""A layer, and the column of a head, or of the MLP beside them."""


@dataclass(frozen=True)
class NeuronBox:
    """A head, or the neurons of an MLP that are kept."""

    name: str
    """As it is shown: `9.6`, `MLP 3`, `embed`, `logits`."""
    count: int
    """How many neurons; 0 where it is no MLP."""
    x: float
    y: float
    score: float
    """The sum over what is in it; NaN where there is none."""


@dataclass(frozen=True, kw_only=True)
class NeuronPicture:
    """One circuit."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    boxes: tuple[NeuronBox, ...]
    rows: tuple[str, ...]
    """What stands beside each row of boxes, from below."""


def neuron_picture(items: pd.DataFrame, *, title: str, lines: Sequence[str], heads: int) -> NeuronPicture | None:
    """The picture of some heads and neurons.

    Args:
        items: Rows with `source` and `value`.
        title: Of the picture.
        lines: What stands below it.
        heads: Query heads of a layer.

    Returns:
        None where there are none.
    """
    found = _grouped(items, heads)
    if not found:
        return None
    rows = {layer: row for row, layer in enumerate(sorted({layer for layer, _ in found}), start=1)}
    boxes = [
        NeuronBox(name, count if column == heads else 0, float(column), float(rows[layer]), score)
        for (layer, column), (name, count, score) in found.items()
    ]
    middle, none = (heads - 1) / 2, float("nan")
    ends = NeuronBox("embed", 0, middle, 0.0, none), NeuronBox("logits", 0, middle, float(len(rows) + 1), none)
    return NeuronPicture(
        title=title,
        lines=tuple(filter(None, lines)),
        boxes=(*boxes, *ends),
        rows=("", *(f"layer {layer}" for layer in rows), ""),
    )


def _grouped(items: pd.DataFrame, heads: int) -> dict[_Place, tuple[str, int, float]]:
    """Row and column of every box, to its name, how many items are in it, and the sum of their scores."""
    found: dict[_Place, tuple[str, int, float]] = {}
    for row in records(items):
        source, score = text(row["source"]), number(row["value"])
        if head := _HEAD.fullmatch(source):
            at, name = (int(head[1]), int(head[2])), f"{head[1]}.{head[2]}"
        elif neuron := _NEURON.fullmatch(source):
            at, name = (int(neuron[1]), heads), f"MLP {neuron[1]}"
        else:
            continue
        _, count, total = found.get(at, (name, 0, 0.0))
        found[at] = name, count + 1, total + score
    return found


def strongest(picture: NeuronPicture) -> float:
    """The largest size of a box's score; 1 where none has one."""
    return max((abs(box.score) for box in picture.boxes if not math.isnan(box.score)), default=0.0) or 1.0
