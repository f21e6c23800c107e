"""Log-loss of many problems at once, from their logits: misses, curvature along a direction, values.

Logits are [problems, columns, n]. One column is the two-class problem, whose logit is that of class 1; more columns
are one per class. Signs are shaped like them: −1 where the column is the sample's class, 1 where it is not.

A miss is by how much a chance is wrong: of another class the chance itself, of a sample's own class what it lacks to 1.
With the sign it is the derivative of the loss; it is computed without a difference from 1, which rounding would eat.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def misses(logits: Tensor, signs: Tensor) -> Tensor:
    """As `logits`, from 0 to 1."""
    if logits.shape[-2] == 1:
        return (signs * logits).sigmoid_()
    others = logits.softmax(-2).masked_fill(signs < 0, 0)
    return torch.where(signs < 0, others.sum(-2, keepdim=True), others)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of every class, [..., classes, n], nats; two classes where there is one column."""
    if logits.shape[-2] == 1:
        return torch.cat([logsigmoid(-logits), logsigmoid(logits)], dim=-2)
    return logits.log_softmax(-2)


def curvature(missed: Tensor, signs: Tensor, direction: Tensor) -> Tensor:
    """Second derivative of each sample's log-loss along a direction of its logits, [problems, 1, n].

    Args:
        missed: From `misses`.
        signs: As there.
        direction: Of the logits, as they are shaped.
    """
    if missed.shape[-2] == 1:
        return _spread(missed).mul_(direction).mul_(direction)
    relative = direction - _own(direction, signs)
    pulled = missed * relative
    return (pulled * relative).sum(-2, keepdim=True) - pulled.sum(-2, keepdim=True).square()


def mean_curvature(missed: Tensor) -> Tensor:
    """Curvature of a logit, mean over columns, [problems, 1, n]: 1/4, or 1/classes, where chances are even."""
    columns = missed.shape[-2]
    return _spread(missed) if columns == 1 else _spread(missed).sum(-2, keepdim=True) / (columns - 1)


def loss(logits: Tensor, signs: Tensor) -> Tensor:
    """Log-loss of each sample, nats, [problems, 1, n].

    Args:
        logits: As above.
        signs: As above.
    """
    if logits.shape[-2] == 1:
        return softplus(signs * logits)
    return logits.logsumexp(-2, keepdim=True) - _own(logits, signs)


def _spread(missed: Tensor) -> Tensor:
    return torch.addcmul(missed, missed, missed, value=-1)


def _own(values: Tensor, signs: Tensor) -> Tensor:
    """Of each sample's class."""
    return values.masked_fill(signs > 0, 0).sum(-2, keepdim=True)
