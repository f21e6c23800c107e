"""A model in float32 for a while: structure is proved there, where rounding hides nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Widen half-precision weights and buffers to float32 and give the very same tensors back.

    Yields whether the model is in float32 inside. Weights on the meta device (offloaded by accelerate)
    cannot be widened: such a model stays as it is.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [t for t in tensors if t.dtype in (torch.float16, torch.bfloat16)]
    if any(t.device.type == "meta" for t in tensors):
        yield not narrow
        return
    kept = [(t, t.data) for t in narrow]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        yield True
    finally:
        for tensor, data in kept:
            tensor.data = data
