"""Logistic regression, L2-penalised, for all sites × tasks × penalties together.

The objective is scikit-learn's: penalty · Σ weight · log-loss + ‖w‖²/2 over standardised features, the intercept free.
Two classes have one row of coefficients (the logit of class 1), more classes have one each (multinomial).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechinterp_cli.methods.probe import losses
from mechinterp_cli.methods.probe.basis import Basis
from mechinterp_cli.methods.probe.descent import Point, Problems, descend, objective, start
from mechinterp_cli.methods.probe.side_by_side import side_by_side
from mechinterp_cli.methods.probe.spaces import Space, spaces

TOLERANCE = 1e-4
LOOSE = 1e-3
"""From this tolerance on float32 is enough, unchecked."""
NEARER = 0.8
"""What is asked of float32, as a share of the tolerance, so that the check in float64 finds little to do."""
REACH = 2e-5
"""Float32 is asked for no more: rounding leaves gradients that are up to a quarter of it."""
MAX_STEPS = 2000
CHUNK_CPU, CHUNK_GPU = 2**16, 2**24
"""Logits that are held at once: what stays in a core's cache; what fills a GPU."""


@dataclass(frozen=True)
class Tasks:
    """What is to be told apart, and from which samples: folds, permuted labels, control labels, sizes of training.

    Args:
        labels: [tasks, n] classes from 0 on.
        weights: [tasks, n]: 1 for a sample that is trained on, 0 for another; anything between too.
        classes: How many classes there are.
    """

    labels: Tensor
    weights: Tensor
    classes: int

    @staticmethod
    def of(labels: Tensor, train: Tensor, classes: int) -> "Tasks":
        """One set of labels, [n], for all folds, [folds, n]."""
        return Tasks(labels.expand(len(train), -1), train, classes)

    def to(self, device: torch.device) -> "Tasks":
        """On another device."""
        return Tasks(self.labels.to(device), self.weights.to(device), self.classes)

    def at(self, tasks: Tensor, samples: Tensor) -> "Tasks":
        """Some of the tasks and of the samples."""
        return Tasks(self.labels[tasks][:, samples], self.weights[tasks][:, samples], self.classes)

    @property
    def columns(self) -> int:
        """Rows of coefficients."""
        return 1 if self.classes == 2 else self.classes

    def signs(self) -> Tensor:
        """[tasks, columns, n]: −1 where the column is the sample's class, else 1."""
        if self.columns == 1:
            return 1 - 2 * self.labels[:, None]
        return 1 - 2 * torch.nn.functional.one_hot(self.labels, self.classes).transpose(1, 2)


@dataclass(frozen=True)
class Logistic:
    """Fitted probes; all but the scaling begin with [sites, tasks, penalties], or [tasks, penalties] of one site.

    Args:
        weights: [..., columns, d], of the activations as they are.
        intercepts: [..., columns].
        scale: [sites, tasks, d], what features were divided by.
        objective: In scikit-learn's scaling.
        gradient: Its gradient's Euclidean norm.
        steps: Of the solver.
        converged: False where the gradient is above the tolerance: the coefficients are then not the optimum's.
    """

    weights: Tensor
    intercepts: Tensor
    scale: Tensor
    objective: Tensor
    gradient: Tensor
    steps: Tensor
    converged: Tensor

    @property
    def coefficients(self) -> Tensor:
        """As `weights`, of standardised features: scikit-learn's `coef_`."""
        return self.weights * self.scale[..., None, None, :]

    def logits(self, x: Tensor) -> Tensor:
        """[..., columns, n] of any samples.

        Args:
            x: [sites, n, d], or [n, d] where the probes are of one site.
        """
        weights = self.weights.flatten(-4, -2)
        found = weights @ x.to(weights.dtype).transpose(-1, -2)
        return found.view(*self.intercepts.shape, -1) + self.intercepts[..., None]

    def log_probabilities(self, x: Tensor) -> Tensor:
        """[..., classes, n], nats."""
        return losses.log_probabilities(self.logits(x))

    def predict(self, x: Tensor) -> Tensor:
        """Classes, [..., n]."""
        logits = self.logits(x)
        return (logits[..., 0, :] > 0).long() if logits.shape[-2] == 1 else logits.argmax(-2)


def fit_logistic(
    x: Tensor,
    tasks: Tasks,
    penalties: Sequence[float],
    *,
    standardise: bool = True,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Logistic:
    """Fit every site × task × penalty; on a CPU as many sites at once as torch has threads, each on one.

    Args:
        x: [sites, n, d] activations.
        tasks: Shared by the sites.
        penalties: scikit-learn's C, the inverse of the penalty's strength.
        standardise: Scale features to variance 1 on each task's own training samples.
        tolerance: Largest gradient, as a share of the coefficients' norm (`descent.descend`).
        max_steps: Of the solver, per problem.
    """
    fit = partial(
        fit_site, tasks=tasks, penalties=penalties, standardise=standardise, tolerance=tolerance, max_steps=max_steps
    )
    fitted = [fit(site) for site in x] if x.is_cuda else list(side_by_side(fit, x))
    names = Logistic.__dataclass_fields__
    return Logistic(**{name: torch.stack([getattr(one, name) for one in fitted]) for name in names})


def fit_site(
    x: Tensor,
    tasks: Tasks,
    penalties: Sequence[float],
    *,
    standardise: bool = True,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> Logistic:
    """As `fit_logistic`, of one site.

    Args:
        x: [n, d].
        tasks: What is to be told apart.
        penalties: scikit-learn's C.
        standardise: Whether features are scaled.
        tolerance: Largest gradient, relative.
        max_steps: Of the solver.
    """
    tasks, x = tasks.to(x.device), x.double()
    strength = torch.tensor(penalties, dtype=x.dtype, device=x.device)
    parts = []
    for space in spaces(x, tasks.weights.double(), tasks.columns * len(strength), standardise=standardise):
        fitted = _fit_space(space, tasks.at(space.tasks, space.samples), strength, tolerance, max_steps)
        parts.append((space.tasks, fitted))
    order = torch.cat([places for places, _ in parts]).argsort()
    return _joined([fitted for _, fitted in parts], order)


def _fit_space(space: Space, tasks: Tasks, strength: Tensor, tolerance: float, max_steps: int) -> Logistic:
    """Tasks that share their features, as many at once as there is room for."""
    room = CHUNK_GPU if strength.is_cuda else CHUNK_CPU
    step = max(1, room // (tasks.labels.shape[1] * tasks.columns * len(strength)))
    parts = []
    for begin in range(0, len(tasks.labels), step):
        part = slice(begin, begin + step)
        problems = _problems(Tasks(tasks.labels[part], tasks.weights[part], tasks.classes), space, part, strength)
        point, values = _solve(space.basis, problems, tolerance, max_steps)
        parts.append(_result(space, part, point, values, len(strength)))
    return _joined(parts)


def _problems(tasks: Tasks, space: Space, part: slice, strength: Tensor) -> Problems:
    """Penalties vary fastest."""
    count = len(strength)
    weighted = tasks.weights.to(strength)[:, None] * strength[:, None]
    ridge = space.ridge[part].repeat_interleave(count, 0) if len(space.ridge) > 1 else space.ridge
    signs = tasks.signs().to(strength).repeat_interleave(count, 0)
    return Problems(signs, weighted.flatten(0, 1)[:, None], ridge.expand(len(signs), -1, -1))


def _solve(basis: Basis, problems: Problems, tolerance: float, max_steps: int) -> tuple[Point, Tensor]:
    """In float32 as far as that goes, then checked and gone on with in float64; and objectives."""
    rough = basis.to(torch.float32)
    if tolerance >= LOOSE:
        problems = problems.to(torch.float32)
        point = descend(rough, problems, start(problems), tolerance=tolerance, max_steps=max_steps)
        return point, objective(rough, problems, point.w)
    nearer = max(NEARER * tolerance, REACH)
    near = descend(rough, problems, start(problems), tolerance=nearer, max_steps=max_steps // 2)
    point = descend(basis, problems, near, tolerance=tolerance, max_steps=max_steps)
    return point, objective(basis, problems, point.w)


def _result(space: Space, part: slice, point: Point, values: Tensor, penalties: int) -> Logistic:
    weights, intercepts = space.raw(point.w.double())
    shape = (-1, penalties)
    return Logistic(
        weights=weights.view(*shape, *weights.shape[1:]),
        intercepts=intercepts.view(*shape, *intercepts.shape[1:]),
        scale=space.scale[part],
        objective=values.double().view(shape),
        gradient=point.gradient.double().view(shape),
        steps=point.steps.long().view(shape),
        converged=point.converged.bool().view(shape),
    )


def _joined(parts: Sequence[Logistic], order: Tensor | None = None) -> Logistic:
    """Along the tasks, put in order."""
    if len(parts) == 1 and order is None:
        return parts[0]
    names = Logistic.__dataclass_fields__
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Logistic(**(whole if order is None else {name: value[order] for name, value in whole.items()}))
