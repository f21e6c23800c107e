"""Scores by nested cross-validation: the penalty is chosen on inner folds of the training samples alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.folds import Nested
from mechinterp_cli.methods.probe.logistic import MAX_STEPS, TOLERANCE, Tasks, fit_site
from mechinterp_cli.methods.probe.ridge import fit_ridge


@dataclass(frozen=True)
class Scored:
    """Of one site.

    Args:
        predicted: [folds, n]: of each fold's probe with its own penalty, all samples; classes or numbers.
        log_probabilities: [folds, classes, n], nats; empty where targets are numbers.
        penalty: [folds]: index of the chosen penalty.
        weights: [folds, columns, d] of the chosen probe, of the activations as they are.
        intercepts: [folds, columns].
        unconverged: Fits, inner ones too, that stopped before their optimum.
    """

    predicted: Tensor
    log_probabilities: Tensor
    penalty: Tensor
    weights: Tensor
    intercepts: Tensor
    unconverged: int

    def held_out(self, nested: Nested) -> Tensor:
        """[n]: each sample's prediction by the probe that was not trained on it."""
        return (self.predicted * nested.outer.test.to(self.predicted)).sum(0)

    def accuracy(self, labels: Tensor, nested: Nested) -> float:
        """Share of samples whose held-out prediction is right."""
        found = self.held_out(nested)
        return float((found == labels.to(found.device)).double().mean())


def score_classes(
    x: Tensor,
    labels: Tensor,
    splits: Sequence[Nested],
    penalties: Sequence[float],
    *,
    classes: int,
    tolerance: float = TOLERANCE,
    max_steps: int = MAX_STEPS,
) -> list[Scored]:
    """Logistic probes of one site, for several sets of labels at once (the real ones, permuted ones, control labels).

    Penalties are chosen by the inner folds' accuracy over all their test samples; of equal ones the strongest.

    Args:
        x: [n, d].
        labels: [sets, n].
        splits: One per set of labels.
        penalties: scikit-learn's C.
        classes: How many.
        tolerance: Of the solver.
        max_steps: Of the solver.
    """
    labels = labels.to(x.device)
    masks = torch.stack([_all_masks(nested) for nested in splits])
    per_set = masks.shape[1]
    tasks = Tasks(labels.repeat_interleave(per_set, 0), masks.flatten(0, 1), classes)
    fitted = fit_site(x, tasks, penalties, tolerance=tolerance, max_steps=max_steps)
    logs = fitted.log_probabilities(x)
    chosen = []
    for number, nested in enumerate(splits):
        rows = slice(number * per_set, (number + 1) * per_set)
        folds = len(nested.train)
        right = (logs[rows].argmax(-2) == labels[number]).double()
        best, at = _choose(right[folds:], nested, penalties), torch.arange(folds)
        own = logs[rows][at, best]
        chosen.append(
            Scored(
                own.argmax(-2),
                own,
                best,
                fitted.weights[rows][at, best],
                fitted.intercepts[rows][at, best],
                int((~fitted.converged[rows]).sum()),
            )  # fmt: skip
        )
    return chosen


def score_numbers(x: Tensor, y: Tensor, nested: Nested, penalties: Sequence[float]) -> Scored:
    """Ridge probes of one site; penalties are chosen by the inner folds' squared error, of equal ones the strongest.

    Args:
        x: [n, d].
        y: [n].
        nested: Folds.
        penalties: scikit-learn's alpha: here the largest is the strongest.
    """
    fitted = fit_ridge(x[None], y, _all_masks(nested), penalties)
    predicted = fitted.predict(x[None])[0]
    folds = len(nested.train)
    gain = -(predicted[folds:] - y.to(predicted.device)).square()
    best, at = _choose(gain, nested, [1 / alpha for alpha in penalties]), torch.arange(folds)
    return Scored(
        predicted[at, best], torch.empty(folds, 0, len(x)), best,
        fitted.weights[0, at, best][:, None], fitted.intercepts[0, at, best][:, None], 0,
    )  # fmt: skip


def _all_masks(nested: Nested) -> Tensor:
    """[folds + folds · inner, n] training masks."""
    return torch.cat([nested.outer.train, nested.train.flatten(0, 1)]).double()


def _choose(gain: Tensor, nested: Nested, penalties: Sequence[float]) -> Tensor:
    """Index of the best penalty of each fold.

    Args:
        gain: [folds · inner, penalties, n] of every sample.
        nested: Folds.
        penalties: In the order of weakness: the smallest is the strongest.
    """
    folds, inner, _ = nested.test.shape
    tested = nested.test.to(gain)[:, :, None]
    total = (gain.view(folds, inner, len(penalties), -1) * tested).sum((1, 3))
    order = torch.tensor(penalties, device=gain.device).argsort()
    return order[total[:, order].argmax(1)]
