"""Circuits given by hand: heads, MLPs and edges by name, or a file; checked against the graph before anything runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.circuit_graph import ARROW, Graph, Source
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.circuit.choose import Bools, Topology, connected, edges_among, nodes_of
from mechinterp_cli.methods.circuit.exchange import from_json, split_name
from mechinterp_cli.methods.circuit.options import CircuitSet, Given

KeyPath = tuple[str | int, ...]

_HEAD = re.compile(r"a?(\d+)\.h?(\d+)")
_SOURCES = (
    (re.compile(r"input"), "embed"),
    (re.compile(r"(\d+)\.(\d+)"), r"a\1.h\2"),
    (re.compile(r"mlp(\d+)"), r"m\1"),
)
_TARGETS = ((re.compile(r"(\d+)\.(\d+)\.([qkv])"), r"a\1.h\2.\3"), (re.compile(r"mlp(\d+)"), r"m\1"))


@dataclass(frozen=True, eq=False)
class Handmade:
    """A circuit that was given.

    Args:
        name: `given` or `reference`.
        kept: [edges], all of them connected.
        nodes: [nodes] of the topology that are in it, the embedding and the logits among them.
        by_nodes: Whether nodes were given, and the edges are all those among them.
        dropped: Edges that were given and lie on no path from the embedding to the logits.
        notes: What a reader must know of a file.
    """

    name: str
    kept: Bools
    nodes: Bools
    by_nodes: bool
    dropped: int = 0
    notes: tuple[str, ...] = ()


def resolve(loaded: LoadedConfig, name: str, given: Given, graph: Graph, topology: Topology) -> Handmade:
    """The edges of a circuit that the config gives.

    Args:
        loaded: The config, for errors with file and line.
        name: Its key in the section.
        given: What stands there.
        graph: The model's graph.
        topology: The same as numbers.

    Raises:
        UserError: A head, MLP or edge is not there, an edge is the wrong way round, a file cannot be read, or nothing
            is connected; names the key.
    """
    path: KeyPath = ("circuit", name)
    if isinstance(given, str):
        given, path_of_file = CircuitSet(file=given), path
    else:
        path_of_file = (*path, "file")
    kept, notes = np.zeros(graph.n_edges, dtype=bool), tuple[str, ...]()
    if given.file is not None:
        kept, notes = _from_file(loaded, path_of_file, given.file, graph)
    for place, edge in enumerate(given.edges):
        kept[_located(loaded, (*path, "edges", place), partial(_edges, graph, edge))] = True
    by_nodes = bool(given.heads or given.mlps)
    if by_nodes:
        kept |= edges_among(topology, _nodes(loaded, path, given, graph))
    found = connected(topology, kept)
    if not found.any():
        problem = "an empty circuit: no edge of it lies on a path from the embedding to the logits"
        raise loaded.error(path, problem, "Give edges such as embed->a0.h1.v and a0.h1->logits, or more heads.")
    nodes = nodes_of(topology, found)
    nodes[-1] = True
    return Handmade(name, found, nodes, by_nodes, int(kept.sum() - found.sum()), notes)


def _located(loaded: LoadedConfig, path: KeyPath, find: Callable[[], Sequence[int]]) -> Sequence[int]:
    """What is found, or the error with file, line and key."""
    try:
        return find()
    except UserError as error:
        raise loaded.error(path, error.cause, error.remedy) from error


def _nodes(loaded: LoadedConfig, path: KeyPath, given: CircuitSet, graph: Graph) -> Bools:
    """[nodes] that are named."""
    nodes = np.zeros(len(graph.sources) + 1, dtype=bool)
    for place, name in enumerate(given.heads):
        nodes[_located(loaded, (*path, "heads", place), partial(_head, graph, name))] = True
    mlps = [source for source in graph.sources if source.kind == "mlp"]
    layers = [source.layer for source in mlps] if given.mlps == "all" else given.mlps
    for place, layer in enumerate(layers):
        source = Source("mlp", layer)
        if source not in graph.source_index:
            remedy = f"Layers are 0..{graph.targets[-1].layer - 1}."
            raise loaded.error((*path, "mlps", place), f"layer {layer} has no MLP in this model", remedy)
        nodes[graph.source_index[source]] = True
    return nodes


def _head(graph: Graph, name: str) -> list[int]:
    """The source that a head is, alone.

    Raises:
        UserError: There is no such head.
    """
    match = _HEAD.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} names no head", "Head 6 of layer 9 is 9.6.")
    source = Source("head", int(match[1]), int(match[2]))
    if source not in graph.source_index:
        layers = graph.targets[-1].layer
        heads = sum(other.kind == "head" and other.layer == 0 for other in graph.sources)
        problem = f"there is no head {name}: layers are 0..{layers - 1}, heads 0..{heads - 1}"
        raise UserError(problem, "Head 6 of layer 9 is 9.6.")
    return [graph.source_index[source]]


def _edges(graph: Graph, name: str) -> list[int]:
    """The edges of a name, one for each span of positions.

    Raises:
        UserError: There is no such edge.
    """
    written = split_name(name, graph)
    source, arrow, target = written.partition(ARROW)
    ends = _rewritten(source.strip(), _SOURCES) + arrow + _rewritten(target.strip(), _TARGETS)
    first = graph.edge_named(ends)
    return [first + span * graph.edges_per_span for span in range(len(graph.spans))]


def _rewritten(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """A name in the graph's own words."""
    for pattern, form in rules:
        if pattern.fullmatch(name):
            return pattern.sub(form, name)
    return name


def _from_file(loaded: LoadedConfig, path: KeyPath, file: str, graph: Graph) -> tuple[Bools, tuple[str, ...]]:
    try:
        return from_json(Path(file), graph)
    except UserError as error:
        raise loaded.error(path, f"{file}: {error.cause}", error.remedy) from error
