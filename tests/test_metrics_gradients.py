"""Metrics that can be differentiated: the measured numbers, the right slopes, and a refusal of counts."""

import pytest
import torch
from torch import Tensor

from mechinterp_cli.errors import UserError
from mechinterp_cli.metrics import METRICS, ROWS_PER_CHUNK, Measurer
from mechinterp_cli.tasks.prompts import Prompt
from tests.test_metrics import prompt

VOCAB = 23
SMOOTH = tuple(sorted(name for name, metric in METRICS.items() if metric.differentiable))
"""The metrics of a single position."""


def measurer(*names: str) -> Measurer:
    prompts: list[Prompt] = [prompt((3,), (5,)), prompt((2, 7), (11, 1, 4)), prompt((20,), (0,))]
    reference = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Measurer(names, prompts, reference)


def some_logits(rows: int) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return logits, torch.arange(rows) % 3


def test_counts_are_told_from_the_others() -> None:
    assert set(METRICS) - set(SMOOTH) == {"rank", "accuracy"}


@pytest.mark.parametrize("rows", [3, ROWS_PER_CHUNK + 5])
def test_the_numbers_are_the_measured_ones(rows: int) -> None:
    measure, (logits, index) = measurer(*SMOOTH), some_logits(rows)
    values = measure.differentiable(logits.requires_grad_(), index)
    assert values.requires_grad
    assert torch.equal(values, measure(logits, index))
    assert not measure(logits, index).requires_grad


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_those_of_differences(name: str) -> None:
    measure, (logits, index) = measurer(name), some_logits(ROWS_PER_CHUNK + 5)
    values = measure.differentiable(logits.requires_grad_(), index)[:, 0]
    gradient = torch.autograd.grad(values.sum(), logits)[0]
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    with torch.no_grad():
        slope = (measure(logits + step * direction, index) - measure(logits - step * direction, index))[:, 0] / (
            2 * step
        )
    assert slope.abs().max() > 1e-3
    assert ((gradient * direction).sum(1) - slope).abs().max() < 1e-6 * slope.abs().max()


def test_kl_has_no_gradient_at_its_own_reference() -> None:
    measure = measurer("kl")
    reference = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = measure.differentiable(reference.requires_grad_(), torch.arange(3))
    gradient = torch.autograd.grad(values.sum(), reference)[0]
    assert gradient.abs().max() < 1e-12


def test_forbidden_tokens_do_not_spoil_gradients() -> None:
    logits, index = some_logits(6)
    logits[:, 15] = -torch.inf
    values = measurer(*SMOOTH).differentiable(logits.requires_grad_(), index)
    smooth = [at for at, name in enumerate(SMOOTH) if name != "kl"]  # that one is infinite there
    gradient = torch.autograd.grad(values[:, smooth].sum(), logits)[0]
    assert bool(gradient.isfinite().all())
    assert gradient.any()


@pytest.mark.parametrize("name", ["rank", "accuracy"])
def test_counts_are_refused(name: str) -> None:
    logits, index = some_logits(3)
    with pytest.raises(UserError, match=f"{name} is a count and has no gradient") as caught:
        measurer("logit_diff", name).differentiable(logits, index)
    assert "logprob" in caught.value.remedy
    assert measurer("logit_diff", name)(logits, index).shape == (3, 2)
