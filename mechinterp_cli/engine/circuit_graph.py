"""The graph of a decoder's parts: who writes to the residual stream, who reads it, and every edge between the two.

A *source* writes: what enters layer 0 (`embed`), a query head's output (`a3.h5`: layer 3, head 5), an MLP's (`m3`).
A *target* reads: a head's query (`a3.h5.q`), a key/value head's key or value (`a3.h1.k`, `a3.h1.v`, counted by
key/value heads, which are fewer than query heads where queries are grouped), an MLP (`m3`), and the final norm and
head (`logits`). An edge `a3.h5->m7` is one source's part of what one target reads at the same position. Sources stand
in the order in which they write, so that a target reads the first so many of them, and edges need no search:
edge = `graph.first[target] + source`.

What is kept or taken away are *items*: edges, or nodes (a source with all its edges) at the coarser granularity; both
by span of positions where the graph has spans. Items are numbered span by span. Single neurons are no sources here, as
their edges would be tens of millions: circuits of neurons are of `circuit_items`.

This module is about names and numbers alone. `mechinterp_cli.engine.wiring` proves that a model is such a graph and
computes what sources write and targets read; `edge_scores` scores edges.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy, LayerAnatomy

Granularity = Literal["edge", "node"]
SourceKind = Literal["embed", "head", "mlp"]
TargetKind = Literal["q", "k", "v", "mlp", "logits"]

ATTENTION_TARGETS: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
ARROW = "->"


@dataclass(frozen=True, order=True)
class Source:
    """What writes to the residual stream; `head` is a query head, and 0 for other kinds, as `layer` is for `embed`."""

    kind: SourceKind
    layer: int = 0
    head: int = 0

    @property
    def name(self) -> str:
        """`embed`, `a3.h5` or `m3`."""
        if self.kind == "embed":
            return "embed"
        return f"a{self.layer}.h{self.head}" if self.kind == "head" else f"m{self.layer}"


@dataclass(frozen=True, order=True)
class Target:
    """What reads the residual stream, before any norm of its own.

    `head` is a query head for `q`, a key/value head for `k` and `v`, and 0 for other kinds. `layer` is the number of
    layers for `logits`.
    """

    kind: TargetKind
    layer: int
    head: int = 0

    @property
    def name(self) -> str:
        """`a3.h5.q`, `a3.h1.k`, `m3` or `logits`."""
        if self.kind in ("mlp", "logits"):
            return "logits" if self.kind == "logits" else f"m{self.layer}"
        return f"a{self.layer}.h{self.head}.{self.kind}"


@dataclass(frozen=True, eq=False)
class Graph:
    """Sources, targets and edges of one model.

    Args:
        sources: In the order in which they write.
        targets: In the order in which they read: by layer q, k and v of all heads, then the MLP; `logits` last.
        reads: For every target how many sources it reads: the first so many.
        granularity: Whether items are edges or nodes.
        spans: Names of the spans of positions by which items are told apart; one name where they are not.
    """

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    reads: tuple[int, ...]
    granularity: Granularity = "edge"
    spans: tuple[str, ...] = ("all",)

    @classmethod
    def of(cls, anatomy: Anatomy, *, granularity: Granularity = "edge", spans: Sequence[str] = ("all",)) -> "Graph":
        """The graph of a model.

        In a sequential block the MLP reads the heads of its own layer; in a parallel one it reads what they read.

        Args:
            anatomy: The model's.
            granularity: Of items.
            spans: Of positions.

        Raises:
            UserError: A layer's parts cannot be told apart; says which and why.
        """
        sources, targets, reads = [Source("embed")], list[Target](), list[int]()
        for layer in anatomy.layers:
            heads = _heads(layer)
            entering = len(sources)
            targets += [Target(kind, layer.index, i) for kind, n in heads.items() for i in range(n)]
            sources += [Source("head", layer.index, head) for head in range(heads["q"])]
            reads += [entering] * (len(targets) - len(reads))
            if layer.mlp_out is not None:
                targets.append(Target("mlp", layer.index))
                reads.append(entering if is_parallel(layer) else len(sources))
                sources.append(Source("mlp", layer.index))
        targets.append(Target("logits", anatomy.n_layers))
        reads.append(len(sources))
        return cls(tuple(sources), tuple(targets), tuple(reads), granularity, tuple(spans))

    @cached_property
    def first(self) -> Int[np.ndarray, " targets"]:
        """The number of each target's edge from `embed`, in the first span."""
        return np.concatenate([[0], np.cumsum(self.reads)[:-1]]).astype(np.int64)

    @cached_property
    def edges_per_span(self) -> int:
        """How many pairs of a source and a target there are."""
        return sum(self.reads)

    @property
    def n_edges(self) -> int:
        """How many edges there are, those of every span counted."""
        return self.edges_per_span * len(self.spans)

    @property
    def n_items(self) -> int:
        """How many items there are: edges or nodes, those of every span counted."""
        return self.n_edges if self.granularity == "edge" else len(self.sources) * len(self.spans)

    @cached_property
    def edge_source(self) -> Int[np.ndarray, " edges"]:
        """Every edge's source, as an index into `sources`; int32."""
        once = np.concatenate([np.arange(n, dtype=np.int32) for n in self.reads])
        return np.tile(once, len(self.spans))

    @cached_property
    def edge_target(self) -> Int[np.ndarray, " edges"]:
        """Every edge's target, as an index into `targets`; int32."""
        once = np.repeat(np.arange(len(self.targets), dtype=np.int32), self.reads)
        return np.tile(once, len(self.spans))

    @cached_property
    def edge_span(self) -> Int[np.ndarray, " edges"]:
        """Every edge's span, as an index into `spans`; int32."""
        return np.repeat(np.arange(len(self.spans), dtype=np.int32), self.edges_per_span)

    @cached_property
    def edge_item(self) -> Int[np.ndarray, " edges"]:
        """The item that every edge belongs to; int32."""
        if self.granularity == "edge":
            return np.arange(self.n_edges, dtype=np.int32)
        return np.asarray(self.edge_span * len(self.sources) + self.edge_source, dtype=np.int32)

    def edges_of(self, items: Bool[np.ndarray, " items"]) -> Bool[np.ndarray, " edges"]:
        """Which edges some items have.

        Args:
            items: Which items.
        """
        return np.take(items, self.edge_item)

    def sources_before(self, target: Target) -> tuple[Source, ...]:
        """What a target reads."""
        return self.sources[: self.reads[self.target_index[target]]]

    @cached_property
    def source_index(self) -> dict[Source, int]:
        """Where each source stands."""
        return {source: i for i, source in enumerate(self.sources)}

    @cached_property
    def target_index(self) -> dict[Target, int]:
        """Where each target stands."""
        return {target: i for i, target in enumerate(self.targets)}

    def edge(self, source: Source, target: Target, span: int = 0) -> int:
        """The number of an edge.

        Raises:
            UserError: There is no such source, target or edge.
        """
        for node, known in ((source, self.source_index), (target, self.target_index)):
            if node not in known:
                raise UserError(f"{node.name} is not in this model's graph", self._layout())
        at, to = self.source_index[source], self.target_index[target]
        if at >= self.reads[to]:
            raise UserError(
                f"{source.name}{ARROW}{target.name} is no edge: {source.name} writes after {target.name} has read",
                "Edges go from an earlier part to a later one; perhaps the two are the wrong way round.",
            )
        return span * self.edges_per_span + int(self.first[to]) + at

    def edge_name(self, edge: int) -> str:
        """`a3.h5->m7`, with `@span` where there are several spans."""
        source, target = self.sources[self.edge_source[edge]], self.targets[self.edge_target[edge]]
        ends = f"{source.name}{ARROW}{target.name}"
        return ends if len(self.spans) == 1 else f"{ends}@{self.spans[self.edge_span[edge]]}"

    def edge_named(self, name: str) -> int:
        """The number of the edge of that name.

        Raises:
            UserError: It is no edge's name.
        """
        ends, at, span = name.partition("@")
        source, arrow, target = ends.partition(ARROW)
        if not arrow:
            raise UserError(f"{name!r} is not the name of an edge", "Write it as a3.h5->m7.")
        if at and span not in self.spans:
            raise UserError(f"{name!r}: there is no span {span}", f"Spans are {', '.join(self.spans)}.")
        found = source_named(source.strip()), target_named(target.strip(), self.targets[-1].layer)
        return self.edge(*found, self.spans.index(span) if at else 0)

    def _layout(self) -> str:
        layers, heads = self.targets[-1].layer, max((s.head for s in self.sources), default=0) + 1
        kv_heads = max((t.head for t in self.targets if t.kind == "k"), default=0) + 1
        return f"Layers are 0..{layers - 1}, heads 0..{heads - 1}, key/value heads (of k and v) 0..{kv_heads - 1}."


def is_parallel(layer: LayerAnatomy) -> bool:
    """Whether attention and MLP read the same stream; that the MLP reads nothing else is proved by `wiring`."""
    return layer.attn_out is not None and layer.mlp_out is not None and layer.mid is None


def _heads(layer: LayerAnatomy) -> dict[Literal["q", "k", "v"], int]:
    """How many targets of each kind a layer's attention has.

    Raises:
        UserError: Its heads cannot be told apart.
    """
    no_mlp = layer.mlp_out is None and layer.attn_out is not None
    for kind in ("attn_out", *(() if no_mlp else ("mlp_out",)), "z", *ATTENTION_TARGETS):
        if kind in layer.missing:
            raise UserError(
                f"layer {layer.index} has no {kind}, which edges of a circuit need: {layer.missing[kind]}",
                "Take another model, or patch whole sites with patch or attribute.",
            )
    assert layer.heads is not None
    return {"q": layer.heads.query, "k": layer.heads.key_value, "v": layer.heads.key_value}


def source_named(name: str) -> Source:
    """The source of that name.

    Raises:
        UserError: It is no source's name.
    """
    if name == "embed":
        return Source("embed")
    if found := re.fullmatch(r"a(\d+)\.h(\d+)", name):
        return Source("head", int(found[1]), int(found[2]))
    if found := re.fullmatch(r"m(\d+)", name):
        return Source("mlp", int(found[1]))
    raise UserError(
        f"{name!r} is nothing that writes to the residual stream", "Write embed, a3.h5 (layer 3, head 5) or m3."
    )


def target_named(name: str, n_layers: int) -> Target:
    """The target of that name.

    Args:
        name: As `Target.name` gives it.
        n_layers: The model's number of layers.

    Raises:
        UserError: It is no target's name.
    """
    if name == "logits":
        return Target("logits", n_layers)
    for kind in ATTENTION_TARGETS:
        if found := re.fullmatch(rf"a(\d+)\.h(\d+)\.{kind}", name):
            return Target(kind, int(found[1]), int(found[2]))
    if found := re.fullmatch(r"m(\d+)", name):
        return Target("mlp", int(found[1]))
    raise UserError(
        f"{name!r} is nothing that reads the residual stream",
        "Write a3.h5.q, a3.h1.k or a3.h1.v (key/value head 1 of layer 3), m3 or logits.",
    )
