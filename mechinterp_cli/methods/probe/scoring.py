"""One probe at one place: predictions of samples that it was not fitted on, and scores of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.folds import Nested, nested_class_folds, nested_number_folds
from mechinterp_cli.methods.probe.means import linear_discriminant, mass_mean
from mechinterp_cli.methods.probe.mlp import Training, fit_mlp
from mechinterp_cli.methods.probe.nested import Scored, score_classes, score_numbers
from mechinterp_cli.methods.probe.options import ProbeName, ProbeOptions

SHRINKAGE = 0.1
"""Of the covariance of linear discriminants, towards a multiple of the identity."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What probes at one place are to tell apart.

    Args:
        targets: [n] classes from 0 on, or numbers.
        classes: How many; None where targets are numbers.
        groups: [n]; samples of a group stay together.
        nested: Folds, the same for every probe.
    """

    targets: Tensor
    classes: int | None
    groups: Sequence[str]
    nested: Nested

    @classmethod
    def of(
        cls, targets: Sequence[float], classes: int | None, groups: Sequence[str], options: ProbeOptions
    ) -> "Problem":
        """Split the samples.

        Raises:
            UserError: As `nested_class_folds`.
        """
        folds, inner, seed = options.folds, options.inner_folds, options.seed
        if classes is None:
            nested = nested_number_folds(len(targets), folds, inner, groups=groups, seed=seed)
            return cls(torch.tensor(targets, dtype=torch.float64), None, groups, nested)
        labels = [int(target) for target in targets]
        nested = nested_class_folds(labels, folds, inner, groups=groups, seed=seed)
        return cls(torch.tensor(labels), classes, groups, nested)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of one probe at one place.

    Args:
        problem: What it was fitted to.
        predicted: [folds, n] of each fold's probe, all samples; classes or numbers.
        penalty: By fold, where there is one.
        unconverged: Fits that stopped before their optimum.
    """

    problem: Problem
    predicted: Tensor
    penalty: tuple[float, ...] | None = None
    unconverged: int = 0

    @cached_property
    def held_out(self) -> Tensor:
        """[n]: each sample's prediction by the probe that was not fitted on it."""
        return (self.predicted * self.problem.nested.outer.test.to(self.predicted)).sum(0)

    @property
    def correct(self) -> Tensor:
        """[n]: 1 where the held-out prediction is right; of numbers 1 − squared error / variance, whose mean is R²."""
        targets = self.problem.targets
        if self.problem.classes is not None:
            return (self.held_out == targets).double()
        return 1 - (self.held_out - targets).square() / targets.var(correction=0)

    def score(self, mask: Tensor, fold: int) -> float:
        """Accuracy (or R²) of a fold's probe on some samples, [n] bool."""
        targets, predicted = self.problem.targets[mask], self.predicted[fold][mask]
        if self.problem.classes is not None:
            return float((predicted == targets).double().mean())
        return float(1 - (predicted - targets).square().mean() / targets.var(correction=0))


def fit(name: ProbeName, x: Tensor, problem: Problem, options: ProbeOptions) -> Outcome:
    """Fit a probe of each fold.

    Args:
        name: Which.
        x: [n, d] activations.
        problem: What it is fitted to.
        options: Penalties and seed.
    """
    train, classes = problem.nested.outer.train, problem.classes
    if name == "ridge":
        alphas = [1 / penalty for penalty in options.penalties]
        return _chosen(score_numbers(x.double(), problem.targets, problem.nested, alphas), problem, options)
    assert classes is not None
    if name == "logistic":
        (found,) = score_classes(x, problem.targets[None], [problem.nested], options.penalties, classes=classes)
        return _chosen(found, problem, options)
    if name == "mlp":
        training = Training(seed=options.seed)
        fitted = fit_mlp(x[None], problem.targets, train, classes=classes, training=training)
        return Outcome(problem, fitted.predict(x[None])[0], None, int((~fitted.stopped).sum()))
    if name == "lda":
        linear = linear_discriminant(x[None], problem.targets, train, classes=classes, shrinkage=SHRINKAGE)
    else:
        whiten = name == "mass_mean_whitened"
        linear = mass_mean(x[None], problem.targets, train, classes=classes, whiten=whiten)
    return Outcome(problem, linear.predict(x[None])[0])


def _chosen(found: Scored, problem: Problem, options: ProbeOptions) -> Outcome:
    penalty = tuple(options.penalties[at] for at in found.penalty.tolist())
    return Outcome(problem, found.predicted, penalty, found.unconverged)
