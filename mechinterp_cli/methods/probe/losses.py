"""Log-loss of many problems at once, from their logits: chances, curvature along a direction, values.

Logits are [problems, columns, n]. One column is the two-class problem, whose logit is that of class 1; more columns
are one per class.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def probabilities(logits: Tensor) -> Tensor:
    """Of class 1 where there is one column, of each class where there are more; as `logits`."""
    return logits.sigmoid() if logits.shape[-2] == 1 else logits.softmax(-2)


def log_probabilities(logits: Tensor) -> Tensor:
    """Of every class, [..., classes, n], nats; two classes where there is one column."""
    if logits.shape[-2] == 1:
        return torch.cat([logsigmoid(-logits), logsigmoid(logits)], dim=-2)
    return logits.log_softmax(-2)


def curvature(chances: Tensor, direction: Tensor) -> Tensor:
    """Second derivative of each sample's log-loss along a direction of its logits, [problems, 1, n].

    Args:
        chances: From `probabilities`.
        direction: Of the logits, as they are shaped.
    """
    if chances.shape[-2] == 1:
        return chances * (1 - chances) * direction.square()
    mean = (chances * direction).sum(-2, keepdim=True)
    return (chances * direction.square()).sum(-2, keepdim=True) - mean.square()


def mean_curvature(chances: Tensor) -> Tensor:
    """Curvature of a logit, mean over columns, [problems, 1, n]: 1/4, or 1/classes, where chances are even."""
    columns = chances.shape[-2]
    if columns == 1:
        return chances * (1 - chances)
    return (1 - chances.square().sum(-2, keepdim=True)) / (columns - 1)


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-loss of each sample, nats, [problems, 1, n].

    Args:
        logits: As above.
        targets: 0 and 1, shaped as the logits: whether it is class 1, or one column per class.
    """
    own = (logits * targets).sum(-2, keepdim=True)
    return (softplus(logits) if logits.shape[-2] == 1 else logits.logsumexp(-2, keepdim=True)) - own
