"""Circuits run the slow way: a whole pass with hooks for every single target, by the oracle's own attention.

Nothing of the engine is used but the graph's names. A head's output is its z through the output projection alone, times
what a norm after attention does to each element in the same pass.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Graph, Source, Target
from tests.oracle import Change, Oracle, Place

POST_NORMED = frozenset({"gemma2", "olmo2"})
Outputs = dict[Source, Tensor]


class PlainEdges:
    """A model of one of the oracle's families, target by target.

    Args:
        family: A key of the oracle's `NAMES`.
        graph: Sources, targets and edges.
        model: The model; a tiny random one where None.
    """

    def __init__(self, family: str, graph: Graph, model: object = None) -> None:
        self.family, self.graph = family, graph
        self.oracle = Oracle(family, model)

    def outputs(self, tokens: Tensor) -> Outputs:
        """What every source adds in an unedited pass."""
        _, seen = self.oracle.run(tokens)
        found: Outputs = {Source("embed"): seen["embed", 0]}
        for layer in range(len(self.oracle.layers)):
            heads = self._heads(layer, seen["z", layer])
            found |= {Source("head", layer, head): x for head, x in enumerate(heads)}
            found[Source("mlp", layer)] = seen["mlp_out", layer]
        return found

    def run(
        self,
        own: Tensor,
        other: Tensor,
        kept: np.ndarray,
        ablated: Outputs | None = None,
        span_of: Tensor | None = None,
    ) -> Tensor:
        """Logits [prompts, positions, vocab] of a circuit."""
        replaced = self.outputs(other) if ablated is None else ablated
        mine: Outputs = {Source("embed"): self.outputs(own)[Source("embed")]}
        spans = torch.zeros_like(own) if span_of is None else span_of
        live = np.zeros((len(self.graph.spans), len(self.graph.targets), len(self.graph.sources)), dtype=bool)
        live[self.graph.edge_span[kept], self.graph.edge_target[kept], self.graph.edge_source[kept]] = True

        def entering(target: Target) -> Tensor:
            row = torch.from_numpy(live[:, self.graph.target_index[target]])
            total = torch.zeros_like(mine[Source("embed")])
            for source in self.graph.sources_before(target):
                carries = row[:, self.graph.source_index[source]][spans][..., None]
                total = total + torch.where(carries, mine[source], replaced[source]) if source in mine else total
            return total + self._constant(target)

        for layer in range(len(self.oracle.layers)):
            self._attention(own, layer, entering, mine)
            mlp = Target("mlp", layer)
            place: Place = ("resid_pre" if self.oracle.names.parallel else "resid_mid", layer)
            _, seen = self.oracle.run(own, {place: _put(entering(mlp))})
            mine[Source("mlp", layer)] = seen["mlp_out", layer]
        last = len(self.oracle.layers) - 1
        logits, _ = self.oracle.run(own, {("resid_post", last): _put(entering(Target("logits", last + 1)))})
        return logits

    def _attention(self, tokens: Tensor, layer: int, entering: object, mine: Outputs) -> None:
        inputs: dict[str, Tensor] = {}
        for target in self.graph.targets:
            if target.layer == layer and target.kind in ("q", "k", "v"):
                _, seen = self.oracle.run(tokens, {("resid_pre", layer): _put(entering(target))})  # type: ignore[operator]
                whole = inputs.setdefault(target.kind, torch.zeros_like(seen[target.kind, layer]))
                whole[:, :, target.head] = seen[target.kind, layer][:, :, target.head]
        changes: Mapping[Place, Change] = {(kind, layer): _put(x) for kind, x in inputs.items()}
        _, seen = self.oracle.run(tokens, changes)
        for head, added in enumerate(self._heads(layer, seen["z", layer])):
            mine[Source("head", layer, head)] = added

    @torch.no_grad()
    def _heads(self, layer: int, z: Tensor) -> list[Tensor]:
        names, module = self.oracle.names, self.oracle.layers[layer]
        project = module.get_submodule(names.o_proj)
        nothing, whole = project(torch.zeros_like(z.flatten(2))), project(z.flatten(2))
        factor = torch.tensor(names.scale)
        if self.family in POST_NORMED:
            factor = module.get_submodule(names.attn_out)(whole) / whole
        found = []
        for head in range(z.shape[2]):
            alone = torch.zeros_like(z)
            alone[:, :, head] = z[:, :, head]
            found.append((project(alone.flatten(2)) - nothing) * factor)
        return found

    @torch.no_grad()
    def _constant(self, target: Target) -> Tensor:
        """The biases of the output projections before a target."""
        names, total = self.oracle.names, torch.zeros(())
        middle = target.kind == "mlp" and not names.parallel
        for layer in range(target.layer + middle):
            bias = self.oracle.layers[layer].get_submodule(names.o_proj).bias
            total = total if bias is None else total + bias * names.scale
        return total


def _put(value: Tensor) -> Change:
    return lambda _activation: value
