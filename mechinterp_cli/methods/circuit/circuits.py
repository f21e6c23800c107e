"""Circuits of every score, ranking and size, and the random ones beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit.choose import Bools, Chosen, Ranking, Topology
from mechinterp_cli.methods.circuit.options import RANKS, CircuitOptions, Rank
from mechinterp_cli.methods.circuit.sets import Handmade

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Circuit:
    """One circuit.

    Args:
        score: By which it was found, or `given` or `reference`.
        kept: [edges].
        rank: By which ranking, where it is of one.
        size: The share of all edges that was asked for, where it was.
        threshold: Of ACDC.
        asked: How many edges (or nodes) were asked for.
    """

    score: str
    kept: Bools
    rank: Rank | None = None
    size: float | None = None
    threshold: float | None = None
    asked: int | None = None

    def about(self) -> Row:
        """Which circuit it is, for tables."""
        return {"score": self.score, "rank": self.rank, "size": self.size, "threshold": self.threshold}

    @property
    def file(self) -> str:
        """The name of its file, without ending."""
        parts = (self.score.replace("_", "-"), self.rank, self.size, self.threshold)
        return "circuit-" + "-".join(f"{part:g}" if isinstance(part, float) else part for part in parts if part)

    def counts(self, topology: Topology) -> Row:
        """How many edges and inner nodes it has."""
        nodes, kept = topology.nodes_of(self.kept)[1:-1], self.kept & ~topology.fixed
        return {"asked": self.asked, "kept": int(kept.sum()), "nodes": int(nodes.sum())}


def ranked(
    topology: Topology, options: CircuitOptions, scores: Mapping[str, Floats]
) -> Iterator[tuple[str, Rank, list[Chosen]]]:
    """The circuits of every score that ranks edges, by both rankings, smallest first.

    Args:
        topology: The graph.
        options: The section.
        scores: By name, [edges], means over the training prompts.
    """
    for name, values in scores.items():
        for rank in RANKS:
            ranking = _ranking(topology, options, values, rank)
            yield name, rank, list(ranking.all(options.sizes))


def _ranking(topology: Topology, options: CircuitOptions, values: Floats, rank: Rank) -> Ranking:
    of_nodes = options.granularity == "nodes"
    return Ranking.of(topology, values, rank, select=options.select, of_nodes=of_nodes)


def of_ranking(name: str, rank: Rank, chosen: Sequence[Chosen]) -> list[Circuit]:
    """The circuits of one ranking."""
    return [Circuit(name, one.kept, rank, one.size, None, one.asked) for one in chosen]


def handmade(sets: Sequence[Handmade]) -> list[Circuit]:
    """The circuits that were given."""
    return [Circuit(given.name, given.kept) for given in sets]


def random_scores(topology: Topology, seed: int, draw: int) -> Floats:
    """[edges] of one random ranking: uniform between −1 and 1."""
    return np.random.default_rng((seed, draw)).uniform(-1, 1, len(topology))


def random_circuits(topology: Topology, options: CircuitOptions) -> list[list[Chosen]]:
    """[draws][sizes] of random rankings."""
    draws = range(options.random.draws)
    return [
        list(
            _ranking(topology, options, random_scores(topology, options.random.seed, 1 + i), "signed").all(
                options.sizes
            )
        )
        for i in draws
    ]
