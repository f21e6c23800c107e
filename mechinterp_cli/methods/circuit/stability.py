"""Would other prompts have given the same circuit? Edges ranked again over training prompts drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from mechinterp_cli.methods.beside import Row
from mechinterp_cli.methods.circuit.choose import jaccard, strengths
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.options import Rank, StabilityOptions
from mechinterp_cli.methods.circuit.tables import Scored
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


def stability(layout: Layout, scores: npt.NDArray[Any], asked: StabilityOptions) -> Stability:
    """Rank and choose again for every draw.

    Args:
        layout: The graph, and how edges are chosen.
        scores: [edges, training prompts].
        asked: Draws, and the size of the circuits.
    """
    clusters, rank = layout.clusters("train"), layout.options.rank
    units = choose_units(np.asarray(clusters))
    sums, counts = units.sums(scores), units.sums(np.ones((1, len(clusters))))[0]
    own = scores.mean(1, dtype=np.float64)
    circuit, ranks = layout.ranking(own).at(asked.size).kept, _standardised(own, rank)
    chosen = ~layout.topology.fixed
    shared, correlation, held = [], [], np.zeros(len(own))
    for weights in draw_weights(units, draws=asked.draws, seed=asked.seed):
        drawn = (sums @ weights) / (counts @ weights)
        other = layout.ranking(drawn).at(asked.size).kept
        shared.append(jaccard(circuit & chosen, other & chosen))
        correlation.append(float(ranks @ _standardised(drawn, rank)))
        held += other
    return Stability(np.array(shared), np.array(correlation), held / asked.draws, units.clusters)


def stability_rows(layout: Layout, scores: Sequence[Scored], asked: StabilityOptions) -> list[Row]:
    """Jaccard and rank correlation of every score that has numbers by prompt.

    Args:
        layout: The graph, and how edges are chosen.
        scores: All scores.
        asked: Draws, and the size of the circuits.
    """
    rows = []
    for score in (score for score in scores if score.by_prompt is not None):
        assert score.by_prompt is not None
        found = stability(layout, score.by_prompt, asked)
        about = {"score": score.name, "rank": layout.options.rank, "metric": layout.metric}
        counts = {"n": score.by_prompt.shape[1], "clusters": found.clusters}
        for measure, values in {"jaccard": found.jaccard, "spearman": found.correlation}.items():
            known = values[np.isfinite(values)]
            if len(known):
                low, high = map(float, np.percentile(known, [2.5, 97.5]))
                size = asked.size if measure == "jaccard" else None
                numbers = {"size": size, "mean": float(known.mean()), "low": low, "high": high, "draws": len(known)}
                rows.append(about | {"measure": measure} | numbers | counts)
    return rows


def _standardised(scores: Floats, rank: Rank) -> Floats:
    """Ranks, centred and of length 1: their product is Spearman's correlation; NaN for constants."""
    ranks = rankdata(strengths(scores, rank))
    centred = ranks - ranks.mean()
    with np.errstate(invalid="ignore"):
        return np.asarray(centred / np.linalg.norm(centred))
