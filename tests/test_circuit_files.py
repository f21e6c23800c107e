"""Circuits as JSON, as EAP-IG's and MIB's tools have it: names, shared keys and values, and there and back."""

import json
from pathlib import Path

import numpy as np
import pytest

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.methods.circuit.exchange import exportable, from_json, split_name, to_json
from mechinterp_cli.models.anatomy import Anatomy, find_anatomy
from tests.families import build


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Anatomy]:
    return {family: find_anatomy(build(family)) for family in ("gpt2", "llama", "gpt_neox")}


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_a_circuit_comes_back_from_its_file(anatomies: dict[str, Anatomy], tmp_path: Path, family: str) -> None:
    graph, rng = Graph.of(anatomies[family]), np.random.default_rng(0)
    kept, scores = rng.random(graph.n_edges) < 0.3, rng.normal(size=graph.n_edges)
    path = tmp_path / "circuit.json"
    path.write_bytes(to_json(graph, anatomies[family], kept, scores))
    found, notes = from_json(path, graph)
    assert (found == kept).all()
    assert notes == ()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_the_file_has_the_nodes_and_edges_that_eap_ig_counts(anatomies: dict[str, Anatomy], family: str) -> None:
    """By EAP-IG's own rules: heads and one MLP a layer; every earlier node into q, k, v of every query head."""
    anatomy = anatomies[family]
    graph = Graph.of(anatomy)
    every = np.ones(graph.n_edges, dtype=bool)
    data = json.loads(to_json(graph, anatomy, every, None, every=True))
    cfg = data["cfg"]
    layers, heads = cfg["n_layers"], cfg["n_heads"]
    assert cfg["d_model"] == anatomy.d_model
    assert cfg["parallel_attn_mlp"] is (family == "gpt_neox")
    assert set(data["nodes"]) == {"input", "logits"} | {
        name for i in range(layers) for name in (f"m{i}", *(f"a{i}.h{head}" for head in range(heads)))
    }
    wanted, stream = set[str](), ["input"]
    for layer in range(layers):
        own = [f"a{layer}.h{head}" for head in range(heads)]
        wanted |= {f"{node}->{head}<{kind}>" for node in stream for head in own for kind in "qkv"}
        read = stream if cfg["parallel_attn_mlp"] else [*stream, *own]
        wanted |= {f"{node}->m{layer}" for node in read}
        stream = [*stream, *own, f"m{layer}"]
    wanted |= {f"{node}->logits" for node in stream}
    assert set(data["edges"]) == wanted
    assert all(edge == {"score": 0.0, "in_graph": True} for edge in data["edges"].values())


def test_an_edge_into_a_shared_key_is_kept_where_one_head_keeps_it_and_that_is_told(
    anatomies: dict[str, Anatomy], tmp_path: Path
) -> None:
    graph = Graph.of(anatomies["llama"])
    heads = sum(s.kind == "head" and s.layer == 0 for s in graph.sources)
    shared = heads // sum(t.kind == "k" and t.layer == 0 for t in graph.targets)
    assert shared > 1
    edges = {f"input->a0.h{head}<k>": {"score": 1.0, "in_graph": head == 0} for head in range(shared)}
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"cfg": {}, "nodes": {}, "edges": edges}))
    kept, notes = from_json(path, graph)
    assert [graph.edge_name(edge) for edge in np.flatnonzero(kept).tolist()] == ["embed->a0.h0.k"]
    assert "1 edges into shared keys and values" in notes[0]


def test_names_are_read_in_either_form(anatomies: dict[str, Anatomy]) -> None:
    graph = Graph.of(anatomies["gpt2"])
    assert split_name("input->a1.h2<v>", graph) == "embed->a1.h2.v"
    assert split_name("a0.h1->m1", graph) == "a0.h1->m1"
    assert split_name("embed->a1.h2.v", graph) == "embed->a1.h2.v"


def test_a_graph_with_spans_is_not_written(anatomies: dict[str, Anatomy]) -> None:
    assert exportable(Graph.of(anatomies["gpt2"])) is None
    assert "spans" in str(exportable(Graph.of(anatomies["gpt2"], spans=("end", "rest"))))
