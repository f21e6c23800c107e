"""Functions with their own values and simpler gradients: norms of constant scale, secants of activation functions."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

NEAR_ZERO = 1e-3
"""Where f(0) is not 0, nearer than this the difference f(x) − f(0) has too few digits for its secant."""


@torch.no_grad()
def is_elementwise(function: Callable[[Tensor], Any], like: Tensor) -> bool:
    """Whether a function changes what it is given, and each element by itself.

    Args:
        function: What is tried, on numbers between −3 and 3.
        like: Something that it takes, [batch, …].
    """
    probe = torch.linspace(-3, 3, like[:1].numel(), device=like.device).to(like.dtype).view(like[:1].shape)
    image = function(probe)
    if not isinstance(image, Tensor) or image.shape != probe.shape or torch.equal(image, probe):
        return False
    kept = torch.arange(probe.numel(), device=like.device).view(probe.shape) * 0.618 % 1 < 0.5
    return torch.allclose(function(torch.where(kept, probe, 0.5))[kept], image[kept], rtol=1e-4, atol=1e-6)


def secant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) with the gradient (f(x) − f(0)) / x, of an f that maps each element by itself.

    At 0 the gradient is the mean of f's slopes on both sides. In half precision f has its own value, and the gradient
    is computed in float32.

    Args:
        function: f.
        x: Of any shape.
    """
    with torch.no_grad():
        value = function(x)
        slope = _slope(function, x.detach(), value)
    return _with_value(x * slope.to(x.dtype), value)


def _slope(function: Callable[[Tensor], Tensor], x: Tensor, value: Tensor) -> Tensor:
    """(f(x) − f(0)) / x, and its limit where x is too near 0."""
    wide = x if x.dtype == torch.float64 else x.float()
    image = value if wide.dtype == x.dtype else function(wide)
    zero = torch.zeros_like(wide[(slice(1),) * (wide.ndim - 1)])
    origin = function(zero)
    limit = (function(zero + NEAR_ZERO) - function(zero - NEAR_ZERO)) / (2 * NEAR_ZERO)
    near = (wide == 0) | ((origin != 0) & (wide.abs() < NEAR_ZERO))
    return torch.where(near, limit, (image - origin) / torch.where(near, 1, wide))


class _Value(torch.autograd.Function):
    """One tensor's value with another one's gradient.

    The value comes in a tuple: what autograd knows as an input would leave as a view, that nothing may change in place.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, value: tuple[Tensor]) -> Tensor:
        return value[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _with_value(gradient: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient`."""
    apply: Callable[..., Tensor] = cast(Any, _Value).apply
    return apply(gradient, (value,))


def _layer_norm(
    x: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(tuple(shape)), 0))
    centred = x - x.mean(dims, keepdim=True)
    normed = centred * torch.rsqrt(centred.detach().square().mean(dims, keepdim=True) + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def _rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(tuple(shape)), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    normed = x * torch.rsqrt(x.detach().square().mean(dims, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def _group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    grouped = x.reshape(len(x), groups, -1)
    normed = _layer_norm(grouped, grouped.shape[-1:], eps=eps).reshape(x.shape)
    per_channel = (1, -1, *(1,) * (x.ndim - 2))
    normed = normed if weight is None else normed * weight.view(per_channel)
    return normed if bias is None else normed + bias.view(per_channel)


def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x.detach(), p, dim, keepdim=True)
    return x / length.clamp_min(eps)


NORMS: Mapping[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.normalize: _normalize,
}
"""Norms that PyTorch computes in one call, and the same with the denominator detached."""


def frozen_norm(func: Any, args: Any, kwargs: Any) -> Tensor:
    """A norm's own value, with the gradient that it has when its denominator is a constant.

    Args:
        func: A key of `NORMS`.
        args: Its arguments.
        kwargs: Its keywords.
    """
    x = args[0]
    wide = x if x.dtype == torch.float64 else x.float()
    with torch.no_grad():
        value = func(*args, **kwargs)
    return _with_value(NORMS[func](wide, *args[1:], **kwargs).to(value.dtype), value)
