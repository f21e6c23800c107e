"""One probe at one place: predictions of samples that it was not fitted on, and scores of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.folds import Nested, nested_class_folds, nested_number_folds
from mechinterp_cli.methods.probe.logistic import Tasks, fit_site
from mechinterp_cli.methods.probe.means import linear_discriminant, mass_mean
from mechinterp_cli.methods.probe.mlp import Training, fit_mlp
from mechinterp_cli.methods.probe.nested import Scored, score_classes, score_numbers
from mechinterp_cli.methods.probe.options import ProbeName, ProbeOptions
from mechinterp_cli.methods.probe.ridge import fit_ridge

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
        log_probabilities: [folds, classes, n], nats, where targets are classes.
        penalty: By fold, where there is one.
        unconverged: Fits that stopped before their optimum.
    """

    problem: Problem
    predicted: Tensor
    log_probabilities: Tensor | None = None
    penalty: tuple[float, ...] | None = None
    unconverged: int = 0

    @cached_property
    def held_out(self) -> Tensor:
        """[n]: each sample's prediction by the probe that was not fitted on it."""
        return self._own(self.predicted)

    @property
    def chances(self) -> Tensor | None:
        """[n]: the probability that its held-out probe gives to each sample's own class; None for numbers."""
        if self.log_probabilities is None:
            return None
        targets = self.problem.targets.to(self.log_probabilities.device)
        every = self.log_probabilities.exp()[:, targets, torch.arange(len(targets))]
        return self._own(every)

    def _own(self, by_fold: Tensor) -> Tensor:
        """Of each sample what its own fold's probe says, [n]."""
        return (by_fold * self.problem.nested.outer.test.to(by_fold)).sum(0)

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
    if name == "ridge":
        alphas = [1 / penalty for penalty in options.penalties]
        return _chosen(score_numbers(x.double(), problem.targets, problem.nested, alphas), problem, options)
    if name == "logistic":
        classes = _classes(problem)
        (found,) = score_classes(x, problem.targets[None], [problem.nested], options.penalties, classes=classes)
        return _chosen(found, problem, options)
    logs, unstopped = _unpenalised(name, x, problem, problem.nested.outer.train, options)
    return Outcome(problem, logs.argmax(-2), logs, None, unstopped)


def refit(
    name: ProbeName,
    x: Tensor,
    problem: Problem,
    train: Tensor,
    penalties: Sequence[float] | None,
    options: ProbeOptions,
) -> Tensor:
    """Predictions of probes of other training samples, [masks, n].

    Args:
        name: Which.
        x: [n, d] activations.
        problem: What it is fitted to.
        train: [masks, n] bool.
        penalties: Of each mask, where the probe has one.
        options: The seed.
    """
    if penalties is None:
        return _unpenalised(name, x, problem, train, options)[0].argmax(-2)
    different = sorted(set(penalties))
    own = torch.tensor([different.index(penalty) for penalty in penalties])
    if name == "ridge":
        alphas = [1 / penalty for penalty in different]
        predicted = fit_ridge(x[None], problem.targets, train, alphas).predict(x[None])[0]
    else:
        tasks = Tasks.of(problem.targets.to(x.device), train.to(x.device).double(), _classes(problem))
        predicted = fit_site(x, tasks, different).predict(x)
    return predicted[torch.arange(len(train)), own]


def _unpenalised(
    name: ProbeName, x: Tensor, problem: Problem, train: Tensor, options: ProbeOptions
) -> tuple[Tensor, int]:
    """Log-probabilities [masks, classes, n], and how many fits were not at their end."""
    classes, labels = _classes(problem), problem.targets
    if name == "mlp":
        fitted = fit_mlp(x[None], labels, train, classes=classes, training=Training(seed=options.seed))
        return fitted.log_probabilities(x[None])[0], int((~fitted.stopped).sum())
    if name == "lda":
        linear = linear_discriminant(x[None], labels, train, classes=classes, shrinkage=SHRINKAGE)
    else:
        linear = mass_mean(x[None], labels, train, classes=classes, whiten=name == "mass_mean_whitened")
    return linear.logits(x[None])[0].log_softmax(-2), 0


def _classes(problem: Problem) -> int:
    assert problem.classes is not None
    return problem.classes


def _chosen(found: Scored, problem: Problem, options: ProbeOptions) -> Outcome:
    penalty = tuple(options.penalties[at] for at in found.penalty.tolist())
    logs = found.log_probabilities if problem.classes is not None else None
    return Outcome(problem, found.predicted, logs, penalty, found.unconverged)
