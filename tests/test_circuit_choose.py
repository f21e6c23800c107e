"""From scores to circuits: what is connected, what a ranking and the greedy search take, against naive searches."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp_cli.engine.circuit_graph import Graph, Source, SourceKind, Target
from mechinterp_cli.methods.circuit.choose import (
    Ranking,
    Topology,
    best_first,
    edges_among,
    first_sizes,
    greedy,
)

Bools = npt.NDArray[np.bool_]


def graph(layers: int = 2, heads: int = 2, kv_heads: int = 2) -> Graph:
    """Layers of attention and MLP, one after the other."""
    sources, targets, reads = [Source("embed")], list[Target](), list[int]()
    for layer in range(layers):
        counts = {"q": heads, "k": kv_heads, "v": kv_heads}
        own = [Target(kind, layer, i) for kind, n in counts.items() for i in range(n)]  # type: ignore[arg-type]
        targets += own
        reads += [len(sources)] * len(own)
        kind: SourceKind = "head"
        sources += [Source(kind, layer, head) for head in range(heads)]
        targets.append(Target("mlp", layer))
        reads.append(len(sources))
        sources.append(Source("mlp", layer))
    return Graph(tuple(sources), (*targets, Target("logits", layers)), (*reads, len(sources)))


GRAPH, GROUPED = graph(), graph(heads=4)


def keep(of: Graph, *names: str) -> Bools:
    kept = np.zeros(of.n_edges, dtype=bool)
    kept[[of.edge_named(name) for name in names]] = True
    return kept


def named(of: Graph, kept: Bools) -> set[str]:
    return {of.edge_name(edge) for edge in np.flatnonzero(kept).tolist()}


def on_paths(topology: Topology, kept: Bools) -> Bools:
    """Edges on a path from embed to logits, by walking every path."""
    found = np.zeros(len(kept), dtype=bool)

    def walk(node: int, path: list[int]) -> None:
        if node == len(topology.nodes) - 1:
            found[path] = True
        for edge in np.flatnonzero(kept & (topology.source == node)).tolist():
            for reader in np.flatnonzero(topology.feeds[topology.target[edge]]).tolist():
                walk(reader, [*path, edge])

    walk(0, [])
    return found


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.6))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("of", [GRAPH, GROUPED], ids=["heads", "grouped"])
def test_connected_edges_are_those_on_paths(of: Graph, seed: int, share: float) -> None:
    topology = Topology.of(of)
    kept = np.random.default_rng(seed).random(of.n_edges) < share * (0.5 if of is GROUPED else 1)
    assert (topology.connected(kept) == on_paths(topology, kept)).all()


def test_a_shared_key_leads_on_through_each_head_that_reads_it() -> None:
    topology = Topology.of(GROUPED)
    for head in (2, 3):
        path = ("embed->a0.h1.k", f"a0.h{head}->logits")
        assert named(GROUPED, topology.connected(keep(GROUPED, *path))) == set(path)
    assert not topology.connected(keep(GROUPED, "embed->a0.h1.k", "a0.h1->logits")).any()


def test_what_leads_nowhere_and_what_comes_from_nowhere_is_left_out() -> None:
    topology = Topology.of(GRAPH)
    whole = ("embed->a0.h1.v", "a0.h1->a1.h0.k", "a1.h0->logits")
    loose = ("embed->a0.h0.q", "a0.h0->m1", "m0->a1.h1.v")
    assert named(GRAPH, topology.connected(keep(GRAPH, *whole, *loose))) == set(whole)
    assert not topology.connected(keep(GRAPH, *whole[1:])).any()


@pytest.mark.parametrize("rank", ["signed", "absolute"])
def test_a_ranking_keeps_int_of_size_times_all_edges_and_circuits_lie_in_each_other(rank: str) -> None:
    topology = Topology.of(GRAPH)
    scores = np.random.default_rng(0).normal(size=GRAPH.n_edges)
    ranking = Ranking.of(topology, scores, rank, select="top", of_nodes=False)  # type: ignore[arg-type]
    sizes = (0.02, 0.1, 0.33, 0.5, 1.0)
    chosen = list(ranking.all(sizes))
    strength = np.abs(scores) if rank == "absolute" else scores
    for circuit in chosen:
        best = set(sorted(range(len(scores)), key=lambda edge: -strength[edge])[: int(circuit.size * len(scores))])
        assert circuit.asked == len(best)
        assert (circuit.kept == topology.connected(np.isin(np.arange(len(scores)), list(best)))).all()
    assert all((small.kept <= large.kept).all() for small, large in itertools.pairwise(chosen))
    assert chosen[-1].kept.all()
    first = first_sizes(sizes, [circuit.kept for circuit in chosen])
    for circuit in chosen:
        assert ((first <= circuit.size) == circuit.kept).all()


def test_the_greedy_search_takes_the_best_edge_into_what_it_has() -> None:
    topology = Topology.of(GROUPED)
    scores = np.random.default_rng(1).normal(size=GROUPED.n_edges)
    order = greedy(topology, scores, "signed").tolist()
    within, left = {len(topology.nodes) - 1}, set(range(len(scores)))
    for taken in order:
        readers = [set(np.flatnonzero(topology.feeds[topology.target[edge]]).tolist()) for edge in sorted(left)]
        open_edges = [edge for edge, own in zip(sorted(left), readers, strict=True) if own & within]
        assert taken == max(open_edges, key=lambda edge: scores[edge])
        left.remove(taken)
        within.add(int(topology.source[taken]))
    assert not left
    # Every edge leads to the logits, at every size.
    for size in (0.05, 0.2):
        circuit = Ranking.of(topology, scores, "signed", select="greedy", of_nodes=False).at(size)
        assert circuit.asked == int(size * len(scores))


def test_nodes_are_ranked_by_the_sum_of_what_leaves_them_and_keep_the_edges_among_them() -> None:
    topology = Topology.of(GRAPH)
    scores = np.random.default_rng(2).normal(size=GRAPH.n_edges)
    sums = topology.node_scores(scores)
    for node, name in enumerate(topology.nodes):
        leaving = [edge for edge in range(len(scores)) if GRAPH.edge_name(edge).split("->")[0] == name]
        assert sums[node] == pytest.approx(sum(scores[edge] for edge in leaving))
    circuit = Ranking.of(topology, scores, "signed", select="top", of_nodes=True).at(0.5)
    assert circuit.asked == int(0.5 * topology.inner) == 3
    best = {topology.nodes[1 + i] for i in np.argsort(-sums[1:-1])[:3]} | {"embed", "logits"}
    for name in named(GRAPH, circuit.kept):
        source, target = name.split("->")
        assert {source, ".".join(target.split(".")[:2])} <= best
    nodes = np.isin(np.array(topology.nodes), list(best))
    assert named(GRAPH, circuit.kept) == named(GRAPH, topology.connected(edges_among(topology, nodes)))


def test_edges_without_a_score_come_last_and_ties_keep_their_order() -> None:
    scores = np.array([1.0, np.nan, 2.0, 1.0, -3.0])
    assert best_first(scores, "signed").tolist() == [2, 0, 3, 4, 1]
    assert best_first(scores, "absolute").tolist() == [4, 2, 0, 3, 1]
