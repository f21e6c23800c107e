"""Linear maps whose backward pass multiplies only with the features that have a gradient.

The gradient of one head's query is zero at all other heads' features of the projection. Left to itself PyTorch
multiplies with those zeros, once for every head.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class SlicedLinear(TorchFunctionMode):
    """While it is on, linear maps have the same values and gradients, and backward passes that leave zeros out.

    Weights and biases get no gradients from such maps.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch in place of each of its functions."""
        if func is F.linear and not kwargs and args[0].requires_grad:
            return _applied(args[0], args[1], args[2] if len(args) > 2 else None)
        if func is torch.addmm and not kwargs and args[1].requires_grad:  # GPT-2's own way
            return _applied(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


class _Sliced(torch.autograd.Function):
    """x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,), gradient = ctx.saved_tensors, gradients[0]
        there = gradient.flatten(0, -2).any(0).nonzero()[:, 0]
        if not len(there):
            return gradient.new_zeros(*gradient.shape[:-1], weight.shape[1]), None, None
        kept = slice(int(there[0]), int(there[-1]) + 1)
        return gradient[..., kept] @ weight[kept], None, None


def _applied(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, cast(Any, _Sliced).apply(x, weight, bias))
