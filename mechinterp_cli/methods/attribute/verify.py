"""Estimates beside exact effects: which nodes are computed exactly, and what that says of all the others."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.methods.attribute.effects import Effects
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import VerifyOptions
from mechinterp_cli.stats.agreement import Agreement, agree
from mechinterp_cli.stats.missed import missed_upper
from mechinterp_cli.tasks.draw import Draw

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Row = dict[str, Any]

LEVEL = 0.95
ALL = "all"
"""In place of a kind of site: all kinds together."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The nodes that are computed exactly.

    Args:
        nodes: Their numbers, rising.
        top: By estimator, which of them are among its strongest estimates.
        random: Which of them were drawn at random.
    """

    nodes: Integers
    top: Mapping[str, Mask]
    random: Mask

    def part(self, estimator: str) -> list[str | None]:
        """Why each was chosen: `top`, `random`, `top, random`; None where another estimator wanted it."""
        names = (("top", self.top[estimator]), ("random", self.random))
        return [", ".join(name for name, mask in names if mask[i]) or None for i in range(len(self.nodes))]


def choose(options: VerifyOptions, nodes: Nodes, usable: Mask, strengths: Mapping[str, Floats]) -> Choice:
    """Choose nodes.

    Args:
        options: How many.
        nodes: All nodes.
        usable: Which of them are not known to be 0.
        strengths: By estimator, the size of each node's estimate.
    """
    strongest = {name: _strongest(sizes, usable, options.top) for name, sizes in strengths.items()}
    drawn = draw_evenly(nodes.kinds, nodes.layers, np.flatnonzero(usable), options.random, options.seed)
    chosen = np.unique(np.concatenate([drawn, *strongest.values()]))
    return Choice(chosen, {name: np.isin(chosen, top) for name, top in strongest.items()}, np.isin(chosen, drawn))


def _strongest(sizes: Floats, usable: Mask, count: int) -> Integers:
    order = np.argsort(-np.where(usable, sizes, -1.0), kind="stable")[:count]
    return order[usable[order]]


def draw_evenly(kinds: npt.NDArray[np.object_], layers: Integers, among: Integers, count: int, seed: int) -> Integers:
    """Nodes at random: as many of each kind of site as there are, and within a kind as many of each layer.

    Within a kind every node is equally likely only where its layers have as many nodes; they mostly have.

    Args:
        kinds: Of all nodes.
        layers: Of all nodes.
        among: The nodes that may be drawn.
        count: How many.
        seed: Of the draw.
    """
    draw = Draw(seed)
    queues = []
    for kind in dict.fromkeys(kinds[among].tolist()):
        members = among[kinds[among] == kind]
        by_layer = [members[layers[members] == layer].tolist() for layer in dict.fromkeys(layers[members].tolist())]
        queues.append(_turns([draw.few(part, min(count, len(part))) for part in draw.shuffled(by_layer)]))
    return np.array(sorted(_turns(queues)[:count]), dtype=np.int64)


def _turns(queues: Sequence[Sequence[int]]) -> list[int]:
    """The first of each queue, then the second of each, and so on."""
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]


@dataclass(frozen=True, eq=False)
class Verified:
    """One estimator on one metric beside what was computed exactly.

    Args:
        about: The columns that name it: estimator, steps, metric.
        nodes: All nodes.
        usable: Which of them are not known to be 0.
        choice: Which were computed.
        estimates: Of all nodes over prompts.
        exact: Of the chosen ones.
        estimator: Its name.
        threshold: The smallest effect of interest; None where nobody can say.
        signless: Kinds of sites of which the estimator gives sizes: they are compared with the exact effects' sizes.
    """

    about: Row
    nodes: Nodes
    usable: Mask
    choice: Choice
    estimates: Effects
    exact: Effects
    estimator: str
    threshold: float | None
    signless: frozenset[str] = frozenset()

    @cached_property
    def kinds(self) -> list[str]:
        """All kinds together, then each where there are several."""
        found = list(dict.fromkeys(self.nodes.kinds.tolist()))
        return [ALL, *found] if len(found) > 1 else found

    @cached_property
    def estimate(self) -> Floats:
        """Of the chosen nodes: normalised where something normalises."""
        return self.estimates.best[self.choice.nodes]

    def _of(self, kind: str, nodes: npt.NDArray[Any]) -> Mask:
        chosen: Mask = np.ones(len(nodes), dtype=bool) if kind == ALL else nodes == kind
        return chosen

    def verification(self) -> Iterator[Row]:
        """Rows of the table `verification`: correlations are those of the random part, by kind."""
        known = np.isfinite(self.estimate) & np.isfinite(self.exact.best)
        chosen_kinds = self.nodes.kinds[self.choice.nodes]
        for kind in self.kinds:
            nodes = int((self._of(kind, self.nodes.kinds) & self.usable).sum())
            for part, mask in (("random", self.choice.random), ("top", self.choice.top[self.estimator])):
                rows = mask & known & self._of(kind, chosen_kinds)
                estimate, exact = self.estimate[rows], self.exact.best[rows]
                signless = bool(self.signless.intersection(chosen_kinds[rows]))
                if signless:
                    estimate, exact = np.abs(estimate), np.abs(exact)
                found = agree(estimate, exact, floor=self.threshold or 0.0)
                if signless:
                    found = replace(found, sign_agreement=None, sign_rows=0)
                yield {**self.about, "site": kind, "part": part, "nodes": nodes, **self._told(found, exact)}

    def _told(self, found: Agreement, exact: Floats) -> Row:
        above = None
        if self.threshold is not None and len(exact):
            above = float((np.abs(exact) >= self.threshold).mean())
        return {
            "rows": found.rows,
            "pearson": found.pearson,
            "spearman": found.spearman,
            "sign_agreement": found.sign_agreement,
            "sign_rows": found.sign_rows,
            "mean_difference": found.mean_difference,
            "above": above,
            "threshold": self.threshold,
            "reason": "; ".join(reason for reason in found.undefined if not reason.startswith("top")) or None,
        }

    def missed(self) -> Iterator[Row]:
        """Rows of the table `missed`: nodes whose estimate is below the threshold, and how many are not.

        By kind of site and size of the estimate, as the random part is a simple random sample only there; over all
        kinds the bounds are added, each at a level that makes their sum hold.
        """
        if self.threshold is None:
            return
        kinds = [kind for kind in self.kinds if kind != ALL]
        strata = _strata(self.threshold)
        for kind in kinds:
            for name, low, high in strata:
                yield self._bound(kind, name, low, high, LEVEL)
        level = 1 - (1 - LEVEL) / len(kinds)
        parts = [self._bound(kind, ALL, 0.0, self.threshold, level) for kind in kinds]
        total = {name: sum(part[name] for part in parts) for name in ("nodes", "rows", "missed", "upper_count")}
        fraction = total["upper_count"] / total["nodes"] if total["nodes"] else None
        yield {**parts[0], **total, "site": ALL, "upper_fraction": fraction, "level": LEVEL}

    def _bound(self, kind: str, stratum: str, low: float, high: float, level: float) -> Row:
        size = np.abs(self.estimates.best)
        inside = self.usable & self._of(kind, self.nodes.kinds) & (size >= low) & (size < high)
        sampled = inside[self.choice.nodes] & self.choice.random & np.isfinite(self.exact.best)
        missed = int((np.abs(self.exact.best[sampled]) >= self.threshold).sum())
        nodes, rows = int(inside.sum()), int(sampled.sum())
        upper = missed_upper(nodes, rows, missed, level=level)
        return {
            **self.about,
            "site": kind,
            "stratum": stratum,
            "low": low,
            "high": high,
            "nodes": nodes,
            "rows": rows,
            "missed": missed,
            "upper_count": upper,
            "upper_fraction": upper / nodes if nodes else None,
            "threshold": self.threshold,
            "level": level,
        }


def _strata(threshold: float) -> list[tuple[str, float, float]]:
    """All below the threshold, and these by size: name, lowest, end."""
    quarter = threshold / 4
    return [(ALL, 0.0, threshold), (f"below {quarter:g}", 0.0, quarter), (f"from {quarter:g}", quarter, threshold)]
