"""The graph: who reads whom, how edges are numbered and named, and what is refused."""

from functools import cache

import numpy as np
import pytest

from mechinterp_cli.engine.circuit_graph import Graph, Source, Target, source_named, target_named
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from tests.families import build


@cache
def anatomy_of(family: str) -> Anatomy:
    return find_anatomy(build(family))


def graph_of(family: str) -> Graph:
    return Graph.of(anatomy_of(family))


def test_a_sequential_mlp_reads_the_heads_of_its_layer_and_a_parallel_one_does_not() -> None:
    for family, reads in (("llama", True), ("gpt_neox", False)):
        graph = graph_of(family)
        before = graph.sources_before(Target("mlp", 1))
        assert (Source("head", 1, 0) in before) is reads
        assert Source("mlp", 0) in before
        assert Source("mlp", 1) not in before
        assert Source("head", 1, 0) not in graph.sources_before(Target("q", 1, 0))
        assert graph.sources_before(Target("logits", 3)) == graph.sources


def test_keys_and_values_count_key_value_heads() -> None:
    graph, heads = graph_of("llama"), anatomy_of("llama").layers[0].heads
    assert heads is not None
    assert heads.key_value < heads.query
    counts = {kind: sum(t.kind == kind and t.layer == 0 for t in graph.targets) for kind in ("q", "k", "v")}
    assert counts == {"q": heads.query, "k": heads.key_value, "v": heads.key_value}


def test_edges_are_numbered_by_target_and_then_by_source() -> None:
    graph = graph_of("llama")
    assert graph.edge_source.dtype == graph.edge_target.dtype == np.int32
    pairs = [(s, t) for t, target in enumerate(graph.targets) for s in range(len(graph.sources_before(target)))]
    assert list(zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)) == pairs
    for edge in range(graph.n_edges):
        source, target = graph.sources[graph.edge_source[edge]], graph.targets[graph.edge_target[edge]]
        assert graph.edge(source, target) == edge
        assert graph.edge_named(graph.edge_name(edge)) == edge


def test_names() -> None:
    sources = [Source("embed"), Source("head", 3, 5), Source("mlp", 12)]
    targets = [Target("q", 3, 5), Target("k", 3, 1), Target("v", 30, 11), Target("mlp", 3), Target("logits", 30)]
    assert [source.name for source in sources] == ["embed", "a3.h5", "m12"]
    assert [target.name for target in targets] == ["a3.h5.q", "a3.h1.k", "a30.h11.v", "m3", "logits"]
    assert [source_named(source.name) for source in sources] == sources
    assert [target_named(target.name, 30) for target in targets] == targets


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a1.h0->a0.h0.q", "a1.h0->a0.h0.q is no edge: a1.h0 writes after a0.h0.q has read"),
        ("m1->m1", "m1 writes after m1 has read"),
        ("a1.h99->logits", "a1.h99 is not in this model's graph"),
        ("a0.h0->a9.h0.q", "a9.h0.q is not in this model's graph"),
        ("a0.h0", "'a0.h0' is not the name of an edge"),
        ("logits->m0", "'logits' is nothing that writes"),
        ("embed->a0.h0", "'a0.h0' is nothing that reads"),
        ("embed->m0@subject", "there is no span subject"),
    ],
)
def test_what_is_no_edge_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        graph_of("llama").edge_named(name)
    assert said in error.value.cause
    assert error.value.remedy


def test_a_node_is_all_that_its_source_writes() -> None:
    graph = Graph.of(anatomy_of("llama"), granularity="node", spans=("subject", "rest"))
    assert graph.n_items == 2 * len(graph.sources)
    chosen = np.zeros(graph.n_items, dtype=bool)
    chosen[len(graph.sources) + 3] = True
    edges = graph.edges_of(chosen)
    assert edges.sum() == sum(reads > 3 for reads in graph.reads)
    assert set(graph.edge_source[edges]) == {3}
    assert {graph.edge_name(int(edge)).split("@")[1] for edge in np.flatnonzero(edges)} == {"rest"}


def test_spans_multiply_edges() -> None:
    anatomy = anatomy_of("gpt2")
    one, two = Graph.of(anatomy), Graph.of(anatomy, spans=("subject", "rest"))
    assert two.n_edges == two.n_items == 2 * one.n_edges
    edge = two.edge_named("embed->m0@rest")
    assert edge == one.edge_named("embed->m0") + one.n_edges
    assert two.edge_span[edge] == 1


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("mamba", "layer 0 has no attn_out"),
        ("gptj", "layer 0 has no q, which edges of a circuit need"),
        ("qwen3_next", "layer 0 has no z"),
    ],
)
def test_models_whose_parts_cannot_be_told_apart_are_refused(family: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        graph_of(family)
