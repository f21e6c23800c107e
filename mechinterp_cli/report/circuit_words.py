"""What circuits are made of, in words, and the picture that shows one."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from mechinterp_cli.report.cells import number, text
from mechinterp_cli.report.circuit_graph import MAX_EDGES, GraphPicture, graph_picture
from mechinterp_cli.report.neuron_graph import NeuronPicture, neuron_picture
from mechinterp_cli.report.rows import Row
from mechinterp_cli.text import counted

ENOUGH = 0.9
"""Of circuits of neurons the smallest that has this much of the behaviour is drawn."""


@dataclass(frozen=True)
class Words:
    """One of what circuits are made of, and several."""

    one: str
    several: str

    def counted(self, count: int) -> str:
        """So many of them."""
        return counted(count, self.one, self.several)

    def named(self, row: Row) -> str:
        """One of them, by a row of a table: `a0.h1->m3`, or `m3.n17`, which leads to all that reads it."""
        source = text(row["source"])
        return source if self is NEURONS else f"{source}->{text(row['target'])}"


EDGES = Words("edge", "edges")
NEURONS = Words("head or neuron", "heads and neurons")


@dataclass(frozen=True)
class Drawn:
    """How the circuits of a run are drawn.

    Args:
        words: What they are made of.
        about: Task, model, checkpoint.
        metric: That scores are of.
        trained: Prompts that scores are of; 0 where nobody said.
        heads: Query heads of a layer.
        grouped: How many of them share a key and a value.
    """

    words: Words
    about: tuple[str, ...]
    metric: str
    trained: int
    heads: int
    grouped: int

    def picture(self, rows: pd.DataFrame, score: str, which: str) -> GraphPicture | NeuronPicture | None:
        """The picture of one circuit.

        Args:
            rows: Its rows of the members table.
            score: By which it was found, or `given` or `reference`.
            which: Which circuit of that score.
        """
        about = ", ".join(filter(None, (*self.about, which, self.words.counted(len(rows)))))
        title = f"The {score} circuit" if score in ("given", "reference") else f"The circuit by {score}"
        scored, of_neurons = bool(rows["value"].notna().any()), self.words is NEURONS
        on = f" of {counted(self.trained, 'prompt')}" if self.trained else ""
        what = "Outline: size of the score, of an MLP its neurons' sum," if of_neurons else "Width: size of the score"
        told = [f"{what} on {self.metric}, mean{on}." if scored else ""]
        if of_neurons:
            return neuron_picture(rows, title=title, lines=(about, *told), heads=self.heads)
        shared = rows["input"].isin(["k", "v"]).any() and self.grouped > 1
        told.append(f"k and v are shared by {self.grouped} heads, which stand above them." if shared else "")
        lines = (about, " ".join(filter(None, told)))
        return graph_picture(rows, title=title, lines=lines, heads=self.heads, grouped=self.grouped)

    def size(self, rows: pd.DataFrame, tested: Sequence[object], faithfulness: pd.DataFrame) -> float:
        """The size that is drawn of a ranking.

        The one that is tested where it has members; else of neurons the smallest with enough of the behaviour, and of
        edges the largest with few enough; else the smallest with any.

        Args:
            rows: The ranking's rows of the members table.
            tested: Sizes that are tested.
            faithfulness: The ranking's rows of the faithfulness table, of the first metric.
        """
        counts = rows["size"].value_counts().sort_index().cumsum()
        chosen = [number(value) for value in tested if number(value) in counts.index]
        if chosen:
            return chosen[0]
        if self.words is NEURONS:
            enough = faithfulness.loc[(faithfulness["faithfulness"] >= ENOUGH).fillna(False), "size"]
            known = [number(size) for size in enough if number(size) in counts.index]
            return min(known, default=float(counts.index[-1]))
        few = counts[counts <= MAX_EDGES]
        return float(few.index[-1] if len(few) else counts.index[0])
