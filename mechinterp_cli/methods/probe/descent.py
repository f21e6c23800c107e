"""Nonlinear conjugate gradients for many L2-penalised logistic problems that share their activations.

Every problem walks on its own; together they cost two matrix products a step with the activations (logits of the
directions, gradients from the residuals), whatever their folds, penalties and labels: folds are weights, and the scale
that a fold standardises by is a penalty for each feature. Directions (Polak & Ribière 1969, begun anew where they do
not descend) are preconditioned by the covariance of the features (`basis.Basis`). Steps are found by Newton's method in
one dimension, where logits need no product.

Every tensor begins with the problems' axis: coefficients are [problems, columns, k + 1], the last the intercept, logits
[problems, columns, n], what is one number per problem [problems, 1, 1]. So problems are the rows of the matrix
products, which is much faster than columns where they are few.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from mechinterp_cli.methods.probe import losses
from mechinterp_cli.methods.probe.basis import Basis

SAFETY = 0.3
"""A problem is done at this share of the tolerance: the estimate of its distance was up to 2.2 times too small."""
FLATTER = 0.25
"""A step is good where the slope along it has fallen to this share."""
STEP_TRIES = 8
REFRESH = 2.0
"""The preconditioner follows a problem's curvature when that has changed by this factor."""
KEPT = 0.9
"""Problems that are done are put away when no more than this share is left."""


@dataclass(frozen=True)
class _ByProblem:
    """Tensors whose first axis is the problems'."""

    def select(self, kept: Tensor) -> Self:
        """Some of the problems."""
        return type(self)(*(getattr(self, field.name)[kept] for field in fields(self)))

    def to(self, dtype: torch.dtype) -> Self:
        """In another precision."""
        return type(self)(*(getattr(self, field.name).to(dtype) for field in fields(self)))


@dataclass(frozen=True)
class Problems(_ByProblem):
    """What is a problem's own: minimise Σ weights · loss + Σ ridge · w² / 2.

    Args:
        signs: [problems, columns, n]: −1 where the column is the sample's class, else 1.
        weights: [problems, 1, n]: penalty × sample weight.
        ridge: [problems, 1, k + 1]: of each feature of the basis; 0 for the intercept.
    """

    signs: Tensor
    weights: Tensor
    ridge: Tensor


@dataclass(frozen=True)
class Point(_ByProblem):
    """Where every problem stands.

    Args:
        w: [problems, columns, k + 1] coefficients and intercept.
        gradient: Euclidean norm of the objective's gradient by the problem's own features, [problems, 1, 1].
        steps: Taken so far.
        converged: 1 where the optimum is near enough, else 0.
    """

    w: Tensor
    gradient: Tensor
    steps: Tensor
    converged: Tensor

    def put(self, places: Tensor, other: "Point") -> None:
        """Write the points of some problems into these."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            mine[places] = theirs.to(mine.dtype)


def start(problems: Problems) -> Point:
    """No coefficients, and the intercepts that are best without any."""
    mass = problems.weights.sum(-1, keepdim=True)
    share = (problems.weights * (problems.signs < 0)).sum(-1, keepdim=True) / mass
    # a class that does not occur would be at −∞; the objective does not stop it from going there
    b = (share.log() if share.shape[1] > 1 else share.logit()).clamp(-30, 30)
    b = b - b.mean(1, keepdim=True) if b.shape[1] > 1 else b
    w = torch.cat([b.new_zeros(*b.shape[:2], problems.ridge.shape[-1] - 1), b], dim=-1)
    number = torch.zeros_like(mass)
    return Point(w, number + torch.inf, number, number.clone())


@dataclass(frozen=True)
class _Walk(_ByProblem):
    """The state of the problems that are not done."""

    w: Tensor
    z: Tensor
    missed: Tensor
    residual: Tensor
    """Derivative of the loss by the logits."""
    grad: Tensor
    scale: Tensor
    """Weighted curvature summed over samples, of the preconditioner."""
    direction: Tensor
    """To go next."""
    slope: Tensor
    """Of the objective along it."""
    product: Tensor
    """Of the gradient and its preconditioned self."""
    size: Tensor
    """Squared norm of the coefficients of the problem's own features."""
    steps: Tensor


def descend(basis: Basis, problems: Problems, begin: Point, *, tolerance: float, max_steps: int) -> Point:
    """Walk every problem until its coefficients are within tolerance × their norm of the optimum.

    In the problem's own standardised features the objective is 1-strongly convex, so a distance to the optimum is at
    most √(gᵀH⁻¹g), with the gradient g and the curvature H there. The preconditioner stands for H: this is an estimate,
    close where it was measured (`SAFETY`). The objective is then within about `tolerance² · norm² / 2`. What rounding
    leaves of a gradient counts as none.

    Args:
        basis: The features; their precision is that of the walk.
        problems: Penalised log-losses.
        begin: From where.
        tolerance: Above 0.
        max_steps: After so many in all a problem is left where it stands, not converged.
    """
    dtype = basis.x.dtype
    problems, begin = problems.to(dtype), begin.to(dtype)
    out = Point(*(getattr(begin, field.name).clone() for field in fields(begin)))
    places = torch.arange(len(out.w), device=out.w.device)
    walk = _set_out(basis, problems, begin)
    while True:
        done = _near(walk, tolerance)
        left = (~done & (walk.steps < max_steps)).flatten()
        count = int(left.sum())
        if count <= KEPT * len(left):
            out.put(places, Point(walk.w, _steepness(problems, walk.grad), walk.steps, done.to(dtype)))
            if not count:
                return out
            kept = left.nonzero().flatten()
            places, problems, walk = places[kept], problems.select(kept), walk.select(kept)
        walk = _step(basis, problems, walk)


def logits(basis: Basis, w: Tensor) -> Tensor:
    """[problems, columns, n]."""
    return (w.flatten(0, 1) @ basis.x.T).view(*w.shape[:2], -1)


def objective(basis: Basis, problems: Problems, w: Tensor) -> Tensor:
    """Penalty × log-loss + ‖w‖²/2 of each problem, [problems]."""
    loss = losses.loss(logits(basis, w), problems.signs)
    return (problems.weights * loss).sum((1, 2)) + (problems.ridge * w.square()).sum((1, 2)) / 2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[problems, 1, 1]."""
    return (a * b).sum((1, 2), keepdim=True)


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


def _near(walk: _Walk, tolerance: float) -> Tensor:
    """Whether the optimum is near enough, or nearer than rounding lets a gradient tell."""
    noise = torch.finfo(walk.w.dtype).eps * walk.w.shape[-1] ** 0.5 * _norm(walk.residual)
    near: Tensor = walk.product <= (SAFETY * tolerance) ** 2 * walk.size + noise.square()
    return near


def _steepness(problems: Problems, grad: Tensor) -> Tensor:
    """Norms of gradients by the problems' own features."""
    return _norm(grad / torch.where(problems.ridge > 0, problems.ridge, 1).sqrt())


def _set_out(basis: Basis, problems: Problems, point: Point) -> _Walk:
    z = logits(basis, point.w)
    missed = losses.misses(z, problems.signs)
    residual = _residual(problems, missed)
    grad = _gradient(basis, problems, point.w, residual)
    scale = _scale(problems, missed)
    ahead = basis.precondition(grad, scale)
    product = _dot(grad, ahead)
    size = _dot(point.w, problems.ridge * point.w)
    return _Walk(
        point.w, z, missed, residual, grad, scale, ahead.neg(), -product, product, size, point.steps
    )  # fmt: skip


def _gradient(basis: Basis, problems: Problems, w: Tensor, residual: Tensor) -> Tensor:
    return (residual.flatten(0, 1) @ basis.x).view_as(w).addcmul_(problems.ridge, w)


def _residual(problems: Problems, missed: Tensor) -> Tensor:
    return (missed * problems.signs).mul_(problems.weights)


def _scale(problems: Problems, missed: Tensor) -> Tensor:
    """Never 0: with every chance at 0 or 1 the preconditioner is the penalty's."""
    return _dot(problems.weights, losses.mean_curvature(missed)) + torch.finfo(missed.dtype).tiny


def _step(basis: Basis, problems: Problems, walk: _Walk) -> _Walk:
    """Along the direction, and the next one from there."""
    drag = problems.ridge * walk.direction
    along, square = _dot(walk.w, drag), _dot(walk.direction, drag)
    length, z, missed, residual = _search(problems, walk, logits(basis, walk.direction), along, square)
    w = torch.addcmul(walk.w, length, walk.direction)
    size = walk.size + length * (2 * along + length * square)
    grad = _gradient(basis, problems, w, residual)
    scale = _scale(problems, missed)
    near = (scale < REFRESH * walk.scale) & (walk.scale < REFRESH * scale)
    scale = torch.where(near, walk.scale, scale)
    ahead = basis.precondition(grad, scale)
    product = _dot(grad, ahead)
    beta = ((product - _dot(walk.grad, ahead)) / walk.product).clamp(min=0)
    # (a direction that would go up is left for the preconditioned gradient)
    up = _dot(grad, walk.direction)
    beta = torch.where(beta * up < product, beta, 0)
    direction = torch.addcmul(ahead.neg_(), beta, walk.direction)
    return _Walk(w, z, missed, residual, grad, scale, direction, beta * up - product, product, size, walk.steps + 1)


def _search(
    problems: Problems, walk: _Walk, dir_z: Tensor, along: Tensor, square: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far to go, and logits, misses and residuals there.

    Newton's method on the slope, bisected where it would leave the bracket.

    Args:
        problems: What is minimised.
        walk: From where, and the direction.
        dir_z: Its logits.
        along: Slope of the penalty along it.
        square: Curvature of the penalty along it.
    """
    tiny = torch.finfo(dir_z.dtype).tiny
    residual, missed, z = walk.residual, walk.missed, walk.z
    # below what rounding leaves of a slope there is nothing to be found
    noise = torch.finfo(dir_z.dtype).eps * _norm(residual) * _norm(dir_z)
    length = low = torch.zeros_like(along)
    high = torch.full_like(along, torch.inf)
    slope = walk.slope
    flat = FLATTER * slope.abs() + noise
    for tried in range(STEP_TRIES):
        bend = _dot(problems.weights, losses.curvature(missed, problems.signs, dir_z)) + square
        ahead = length - slope / bend.clamp(min=tiny)
        if tried:
            middle = torch.where(high.isinf(), 2 * length + tiny, (low + high) / 2)
            ahead = torch.where((ahead > low) & (ahead < high), ahead, middle)
            ahead = torch.where(slope.abs() > flat, ahead, length)
        length = ahead
        z = torch.addcmul(walk.z, length, dir_z)
        missed = losses.misses(z, problems.signs)
        residual = _residual(problems, missed)
        slope = _dot(residual, dir_z) + torch.addcmul(along, length, square)
        if bool((slope.abs() <= flat).all()):
            break
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
    return length, z, missed, residual
