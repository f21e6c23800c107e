"""Fits of one training mask to many sets of labels at once, float64: what does not depend on labels is done once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.standardise import fit_scaling

SMALL = 1e-12
"""Eigenvalues of a Gram matrix below this share of the largest are taken for 0."""
FARTHEST = 30.0
"""Of an intercept: the logit of a class that does not occur."""


@dataclass(frozen=True)
class Basis:
    """Samples in the coordinates of the training samples' span, in which their second moments are diagonal.

    Args:
        train: [n_train, r].
        rows: [rows, r] of the samples that are to be predicted.
        moments: [r] sums of squares of the training samples.
    """

    train: Tensor
    rows: Tensor
    moments: Tensor

    @staticmethod
    def of(x: Tensor, train: Tensor, rows: Tensor, *, standardise: bool) -> "Basis":
        """About the mean of the training samples.

        Args:
            x: [n, d].
            train: [n] mask.
            rows: [rows] indices.
            standardise: Scale features to variance 1 on the training samples.
        """
        scaling = fit_scaling(x, train[None].to(x))
        scaled = scaling(x)[0] if standardise else x - scaling.mean
        own = scaled[train]
        if own.shape[1] <= len(own):
            moments, vectors = torch.linalg.eigh(own.T @ own)
        else:
            moments, left = torch.linalg.eigh(own @ own.T)
            vectors = own.T @ left / moments.clamp(min=torch.finfo(moments.dtype).tiny).sqrt()
        kept = moments > SMALL * moments[-1]
        vectors = vectors[:, kept]
        return Basis(own @ vectors, scaled[rows] @ vectors, moments[kept])


def newton_steps(basis: Basis, targets: Tensor, penalties: Sequence[float], *, classes: bool) -> Iterator[Tensor]:
    """Logits of every penalty after one step of Newton's method from no coefficients, [rows, sets, columns].

    Of numbers it is ridge regression itself. The objective is that of `logistic.fit_site` (`ridge.fit_ridge`): from no
    coefficients its curvature is the Kronecker product of the samples' second moments and of `diag(s) − s sᵀ`, s the
    shares of the classes; so in the basis and in that matrix's eigenvectors it is diagonal.

    Args:
        basis: Of standardised features.
        targets: [n_train, sets, columns], 0 and 1 (one column of two classes, else one for each), or numbers.
        penalties: scikit-learn's C, 1 / alpha of ridge.
        classes: Whether targets are classes.
    """
    mean = targets.mean(0)
    values, vectors = _curvature(mean) if classes else _flat(mean)
    inside = _turned(_times(basis.train.T, targets - mean), vectors)
    start = _logits(mean) if classes else mean
    for penalty in penalties:
        w = inside / (values * basis.moments[:, None, None] + 1 / penalty)
        yield start + _times(basis.rows, _turned(w, vectors.mT))


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """[rows, r] × [r, sets, columns], one product for all sets."""
    return (matrix @ x.flatten(1)).view(len(matrix), *x.shape[1:])


def _turned(x: Tensor, vectors: Tensor) -> Tensor:
    """[r, sets, columns] × [sets, columns, columns]."""
    return x * vectors[..., 0] if x.shape[-1] == 1 else torch.einsum("rsc,sck->rsk", x, vectors)


def _flat(mean: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(mean), torch.ones_like(mean)[..., None]


def _curvature(share: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [sets, columns] and eigenvectors of a logit's curvature."""
    if share.shape[1] == 1:
        return share * (1 - share), torch.ones_like(share)[..., None]
    values, vectors = torch.linalg.eigh(torch.diag_embed(share) - share[:, :, None] * share[:, None])
    return values.clamp(min=0), vectors


def _logits(share: Tensor) -> Tensor:
    """Intercepts that are best without coefficients."""
    found = share.logit() if share.shape[-1] == 1 else share.log()
    return found.clamp(-FARTHEST, FARTHEST)


def nearest_means(basis: Basis, members: Tensor) -> Tensor:
    """Logits of `means.mass_mean`, not whitened, [rows, sets, classes].

    Args:
        basis: Of features as they are.
        members: [n_train, sets, classes], 1 for a sample's class.
    """
    means = _means(basis, members)
    return _times(basis.rows, means) - means.square().sum(0) / 2


def discriminants(basis: Basis, members: Tensor, *, features: int, shrinkage: float) -> Tensor:
    """Logits of `means.linear_discriminant`, [rows, sets, classes].

    The covariance is what all samples have, shrunk, which is diagonal in the basis, less what class means have
    (Woodbury's identity).

    Args:
        basis: Of features as they are.
        members: [n_train, sets, classes].
        features: d.
        shrinkage: Above 0.
    """
    means, shares = _means(basis, members), members.mean(0)
    whole = basis.moments / len(basis.train)
    within = whole.sum() - (shares * means.square().sum(0)).sum(-1)
    diagonal = (1 - shrinkage) * whole[:, None] + shrinkage * within / features
    stretched = means / diagonal[..., None]
    inner = torch.einsum("rsc,rsk->sck", means, stretched)
    weight = torch.diag_embed(1 / ((1 - shrinkage) * shares)) - inner
    inverse = stretched + torch.einsum("rsc,sck->rsk", stretched, torch.linalg.solve(weight, inner))
    return _times(basis.rows, inverse) - (means * inverse).sum(0) / 2 + shares.log()


def _means(basis: Basis, members: Tensor) -> Tensor:
    """Class means [r, sets, classes]."""
    return _times(basis.train.T, members / members.sum(0))
