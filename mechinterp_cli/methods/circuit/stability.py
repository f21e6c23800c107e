"""Would other prompts have given the same circuit? Edges ranked again over training prompts drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from mechinterp_cli.methods.circuit.choose import Bools, Ranking, Topology, strengths
from mechinterp_cli.methods.circuit.options import Rank, Select
from mechinterp_cli.stats import choose_units, draw_weights

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stability:
    """The circuit of all training prompts beside those of each draw.

    Args:
        jaccard: [draws] edges in both, over edges in either.
        correlation: [draws] Spearman's, of all edges' scores.
        frequency: [edges] share of the draws whose circuit holds the edge.
        clusters: How many clusters of prompts there are.
    """

    jaccard: Floats
    correlation: Floats
    frequency: Floats
    clusters: int


def stability(
    topology: Topology,
    scores: Floats,
    clusters: Sequence[str],
    *,
    rank: Rank,
    select: Select,
    of_nodes: bool,
    size: float,
    draws: int,
    seed: int,
) -> Stability:
    """Rank and choose again for every draw.

    Args:
        topology: The graph.
        scores: [edges, prompts].
        clusters: Of the prompts; drawn as wholes where there are enough of them.
        rank: By score, or by size.
        select: How edges are chosen.
        of_nodes: Whether nodes are.
        size: Share that circuits keep.
        draws: How many.
        seed: Of the draws.
    """
    units = choose_units(np.asarray(clusters))
    sums, counts = units.sums(scores), units.sums(np.ones((1, len(clusters))))[0]
    own = scores.mean(1)
    circuit = _circuit(topology, own, rank, select, of_nodes, size)
    ranks = _standardised(own, rank)
    found_jaccard, found_correlation, held = [], [], np.zeros(len(topology))
    for weights in draw_weights(units, draws=draws, seed=seed):
        drawn = (sums @ weights) / (counts @ weights)
        other = _circuit(topology, drawn, rank, select, of_nodes, size)
        found_jaccard.append(jaccard(circuit, other))
        found_correlation.append(float(ranks @ _standardised(drawn, rank)))
        held += other
    return Stability(np.array(found_jaccard), np.array(found_correlation), held / draws, units.clusters)


def _circuit(topology: Topology, scores: Floats, rank: Rank, select: Select, of_nodes: bool, size: float) -> Bools:
    return Ranking.of(topology, scores, rank, select=select, of_nodes=of_nodes).at(size).kept


def _standardised(scores: Floats, rank: Rank) -> Floats:
    """Ranks, centred and of length 1: their product is Spearman's correlation; NaN for constants."""
    ranks = rankdata(strengths(scores, rank))
    centred = ranks - ranks.mean()
    with np.errstate(invalid="ignore"):
        return np.asarray(centred / np.linalg.norm(centred))


def jaccard(a: Bools, b: Bools) -> float:
    """Members of both over members of either; NaN where there are none."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else float("nan")
