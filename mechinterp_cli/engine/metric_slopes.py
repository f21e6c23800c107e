"""How steep a metric is where a gradient is taken: where it is flat, a gradient says nothing."""

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.gradients import Differentiable
from mechinterp_cli.errors import UserError

VOID = 1e-4
"""A slope at the base below this part of that at the source is none: what is left of it is rounding."""


class Sloped:
    """A metric that notes how steep it is in the logits, once for every pass.

    Args:
        metric: Any metric.

    Attributes:
        slopes: For every pass the sum of the sizes of its derivatives, [n], float64, on the CPU.
    """

    def __init__(self, metric: Differentiable) -> None:
        self._metric = metric
        self.slopes: list[Float[Tensor, " n"]] = []

    def __call__(self, logits: Tensor, prompts: Tensor) -> Tensor:
        """The metric's own values, without gradients."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            values = self._metric(leaf, prompts)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        self.slopes.append(slope.abs().sum(-1, dtype=torch.float64).cpu())
        return values.detach()


def refuse_flat(slopes: Float[Tensor, "prompts 2"], method: str) -> None:
    """Refuse a metric that is flat at the base, for a method that takes gradients nowhere else.

    Args:
        slopes: Of all prompts, at the base and at the source.
        method: For the message.

    Raises:
        UserError: It is flat.
    """
    at_base, at_source = slopes.sum(0).tolist()
    if at_base <= VOID * at_source:
        raise UserError(
            f"{method} says 0 of every edge: this metric has no gradient at the base, such as KL to the clean output "
            "at the clean prompt, where it is least",
            "Use eap_ig_inputs with several steps, or another metric such as logit_diff.",
        )
