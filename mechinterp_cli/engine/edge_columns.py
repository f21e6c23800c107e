"""Projections before attention, computed for a row only where what is read of that row depends on it.

Rows that stand before a layer's attention are each read by few targets: one head's query, say. The front of the layer
is the model's own code, and gives all heads of every row. Here it is found out by differentiation which columns of
which linear modules each target depends on; all others are left at zero. That nothing is lost is tried on the layer
itself before it is used.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mechinterp_cli.engine.edge_routing import Bools
from mechinterp_cli.models.record import hooked
from mechinterp_cli.models.walk import MISSING

Projection = nn.Linear | Conv1D
"""Linear modules; the second, GPT-2's, has its weight the other way round."""

TOLERANCE = 1e-5
"""Largest difference from whole projections, in parts of the largest value."""

Front = Callable[[Float[Tensor, "blocks rows d_model"]], tuple[Tensor, ...]]
"""Runs a layer up to its attention: q, k and v, [blocks, rows, heads, d] each."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What one layer's targets depend on.

    Args:
        needed: Linear module to the columns of its output that each target depends on; targets are the layer's queries,
            keys and values in that order.
    """

    needed: Mapping[Projection, Bool[np.ndarray, "targets columns"]]

    @contextmanager
    def restricted(self, reads: Sequence[Sequence[int]]) -> Iterator[None]:
        """Within, the layer's front gives what is read of each block, and anything elsewhere.

        Args:
            reads: Of every block the targets that read it.
        """
        with ExitStack() as stack:
            for module, needed in self.needed.items():
                columns = np.stack([needed[list(own)].any(0) for own in reads])
                stack.enter_context(_partly(module, columns))
            yield


def find_columns(layer: nn.Module, front: Front, rows: Float[Tensor, "rows d_model"]) -> Columns | None:
    """What a layer's targets depend on, or None where that cannot be told.

    Args:
        layer: The layer.
        front: Runs it up to its attention.
        rows: Inputs to try it on.
    """
    columns = Columns(_dependence(layer, front, rows))
    whole = front(rows[None])
    count = sum(x.shape[2] for x in whole)
    with columns.restricted([[target] for target in range(count)]):
        partly = front(rows.expand(count, *rows.shape))
    first = 0
    for full, own in zip(whole, partly, strict=True):
        for head in range(full.shape[2]):
            error = (own[first + head, :, head] - full[0, :, head]).abs().max()
            if not bool(error <= TOLERANCE * full.abs().max()):
                return None
        first += full.shape[2]
    return columns


@torch.enable_grad()
def _dependence(layer: nn.Module, front: Front, rows: Tensor) -> dict[Projection, Bools]:
    nudges: dict[Projection, Tensor] = {}

    def nudge(module: Projection, _args: object, output: Tensor) -> Tensor:
        nudges[module] = output.new_zeros(output.shape[-1], requires_grad=True)
        return output + nudges[module]

    plain = [m for m in layer.modules() if type(m) in (nn.Linear, Conv1D) and "forward" not in m.__dict__]
    with hooked([module.register_forward_hook(nudge) for module in plain]):
        seen = front(rows[None])
    generator = torch.Generator().manual_seed(0)
    found: dict[Projection, list[Bools]] = {module: [] for module in nudges}
    for x in seen:
        weights = torch.randn(x.shape[1], x.shape[3], generator=generator).to(x)
        for head in range(x.shape[2]):
            if not x.requires_grad:
                return {}
            slopes = torch.autograd.grad(
                (x[0, :, head] * weights).sum(), list(nudges.values()), retain_graph=True, allow_unused=True
            )
            for (module, own), slope in zip(nudges.items(), slopes, strict=True):
                depends = torch.zeros_like(own, dtype=torch.bool) if slope is None else slope != 0
                found[module].append(depends.cpu().numpy())
    return {module: np.stack(rows) for module, rows in found.items()}


@contextmanager
def _partly(module: Projection, columns: Bool[np.ndarray, "blocks columns"]) -> Iterator[None]:
    """The module computes these columns of each block of rows; others are zero."""
    groups: dict[bytes, list[int]] = {}
    for block, own in enumerate(columns):
        groups.setdefault(own.tobytes(), []).append(block)

    weight = module.weight.T if isinstance(module, Conv1D) else module.weight

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(len(columns), -1, x.shape[-1])
        out = x.new_zeros(*rows.shape[:2], columns.shape[1])
        for members in groups.values():
            wanted = np.flatnonzero(columns[members[0]])
            if len(wanted):  # one head's columns stand together: all between the first and the last are computed
                own = slice(int(wanted[0]), int(wanted[-1]) + 1)
                bias = None if module.bias is None else module.bias[own]
                out[members, :, own] = F.linear(rows[members], weight[own], bias)
        return out.view(*x.shape[:-1], -1)

    kept = module.__dict__.get("forward", MISSING)
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if kept is not MISSING:
            module.__dict__["forward"] = kept
