"""Circuits given by hand: heads, MLPs and edges by name, or a file; checked against the graph before anything runs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine.circuit_graph import ARROW, Graph, Source
from mechinterp_cli.engine.circuit_items import is_neuron
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.circuit.choose import Bools, Topology, edges_among
from mechinterp_cli.methods.circuit.exchange import from_json, split_name
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.options import CircuitSet, Given

KeyPath = tuple[str | int, ...]

_MLP = re.compile(r"m?(\d+)")
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
    if isinstance(topology, ItemTopology):
        _refuse_edges(loaded, path, path_of_file, given)
    if given.file is not None:
        kept, notes = _from_file(loaded, path_of_file, given.file, graph)
    for place, edge in enumerate(given.edges):
        kept[_located(loaded, (*path, "edges", place), partial(_edges, graph, edge))] = True
    by_nodes = bool(given.heads or given.mlps)
    if isinstance(topology, ItemTopology):
        kept, by_nodes = _items(loaded, path, given, topology), False
    elif by_nodes:
        kept |= edges_among(topology, _nodes(loaded, path, given, graph))
    found = topology.connected(kept)
    if not found.any():
        problem = "an empty circuit: no edge of it lies on a path from the embedding to the logits"
        raise loaded.error(path, problem, "Give edges such as embed->a0.h1.v and a0.h1->logits, or more heads.")
    nodes = topology.nodes_of(found)
    nodes[-1] = True
    return Handmade(name, found, nodes, by_nodes, int(kept.sum() - found.sum()), notes)


def _located(loaded: LoadedConfig, path: KeyPath, find: Callable[[], Sequence[int]]) -> Sequence[int]:
    """What is found, or the error with file, line and key."""
    try:
        return find()
    except UserError as error:
        raise loaded.error(path, error.cause, error.remedy) from error


def _nodes(loaded: LoadedConfig, path: KeyPath, given: CircuitSet, graph: Graph, *, whole: bool = False) -> Bools:
    """[nodes] that are named.

    Args:
        loaded: The config, for errors.
        path: The circuit's key.
        given: What stands there.
        graph: The model's graph.
        whole: Pass over single neurons, which are refused otherwise.

    Raises:
        UserError: There is no such head or MLP.
    """
    nodes = np.zeros(len(graph.sources) + 1, dtype=bool)
    for place, name in enumerate(given.heads):
        nodes[_located(loaded, (*path, "heads", place), partial(_head, graph, name))] = True
    if given.mlps == "all":
        nodes[[i for i, source in enumerate(graph.sources) if source.kind == "mlp"]] = True
        return nodes
    for place, mlp in enumerate(given.mlps):
        if not (whole and is_neuron(str(mlp))):
            nodes[_located(loaded, (*path, "mlps", place), partial(_mlp, graph, mlp))] = True
    return nodes


def _mlp(graph: Graph, name: int | str) -> list[int]:
    """The source that an MLP is, alone.

    Raises:
        UserError: There is no such MLP, or a neuron is named.
    """
    match = _MLP.fullmatch(str(name))
    if match is None:
        told = " is a single neuron, and granularity is not neurons" if is_neuron(str(name)) else " names no MLP"
        remedy = "The MLP of layer 3 is 3; with granularity: neurons its neuron 17 is m3.n17."
        raise UserError(f"{name!r}{told}", remedy)
    source = Source("mlp", int(match[1]))
    if source not in graph.source_index:
        problem = f"layer {source.layer} has no MLP in this model"
        raise UserError(problem, f"Layers are 0..{graph.targets[-1].layer - 1}.")
    return [graph.source_index[source]]


def _refuse_edges(loaded: LoadedConfig, path: KeyPath, path_of_file: KeyPath, given: CircuitSet) -> None:
    """Refuse circuits of edges where circuits are made of neurons.

    Raises:
        UserError: Names the key.
    """
    remedy = "Give heads, and MLPs or single neurons such as m3.n17 under mlps."
    if given.file is not None:
        problem = f"{given.file}: files hold circuits of edges, and granularity is neurons"
        raise loaded.error(path_of_file, problem, remedy)
    if given.edges:
        raise loaded.error((*path, "edges"), "a circuit of edges, and granularity is neurons", remedy)


def _items(loaded: LoadedConfig, path: KeyPath, given: CircuitSet, topology: ItemTopology) -> Bools:
    """[items] that are named, and the embedding."""
    items, kept = topology.items, topology.fixed.copy()
    for place, name in enumerate(() if given.mlps == "all" else given.mlps):
        if is_neuron(str(name)):
            kept[_located(loaded, (*path, "mlps", place), partial(items.named, str(name)))] = True
    nodes = _nodes(loaded, path, given, items.graph, whole=True)
    return np.asarray(kept | nodes[topology.source])


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
