"""What single neurons add to the residual stream, by the model's own down projection, which is tried out."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp_cli.models.anatomy import LayerAnatomy
from mechinterp_cli.models.scaled import TOLERANCE, ScaledMap, fit
from mechinterp_cli.models.walk import first_tensor


@dataclass(frozen=True, eq=False)
class Down:
    """The way from a layer's neurons to what its MLP adds: a down projection, and a norm after it in some models."""

    module: nn.Module
    scale: float
    """What the model multiplies the MLP's output with."""
    after: ScaledMap | None
    """From the projection's output to what is added, where something stands between the two."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layer: LayerAnatomy,
        neurons: Float[Tensor, "rows d_mlp"],
        added: Float[Tensor, "rows d_model"],
    ) -> "Down | str":
        """Find a layer's way, or the reason why its neurons cannot be told apart.

        Args:
            model: The model, in float32.
            layer: One that has `neuron`.
            neurons: What enters the down projection, of some tokens; the way is tried on them.
            added: What the MLP adds at these tokens.
        """
        assert layer.down is not None
        assert layer.mlp_out is not None
        module, scale = model.get_submodule(layer.down), layer.mlp_out.scale
        projected = _call(module, neurons)
        size = float(added.abs().max())
        if float((projected * scale - added).abs().max()) <= TOLERANCE * size:
            return cls(module, scale, None)
        norm = model.get_submodule(layer.mlp_out.module)
        found = fit(lambda rows: (_call(norm, rows) * scale)[:, None], projected, added[:, None])
        reason = "what stands between the down projection and the residual stream is no norm"
        return reason if found is None else cls(module, scale, found)

    def parts(
        self,
        neurons: Float[Tensor, "rows d_mlp"],
        added: Float[Tensor, "rows d_model"],
        direction: Float[Tensor, "rows d_model"],
    ) -> tuple[Float[Tensor, "rows d_mlp"], Float[Tensor, " rows"]]:
        """What each neuron adds along a direction, and what the biases add; together what the MLP does.

        A norm after the projection has its scale frozen.

        Args:
            neurons: What enters the down projection.
            added: What the MLP adds.
            direction: One for each row.
        """
        bias = direction.new_zeros(len(direction))
        if self.after is None:
            inner = direction * self.scale
        else:
            scale = self.after.scale(_call(self.module, neurons), added[:, None])
            inner, bias = direction @ self.after.matrix[0].T / scale, direction @ self.after.offset[0]
        bias = bias + inner @ _call(self.module, torch.zeros_like(neurons[:1]))[0]
        # The projection's transpose, however its weight is laid out: the gradient of what it gives along `inner`.
        with torch.enable_grad():
            leaf = neurons.detach().requires_grad_()
            weights = torch.autograd.grad((_call(self.module, leaf) * inner).sum(), leaf)[0]
        return neurons * weights, bias


def _call(module: nn.Module, rows: Float[Tensor, "rows features"]) -> Float[Tensor, "rows d_out"]:
    """A module on rows, each a prompt of one token."""
    output = first_tensor(module(rows[:, None]))
    return output.reshape(len(rows), -1).float()
