"""A circuit as a picture: nodes by layer, the embedding below and the logits on top, edges as lines."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.rows import Row, records

MAX_EDGES = 60
"""More lines would hide each other."""
_HEAD = re.compile(r"a(\d+)\.h(\d+)(?:\.([qkv]))?")
_MLP = re.compile(r"m(\d+)")
_INPUTS = {"q": -0.28, "k": 0.0, "v": 0.28}
"""Where on a head's lower side its inputs are."""


@dataclass(frozen=True)
class GraphNode:
    """A box of the picture."""

    name: str
    """As it is shown: `9.6`, `MLP 3`, `embed`, `logits`."""
    x: float
    y: float


@dataclass(frozen=True)
class GraphEdge:
    """A line from the upper side of one box to the lower side of another."""

    start: tuple[float, float]
    end: tuple[float, float]
    score: float
    """Its sign is the line's colour, its size the width."""
    input: str
    """`q`, `k` or `v`; empty where it leads to an MLP or the logits."""
    source: str
    target: str
    """Names of the nodes, as tables have them."""
    scored: bool = True
    """Whether there is a score; of circuits that are given there is none."""


@dataclass(frozen=True, kw_only=True)
class GraphPicture:
    """One circuit."""

    title: str
    lines: tuple[str, ...]
    """What stands below the title."""
    nodes: tuple[GraphNode, ...]
    edges: tuple[GraphEdge, ...]
    rows: tuple[str, ...]
    """What stands beside each row of boxes, from below."""


@dataclass(frozen=True)
class _Layout:
    """Where boxes are: a row for each layer's heads and one for its MLP, where the circuit has any."""

    heads: int
    rows: dict[tuple[str, int], int]

    @classmethod
    def of(cls, names: Sequence[str], heads: int) -> "_Layout":
        places = sorted({_place(name) for name in names} - {("embed", 0), ("logits", 0)}, key=lambda p: (p[1], p[0]))
        order = [("embed", 0), *places, ("logits", 0)]
        return cls(heads, {place: row for row, place in enumerate(order)})

    def at(self, name: str) -> tuple[float, float]:
        """The middle of a node's box."""
        row = float(self.rows[_place(name)])
        if match := _HEAD.fullmatch(name):
            return float(match[2]), row
        # MLPs stand beside the heads, so that what passes by them is seen.
        return (float(self.heads) if _MLP.fullmatch(name) else (self.heads - 1) / 2), row

    @property
    def titles(self) -> tuple[str, ...]:
        return tuple("" if kind in ("embed", "logits") else f"layer {layer}" for kind, layer in self.rows)


def _place(name: str) -> tuple[str, int]:
    """Which row a node is in; MLPs come after heads."""
    if match := _HEAD.fullmatch(name):
        return "head", int(match[1])
    if match := _MLP.fullmatch(name):
        return "mlp", int(match[1])
    return ("logits" if name == "logits" else "embed"), 0


def _shown(name: str) -> str:
    if match := _HEAD.fullmatch(name):
        return f"{match[1]}.{match[2]}"
    return f"MLP {name[1:]}" if _MLP.fullmatch(name) else name


def graph_picture(
    edges: pd.DataFrame, *, title: str, lines: Sequence[str], heads: int, grouped: int
) -> GraphPicture | None:
    """The picture of some edges.

    Args:
        edges: Rows with `source`, `target`, `input` and `value`; the strongest `MAX_EDGES` are drawn.
        title: Of the picture.
        lines: What stands below it.
        heads: Query heads of a layer.
        grouped: How many of them share a key and a value.

    Returns:
        None where there are no edges.
    """
    if edges.empty:
        return None
    sizes = edges["value"].map(lambda value: 0.0 if missing(value) else abs(number(value)))
    chosen = records(edges.loc[sizes.sort_values(ascending=False, kind="stable").index[:MAX_EDGES]])
    boxes = dict.fromkeys(["embed", "logits"])
    for row in chosen:
        boxes |= dict.fromkeys([text(row["source"]), *_readers(row, grouped)])
    layout = _Layout.of(list(boxes), heads)
    told = f"The strongest {len(chosen)} of {len(edges)} edges." if len(edges) > len(chosen) else ""
    return GraphPicture(
        title=title,
        lines=tuple(filter(None, (*lines, told))),
        nodes=tuple(GraphNode(_shown(name), *layout.at(name)) for name in boxes),
        edges=tuple(_edge(row, layout, grouped) for row in chosen),
        rows=layout.titles,
    )


def _readers(row: Row, grouped: int) -> list[str]:
    """The nodes that an edge leads into: the query heads that share a key or a value, or one node."""
    match = _HEAD.fullmatch(text(row["target"]))
    if match is None:
        return [text(row["target"])]
    count = 1 if match[3] == "q" else grouped
    first = int(match[2]) * count
    return [f"a{match[1]}.h{head}" for head in range(first, first + count)]


def _edge(row: Row, layout: _Layout, grouped: int) -> GraphEdge:
    readers = [layout.at(name) for name in _readers(row, grouped)]
    kind, score = text(row["input"]), number(row["value"])
    end = (sum(x for x, _ in readers) / len(readers) + _INPUTS.get(kind, 0.0), readers[0][1])
    source, target, scored = text(row["source"]), text(row["target"]), not math.isnan(score)
    return GraphEdge(layout.at(source), end, score if scored else 0.0, kind, source, target, scored)
