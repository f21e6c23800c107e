"""What a linear probe found, as directions of the activations that it was fitted on; and a file of them.

A probe of two classes, or of numbers, has one direction, from the first class to the second, or towards larger numbers.
One of K classes has the K − 1 that its weights span, of which the first leads from the first class to the last.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from mechinterp_cli.methods.probe.causal_options import LinearProbe
from mechinterp_cli.methods.probe.logistic import Tasks, fit_site
from mechinterp_cli.methods.probe.means import linear_discriminant, mass_mean
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.ridge import fit_ridge
from mechinterp_cli.methods.probe.scoring import SHRINKAGE
from mechinterp_cli.methods.probe.sites import Reading

FILE = "directions"
"""Its name in the run directory, before the number of the checkpoint where there are several."""
LINEAR: tuple[ProbeName, ...] = get_args(LinearProbe)
PENALISED: tuple[ProbeName, ...] = ("logistic", "ridge")
_DEPENDENT = 1e-6
"""Singular values of weights below this share of the largest are none."""


@dataclass(frozen=True)
class Linear:
    """A fitted linear probe.

    Args:
        weights: [columns, d] of the activations as they are, float64: one of two classes and of numbers, else one each.
        intercepts: [columns].
    """

    weights: Float[Tensor, "columns d"]
    intercepts: Float[Tensor, " columns"]

    def predict(self, x: Float[Tensor, "n d"]) -> Tensor:
        """[n]: what it says of activations, classes by number; of numbers the number."""
        found = x.to(self.weights) @ self.weights.T + self.intercepts
        return found.argmax(1) if found.shape[1] > 1 else found[:, 0]

    @property
    def basis(self) -> Float[Tensor, "rank d"]:
        """Orthonormal rows of what the weights span, float32, the first as `toward`; no row where they are zero."""
        centred = self.weights - self.weights.mean(0) if len(self.weights) > 1 else self.weights
        sizes = torch.linalg.svdvals(centred)
        if not bool(sizes[0] > torch.finfo(torch.float32).tiny):
            return torch.empty(0, self.weights.shape[1])
        rank, first = int((sizes > _DEPENDENT * sizes[0]).sum()), self.toward[None]
        rest = torch.linalg.svd(centred - centred @ first.T @ first, full_matrices=False)[2]
        return torch.cat([first, rest[: rank - 1]]).float().contiguous()

    @property
    def toward(self) -> Float[Tensor, " d"]:
        """What is steered along, of length 1: towards the second class (the last of several), or larger numbers."""
        along = self.weights[-1] - self.weights[0] if len(self.weights) > 1 else self.weights[0]
        return torch.nn.functional.normalize(along, dim=0)


def fit_linear(
    name: ProbeName, x: Float[Tensor, "n d"], targets: Sequence[Tensor], classes: int | None, penalty: float
) -> list[Linear]:
    """Probes of all samples, one for each set of labels.

    Args:
        name: One of `LINEAR`.
        x: Activations.
        targets: Sets of labels, [n] each: classes from 0 on, or numbers.
        classes: How many; None where labels are numbers.
        penalty: scikit-learn's C of `logistic`, 1 / alpha of `ridge`.
    """
    everyone = torch.ones(1, len(x), dtype=torch.bool)
    if name == "ridge":
        return [_ridge(x, numbers, 1 / penalty) for numbers in targets]
    assert classes is not None
    if name == "logistic":
        labels = torch.stack(list(targets)).long()
        fitted = fit_site(x, Tasks(labels, torch.ones(labels.shape), classes), (penalty,))
        return [Linear(*pair) for pair in zip(fitted.weights[:, 0], fitted.intercepts[:, 0], strict=True)]
    return [_by_moments(name, x, labels.long(), everyone, classes) for labels in targets]


def _ridge(x: Tensor, numbers: Tensor, alpha: float) -> Linear:
    fitted = fit_ridge(x.double()[None], numbers, torch.ones(1, len(x), dtype=torch.float64), (alpha,))
    return Linear(fitted.weights[0, 0, 0][None], fitted.intercepts[0, 0, 0][None])


def _by_moments(name: ProbeName, x: Tensor, labels: Tensor, everyone: Tensor, classes: int) -> Linear:
    if name == "lda":
        found = linear_discriminant(x[None], labels, everyone, classes=classes, shrinkage=SHRINKAGE)
    else:
        found = mass_mean(x[None], labels, everyone, classes=classes, whiten=name == "mass_mean_whitened")
    weights, intercepts = found.weights[0, 0], found.intercepts[0, 0]
    if classes == 2:
        return Linear((weights[1] - weights[0])[None], (intercepts[1] - intercepts[0])[None])
    return Linear(weights, intercepts)


def is_right(predicted: Tensor, targets: Int[Tensor, " n"], classes: int) -> Tensor:
    """[n]: 1 where what a probe says is the class.

    Args:
        predicted: From `Linear.predict`: of two classes the logit of the second.
        targets: Classes.
        classes: How many.
    """
    return ((predicted > 0).long() if classes == 2 else predicted).eq(targets).double()


def tensor_name(reading: Reading, *, several: bool) -> str:
    """What a reading's directions are called in the file: `SITE.LAYER`, `SITE.LAYER.HEAD`, either with `@VIEW`.

    Args:
        reading: The place.
        several: Whether its site is read at several views, which then end the name: `resid_post.12@span subject`.
    """
    head = "" if reading.head is None else f".{reading.head}"
    return f"{reading.site.kind}.{reading.site.layer}{head}" + (f"@{reading.view.name}" if several else "")


def as_file(directions: Mapping[str, Float[Tensor, "rank d"]]) -> bytes:
    """A safetensors file of orthonormal rows; equal directions give equal bytes."""
    return save({name: directions[name].contiguous() for name in sorted(directions)})
