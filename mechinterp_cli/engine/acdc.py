"""ACDC: edges are tried one after the other from the logits down, and go where their going changes little.

Conmy et al. 2304.14997, algorithm 1: targets in reverse order; for each, every edge into it, the latest source first;
an edge is removed for good where the metric without it, less the metric with it, is below the threshold. The decisions
depend on each other and are made in that order. Circuits to come are run together with the next one as if the coming
decisions were all like the last; what was run after a decision that came out differently is thrown away.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.engine.edge_routing import Bools, Slots
from mechinterp_cli.engine.wiring import Wiring

AHEAD = 16
"""Most circuits that are run at a time."""

Evaluate = Callable[[Sequence[Bools]], npt.NDArray[np.float64]]
"""Circuits, bool [edges] each, to one number each: what removals may change by less than the threshold."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """What ACDC leaves.

    Args:
        kept: Which edges stay, [edges].
        value: The number of that circuit.
        evaluations: Edges that were decided by running a circuit; all others led to nothing that is kept.
        runs: Circuits that were run for that, those that were thrown away among them.
    """

    kept: Bools
    value: float
    evaluations: int
    runs: int


def acdc(
    wiring: Wiring,
    evaluate: Evaluate,
    threshold: float,
    *,
    absolute: bool = False,
    ahead: int = AHEAD,
    tick: Callable[[int], None] = lambda decided: None,
) -> Pruned:
    """The edges that stay.

    Args:
        wiring: The model as a graph.
        evaluate: Runs circuits. Where larger is worse, as for the divergence from the whole model, this is the
            published algorithm.
        threshold: What one removal may raise the number by, and less.
        absolute: Whether it may not lower it by as much either: for metrics that may move both ways.
        ahead: Most circuits that are run at a time; changes nothing but speed.
        tick: Called with the number of edges that are decided.
    """
    search = _Search(wiring, evaluate, threshold, absolute, ahead, tick)
    targets = wiring.graph.edge_target
    for target in reversed(range(len(wiring.graph.targets))):
        search.decide(target, np.flatnonzero(targets == target)[::-1].tolist())
    return Pruned(search.kept, search.value, search.evaluations, search.runs)


class _Search:
    """The circuit as it is so far."""

    def __init__(
        self,
        wiring: Wiring,
        evaluate: Evaluate,
        threshold: float,
        absolute: bool,
        ahead: int,
        tick: Callable[[int], None],
    ) -> None:
        self.evaluate, self.threshold, self.absolute, self.ahead, self.tick = evaluate, threshold, absolute, ahead, tick
        self.slots = Slots.of(wiring.graph, wiring.normed)
        self.kept: Bools = np.ones(wiring.graph.n_edges, dtype=np.bool_)
        self.value = float(evaluate([self.kept])[0])
        self.evaluations, self.runs, self.decided = 0, 1, 0
        self._goes, self._size = True, 1

    def decide(self, target: int, edges: Sequence[int]) -> None:
        """Decide about the edges into one target, in their order."""
        if not self.slots.mattering(self.kept)[target]:
            self.kept[list(edges)] = False
            self._count(len(edges))
            return
        done = 0
        while done < len(edges):
            done += self._some(edges[done : done + self._size])

    def _some(self, edges: Sequence[int]) -> int:
        """Decide about as many of some edges as one batch of runs can tell; how many that are."""
        circuits = list[Bools]()
        for number, edge in enumerate(edges):
            circuit = (circuits[-1] if number and self._goes else self.kept).copy()
            circuit[edge] = False
            circuits.append(circuit)
        values = self.evaluate(circuits)
        self.runs += len(edges)
        for number, (edge, value) in enumerate(zip(edges, values.tolist(), strict=True)):
            goes = self._below(value - self.value)
            self.evaluations += 1
            self._count(1)
            if goes:
                self.kept[edge], self.value = False, value
            if goes != self._goes:
                self._goes, self._size = goes, 1
                return number + 1
        self._size = min(self.ahead, 2 * self._size)
        return len(edges)

    def _below(self, change: float) -> bool:
        return (abs(change) if self.absolute else change) < self.threshold

    def _count(self, edges: int) -> None:
        self.decided += edges
        self.tick(self.decided)
