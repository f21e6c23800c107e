"""Circuits of heads and single neurons as numbers: sets of items, where other circuits are sets of edges."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.methods.circuit.choose import Bools, Floats, Integers, Topology
from mechinterp_cli.tasks.draw import Draw


@dataclass(frozen=True, eq=False)
class ItemTopology(Topology):
    """Heads and neurons as numbers: items stand where edges stand elsewhere, each leading from its node to the logits.

    Args:
        items: What circuits are made of.
    """

    items: Items

    level: ClassVar[Literal["edges", "neurons"]] = "neurons"

    @classmethod
    def over(cls, items: Items) -> "ItemTopology":
        """The numbers of some items."""
        whole = Topology.of(items.graph)
        logits = np.full(len(items), len(whole.inputs) - 1, dtype=np.int64)
        return cls(whole.nodes, whole.inputs, whole.feeds, items.source.astype(np.int64), logits, items)

    @cached_property
    def fixed(self) -> Bools:
        """[items] the embedding, which every circuit has."""
        return np.asarray(self.source == 0)

    def connected(self, kept: Bools) -> Bools:
        """Of some items those that lie on a path from the embedding to the logits.

        An item is on one where its node reads something that is kept, and something that is kept reads it. Every node
        reads the embedding and the logits read every node, so that this is all of them, or nothing without embedding.

        Args:
            kept: [items].
        """
        return kept if bool(kept[self.fixed].all()) else np.zeros_like(kept)

    def path(self, draw: Draw) -> list[int]:
        """A random path: the embedding leads to the logits through any single item."""
        chosen = np.flatnonzero(~self.fixed)
        return [int(chosen[draw.below(len(chosen))])]

    @cached_property
    def neurons(self) -> Integers:
        """Those of a span's items that are neurons."""
        mlps = np.array([source.kind == "mlp" for source in self.items.graph.sources])
        return np.flatnonzero(mlps[self.items.source[: self.items.per_span]])

    def neuron_scores(self, scores: Floats) -> Floats:
        """[items of a span, ...] sums of the scores over spans.

        Args:
            scores: [items, ...].
        """
        return np.asarray(scores.reshape(-1, self.items.per_span, *scores.shape[1:]).sum(0))
