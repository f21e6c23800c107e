"""What scores of edges say of whole nodes: rows of the summary, which `patch`, `ablate` and `attribute` have too.

The edges that leave a node carry all that it adds, so the sum of their estimates is the estimate of patching the node.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mechinterp_cli.engine.circuit_graph import Source
from mechinterp_cli.methods.attribute.effects import Effects, Scale
from mechinterp_cli.methods.circuit.choose import Topology
from mechinterp_cli.methods.circuit.layout import Layout
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.circuit.options import LINEAR
from mechinterp_cli.methods.circuit.tables import Floats, Scored
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.summary import ALL_GROUPS

_SITES = {"embed": "embed", "head": "z", "mlp": "mlp_out"}


def node_summary(layout: Layout, scores: Sequence[Scored], streams: Mapping[str, Floats]) -> pd.DataFrame:
    """One row per score and node (and neuron), of the training prompts; of scores that are linear in edges.

    Args:
        layout: Config, model, prompts.
        scores: All scores.
        streams: Stream to [prompts, 1, metrics].
    """
    train, clusters, stats = layout.chosen("train"), layout.clusters("train"), layout.loaded.config.stats
    other = "corrupt" if layout.base == "clean" else "clean"
    scale = Scale(streams[layout.base][train, 0, 0], streams[other][train, 0, 0], stats)
    places = _typed([*map(_place, layout.graph.sources), *_neuron_places(layout.topology)])
    frames = []
    for number, score in enumerate(score for score in scores if score.name in LINEAR):
        assert score.by_prompt is not None
        effects = layout.sign * _effects(layout.topology, np.asarray(score.by_prompt, dtype=np.float64))
        found = Effects(effects, np.full(effects.shape, Status.OK, dtype=np.int8), scale)
        numbers = pd.DataFrame({"trial": np.arange(len(effects)) + number * len(effects), **_columns(found, clusters)})
        steps = pd.array([score.steps] * len(effects), dtype="Int32")
        frame = pd.concat([numbers, places], axis=1)
        frames.append(frame.assign(estimator=score.name, steps=steps, metric=layout.metric))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _effects(topology: Topology, scores: Floats) -> Floats:
    """[nodes, prompts], the logits left out, and after them every neuron where circuits are made of neurons."""
    nodes = topology.node_scores(scores)[:-1]
    if not isinstance(topology, ItemTopology):
        return nodes
    return np.concatenate([nodes, topology.neuron_scores(scores)[topology.neurons]])


def _neuron_places(topology: Topology) -> Iterator[dict[str, Any]]:
    """Where neurons are, as the trials of `patch` say it."""
    if isinstance(topology, ItemTopology):
        items = topology.items
        for item in topology.neurons.tolist():
            layer, neuron = items.graph.sources[items.source[item]].layer, int(items.unit[item])
            label = f"neuron, layer {layer}, neuron {neuron}"
            yield {"label": label, "site": "neuron", "layer": layer, "neuron": neuron}


def _columns(found: Effects, clusters: Sequence[str]) -> dict[str, Any]:
    """The numbers of all nodes."""
    low, high = found.intervals(clusters, np.ones(len(found.effects), dtype=bool))
    return {
        "group": ALL_GROUPS,
        "aggregate": "mean" if found.normalized is None else "ratio_of_means",
        "value": _nullable(found.scale.base.mean() + found.mean),
        "effect": _nullable(found.mean),
        "estimate": _nullable(found.mean),
        "normalized": None if found.normalized is None else _nullable(found.normalized),
        "n": len(clusters),
        "n_dropped": 0,
        "clusters": len(set(clusters)),
        "ci_low": _nullable(low),
        "ci_high": _nullable(high),
        "ci_method": np.where(np.isnan(low), "undefined", found.scale.stats.interval).astype(object),
        "status": np.where(np.isnan(found.best), "undefined", "ok").astype(object),
    }


def _place(source: Source) -> dict[str, Any]:
    """Where a node is, as the trials of `patch` say it."""
    site = _SITES[source.kind]
    if source.kind != "head":
        return {"label": f"{site}, layer {source.layer}", "site": site, "layer": source.layer}
    label = f"{site}, layer {source.layer}, head {source.head}"
    return {"label": label, "site": site, "layer": source.layer, "head": source.head}


def _typed(places: Sequence[dict[str, Any]]) -> pd.DataFrame:
    kinds = dict.fromkeys(("label", "site"), "string[pyarrow]") | dict.fromkeys(("layer", "head", "neuron"), "Int32")
    return pd.DataFrame(places, columns=list(kinds)).astype(kinds)


def _nullable(values: Any) -> pd.arrays.ArrowExtensionArray:
    """Numbers with null in place of NaN."""
    return pd.arrays.ArrowExtensionArray(pa.array(values, mask=np.isnan(values), from_pandas=False))
