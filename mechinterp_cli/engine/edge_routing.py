"""What each edge of a decoder's graph carries in one pass, and what of the pass has to be computed.

An edge carries its source as this pass has it (*live*), as the other stream has it (*other*), or as the anchor has it
(neither). The *anchor* is an unedited stream whose numbers are known, so that only differences from it are computed:
nothing for a part whose inputs are the anchor's, and nothing for a part from which no live edge leads on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Graph, Source, Target

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]


class Masks(Protocol):
    """Which edges each circuit keeps: `masks[i]` is bool, [edges]."""

    def __len__(self) -> int:
        """How many circuits there are."""

    def __getitem__(self, circuit: int, /) -> Bools:
        """The edges that one keeps."""


@dataclass(frozen=True, eq=False)
class AllButOne:
    """For each of some edges the circuit of all edges but it.

    Args:
        edges: How many edges the graph has.
        removed: The edge that each circuit lacks.
    """

    edges: int
    removed: Sequence[int] | Integers

    def __len__(self) -> int:
        """How many circuits there are."""
        return len(self.removed)

    def __getitem__(self, circuit: int, /) -> Bools:
        """All edges but one."""
        kept = np.ones(self.edges, dtype=np.bool_)
        kept[self.removed[circuit]] = False
        return kept


@dataclass(frozen=True, eq=False)
class Routing:
    """What each edge carries in one pass.

    Args:
        live: Whether it carries the source as this pass has it.
        other: Whether it carries the source as the other stream has it.
        pinned: Target to the difference from the anchor that is its input, [prompts, positions, d_model], whatever
            its edges carry.
        alters_embed: Whether what enters layer 0 differs from the anchor's.
    """

    live: Bool[np.ndarray, "spans targets sources"]
    other: Bool[np.ndarray, "spans targets sources"]
    pinned: Mapping[int, Tensor] = field(default_factory=dict)
    alters_embed: bool = False


@dataclass(frozen=True, eq=False)
class LayerSlots:
    """Where one layer's parts stand in the graph's lists: sources and targets."""

    heads: Integers
    q: Integers
    k: Integers
    v: Integers
    mlp: int | None
    mlp_input: int | None
    parallel: bool
    """Whether the MLP reads what attention reads."""
    joint: bool
    """Whether a norm after attention makes each head's addition depend on all heads."""

    @property
    def attention(self) -> Integers:
        """All targets before attention."""
        return np.concatenate([self.q, self.k, self.v])

    def heads_among(self, targets: Bools) -> Bools:
        """[heads], whether one of a head's three inputs is among some targets, [all targets]."""
        found: Bools = targets[self.q] | np.repeat(targets[self.k] | targets[self.v], len(self.q) // len(self.k))
        return found

    def inputs_of(self, heads: Bools) -> Integers:
        """The targets of some heads, [heads]."""
        shared = heads.reshape(len(self.k), -1).any(1)
        return np.concatenate([self.q[heads], self.k[shared], self.v[shared]])


@dataclass(frozen=True, eq=False)
class Needs:
    """What of a pass is computed: every other part is the anchor's, or leads nowhere.

    Args:
        targets: Whose inputs differ from the anchor's and matter.
        sources: Whose outputs do.
        apart: Those of these sources that are live to some of those targets and not to others.
        wanted: The targets whose inputs are asked for.
    """

    targets: Bool[np.ndarray, " targets"]
    sources: Bool[np.ndarray, " sources"]
    apart: Bool[np.ndarray, " sources"]
    wanted: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Slots:
    """Where the parts of every layer stand in a graph's lists.

    Args:
        graph: The graph.
        layers: By layer.
        allowed: Which edges there are.
    """

    graph: Graph
    layers: tuple[LayerSlots, ...]
    allowed: Bool[np.ndarray, "targets sources"]

    @classmethod
    def of(cls, graph: Graph, joint: Sequence[bool]) -> "Slots":
        """The slots of a graph.

        Args:
            graph: The graph.
            joint: For every layer whether a norm follows attention.
        """
        allowed = np.zeros((len(graph.targets), len(graph.sources)), dtype=np.bool_)
        allowed[graph.edge_target, graph.edge_source] = True
        return cls(graph, tuple(_layer_slots(graph, layer, after) for layer, after in enumerate(joint)), allowed)

    @property
    def logits(self) -> int:
        """The target that is read at the end."""
        return len(self.graph.targets) - 1

    def circuit(self, kept: Bools, *, anchored_in_other: bool) -> Routing:
        """A circuit: edges that are kept carry this pass's own outputs, all others the other stream's.

        Args:
            kept: [edges].
            anchored_in_other: Whether the anchor is the other stream, rather than the one whose tokens are run.
        """
        graph = self.graph
        live = np.zeros((len(graph.spans), *self.allowed.shape), dtype=np.bool_)
        live[graph.edge_span[kept], graph.edge_target[kept], graph.edge_source[kept]] = True
        if anchored_in_other:
            return Routing(live, np.zeros_like(live), alters_embed=True)
        return Routing(live, self.allowed & ~live)

    def mattering(self, kept: Bools) -> Bools:
        """[targets], whose inputs can change the logits where only some edges, [edges], are kept."""
        graph, live = self.graph, np.zeros_like(self.allowed)
        live[graph.edge_target[kept], graph.edge_source[kept]] = True
        return self._leading(live, [self.logits])[0]

    def needs(self, routing: Routing, wanted: Sequence[int]) -> Needs:
        """What must be computed to know the inputs of some targets.

        Args:
            routing: What edges carry.
            wanted: The targets.
        """
        live: Bools = np.asarray(routing.live.any(0))
        pinned = np.zeros(live.shape[0], dtype=np.bool_)
        pinned[list(routing.pinned)] = True
        live[pinned] = False
        hot, active = self._differing(live, routing.other.any((0, 2)) | pinned, routing.alters_embed)
        targets, sources = self._leading(live, wanted)
        targets, sources = targets & hot, sources & active
        everywhere = routing.live.all(0)
        apart = (self.allowed & ~everywhere & (targets & ~pinned)[:, None]).any(0) & sources
        return Needs(targets, sources, apart, tuple(wanted))

    def _differing(self, live: Bools, hot: Bools, alters_embed: bool) -> tuple[Bools, Bools]:
        """Targets and sources that can differ from the anchor, from the beginning to the end."""
        active = np.zeros(live.shape[1], dtype=np.bool_)
        active[0] = alters_embed
        for layer in self.layers:
            own = layer.attention
            hot[own] |= (live[own] & active).any(1)
            heads = layer.heads_among(hot)
            active[layer.heads] = heads.any() if layer.joint else heads
            if layer.mlp is not None and layer.mlp_input is not None:
                hot[layer.mlp_input] |= (live[layer.mlp_input] & active).any()
                active[layer.mlp] = hot[layer.mlp_input]
        hot[self.logits] |= (live[self.logits] & active).any()
        return hot, active

    def _leading(self, live: Bools, wanted: Sequence[int]) -> tuple[Bools, Bools]:
        """Targets and sources that the wanted targets depend on, from the end to the beginning."""
        targets = np.zeros(live.shape[0], dtype=np.bool_)
        targets[list(wanted)] = True
        sources: Bools = np.asarray(live[targets].any(0))
        for layer in reversed(self.layers):
            if layer.mlp is not None and sources[layer.mlp]:
                targets[layer.mlp_input] = True
                sources |= live[layer.mlp_input]
            heads = sources[layer.heads]
            if heads.any():
                own = layer.inputs_of(np.ones_like(heads) if layer.joint else heads)
                targets[own] = True
                sources |= live[own].any(0)
        return targets, sources


def _layer_slots(graph: Graph, layer: int, joint: bool) -> LayerSlots:
    def places(parts: Sequence[Source | Target], kind: str) -> Integers:
        found = [i for i, part in enumerate(parts) if part.kind == kind and part.layer == layer]
        return np.array(found, dtype=np.int64)

    heads, mlp, mlp_input = (
        places(graph.sources, "head"),
        graph.source_index.get(Source("mlp", layer)),
        graph.target_index.get(Target("mlp", layer)),
    )
    q, k, v = (places(graph.targets, kind) for kind in ("q", "k", "v"))
    parallel = mlp_input is not None and graph.reads[mlp_input] == graph.reads[q[0]]
    return LayerSlots(heads, q, k, v, mlp, mlp_input, parallel, joint)
