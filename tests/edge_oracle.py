"""Edges of a circuit by hand: what a head writes, and what one target makes of a stream of its own, in whole passes.

Nothing here runs a layer by itself, folds a norm or numbers edges: two whole passes of the model, with activations
read from the first and put into the second.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Source, Target
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import kinds_by_layer, visiting
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import forward
from tests.attribution_cases import Case

Metric = Callable[[Tensor, Tensor], Tensor]
Edits = dict[Site, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream's activations.

    Args:
        case: Model and prompts.
        tokens: The stream's.
        placed: Activations that stand in place of the pass's own.
    """

    case: Case
    tokens: Tensor
    placed: dict[Site, Tensor] = field(default_factory=dict)

    def run(self, changes: Edits, wanted: set[Site]) -> tuple[Tensor, dict[Site, Tensor]]:
        """Logits where they are read, and activations, of a pass with edits; both keep their graph."""
        seen: dict[Site, Tensor] = {}
        edits = {site: partial(_instead, x) for site, x in self.placed.items()} | changes

        def visit(site: Site, activation: Tensor) -> Tensor | None:
            new = edits[site](activation) if site in edits else None
            if site in wanted:
                seen[site] = (activation if new is None else new).clone()
            return new

        with visiting(self.case.model, self.case.anatomy, kinds_by_layer({*edits, *wanted}), visit):
            logits = forward(self.case.model, self.tokens)[torch.arange(len(self.tokens)), list(self.case.read)]
        return logits, seen

    @cached_property
    def seen(self) -> dict[Site, Tensor]:
        """All that the unedited pass has."""
        with torch.no_grad():
            return self.run({}, set(self.case.sites))[1]

    def output(self, source: Source) -> Tensor:
        """What a source adds to the residual stream, but for constants, [prompts, positions, d_model]."""
        if source.kind == "embed":
            return self.seen[Site("embed", 0)]
        if source.kind == "mlp":
            return self.seen[Site("mlp_out", source.layer)]
        return self._head(source.layer, source.head)

    def _head(self, layer: int, head: int) -> Tensor:
        """Through the output projection by zeroing the other heads, and times the norm's own factors of this pass."""
        site, added = Site("z", layer), Site("attn_out", layer)

        def alone(z: Tensor) -> Tensor:
            kept = torch.zeros_like(z)
            kept[:, :, head] = z[:, :, head]
            return kept

        projection = self._projection(layer)
        if projection is None:
            with torch.no_grad():
                one, none = self.run({site: alone}, {added})[1], self.run({site: torch.zeros_like}, {added})[1]
            return one[added] - none[added]
        own, whole = self._projected(projection, {site: alone}), self._projected(projection, {})
        return own * (self.seen[added] / whole)

    def _projection(self, layer: int) -> torch.nn.Module | None:
        """The output projection where a norm stands behind it, in models shaped like Gemma 2 and OLMo 2."""
        if self.case.model.config.model_type not in ("gemma2", "olmo2"):
            return None
        found: torch.nn.Module = self.case.model.model.layers[layer].self_attn.o_proj
        return found

    def _projected(self, projection: torch.nn.Module, edits: Edits) -> Tensor:
        given: list[Tensor] = []
        with hooked([projection.register_forward_hook(lambda _m, _a, out: given.append(out.clone()))]), torch.no_grad():
            self.run(edits, set())
        return given[0]

    def with_own_stream(self, target: Target, stream: Callable[[Tensor], Tensor], metric: Metric) -> Tensor:
        """The metric [prompts] when one target reads a stream of its own and everything else is as it was."""
        place, given = self.places(target)
        everyone = torch.arange(len(self.tokens))
        if given is None:
            return metric(self.run({place: stream}, set())[0], everyone)[:, 0]
        new = self.run({place: stream}, {given})[1][given]

        def put(own: Tensor) -> Tensor:
            if target.kind == "mlp":
                return new
            changed = own.clone()
            changed[:, :, target.head] = new[:, :, target.head]
            return changed

        return metric(self.run({given: put}, set())[0], everyone)[:, 0]

    def places(self, target: Target) -> tuple[Site, Site | None]:
        """The stream that a target reads, and what it makes of it (None: the logits)."""
        if target.kind == "logits":
            return Site("resid_post", target.layer - 1), None
        if target.kind != "mlp":
            return Site("resid_pre", target.layer), Site(target.kind, target.layer)
        middle = "resid_mid" in self.case.anatomy.layers[target.layer].sites
        return Site("resid_mid" if middle else "resid_pre", target.layer), Site("mlp_out", target.layer)

    def gradient(self, target: Target, metric: Metric) -> Tensor:
        """∂M/∂(the stream that one target reads), [prompts, positions, d_model]."""
        leaf = self.seen[self.places(target)[0]].clone().requires_grad_()
        with torch.enable_grad():
            total = self.with_own_stream(target, lambda _own: leaf, metric).sum()
        return torch.autograd.grad(total, leaf)[0]


def _instead(new: Tensor, _own: Tensor) -> Tensor:
    return new


def both(case: Case) -> tuple[Stream, Stream]:
    """The base and the source."""
    return Stream(case, case.base), Stream(case, case.source)


__all__ = ["Metric", "Stream", "both"]
