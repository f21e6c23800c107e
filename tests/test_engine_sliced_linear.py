"""Linear maps whose backward pass leaves zeros out: same values, same gradients, fewer multiplications."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from mechinterp_cli.engine.sliced_linear import SlicedLinear

conv1d: Any = Conv1D
MAPS = {"linear": nn.Linear(6, 9), "no bias": nn.Linear(6, 9, bias=False), "gpt2": conv1d(9, 6)}


def gradient(output: Tensor, x: Tensor, features: slice) -> tuple[Tensor, int]:
    """Of some features' sum with weights, and the multiplications that it took."""
    part = output[..., features]
    weights = torch.arange(1.0, part.numel() + 1).reshape(part.shape)
    with FlopCounterMode(display=False) as counter:
        found = torch.autograd.grad(part, x, weights)[0]
    return found, counter.get_total_flops()


@pytest.mark.parametrize("name", MAPS)
def test_it_is_the_same_map_with_a_shorter_way_back(name: str) -> None:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = MAPS[name](x)
    with SlicedLinear():
        sliced = MAPS[name](x)
    assert torch.equal(plain, sliced)
    wanted, whole = gradient(plain, x, slice(3, 5))
    found, less = gradient(sliced, x, slice(3, 5))
    assert torch.allclose(found, wanted, atol=1e-6)
    assert less * 9 == whole * 2
    assert found.abs().max() > 0


def test_no_gradient_is_zero_and_nan_stays() -> None:
    x = torch.ones(1, 6, requires_grad=True)
    with SlicedLinear():
        nothing, bad = MAPS["linear"](x), MAPS["linear"](x)
    assert not torch.autograd.grad(nothing, x, torch.zeros(1, 9))[0].any()
    assert torch.autograd.grad(bad, x, torch.full((1, 9), torch.nan))[0].isnan().all()


def test_it_is_off_outside_and_without_gradients() -> None:
    x = torch.ones(1, 6, requires_grad=True)
    with SlicedLinear():
        alone = MAPS["linear"](x.detach())
    assert "Sliced" not in str(alone.grad_fn)
    assert "Sliced" not in str(MAPS["linear"](x).grad_fn)
