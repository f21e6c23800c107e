"""Nonlinear conjugate gradients for many L2-penalised logistic problems that share their activations.

Every problem walks on its own; together they cost two matrix products a step with the activations (logits of the
directions, gradients from the residuals), whatever their folds, penalties and labels: folds are weights, and the scale
that a fold standardises by is a penalty for each feature. Directions (Polak & Ribière 1969, begun anew where they do
not descend) are preconditioned by the eigenvectors of the covariance of all samples, in which penalties differ by a
diagonal. Steps are found by Newton's method in one dimension, where logits need no product.

Every tensor begins with the problems' axis: coefficients are [problems, columns, d + 1], the last the intercept, logits
[problems, columns, n], what is one number per problem [problems, 1, 1]. So problems are the rows of the matrix
products, which is much faster than columns where they are few.
"""

from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from mechinterp_cli.methods.probe import losses

FLATTER = 0.25
"""A step is good where the slope along it has fallen to this share."""
STEP_TRIES = 8
REFRESH = 2.0
"""The preconditioner follows a problem's curvature when that has changed by this factor."""
KEPT = 0.95
"""Problems that are done are put away when no more than this share is left."""


@dataclass(frozen=True)
class Shared:
    """What the problems of a site share.

    Args:
        x: [n, d + 1] activations, centred (and scaled) over all samples, and a last column of ones.
        vectors: [d + 1, rank] eigenvectors of `x.T @ x`, the intercept's last; float32 will do.
        values: [rank] its eigenvalues.
    """

    x: Tensor
    vectors: Tensor
    values: Tensor

    @staticmethod
    def of(x: Tensor) -> "Shared":
        """With the eigenvectors in float32, from whichever of [d, d] and [n, n] is smaller.

        Args:
            x: [n, d], each feature's mean 0.
        """
        n, d = x.shape
        small = x.float()
        if d <= n:
            values, vectors = torch.linalg.eigh(small.T @ small)
        else:
            values, left = torch.linalg.eigh(small @ small.T)
            kept = values > values[-1] * torch.finfo(values.dtype).eps * n
            values, left = values[kept], left[:, kept]
            vectors = small.T @ left / values.sqrt()
        vectors = torch.nn.functional.pad(vectors, (0, 1, 0, 1))
        vectors[-1, -1] = 1
        values = torch.nn.functional.pad(values.clamp(min=0), (0, 1), value=n)
        return Shared(torch.nn.functional.pad(x, (0, 1), value=1), vectors, values)

    def to(self, dtype: torch.dtype) -> "Shared":
        """The activations in another precision; the preconditioner keeps its own."""
        return Shared(self.x.to(dtype), self.vectors, self.values)


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
        targets: [problems, columns, n], 0 and 1.
        weights: [problems, 1, n]: penalty × sample weight.
        ridge: [problems, 1, d + 1]: squared scale of the problem's own features, as a share of the shared scale;
            near 1 mostly, and 0 for the intercept.
    """

    targets: Tensor
    weights: Tensor
    ridge: Tensor


@dataclass(frozen=True)
class Point(_ByProblem):
    """Where every problem stands.

    Args:
        w: [problems, columns, d + 1] coefficients and intercept.
        gradient: Euclidean norm of the objective's gradient by the problem's own features, [problems, 1, 1].
        steps: Taken so far.
        converged: 1 where the gradient is small enough, else 0.
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
    share = (problems.weights * problems.targets).sum(-1, keepdim=True) / mass
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
    chances: Tensor
    residual: Tensor
    """Derivative of the loss by the logits."""
    grad: Tensor
    scale: Tensor
    """Weighted curvature summed over samples, of the preconditioner."""
    direction: Tensor
    old: Tensor
    """Gradient before the last step."""
    product: Tensor
    """That gradient times its preconditioned self; infinite before the first step."""
    steps: Tensor


def descend(shared: Shared, problems: Problems, begin: Point, *, tolerance: float, max_steps: int) -> Point:
    """Walk every problem until its gradient's norm is at most tolerance × the coefficients' norm.

    Both norms are of the problem's own standardised features, in which the objective is 1-strongly convex: so the
    coefficients are then within about `tolerance` of the optimum, as a share of their norm, and the objective within
    `tolerance² · norm² / 2`; mostly much nearer. What rounding leaves of a gradient counts as none.

    Args:
        shared: The activations; their precision is that of the walk.
        problems: Penalised log-losses.
        begin: From where.
        tolerance: Above 0.
        max_steps: After so many in all a problem is left where it stands, not converged.
    """
    dtype = shared.x.dtype
    problems, begin = problems.to(dtype), begin.to(dtype)
    out = Point(*(getattr(begin, field.name).clone() for field in fields(begin)))
    places = torch.arange(len(out.w), device=out.w.device)
    limit, walk = _Limit.of(problems, tolerance), _set_out(shared, problems, begin)
    while True:
        norm, done = limit.reached(walk)
        left = (~done & (walk.steps < max_steps)).flatten()
        count = int(left.sum())
        if count <= KEPT * len(left):
            out.put(places, Point(walk.w, norm, walk.steps, done.to(dtype)))
            if not count:
                return out
            kept = left.nonzero().flatten()
            places, problems, walk, limit = places[kept], problems.select(kept), walk.select(kept), limit.select(kept)
        walk = _step(shared, problems, walk)


def logits(shared: Shared, w: Tensor) -> Tensor:
    """[problems, columns, n]."""
    return (w.flatten(0, 1) @ shared.x.T).view(*w.shape[:2], -1)


def objective(shared: Shared, problems: Problems, w: Tensor) -> Tensor:
    """Penalty × log-loss + ‖w‖²/2 of each problem, [problems]."""
    loss = losses.loss(logits(shared, w), problems.targets)
    return (problems.weights * loss).sum((1, 2)) + (problems.ridge * w.square()).sum((1, 2)) / 2


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[problems, 1, 1]."""
    found: Tensor = torch.linalg.vecdot(a.flatten(1), b.flatten(1))
    return found[:, None, None]


def _norm(a: Tensor) -> Tensor:
    return _dot(a, a).sqrt()


@dataclass(frozen=True)
class _Limit(_ByProblem):
    """When a problem is done."""

    root: Tensor
    """Makes coefficients those of the problem's own features, times the tolerance; 0 for the intercept."""
    lift: Tensor
    """Makes a gradient that by the problem's own features."""
    noise: Tensor
    """Norm of what rounding leaves in a gradient."""

    @staticmethod
    def of(problems: Problems, tolerance: float) -> "_Limit":
        root = problems.ridge.sqrt()
        mass = problems.weights.amax(-1, keepdim=True) * problems.weights.sum(-1, keepdim=True)
        noise = torch.finfo(root.dtype).eps * (mass * root.shape[-1]).sqrt()
        return _Limit(tolerance * root, 1 / torch.where(root > 0, root, 1), noise)

    def reached(self, walk: _Walk) -> tuple[Tensor, Tensor]:
        """Gradients' norms, and whether they are small enough."""
        norm = _norm(walk.grad * self.lift)
        return norm, norm <= _norm(walk.w * self.root) + self.noise


def _set_out(shared: Shared, problems: Problems, point: Point) -> _Walk:
    z = logits(shared, point.w)
    chances = losses.probabilities(z)
    residual = problems.weights * (chances - problems.targets)
    grad = _gradient(shared, problems, point.w, residual)
    infinite = torch.full_like(point.gradient, torch.inf)
    nothing = torch.zeros_like(grad)
    scale = _scale(problems, chances)
    return _Walk(point.w, z, chances, residual, grad, scale, nothing, nothing, infinite, point.steps)


def _gradient(shared: Shared, problems: Problems, w: Tensor, residual: Tensor) -> Tensor:
    return (residual.flatten(0, 1) @ shared.x).view_as(w).addcmul_(problems.ridge, w)


def _scale(problems: Problems, chances: Tensor) -> Tensor:
    """Never 0: with every chance at 0 or 1 the preconditioner is the penalty's."""
    return _dot(problems.weights, losses.mean_curvature(chances)) + torch.finfo(chances.dtype).tiny


def _precondition(shared: Shared, walk: _Walk) -> Tensor:
    """The gradient through the inverse of `scale/n · x.T x + 1`, without the 1 for the intercept."""
    flat = walk.grad.flatten(0, 1).to(shared.vectors.dtype)
    inside = flat @ shared.vectors
    stretch = (walk.scale / len(shared.x)).to(inside.dtype) * shared.values
    stretch[..., :-1] += 1
    shrunk = (inside.view(*walk.w.shape[:2], -1) / stretch).flatten(0, 1) @ shared.vectors.T
    if shared.vectors.shape[0] > shared.vectors.shape[1]:
        shrunk += flat - inside @ shared.vectors.T
    return shrunk.view_as(walk.w).to(walk.w.dtype)


def _step(shared: Shared, problems: Problems, walk: _Walk) -> _Walk:
    ahead = _precondition(shared, walk)
    product = _dot(walk.grad, ahead)
    beta = ((product - _dot(walk.old, ahead)) / walk.product).clamp(min=0)
    # (a direction that would go up is left for the preconditioned gradient)
    beta = torch.where(beta * _dot(walk.grad, walk.direction) < product, beta, 0)
    direction = torch.addcmul(-ahead, beta, walk.direction)
    length, z, chances, residual = _search(problems, walk, direction, logits(shared, direction))
    w = torch.addcmul(walk.w, length, direction)
    grad = _gradient(shared, problems, w, residual)
    scale = _scale(problems, chances)
    near = (scale < REFRESH * walk.scale) & (walk.scale < REFRESH * scale)
    scale = torch.where(near, walk.scale, scale)
    return _Walk(w, z, chances, residual, grad, scale, direction, walk.grad, product, walk.steps + 1)


def _search(problems: Problems, walk: _Walk, direction: Tensor, dir_z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far to go, and logits, chances and residuals there.

    Newton's method on the slope, bisected where it would leave the bracket.
    """
    tiny = torch.finfo(dir_z.dtype).tiny
    drag = problems.ridge * direction
    along, square = _dot(walk.w, drag), _dot(direction, drag)
    residual, chances, z = walk.residual, walk.chances, walk.z
    # below what rounding leaves of a slope there is nothing to be found
    noise = torch.finfo(dir_z.dtype).eps * _norm(residual) * _norm(dir_z)
    length = low = torch.zeros_like(along)
    high = torch.full_like(along, torch.inf)
    slope = _dot(walk.grad, direction)
    flat = FLATTER * slope.abs() + noise
    for tried in range(STEP_TRIES):
        bend = _dot(problems.weights, losses.curvature(chances, dir_z)) + square
        ahead = length - slope / bend.clamp(min=tiny)
        if tried:
            middle = torch.where(high.isinf(), 2 * length + tiny, (low + high) / 2)
            ahead = torch.where((ahead > low) & (ahead < high), ahead, middle)
            ahead = torch.where(slope.abs() > flat, ahead, length)
        length = ahead
        z = torch.addcmul(walk.z, length, dir_z)
        chances = losses.probabilities(z)
        residual = problems.weights * (chances - problems.targets)
        slope = _dot(residual, dir_z) + torch.addcmul(along, length, square)
        if bool((slope.abs() <= flat).all()):
            break
        low, high = torch.where(slope < 0, length, low), torch.where(slope < 0, high, length)
    return length, z, chances, residual
