"""Tests of one circuit: which circuits they run, and what comes of them as rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit import hypotheses
from mechinterp_cli.methods.circuit.choose import Bools, Integers, Topology
from mechinterp_cli.methods.circuit.circuits import Circuit
from mechinterp_cli.methods.circuit.faithfulness import Ends
from mechinterp_cli.methods.circuit.options import HypothesisOptions
from mechinterp_cli.tasks.draw import Draw

Floats = npt.NDArray[np.float64]
Evaluate = Callable[[str, Sequence[Bools]], Floats]

TRIES = 100
"""Random paths that are drawn until one has an edge that the circuit lacks."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """Rows of the tables that tests fill."""

    tests: list[Row]
    minimality: list[Row]
    completeness: list[Row]


@dataclass(frozen=True, eq=False)
class CircuitTests:
    """The tests of one circuit on one metric.

    Args:
        topology: The graph.
        circuit: The circuit.
        scores: [edges] by which its edges are taken in turn; None: in their order.
        ends: The metric of the whole model and of nothing, on the evaluation prompts.
        metric: Its name.
        at: Its place among what is evaluated.
        evaluate: Runs circuits.
        options: The section.
        stats: How intervals are made.
    """

    topology: Topology
    circuit: Circuit
    scores: Floats | None
    ends: Ends
    metric: str
    at: int
    evaluate: Evaluate
    options: HypothesisOptions
    stats: StatsSection

    @property
    def about(self) -> Row:
        """Which circuit and metric."""
        return self.circuit.about() | {"metric": self.metric}

    def run(self) -> Outcome:
        """All tests."""
        own, rest = (
            self._values("circuit", [mask])[0] for mask in (self.circuit.kept, self.topology.rest(self.circuit.kept))
        )
        clusters, options = self.ends.clusters, self.options
        same = hypotheses.equivalence(own, self.ends.full, clusters, self.stats, epsilon=options.epsilon)
        apart = hypotheses.independence(
            rest,
            self.ends.full,
            clusters,
            permutations=options.permutations,
            level=options.level,
            seed=options.seed,
        )
        rows = [same | {"test": "equivalence"}, apart | {"test": "independence"}]
        edges = self._minimality(own)
        if edges:
            rows.append(self._all_needed(edges))
        subsets = self._completeness(own)
        return Outcome([self.about | row for row in rows], edges, subsets)

    @property
    def _members(self) -> Integers:
        """Its edges that were chosen."""
        return np.flatnonzero(self.circuit.kept & ~self.topology.fixed)

    def _values(self, name: str, masks: Sequence[Bools]) -> Floats:
        """[circuits, prompts] of the metric."""
        return self.evaluate(f"test-{name}", masks)[..., self.at]

    def _minimality(self, own: Floats) -> list[Row]:
        """Every edge taken out alone, beside edges that are not needed."""
        edges = self._taken()
        if not len(edges):
            return []
        without = self._values("minimality", [_less(self.circuit.kept, edge) for edge in edges.tolist()])
        found = self.ends.with_intervals(own - without)
        needless = self._needless()
        tested = hypotheses.minimality(
            np.array([one.value for one in found]),
            np.array([one.verdict_low for one in found]),
            np.array([one.verdict_high for one in found]),
            needless,
            quantile=self.options.quantile,
            margin=self.options.margin,
            level=self.options.level,
        )
        rows = []
        for at, edge in enumerate(edges.tolist()):
            row = self.about | {"edge": edge, "value": float(own.mean()), "without": float(without[at].mean())}
            row |= found[at].columns("effect")
            numbers = {"share": tested.share[at], "p": tested.p[at], "p_adjusted": tested.adjusted[at]}
            row |= {name: float(number) for name, number in numbers.items() if np.isfinite(number)}
            rows.append(row | {"verdict": tested.verdicts[at]})
        return rows

    def _taken(self) -> Integers:
        """The edges that are tried: those of the smallest scores first."""
        edges = self._members
        if self.scores is not None:
            edges = edges[np.argsort(np.abs(self.scores[edges]), kind="stable")]
        return edges[: self.options.edges]

    def _needless(self) -> Floats:
        """[draws] what random edges of the circuit with a random path added change, in faithfulness."""
        draw, kept = Draw(self.options.seed), self.circuit.kept
        masks: list[Bools] = []
        for _ in range(self.options.inflated):
            path = _new_path(self.topology, kept, draw)
            if path is None:
                break
            inflated = kept.copy()
            inflated[path] = True
            fresh = [edge for edge in path if not kept[edge]]
            masks += [inflated, _less(inflated, draw.choice(fresh))]
        if not masks or not self.ends.usable:
            return np.zeros(0)
        values = self._values("inflated", masks)
        return np.asarray((values[0::2] - values[1::2]).sum(1) / self.ends.denominators.sum())

    def _all_needed(self, edges: Sequence[Row]) -> Row:
        """The circuit's own row: `no` where one edge is not needed; `yes` where all were tried and are."""
        verdicts = [row["verdict"] for row in edges]
        tried = len(verdicts) == len(self._members)
        verdict = "no" if "no" in verdicts else "yes" if tried and set(verdicts) == {"yes"} else "inconclusive"
        known = [row["p_adjusted"] for row in edges if "p_adjusted" in row]
        row: Row = {"test": "minimality", "statistic": float(verdicts.count("no")), "margin": self.options.margin}
        return row | {"p": min(known, default=None), "n": len(verdicts), "of": len(verdicts), "verdict": verdict}

    def _completeness(self, own: Floats) -> list[Row]:
        """Random parts taken out of the circuit and out of the model; the first part is the whole circuit."""
        draw, members = Draw(self.options.seed + 1), self._members.tolist()
        if not self.options.subsets:
            return []
        parts = [members]
        for _ in range(self.options.subsets if len(members) > 1 else 0):
            parts.append(draw.sample(members, 1 + draw.below(len(members) - 1)))
        masks = []
        for part in parts:
            outside = np.ones_like(self.circuit.kept)
            outside[part] = False
            masks += [self.circuit.kept & outside, outside]
        values = self._values("completeness", masks)
        found = self.ends.with_intervals(values[0::2] - values[1::2])
        rows = []
        for number, part in enumerate(parts):
            one = found[number]
            rows.append(
                self.about
                | {"draw": number, "removed": len(part)}
                | {"circuit_without": float(values[2 * number].mean())}
                | {"model_without": float(values[2 * number + 1].mean())}
                | one.columns("difference")
                | {"verdict": hypotheses.within(one.verdict_low, one.verdict_high, self.options.margin)}
            )
        return rows


def _less(kept: Bools, edge: int) -> Bools:
    found = kept.copy()
    found[edge] = False
    return found


def _new_path(topology: Topology, kept: Bools, draw: Draw) -> list[int] | None:
    """A random path from the embedding to the logits with an edge that is not kept; None where none is found."""
    for _ in range(TRIES):
        path = topology.path(draw)
        if not all(kept[edge] for edge in path):
            return path
    return None
