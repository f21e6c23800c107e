"""Logistic regression, L2-penalised, for all sites × tasks × penalties together.

The objective is scikit-learn's: penalty · Σ weight · log-loss + ‖w‖²/2 over standardised features, the intercept free.
Two classes have one row of coefficients (the logit of class 1), more classes have one each (multinomial).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechinterp_cli.methods.probe import losses
from mechinterp_cli.methods.probe.descent import Point, Problems, Shared, descend, objective, start
from mechinterp_cli.methods.probe.standardise import Scaling, fit_scaling

TOLERANCE = 1e-4
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

    @property
    def columns(self) -> int:
        """Rows of coefficients."""
        return 1 if self.classes == 2 else self.classes

    def targets(self) -> Tensor:
        """[tasks, columns, n], 0 and 1."""
        if self.columns == 1:
            return self.labels[:, None]
        return torch.nn.functional.one_hot(self.labels, self.classes).transpose(1, 2)


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
    fitted = [fit(site) for site in x] if x.is_cuda else _side_by_side(fit, x)
    names = Logistic.__dataclass_fields__
    return Logistic(**{name: torch.stack([getattr(one, name) for one in fitted]) for name in names})


def _side_by_side(fit: Callable[[Tensor], Logistic], x: Tensor) -> list[Logistic]:
    """A site's matrices are too small for threads to share; and so no number depends on how many threads there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(fit, x))
    finally:
        torch.set_num_threads(threads)


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
    tasks = tasks.to(x.device)
    x, weights = x.double(), tasks.weights.double()
    every = fit_scaling(x, torch.ones_like(weights[:1]))
    scaling = fit_scaling(x, weights)
    if not standardise:
        every, scaling = (Scaling(found.mean, torch.ones_like(found.scale)) for found in (every, scaling))
    shared = Shared.of(every(x)[0])
    ridge = torch.nn.functional.pad((scaling.scale / every.scale).square(), (0, 1))[:, None]
    targets = tasks.targets().double()
    strength = torch.tensor(penalties, dtype=x.dtype, device=x.device)
    room = CHUNK_GPU if x.is_cuda else CHUNK_CPU
    step = max(1, room // (targets[0].numel() * len(strength)))
    points, values = [], []
    for begin in range(0, len(weights), step):
        part = slice(begin, begin + step)
        problems = _problems(targets[part], weights[part], ridge[part], strength)
        points.append(_solve(shared, problems, tolerance, max_steps))
        values.append(objective(shared, problems, points[-1].w))
    return _result(points, values, scaling.scale, every, len(strength))


def _problems(targets: Tensor, weights: Tensor, ridge: Tensor, strength: Tensor) -> Problems:
    """Penalties vary fastest."""
    count = len(strength)
    weighted = weights[:, None] * strength[:, None]
    return Problems(
        targets.repeat_interleave(count, 0), weighted.flatten(0, 1)[:, None], ridge.repeat_interleave(count, 0)
    )


def _solve(shared: Shared, problems: Problems, tolerance: float, max_steps: int) -> Point:
    """In float32 as far as that goes, then in float64."""
    near = descend(shared.to(torch.float32), problems, start(problems), tolerance=tolerance, max_steps=max_steps // 2)
    return descend(shared, problems, near, tolerance=tolerance, max_steps=max_steps)


def _result(points: list[Point], values: list[Tensor], scale: Tensor, every: Scaling, penalties: int) -> Logistic:
    w = torch.cat([point.w for point in points])
    w, b = w[..., :-1] / every.scale, w[..., -1]
    b = b - w @ every.mean[0]

    def shaped(found: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(found)).view(-1, penalties)

    return Logistic(
        weights=w.view(-1, penalties, *w.shape[1:]),
        intercepts=b.view(-1, penalties, b.shape[1]),
        scale=scale,
        objective=shaped(values),
        gradient=shaped([point.gradient for point in points]),
        steps=shaped([point.steps for point in points]).long(),
        converged=shaped([point.converged for point in points]).bool(),
    )
