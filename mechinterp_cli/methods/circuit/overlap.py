"""What a score and its circuits have in common with a reference: AUROC, precision, recall, Jaccard."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit.choose import Bools, Integers, Topology, jaccard, strengths
from mechinterp_cli.methods.circuit.circuits import Circuit
from mechinterp_cli.methods.circuit.options import Level, Rank
from mechinterp_cli.methods.circuit.sets import Handmade

Floats = npt.NDArray[np.float64]


class Reference:
    """A reference circuit as what circuits are compared with: its nodes, and its edges where those were given.

    Args:
        topology: The graph.
        given: The circuit. Where it names no MLP, heads alone are compared: it says nothing of MLPs.
    """

    def __init__(self, topology: Topology, given: Handmade) -> None:
        self.topology = topology
        self.given = given
        inner = np.arange(1, len(topology.nodes) - 1)
        mlps = np.array([name.startswith("m") for name in topology.nodes])
        self.inner = inner if given.nodes[mlps].any() else inner[~mlps[inner]]

    @property
    def levels(self) -> tuple[Level, ...]:
        """What is compared."""
        return ("nodes",) if self.given.by_nodes else (self.topology.level, "nodes")

    @cached_property
    def _parts(self) -> Integers:
        """The edges that are compared; of neurons and heads those of the nodes that are."""
        if self.topology.level == "edges":
            return np.arange(len(self.topology))
        return np.flatnonzero(np.isin(self.topology.source, self.inner))

    def truth(self, level: Level) -> Bools:
        """Which edges (or neurons and heads), or which nodes, are in it."""
        return self.given.nodes[self.inner] if level == "nodes" else self.given.kept[self._parts]

    def of_scores(self, scores: Floats, rank: Rank) -> Iterator[Row]:
        """How well a score tells its members from others.

        Args:
            scores: [edges].
            rank: By score, or by size.
        """
        for level in self.levels:
            values = self.topology.node_scores(scores)[self.inner] if level == "nodes" else scores[self._parts]
            truth, strength = self.truth(level), strengths(values, rank)
            strength = np.where(np.isfinite(strength), strength, strength[np.isfinite(strength)].min(initial=0) - 1)
            if truth.all() or not truth.any():
                continue
            yield {"measure": "auroc", "level": level, "value": float(roc_auc_score(truth, strength))}
            precision = float(average_precision_score(truth, strength))
            yield {"measure": "average_precision", "level": level, "value": precision}

    def of_circuit(self, circuit: Circuit) -> Iterator[Row]:
        """How much of it a circuit holds, and how much else."""
        for level in self.levels:
            nodes = self.topology.nodes_of(circuit.kept)[self.inner]
            found, truth = (nodes if level == "nodes" else circuit.kept[self._parts]), self.truth(level)
            both = int((found & truth).sum())
            measures = {
                "precision": both / found.sum() if found.any() else None,
                "recall": both / truth.sum() if truth.any() else None,
                "jaccard": jaccard(found, truth) if (found | truth).any() else None,
            }
            for measure, value in measures.items():
                yield {"measure": measure, "level": level, "value": None if value is None else float(value)}


def overlaps(
    reference: Reference | None, metric: str, scores: dict[str, Floats], circuits: Sequence[Circuit]
) -> list[Row]:
    """Rows of the quality table.

    Args:
        reference: None: no rows.
        metric: That scores are of.
        scores: By name, [edges].
        circuits: Those that were found or given, but for the reference itself.
    """
    if reference is None:
        return []
    rows: list[Row] = []
    ranks: tuple[Rank, ...] = ("signed", "absolute")
    for name, values in scores.items():
        for rank in ranks:
            about = {"score": name, "rank": rank, "metric": metric}
            rows += [about | row for row in reference.of_scores(values, rank)]
    for circuit in circuits:
        about = circuit.about() | {"metric": metric}
        rows += [about | row for row in reference.of_circuit(circuit)]
    return rows
