"""Circuits as JSON in the form that EAP-IG's and MIB's tools read and write.

`cfg` (n_layers, n_heads, parallel_attn_mlp, d_model), `nodes` (name to `in_graph`) and `edges` (name to `score` and
`in_graph`). There the embedding is `input`, and an edge into a head says which input after it: `a0.h1->a1.h2<k>`. Keys
and values are counted by query head there and by key/value head here: what is written stands once for each query head
that shares one, and what is read is kept where one of them keeps it. Edges that a file does not name are not in it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.engine.circuit_graph import ARROW, Graph, Source, Target, is_parallel
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

MOST_BYTES = 1 << 30
"""Larger files are refused."""
_EMBED = "input"
_INTO_HEAD = re.compile(r"a(\d+)\.h(\d+)<([qkv])>")


@lru_cache(maxsize=4)
def _shares(graph: Graph) -> Mapping[int, int]:
    """By layer how many query heads share a key/value head."""
    counts = Counter((target.layer, target.kind) for target in graph.targets)
    return {layer: n // counts[layer, "k"] for (layer, kind), n in counts.items() if kind == "q"}


NO_NEURONS = "its neurons are features of the residual stream that a node writes, and not those of an MLP"
"""Why circuits of neurons cannot be written in this form."""


def exportable(graph: Graph) -> str | None:
    """Why the graph cannot be written in this form; None where it can."""
    heads = {layer: 0 for layer in range(graph.targets[-1].layer)}
    for source in graph.sources:
        if source.kind == "head":
            heads[source.layer] += 1
    mlps = sum(source.kind == "mlp" for source in graph.sources)
    if len(set(heads.values())) > 1 or mlps != len(heads):
        return "its layers are not alike"
    return None if len(graph.spans) == 1 else "it tells spans of positions apart"


def to_json(graph: Graph, anatomy: Anatomy, kept: Bools, scores: Floats | None, *, every: bool = False) -> bytes:
    """A circuit as a file.

    Args:
        graph: The graph.
        anatomy: The model's.
        kept: [edges].
        scores: [edges], or none.
        every: Write the edges that are not kept too, with their scores.
    """
    layers = graph.targets[-1].layer
    heads = sum(source.kind == "head" and source.layer == 0 for source in graph.sources)
    within = np.zeros(len(graph.sources), dtype=bool)
    within[graph.edge_source[kept]] = True
    nodes = {_node(source): {"in_graph": bool(within[i])} for i, source in enumerate(graph.sources)}
    edges = {}
    for edge in range(graph.n_edges) if every else np.flatnonzero(kept).tolist():
        score = 0.0 if scores is None or not np.isfinite(scores[edge]) else float(scores[edge])
        for name in _names(graph, edge):
            edges[name] = {"score": score, "in_graph": bool(kept[edge])}
    parallel = all(is_parallel(layer) for layer in anatomy.layers)
    cfg = {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": anatomy.d_model}
    data = {"cfg": cfg, "nodes": nodes | {"logits": {"in_graph": True}}, "edges": edges}
    return json.dumps(data, indent=None if every else 1).encode()


def _node(source: Source) -> str:
    return _EMBED if source.kind == "embed" else source.name


def _names(graph: Graph, edge: int) -> Iterator[str]:
    """An edge's names, one for each query head whose input it leads into."""
    source, target = graph.sources[graph.edge_source[edge]], graph.targets[graph.edge_target[edge]]
    start = f"{_node(source)}{ARROW}"
    if target.kind in ("mlp", "logits"):
        yield start + target.name
        return
    share = 1 if target.kind == "q" else _shares(graph)[target.layer]
    for head in range(target.head * share, (target.head + 1) * share):
        yield f"{start}a{target.layer}.h{head}<{target.kind}>"


def split_name(name: str, graph: Graph) -> str:
    """An edge's name in the graph's own words where it is written as these files have it; else as it is.

    Args:
        name: `input->a0.h1<k>`.
        graph: The graph, whose key/value heads may be fewer.
    """
    source, arrow, target = name.partition(ARROW)
    match = _INTO_HEAD.fullmatch(target.strip())
    if match is not None:
        layer, head, kind = int(match[1]), int(match[2]), match[3]
        if kind != "q" and Target("q", layer, head) in graph.target_index:
            head //= _shares(graph)[layer]
        target = f"a{layer}.h{head}.{kind}"
    return ("embed" if source.strip() == _EMBED else source) + arrow + target


def from_json(path: Path, graph: Graph) -> tuple[Bools, tuple[str, ...]]:
    """The edges of a circuit in a file, and what a reader must know of it.

    Args:
        path: The file.
        graph: The model's graph.

    Raises:
        UserError: It cannot be read, is of another form or of another model, or has no edge in the circuit.
    """
    data = _read(path)
    layers = data.get("cfg", {}).get("n_layers") if isinstance(data.get("cfg"), dict) else None
    if layers is not None and layers != graph.targets[-1].layer:
        problem = f"it is of a model of {layers} layers, and this one has {graph.targets[-1].layer}"
        raise UserError(problem, "Give a circuit of this model.")
    kept, dropped = np.zeros(graph.n_edges, dtype=bool), np.zeros(graph.n_edges, dtype=bool)
    for name, entry in data["edges"].items():
        at = graph.edge_named(split_name(name, graph))
        (kept if _is_in(name, entry) else dropped)[at :: graph.edges_per_span] = True
    if not kept.any():
        problem = "no edge is in the circuit (in_graph is false everywhere)"
        raise UserError(problem, "Files of scores alone hold no circuit; choose one of its sizes first.")
    both = int((kept & dropped).sum())
    note = f"{path.name}: {both} edges into shared keys and values are kept for some query heads only; they are kept"
    return kept, (note,) if both else ()


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError("larger than 1 GiB", "Leave out the edges that are not in the circuit.")
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", "Give the path of a .json file.") from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", "Write it with this method, or with EAP-IG's Graph.to_json.") from error
    if not isinstance(data, dict) or not isinstance(data.get("edges"), dict):
        raise UserError("has no `edges`", "It must hold cfg, nodes and edges, as EAP-IG's Graph.to_json writes them.")
    return data


def _is_in(name: str, entry: Any) -> bool:
    """Whether a file says that an edge is in the circuit."""
    found = entry.get("in_graph") if isinstance(entry, Mapping) else entry
    if not isinstance(found, bool):
        raise UserError(f"edge {name!r} has no `in_graph` that is true or false", "See EAP-IG's Graph.to_json.")
    return found
