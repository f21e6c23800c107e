"""Learning curves: scores of held-out samples by how many samples a probe was fitted on."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.honesty import accuracy_interval, learning_masks, learning_sizes
from mechinterp_cli.methods.probe.readout import Readout, Row
from mechinterp_cli.methods.probe.scoring import Outcome, Problem, refit


def learning_rows(readout: Readout, x: Tensor) -> Iterator[Row]:
    """Of every fitted probe a row for each size.

    Training samples of a fold come in a seeded order that keeps the shares of the classes, so a larger set holds every
    smaller one; the penalty is what the fold chose of all its training samples.

    Args:
        readout: A place, whose probes are fitted.
        x: [n, d] activations.
    """
    problem, options = readout.problem, readout.options
    sizes, train = _masks(problem, options.seed)
    for name, outcome in readout.outcomes.items():
        penalties = None if outcome.penalty is None else outcome.penalty * len(sizes)
        predicted = refit(name, x, problem, train.flatten(0, 1), penalties, options).view(train.shape)
        for size, own in zip(sizes, predicted, strict=True):
            correct = Outcome(problem, own).correct
            interval = accuracy_interval(correct[None], list(problem.groups), readout.stats)
            yield {
                "probe": name,
                "measure": "r2" if problem.classes is None else "accuracy",
                "n_train": size,
                "n": len(correct),
                "score": float(correct.mean()),
                **interval.ends(0, "ci_low", "ci_high"),
            }


def _masks(problem: Problem, seed: int) -> tuple[tuple[int, ...], Tensor]:
    """Sizes, and training masks [sizes, folds, n]; no size at which a fold lacks a class."""
    train, classes = problem.nested.outer.train, problem.classes
    labels = problem.targets.long().tolist() if classes is not None else [0] * len(problem.targets)
    sizes = learning_sizes(int(train.sum(1).min()), classes or 1)
    masks = torch.stack([learning_masks(mask, labels, sizes, seed=seed) for mask in train], dim=1)
    kinds = torch.nn.functional.one_hot(torch.tensor(labels))
    whole = ((masks.long() @ kinds) > 0).all(-1).all(-1).tolist()
    kept = [number for number, good in enumerate(whole) if good]
    return tuple(sizes[number] for number in kept), masks[kept]
