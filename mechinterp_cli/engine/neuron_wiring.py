"""A model as a graph whose MLPs are taken apart into neurons: proof that an MLP is the sum of what they add.

A neuron writes its activation through the down projection and the residual's multiplier, and where a norm follows the
MLP, through that norm with its scale *of the same pass*, as heads do. The projection's bias belongs to no neuron and
cancels in differences; behind a norm it would not, since two passes divide it by different scales: such a model is
refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.engine.softmax_fix import widened
from mechinterp_cli.engine.wiring import ADDITIVE, Wiring
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import device_of, probe_tokens
from mechinterp_cli.models.neurons import Down
from mechinterp_cli.models.precision import in_float32
from mechinterp_cli.models.walk import forward

_LENGTH = 12


@dataclass(frozen=True, eq=False)
class Way:
    """From one layer's neurons to what its MLP adds: linear but for the scale of a norm.

    Args:
        down: The down projection, and a norm after it in some models.
        width: How many neurons there are.
    """

    down: Down
    width: int

    @property
    def normed(self) -> bool:
        """Whether a norm scales what the MLP adds."""
        return self.down.after is not None

    def scaled(
        self, neurons: Float[Tensor, "*n d_mlp"], added: Float[Tensor, "*n d_model"] | None
    ) -> Float[Tensor, "*n d_mlp"]:
        """Neurons by the norm's scale in their pass, where there is a norm: `written` of them is what they add.

        Args:
            neurons: What enters the down projection.
            added: What the MLP adds there; looked at only where the way is `normed`.
        """
        wide = widened(neurons)
        if self.down.after is None:
            return wide
        assert added is not None
        scale = self.down.after.scale(self._projected(wide).flatten(0, -2), widened(added).flatten(0, -2)[:, None])
        return wide / scale.view(*wide.shape[:-1], 1)

    def written(self, neurons: Float[Tensor, "*n d_mlp"]) -> Float[Tensor, "*n d_model"]:
        """What neurons, by their norm's scale, add together; biases are left out."""
        found = self._projected(neurons) - self.bias(neurons)
        after = self.down.after
        return found * self.down.scale if after is None else found @ after.matrix[0].to(found)

    def bias(self, like: Tensor) -> Float[Tensor, "1 d_model"]:
        """What the down projection gives where no neuron is active."""
        return self._projected(like.new_zeros(1, self.width))

    def back(self, gradient: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_mlp"]:
        """What a gradient with respect to what the MLP adds says of each neuron: `written`, transposed."""
        after = self.down.after
        inner = gradient * self.down.scale if after is None else gradient @ after.matrix[0].T.to(gradient)
        # The projection's transpose, however its weight is laid out: the gradient of what it gives along `inner`.
        with torch.enable_grad():
            leaf = inner.new_zeros(*inner.shape[:-1], self.width).requires_grad_()
            return torch.autograd.grad(self._projected(leaf), leaf, inner)[0]

    def _projected(self, neurons: Tensor) -> Tensor:
        # Hooks that are at work on the module are not to see this: `forward`, and not a call.
        weight = next(self.down.module.parameters())
        return widened(self.down.module.forward(neurons.to(weight.dtype)))


@dataclass(frozen=True, eq=False)
class NeuronWiring:
    """What writes to a model's residual stream, neurons one by one; make it with `neurons_wired`.

    Args:
        wiring: The model's parts.
        items: What circuits are made of.
        ways: Layer to the way of its neurons, for layers with an MLP.
        deviation: Largest error of the sum of a layer's neurons, in parts of its largest element.
    """

    wiring: Wiring
    items: Items
    ways: Mapping[int, Way]
    deviation: float

    @property
    def graph(self) -> Graph:
        """Sources and targets."""
        return self.items.graph

    @property
    def sites(self) -> frozenset[Site]:
        """Where a pass is read to know all that items write."""
        neurons = {Site("neuron", layer) for layer in self.ways}
        normed = {Site("mlp_out", layer) for layer, way in self.ways.items() if way.normed}
        return frozenset({site for site in self.wiring.sites if site.kind != "mlp_out"} | neurons | normed)

    def heads(self, layer: int, seen: Mapping[Site, Tensor]) -> Float[Tensor, "n positions heads d_value"]:
        """A layer's z by the scale of the norm after attention in its pass, where there is one.

        Args:
            layer: The layer.
            seen: Activations of one pass at `sites`.
        """
        z = widened(seen[Site("z", layer)])
        if not self.wiring.normed[layer]:
            return z
        output, added = self.wiring.outputs[layer], widened(seen[Site("attn_out", layer)])
        scale = output.scale(z.flatten(2).flatten(0, 1), added.flatten(0, 1)[:, None])
        return z / scale.view(*z.shape[:2], 1, 1)

    def neurons(self, layer: int, seen: Mapping[Site, Tensor]) -> Float[Tensor, "n positions d_mlp"]:
        """A layer's neurons by the scale of the norm after its MLP in its pass, where there is one.

        Args:
            layer: A layer with an MLP.
            seen: Activations of one pass at `sites`.
        """
        return self.ways[layer].scaled(seen[Site("neuron", layer)], seen.get(Site("mlp_out", layer)))

    def output(self, layer: int, like: Tensor) -> Float[Tensor, "heads_by_d_value d_model"]:
        """What one unit of each feature of `heads` adds to the residual stream."""
        return self.wiring.outputs[layer].matrix[0].to(like)


@torch.no_grad()
def neurons_wired(wiring: Wiring, items: Items) -> NeuronWiring:
    """Prove that every MLP is the sum of what its neurons add, on random tokens in float32.

    Args:
        wiring: The model's parts.
        items: What circuits are made of.

    Raises:
        UserError: A layer's neurons cannot be told apart; says which layer and why.
    """
    model, anatomy = wiring.model, wiring.anatomy
    length = min(_LENGTH, anatomy.max_length or _LENGTH)
    tokens = probe_tokens(anatomy.vocab_size, length, torch.Generator().manual_seed(3)).to(device_of(model))
    layers = sorted({source.layer for source in items.graph.sources if source.kind == "mlp"})
    with in_float32(model):
        kinds = {Site(kind, layer) for kind in ("neuron", "mlp_out") for layer in layers}
        seen = read_sites(model, anatomy, kinds, lambda: forward(model, tokens))
        proofs = {layer: _proved(wiring, layer, seen) for layer in layers}
    ways = {layer: way for layer, (way, _) in proofs.items()}
    return NeuronWiring(wiring, items, ways, max(deviation for _, deviation in proofs.values()))


def _proved(wiring: Wiring, layer: int, seen: Mapping[Site, Tensor]) -> tuple[Way, float]:
    """A layer's way, and how far what it says of differences between tokens is from what the model does.

    Raises:
        UserError: There is none.
    """
    neurons, added = (widened(seen[Site(kind, layer)]).flatten(0, 1) for kind in ("neuron", "mlp_out"))
    down = Down.of(wiring.model, wiring.anatomy.layers[layer], neurons, added)
    if isinstance(down, str):
        raise _refused(layer, down)
    way = Way(down, neurons.shape[-1])
    if way.normed and bool(way.bias(neurons).any()):
        raise _refused(layer, "its down projection has a bias, and a norm after it, whose scale differs between passes")
    scaled = way.scaled(neurons, added)
    error = way.written(scaled - scaled.roll(1, 0)) - (added - added.roll(1, 0))
    size = float(added.abs().max())
    deviation = float(error.abs().max()) / (size or 1.0)  # an MLP may write nothing
    if not deviation <= ADDITIVE:
        raise _refused(layer, f"what they write misses it by {deviation:.1e} of its largest element")
    return way, deviation


def _refused(layer: int, reason: str) -> UserError:
    return UserError(
        f"what the MLP of layer {layer} adds is not the sum of its neurons: {reason}",
        "Use granularity: nodes, whose smallest part is a whole MLP.",
    )
