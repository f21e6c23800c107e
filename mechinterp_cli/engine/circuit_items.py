"""What circuits of neurons are made of: what enters layer 0, every head, and every single neuron of every MLP.

A neuron is one feature of what enters an MLP's down projection. All that read an item see the same, so that a circuit
is a set of items and needs no list of edges, of which there would be tens of millions. Items stand in the order of the
graph's sources, an MLP's neurons in place of the MLP; where positions are told apart by span, they stand span by span.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int

from mechinterp_cli.engine.circuit_graph import Graph, Source, source_named
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy

_NEURON = re.compile(r"(m\d+)\.n(\d+)")


@dataclass(frozen=True, eq=False)
class Items:
    """The items of one model's graph.

    Args:
        graph: Sources and targets.
        widths: How many items each source has: an MLP as many as neurons, all others one.
    """

    graph: Graph
    widths: tuple[int, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, graph: Graph) -> "Items":
        """The items of a model.

        Args:
            anatomy: The model's.
            graph: Its graph.

        Raises:
            UserError: The neurons of a layer's MLP cannot be told apart, or there is no MLP; says which and why.
        """
        layers = {source.layer for source in graph.sources if source.kind == "mlp"}
        if not layers:
            raise UserError("this model has no MLPs, and so no neurons", "Use granularity: nodes.")
        for index in sorted(layers):
            reason = anatomy.layers[index].missing.get("neuron")
            if reason is not None:
                problem = f"layer {index} has no neuron, which circuits of neurons need: {reason}"
                raise UserError(problem, "Use granularity: nodes, whose smallest part is a whole MLP.")
        neurons = (anatomy.layers[s.layer].d_mlp if s.kind == "mlp" else 1 for s in graph.sources)
        return cls(graph, tuple(neurons))

    @cached_property
    def first(self) -> Int[np.ndarray, " sources"]:
        """The number of each source's first item, in the first span."""
        return np.concatenate([[0], np.cumsum(self.widths)[:-1]]).astype(np.int64)

    @property
    def per_span(self) -> int:
        """How many items there are in a span."""
        return sum(self.widths)

    def __len__(self) -> int:
        """How many items there are, those of every span counted."""
        return self.per_span * len(self.graph.spans)

    @cached_property
    def source(self) -> Int[np.ndarray, " items"]:
        """Every item's source, as an index into the graph's; int32."""
        once = np.repeat(np.arange(len(self.widths), dtype=np.int32), self.widths)
        return np.tile(once, len(self.graph.spans))

    @cached_property
    def unit(self) -> Int[np.ndarray, " items"]:
        """Every item's place in its source: the number of a neuron in its MLP; int32."""
        once = np.arange(self.per_span, dtype=np.int32) - self.first[self.source[: self.per_span]].astype(np.int32)
        return np.tile(once, len(self.graph.spans))

    @cached_property
    def span(self) -> Int[np.ndarray, " items"]:
        """Every item's span, as an index into the graph's; int32."""
        return np.repeat(np.arange(len(self.graph.spans), dtype=np.int32), self.per_span)

    def within(self, source: int) -> slice:
        """Where a source's items are among those of a span."""
        return slice(int(self.first[source]), int(self.first[source]) + self.widths[source])

    def source_name(self, item: int) -> str:
        """`embed`, `a3.h5` or `m3.n17`, without its span."""
        source = self.graph.sources[self.source[item]]
        return f"{source.name}.n{self.unit[item]}" if source.kind == "mlp" else source.name

    def name(self, item: int) -> str:
        """`a3.h5` or `m3.n17`, with `@span` where there are several spans."""
        own = self.source_name(item)
        return own if len(self.graph.spans) == 1 else f"{own}@{self.graph.spans[self.span[item]]}"

    def named(self, name: str) -> list[int]:
        """The items of a name, those of every span: one neuron `m3.n17`, all neurons of an MLP `m3`, a head, `embed`.

        Raises:
            UserError: It names nothing of this model.
        """
        match = _NEURON.fullmatch(name)
        source = source_named(match[1] if match else name)
        if source not in self.graph.source_index:
            raise UserError(f"there is no {name} in this model", self._layout())
        own = self.within(self.graph.source_index[source])
        chosen: Sequence[int] = range(own.start, own.stop)
        if match is not None:
            if int(match[2]) >= len(chosen):
                raise UserError(f"there is no {name}: neurons of layer {source.layer} are 0..{len(chosen) - 1}", _FORM)
            chosen = [chosen[int(match[2])]]
        return [item + span * self.per_span for span in range(len(self.graph.spans)) for item in chosen]

    def _layout(self) -> str:
        layers = self.graph.targets[-1].layer
        heads = max(source.head for source in self.graph.sources) + 1
        return f"Layers are 0..{layers - 1}, heads 0..{heads - 1}. {_FORM}"


_FORM = "Neuron 17 of layer 3 is m3.n17, head 5 of it a3.h5."


def is_neuron(name: str) -> bool:
    """Whether a name is one neuron's."""
    return _NEURON.fullmatch(name) is not None


def mlp_of(layer: int) -> Source:
    """The source that a layer's neurons belong to."""
    return Source("mlp", layer)
