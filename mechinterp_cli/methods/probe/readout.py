"""Everything that is said of the probes at one place: their scores, and what these are to be set beside."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.probe.chance import CHANCE, chance
from mechinterp_cli.methods.probe.code_length import code_length
from mechinterp_cli.methods.probe.exchange import Integers, exchanges
from mechinterp_cli.methods.probe.honesty import accuracy_interval, control_labels, majority_score
from mechinterp_cli.methods.probe.logistic import Tasks, fit_site
from mechinterp_cli.methods.probe.options import ProbeName, ProbeOptions
from mechinterp_cli.methods.probe.scoring import Outcome, Problem, fit
from mechinterp_cli.methods.probe.sites import Reading

Row = dict[str, Any]
LABEL, CONTROL = "label", "control"


@dataclass(frozen=True, eq=False)
class Readout:
    """The samples of one place.

    Args:
        reading: The place.
        problem: Their labels and folds.
        control: Their control labels, where there are any.
        options: The section.
        stats: How intervals are made.
        correct: `Outcome.correct` of every probe fitted to the labels so far, by its name and baseline.
        outcomes: Of the probes fitted to the activations so far.
    """

    reading: Reading
    problem: Problem
    control: Problem | None
    options: ProbeOptions
    stats: StatsOptions
    correct: dict[tuple[ProbeName, str | None], Tensor] = field(default_factory=dict)
    outcomes: dict[ProbeName, Outcome] = field(default_factory=dict)

    def rows(self, names: Sequence[ProbeName], x: Tensor, exchanged: Integers) -> Iterator[Row]:
        """Of every probe: over all folds, and of each fold in training and in test.

        Args:
            names: The probes.
            x: [n, d] activations.
            exchanged: [draws, n] whose label a sample has in permuted ones; the first row has its `chance`.
        """
        for name in names:
            found = fit(name, x, self.problem, self.options)
            self.correct[name, None], self.outcomes[name] = found.correct, found
            control = None if self.control is None else fit(name, x, self.control, self.options)
            by_chance = chance(name, x, self.problem, self.options.penalties, exchanged)
            yield self._whole(found, name, control) | {CHANCE: by_chance}
            if control is not None:
                yield self._whole(control, name, None) | {"target": CONTROL}
            yield from self._by_fold(found, name)

    def draws(self) -> Integers:
        """Permuted labels, [draws, n]: the sample whose label a sample has."""
        problem, options = self.problem, self.options
        texts, folds = self.reading.view.prompts, problem.nested.outer
        return exchanges(
            problem.targets.tolist(), texts, problem.groups, folds, draws=options.permutations, seed=options.seed
        )

    def beside(self, name: ProbeName, baseline: str, x: Tensor) -> Row:
        """The same probe on something else than the model's activations."""
        found = fit(name, x, self.problem, self.options)
        self.correct[name, baseline] = found.correct
        return self._whole(found, name, None) | {"baseline": baseline}

    def majority(self) -> Row:
        """Saying the commonest class of the training samples, or their mean."""
        problem = self.problem
        if problem.classes is None:
            train = problem.nested.outer.train.double()
            means = (train @ problem.targets) / train.sum(1)
            found = Outcome(problem, means[:, None].expand(len(train), len(problem.targets)))
            return self._whole(found, None, None) | {"baseline": "majority"}
        score = majority_score(problem.targets.tolist(), problem.nested.outer)
        return self._row(None) | {"baseline": "majority", "score": score, "n": len(problem.targets)}

    def _row(self, name: ProbeName | None) -> Row:
        row: Row = {"probe": name, "target": LABEL, "baseline": None, "split": "test", "fold": None}
        return row | {"measure": "accuracy" if self.problem.classes is not None else "r2"}

    def _whole(self, found: Outcome, name: ProbeName | None, control: Outcome | None) -> Row:
        """Over all held-out predictions."""
        correct = found.correct
        interval = accuracy_interval(correct[None], list(found.problem.groups), self.stats)
        score = float(correct.mean())
        return self._row(name) | {
            "n": len(correct),
            "score": score,
            **interval.ends(0, "ci_low", "ci_high"),
            "unconverged": found.unconverged,
            "selectivity": None if control is None else score - float(control.correct.mean()),
        }

    def _by_fold(self, found: Outcome, name: ProbeName) -> Iterator[Row]:
        folds = self.problem.nested.outer
        for fold in range(len(folds.train)):
            penalty = None if found.penalty is None else found.penalty[fold]
            for split, masks in (("train", folds.train), ("test", folds.test)):
                mask = masks[fold]
                yield self._row(name) | {
                    "split": split,
                    "fold": fold,
                    "penalty": penalty,
                    "n_train": int(folds.train[fold].sum()),
                    "n": int(mask.sum()),
                    "score": found.score(mask, fold),
                }

    def code(self, x: Tensor) -> Row:
        """Online code length of the labels, by logistic probes of penalty 1, samples in a seeded order."""
        classes = self.problem.classes
        assert classes is not None
        order = torch.from_numpy(np.random.default_rng(self.options.seed).permutation(len(x)))
        x, labels = x[order], self.problem.targets[order]

        def next_block(begin: int, end: int) -> Tensor:
            weights = torch.zeros(1, len(labels))
            weights[:, :begin] = 1
            fitted = fit_site(x, Tasks(labels[None], weights, classes), (1.0,))
            return fitted.log_probabilities(x[begin:end])[0, 0]

        found = code_length(labels.tolist(), next_block, classes=classes)
        return {"bits": float(found.bits), "uniform": found.uniform, "compression": float(found.compression)}


def control_problem(problem: Problem, types: Sequence[str], options: ProbeOptions) -> Problem:
    """The same samples with labels that depend on the word type alone.

    Raises:
        UserError: Control labels that cannot be split.
    """
    assert problem.classes is not None
    labels = control_labels(types, problem.targets.tolist(), seed=options.seed)
    return Problem(torch.from_numpy(labels), problem.classes, problem.groups, problem.nested)


def bags(tokens: Sequence[Sequence[int]]) -> Tensor:
    """[n, different tokens]: how often each token occurs.

    Args:
        tokens: Of every sample those up to where the probe reads.
    """
    index: Mapping[int, int] = {token: i for i, token in enumerate(dict.fromkeys(t for own in tokens for t in own))}
    counts = torch.zeros(len(tokens), len(index))
    for row, own in enumerate(tokens):
        for token in own:
            counts[row, index[token]] += 1
    return counts
