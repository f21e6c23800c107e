"""Directions of the residual stream from a file, as orthonormal rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import HEAD_KINDS, NEURON_KINDS, RESIDUAL_KINDS
from mechinterp_cli.text import visible

_NUMBER = "0|[1-9][0-9]{0,5}"
_NAME = re.compile(rf"(?P<site>[a-z_]+)\.(?P<layer>{_NUMBER})(?P<head>\.(?:{_NUMBER}))?(?:@(?P<view>.+))?")
_NAMING = "Tensors are named SITE.LAYER, such as resid_post.12."
_DEPENDENT = 1e-4
"""Rows of length 1 whose smallest singular value is no larger are dependent."""
_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Direction:
    """The rows of one tensor of the file.

    Args:
        name: The tensor's name.
        site: Kind of site.
        layer: Its layer.
        basis: Orthonormal rows [directions, d_model], float32, that span what the file's rows span.
    """

    name: str
    site: str
    layer: int
    basis: Float[Tensor, "directions d_model"]


def read_directions(file: str, anatomy: Anatomy) -> list[Direction]:
    """Read and check a file of directions, by layer and site.

    Args:
        file: A .safetensors file of tensors [directions, d_model] or [d_model], each named `SITE.LAYER`; `@` and what
            was read may follow, as `probe` leaves it. Its tensors of heads and neurons are passed over.
        anatomy: The model that they are of.

    Raises:
        UserError: It cannot be read, or a tensor is not of this model, has a row of length zero or dependent rows.
    """
    tensors = _read(file)
    chosen = {name: tensor for name, tensor in tensors.items() if not _within_layer(name)}
    if not chosen:
        shown = visible(", ".join(list(tensors)[:_SHOWN]))
        raise UserError(f"{visible(file)!r} holds {shown}, and no direction of the residual stream", _NAMING)
    found = [_direction(name, tensor, tensors, anatomy) for name, tensor in chosen.items()]
    return sorted(found, key=lambda direction: (direction.layer, RESIDUAL_KINDS.index(direction.site)))


def _read(file: str) -> dict[str, Tensor]:
    path = Path(file)
    if path.suffix != ".safetensors":
        raise UserError(f"{visible(file)!r} is no .safetensors file", "Save the directions with safetensors.")
    if not path.is_file():
        state = "is not an ordinary file" if path.exists() else "does not exist"
        raise UserError(f"{visible(file)!r} {state}", "Give the path of a .safetensors file.")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        problem = f"{visible(file)!r} cannot be read: {visible(str(error))}"
        raise UserError(problem, "Write the file again; it may be cut off.") from error
    if not tensors:
        raise UserError(f"{visible(file)!r} holds no tensor", _NAMING)
    return tensors


def _within_layer(name: str) -> bool:
    """Whether a tensor is of heads or neurons."""
    match = _NAME.fullmatch(name)
    return match is not None and match["site"] in (*HEAD_KINDS, *NEURON_KINDS)


def _direction(name: str, tensor: Tensor, tensors: dict[str, Tensor], anatomy: Anatomy) -> Direction:
    site, layer = _site(name, list(tensors), anatomy)
    if tensor.ndim not in (1, 2) or tensor.shape[-1] != anatomy.d_model or tensor.numel() == 0:
        problem = f"{name} is of shape {list(tensor.shape)}, not [directions, {anatomy.d_model}] or [{anatomy.d_model}]"
        raise UserError(problem, "Directions have the size of the model's residual stream.")
    if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
        raise UserError(f"{name} holds something other than finite real numbers", "Write the file again.")
    return Direction(name, site, layer, orthonormal(tensor.reshape(-1, anatomy.d_model), name))


def _site(name: str, names: Sequence[str], anatomy: Anatomy) -> tuple[str, int]:
    """The site and layer that a tensor's name says."""
    match = _NAME.fullmatch(name)
    if match is None or match["site"] not in RESIDUAL_KINDS or match["head"] is not None:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        problem = f"{visible(name)!r} names no site; the file holds {visible(', '.join(names[:_SHOWN]))}{more}"
        raise UserError(problem, f"{_NAMING} Sites: {', '.join(RESIDUAL_KINDS)}.")
    site, layer = match["site"], int(match["layer"])
    if layer >= anatomy.n_layers:
        problem = f"{name}: layer {layer} is outside 0..{anatomy.n_layers - 1}"
        raise UserError(problem, f"The model has {anatomy.n_layers} layers, counted from 0.")
    if site in anatomy.layers[layer].missing:
        reason = anatomy.layers[layer].missing[site]
        raise UserError(f"{name}: {reason}", f"Sites of this layer: {', '.join(anatomy.layers[layer].sites)}.")
    return site, layer


def orthonormal(
    rows: Float[Tensor, "directions d_model"], name: str = "the directions"
) -> Float[Tensor, "directions d_model"]:
    """Orthonormal rows of the same span, float32; the first is the first one given, at length 1.

    Args:
        rows: Directions of any length.
        name: What an error calls them.

    Raises:
        UserError: A row is zero, or one lies in the span of the others.
    """
    wide = rows.double()
    # by the largest number first: squares of very small or large ones leave the range of the type
    largest = wide.abs().amax(1, keepdim=True)
    if bool((largest == 0).any()):
        raise UserError(f"{name}: row {int((largest[:, 0] == 0).nonzero()[0])} is zero", "It is no direction.")
    wide = torch.nn.functional.normalize(wide / largest, dim=1)
    rank = int((torch.linalg.svdvals(wide) > _DEPENDENT).sum())
    if rank < len(wide):
        problem = f"{name}: its {len(wide)} rows span {rank} dimensions only"
        raise UserError(problem, "Leave out rows that are sums of others.")
    q, r = torch.linalg.qr(wide.T)
    basis: Tensor = (q * r.diagonal().sign()).T
    return basis.float().contiguous()


def joined(bases: Sequence[Float[Tensor, "directions d_model"]]) -> Float[Tensor, "rank d_model"]:
    """Orthonormal rows of the span of several bases together, float32.

    What one of them has of the others' span counts once: of two rows that differ by an angle below `_DEPENDENT` one
    direction is left.

    Args:
        bases: Orthonormal rows each.
    """
    _, sizes, rows = torch.linalg.svd(torch.cat(list(bases)).double(), full_matrices=False)
    basis: Tensor = rows[sizes > _DEPENDENT].float().contiguous()
    return basis
