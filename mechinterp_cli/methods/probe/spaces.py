"""Which tasks of a site are solved together, and in which features.

Tasks that are trained on the same samples have the same standardised features, and in the eigenvectors of these a
problem has few coefficients and its preconditioner costs nothing. Where too few tasks share their samples to pay for
eigenvectors, tasks share the features of all samples, and what a task standardises by is a penalty for each feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from mechinterp_cli.methods.probe.basis import Basis, leading, rotated
from mechinterp_cli.methods.probe.standardise import Scaling, fit_scaling

STEPS = 20
"""Of a problem, about: what eigenvectors must pay for themselves in."""
EIGENVECTORS = 25
"""Their cost, in multiplications of the cubed rank; measured on a CPU."""


@dataclass(frozen=True)
class Space:
    """Tasks that are solved together.

    Args:
        tasks: [t] which.
        samples: [m] those that any of them is trained on.
        scale: [t, d], what each task's features are divided by.
        basis: Features of the samples.
        ridge: [t or 1, 1, k + 1]: squared scale of the task's own features, as a share of the basis's; near 1 mostly,
            and 0 for the intercept.
        middle: What the basis's features are standardised by, one mean and scale.
        vectors: [d, k], where the basis's features are rotated.
    """

    tasks: Tensor
    samples: Tensor
    scale: Tensor
    basis: Basis
    ridge: Tensor
    middle: Scaling
    vectors: Tensor | None

    def raw(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the activations as they are, [..., d], and intercepts, [...].

        Args:
            w: [..., k + 1] of the basis.
        """
        weights, intercepts = w[..., :-1], w[..., -1]
        if self.vectors is not None:
            weights = weights @ self.vectors.T
        weights = weights / self.middle.scale
        return weights, intercepts - weights @ self.middle.mean[0]


def spaces(x: Tensor, weights: Tensor, problems: int, *, standardise: bool) -> Iterator[Space]:
    """Every task in one of them.

    Args:
        x: [n, d] float64.
        weights: [tasks, n].
        problems: Rows of coefficients per task.
        standardise: Whether features are scaled.
    """
    found, which, counts = torch.unique(weights, dim=0, return_inverse=True, return_counts=True)
    trained = (found > 0).sum(1)
    rank = trained.clamp(max=x.shape[1])
    saved = counts * problems * STEPS * (x.numel() - trained * rank)
    alone = saved > EIGENVECTORS * rank**3
    for number in alone.nonzero().flatten().tolist():
        yield _own(x, found[number], (which == number).nonzero().flatten(), standardise)
    rest = (~alone[which]).nonzero().flatten()
    if len(rest):
        yield _shared(x, weights[rest], rest, standardise)


def _own(x: Tensor, weights: Tensor, tasks: Tensor, standardise: bool) -> Space:
    samples = weights.nonzero().flatten()
    x, weights = x[samples], weights[None, samples]
    own = _scaling(x, weights, standardise)
    basis, vectors = rotated(own(x)[0])
    ridge = pad(basis.x.new_ones(1, 1, vectors.shape[1]), (0, 1))
    return Space(tasks, samples, own.scale.expand(len(tasks), -1), basis, ridge, own, vectors)


def _shared(x: Tensor, weights: Tensor, tasks: Tensor, standardise: bool) -> Space:
    samples = (weights > 0).any(0).nonzero().flatten()
    x, weights = x[samples], weights[:, samples]
    both = _scaling(x, torch.cat([torch.ones_like(weights[:1]), weights]), standardise)
    middle, scale = Scaling(both.mean[:1], both.scale[:1]), both.scale[1:]
    ridge = pad((scale / middle.scale).square(), (0, 1))[:, None]
    return Space(tasks, samples, scale, leading(middle(x)[0]), ridge, middle, None)


def _scaling(x: Tensor, weights: Tensor, standardise: bool) -> Scaling:
    found = fit_scaling(x, weights)
    return found if standardise else Scaling(found.mean, torch.ones_like(found.scale))
