"""From scores of edges to circuits: the best of a ranking, and of them what is connected to embedding and logits."""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from mechinterp_cli.methods.circuit.options import Rank, Select
from mechinterp_cli.tasks.draw import Draw

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Topology:
    """A graph as numbers, for questions of what is connected.

    Args:
        nodes: Names, in the order of writing: the embedding first; the logits last, which only read.
        inputs: Names of what edges lead into: q, k and v of heads, MLPs, logits.
        feeds: [inputs, nodes]: whose input it is; k and v of grouped queries are of several heads.
        source: [edges] node that an edge comes from.
        target: [edges] input that it leads into.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    feeds: Bools
    source: Integers
    target: Integers

    @classmethod
    def of(cls, graph: Graph) -> "Topology":
        """The numbers of a model's graph."""
        feeds = np.zeros((len(graph.targets), len(graph.sources) + 1), dtype=bool)
        per_layer = Counter((target.layer, target.kind) for target in graph.targets)
        for row, target in enumerate(graph.targets):
            shared = per_layer[target.layer, "q"] // max(1, per_layer[target.layer, target.kind])
            for node in _readers(target, shared):
                feeds[row, len(graph.sources) if node is None else graph.source_index[node]] = True
        names = (*(source.name for source in graph.sources), "logits")
        inputs = tuple(target.name for target in graph.targets)
        return cls(names, inputs, feeds, graph.edge_source.astype(np.int64), graph.edge_target.astype(np.int64))

    def __len__(self) -> int:
        """How many edges there are."""
        return len(self.source)

    @property
    def inner(self) -> int:
        """How many nodes lie between embedding and logits."""
        return len(self.nodes) - 2

    @cached_property
    def into(self) -> tuple[Integers, ...]:
        """By node, the edges into its inputs."""
        order = np.argsort(self.target, kind="stable")
        ends = np.cumsum([0, *np.bincount(self.target, minlength=len(self.inputs))])
        by_input = [order[ends[i] : ends[i + 1]] for i in range(len(self.inputs))]
        none = np.zeros(0, dtype=np.int64)
        return tuple(np.concatenate([none, *(by_input[i] for i in np.flatnonzero(own))]) for own in self.feeds.T)

    level: ClassVar[Literal["edges", "neurons"]] = "edges"
    """What circuits are made of."""

    @cached_property
    def fixed(self) -> Bools:
        """[edges] those that every circuit has without their being chosen: none."""
        return np.zeros(len(self), dtype=bool)

    def rest(self, kept: Bools) -> Bools:
        """[edges] the model without a circuit."""
        return np.asarray(~kept | self.fixed)

    def connected(self, kept: Bools) -> Bools:
        """Of some edges those that lie on a path from the embedding to the logits.

        Args:
            kept: [edges].
        """
        into = np.zeros((len(self.nodes), len(self.inputs)), dtype=np.float32)
        into[self.source[kept], self.target[kept]] = 1
        leads = (into @ self.feeds.astype(np.float32)) > 0  # [nodes, nodes]
        count = len(self.nodes)
        reached, leaves = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        reached[0] = leaves[-1] = True
        for node in range(1, count):
            reached[node] = bool((leads[:node, node] & reached[:node]).any())
        for node in range(count - 2, -1, -1):
            leaves[node] = bool((leads[node, node + 1 :] & leaves[node + 1 :]).any())
        through = reached & leaves
        alive = self.feeds @ through  # inputs of which a node lies on a path
        return np.asarray(kept & through[self.source] & alive[self.target])

    def nodes_of(self, kept: Bools) -> Bools:
        """[nodes] that edges of a circuit leave."""
        found = np.zeros(len(self.nodes), dtype=bool)
        found[self.source[kept]] = True
        return found

    def node_scores(self, scores: Floats) -> Floats:
        """[nodes, ...] sums of the scores of the edges that leave a node: by linearity, the node's own score.

        Args:
            scores: [edges, ...].
        """
        totals = np.zeros((len(self.nodes), *scores.shape[1:]))
        np.add.at(totals, self.source, scores)
        return totals

    def path(self, draw: Draw) -> list[int]:
        """A random path: from the logits up, each time one of the edges into a node."""
        node, path = len(self.nodes) - 1, list[int]()
        while node != 0:
            edge: int = draw.choice(self.into[node].tolist())
            path.append(edge)
            node = int(self.source[edge])
        return path

    def names(self, edge: int) -> tuple[str, str]:
        """Where an edge comes from and what it leads into."""
        return self.nodes[self.source[edge]], self.inputs[self.target[edge]]


def _readers(target: Target, shared: int) -> list[Source | None]:
    """The nodes that a target is an input of; None for the logits.

    Args:
        target: The input.
        shared: How many query heads share a key/value head.
    """
    if target.kind == "logits":
        return [None]
    if target.kind == "mlp":
        return [Source("mlp", target.layer)]
    heads = [target.head] if target.kind == "q" else range(target.head * shared, (target.head + 1) * shared)
    return [Source("head", target.layer, head) for head in heads]


def edges_among(topology: Topology, nodes: Bools) -> Bools:
    """[edges] from a kept node into an input of a kept node; embedding and logits are always kept.

    Args:
        topology: The graph.
        nodes: [nodes].
    """
    kept = nodes.copy()
    kept[[0, -1]] = True
    return np.asarray(kept[topology.source] & (topology.feeds @ kept)[topology.target])


def strengths(scores: Floats, rank: Rank) -> Floats:
    """What is ranked by: the scores, or their size; what has no number comes last."""
    chosen = np.abs(scores) if rank == "absolute" else scores
    return np.where(np.isnan(chosen), -np.inf, chosen)


def best_first(scores: Floats, rank: Rank) -> Integers:
    """Places in the order of a ranking; of equal scores the first place comes first."""
    return np.argsort(-strengths(scores, rank), kind="stable")


def greedy(topology: Topology, scores: Floats, rank: Rank) -> Integers:
    """Edges in the order in which the greedy search takes them (Hanna et al. 2403.17806).

    It begins at the logits: of all edges into nodes of the circuit the best one goes in, and with it the node that it
    comes from. So every edge leads to the logits.

    Args:
        topology: The graph.
        scores: [edges].
        rank: By score, or by size.
    """
    strength = strengths(scores, rank)
    within = np.zeros(len(topology.nodes), dtype=bool)
    seen = np.zeros(len(topology), dtype=bool)
    waiting: list[tuple[float, int]] = []

    def enter(node: int) -> None:
        within[node] = True
        fresh = topology.into[node][~seen[topology.into[node]]]
        seen[fresh] = True
        for edge in fresh.tolist():
            heapq.heappush(waiting, (-float(strength[edge]), edge))

    enter(len(topology.nodes) - 1)
    order = []
    while waiting:
        _, edge = heapq.heappop(waiting)
        order.append(edge)
        node = int(topology.source[edge])
        if not within[node]:
            enter(node)
    return np.array(order, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A circuit at one size.

    Args:
        size: The share of edges (or nodes) that were asked for.
        asked: How many those are.
        kept: [edges], what is connected of them.
    """

    size: float
    asked: int
    kept: Bools


@dataclass(frozen=True, eq=False)
class Ranking:
    """Edges or nodes, best first.

    Args:
        topology: The graph.
        order: Edges or inner nodes.
        of_nodes: Whether they are nodes.
    """

    topology: Topology
    order: Integers
    of_nodes: bool = False

    @classmethod
    def of(cls, topology: Topology, scores: Floats, rank: Rank, *, select: Select, of_nodes: bool) -> "Ranking":
        """The ranking of scored edges.

        Args:
            topology: The graph.
            scores: [edges].
            rank: By score, or by size.
            select: `greedy` is of edges alone.
            of_nodes: Rank nodes, by the sums of what leaves them.
        """
        if of_nodes:
            return cls(topology, 1 + best_first(topology.node_scores(scores)[1:-1], rank), of_nodes=True)
        order = greedy(topology, scores, rank) if select == "greedy" else best_first(scores, rank)
        return cls(topology, order[~topology.fixed[order]])

    @property
    def total(self) -> int:
        """How many there are to choose from."""
        return self.topology.inner if self.of_nodes else len(self.topology) - int(self.topology.fixed.sum())

    def at(self, size: float) -> Chosen:
        """The circuit of the best `int(size · all)`."""
        asked = int(size * self.total)
        best = self.order[:asked]
        if self.of_nodes:
            nodes = np.zeros(len(self.topology.nodes), dtype=bool)
            nodes[best] = True
            return Chosen(size, asked, self.topology.connected(edges_among(self.topology, nodes)))
        kept = self.topology.fixed.copy()
        kept[best] = True
        return Chosen(size, asked, self.topology.connected(kept))

    def all(self, sizes: Sequence[float]) -> Iterator[Chosen]:
        """The circuits of several sizes; each lies in the next."""
        return (self.at(size) for size in sizes)


def first_sizes(sizes: Sequence[float], circuits: Sequence[Bools]) -> Floats:
    """[edges] the smallest size whose circuit holds an edge; NaN where none does.

    Args:
        sizes: Rising.
        circuits: Of one ranking, [edges] each.
    """
    first = np.full(len(circuits[0]), np.nan)
    for size, kept in reversed(list(zip(sizes, circuits, strict=True))):
        first[kept] = size
    return first


def jaccard(a: Bools, b: Bools) -> float:
    """Members of both over members of either; NaN where there are none."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else float("nan")
