"""Maps that are linear but for one number per input: y = M x / s(x) + b, found by trying and then proved.

A projection behind a norm is of this form, and so are a norm alone, a norm after a projection and a norm
within each head: s is the norm's scale. Freezing s leaves the matrix M, which is what work on a model's
weights means by "with the norm folded in".
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

Inputs = Float[Tensor, "rows d_in"]
Outputs = Float[Tensor, "rows groups d_out"]
Function = Callable[[Inputs], Outputs]

TOLERANCE = 1e-4
"""Largest difference, in parts of the largest output, between a map and what it stands for."""
_LARGE = 1e3
"""Size of the inputs tried: beside it what a norm adds to the variance is nothing."""


@dataclass(frozen=True, eq=False)
class ScaledMap:
    """y = M x / s(x) + b, with s > 0 one number per row and group (a head, or everything together).

    `matrix` is M by rows of inputs: `matrix[g, i]` is what one unit of input i gives. Its size is such that
    s is 1 on average over the inputs it was proved on; where the map is plainly linear, s is 1 everywhere.
    """

    matrix: Float[Tensor, "groups d_in d_out"]
    offset: Float[Tensor, "groups d_out"]
    deviation: float
    """Largest difference from the model's own values in the proof, in parts of the largest value."""

    def direction(self, x: Inputs) -> Outputs:
        """M x, the scale and the offset left out."""
        return torch.einsum("ni,gio->ngo", x, self.matrix)

    def scale(self, x: Inputs, y: Outputs) -> Float[Tensor, "rows groups"]:
        """Find s at inputs x whose outputs y are known, by least squares; 1 where M x is 0."""
        return scales(self.direction(x), y - self.offset)


def scales(raw: Outputs, moved: Outputs) -> Float[Tensor, "rows groups"]:
    """Find s with raw / s = moved, by least squares over the last axis; 1 where there is nothing to compare."""
    size, overlap = raw.square().sum(-1), (raw * moved).sum(-1)
    return torch.where((size > 0) & (overlap != 0), size / overlap, 1.0)


def fit(function: Function, x: Inputs, y: Outputs) -> ScaledMap | None:
    """The map that a function is, or None where it is none of this kind.

    The columns of M are the function's values at large unit inputs, less its value at 0. A norm before the
    projection has the same scale at all of them. One after it has not: then each column's scale is read off
    the value at the sum of the input and one reference. What was found must give `y` at `x`.

    Args:
        function: Rows [n, d_in] to [n, groups, d_out], any n; deterministic, each row by itself.
        x: Inputs as they occur in the model.
        y: The model's own outputs there.
    """
    probes = _Probes(function, x)
    joint = _proved(probes.units, probes.offset, x, y, together=True)
    if joint is not None:
        return joint
    for together in (True, False):
        found = _proved(probes.rescaled(together), probes.offset, x, y, together=together)
        if found is not None:
            return found
    return None


class _Probes:
    """A function's values at chosen inputs; the offset is taken off."""

    def __init__(self, function: Function, x: Inputs) -> None:
        self._function = function
        self._like = x
        self._eye = _LARGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.offset: Float[Tensor, "groups d_out"] = function(torch.zeros_like(x[:1]))[0]
        self.units: Float[Tensor, "d_in groups d_out"] = function(self._eye) - self.offset

    def rescaled(self, together: bool) -> Float[Tensor, "d_in groups d_out"]:
        """The units times their own scales, in parts of the reference's scale.

        With u = M e / s_e, r = M v / s_v and w = M (v + e) / s' the values at a unit, the reference and their
        sum, w = a r + c u where a = s_v / s' and c = s_e / s'; so u c / a = M e / s_v.
        """
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self._eye.shape[0], generator=generator).to(self._like)
        reference = _LARGE * direction / direction.norm()
        r = _wide(_grouped(self._function(reference[None]) - self.offset, together))
        w = _wide(_grouped(self._function(reference + self._eye) - self.offset, together))
        u = _wide(_grouped(self.units, together))
        rr, ru, uu = (a.mul(b).sum(-1) for a, b in ((r, r), (r, u), (u, u)))
        rw, uw = (w * r).sum(-1), (w * u).sum(-1)
        ratio = (uw * rr - rw * ru) / (rw * uu - uw * ru)
        # A unit that the function does not see stays unseen; one along the reference says nothing of its scale.
        usable = (uu > 0) & ratio.isfinite()
        columns = u * torch.where(usable, ratio, 0.0)[..., None]
        return columns.reshape(self.units.shape).to(self.units)


def _wide(values: Tensor) -> Tensor:
    """Float64, on the CPU where the device has none."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def _grouped(values: Outputs, together: bool) -> Outputs:
    return values.flatten(1)[:, None] if together else values


def _proved(
    units: Float[Tensor, "d_in groups d_out"], offset: Tensor, x: Inputs, y: Outputs, *, together: bool
) -> ScaledMap | None:
    """The map with these columns, if it gives y at x."""
    raw = torch.einsum("ni,igo->ngo", x, units)
    moved = y - offset
    size = moved.abs().max()
    s = scales(_grouped(raw, together), _grouped(moved, together))
    error = (_grouped(raw, together) / s[..., None] - _grouped(moved, together)).abs().max()
    counts = _grouped(moved, together).abs().amax(-1) > 1e-3 * size
    if not bool(error <= TOLERANCE * size) or not bool((s[counts] > 0).all()):
        return None
    typical = torch.where(counts.any(0), (s * counts).sum(0) / counts.sum(0).clamp(min=1), 1.0)
    matrix = (units / typical.view(1, -1, 1)).transpose(0, 1).contiguous()
    return ScaledMap(matrix, offset, float(error / size) if size > 0 else 0.0)
