"""Scores with permuted labels, for all draws of a place together, and what they say of the score.

What is scored must be one function of the labels, whatever it is, for a permutation test to be exact; it need not be
the probe to its last digit. Logistic fits of 200 draws × 20 masks × 8 penalties at 30 layers take minutes, so the test
has a stand-in of them, for the labels as they are and for permuted ones alike: one step of Newton's method from no
coefficients, which has a closed form and is the probe itself where penalties are strong. Ridge, mass-mean and linear
discriminant probes are themselves.

Folds are those of the score. The penalty is chosen anew for each draw: each other fold is tested in turn, by fits that
leave out both it and the fold that is scored. So every mask keeps its classes in each draw, and serves two folds.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.methods.beside import Floats
from mechinterp_cli.methods.probe.exchange import Integers
from mechinterp_cli.methods.probe.folds import Nested
from mechinterp_cli.methods.probe.honesty import permutation_p
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.permuted_fits import Basis, discriminants, nearest_means, newton_steps
from mechinterp_cli.methods.probe.scoring import SHRINKAGE, Problem
from mechinterp_cli.stats.families import step_down

WITHOUT = ("mlp", "mass_mean_whitened")
"""Probes whose fits of permuted labels share nothing: there is no test of them."""
_Fit = Callable[[Basis, Tensor], Iterator[Tensor]]
"""From training targets [n_train, sets, columns] to logits of each penalty, [rows, sets, columns]."""


Row = dict[str, Any]
CHANCE, PERMUTED = "chance", "permuted"
"""Where a row has its `Chance`; the target of rows that say what permuted labels score."""


@dataclass(frozen=True, eq=False)
class Chance:
    """What permuted labels score.

    Args:
        observed: The labels as they are, scored in the same way.
        drawn: [draws].
    """

    observed: float
    drawn: Floats

    @property
    def p(self) -> float:
        """(1 + draws at least as good) / (1 + draws)."""
        return permutation_p(self.observed, self.drawn)


def chance(name: ProbeName, x: Tensor, problem: Problem, penalties: Sequence[float], drawn: Integers) -> Chance | None:
    """Score permuted labels at a place; None for a probe that has no test.

    Args:
        name: The probe.
        x: [n, d] activations.
        problem: The labels as they are, and their folds.
        penalties: Of logistic and ridge probes.
        drawn: [draws, n] from `exchange.exchanges`.
    """
    if name in WITHOUT or not len(drawn):
        return None
    own = np.arange(len(problem.targets))
    sets = problem.targets[torch.from_numpy(np.concatenate([own[None], drawn]).T)].to(x.device)
    scored = _Scored.of(name, x.double(), sets, problem, penalties)
    scores = scored.scores(problem.nested).cpu().numpy()
    return Chance(float(scores[0]), scores[1:])


def adjusted(found: Sequence[Chance]) -> list[float]:
    """p-values adjusted for all of these (step-down max-T, Westfall & Young 1993), whose draws are shared.

    Args:
        found: Of all places and probes of a run.
    """
    if not found:
        return []
    observed, drawn = np.array([one.observed for one in found]), np.stack([one.drawn for one in found])
    # below 0 an R² says no more than at 0
    least = np.maximum(drawn, 0)
    _, p = step_down(np.maximum(observed, 0), lambda rows: least[rows], drawn.shape[1], exact=False)
    return [float(one) for one in p]


def with_chance(rows: Iterable[Row]) -> list[Row]:
    """Scores with their p-values, each followed by what permuted labels score: mean, and what 95 % of draws lie within.

    Args:
        rows: Of all places and probes of a run; some have a `chance`.
    """
    rows = list(rows)
    found = [row[CHANCE] for row in rows if row.get(CHANCE) is not None]
    corrected = iter(adjusted(found))
    out = []
    for row in rows:
        one = row.get(CHANCE)
        plain = {name: value for name, value in row.items() if name != CHANCE}
        if one is None:
            out.append(plain)
            continue
        out.append(plain | {"p": one.p, "p_adjusted": next(corrected), "statistic": one.observed})
        low, high = np.quantile(one.drawn, (0.025, 0.975)).tolist()
        score = {"target": PERMUTED, "score": float(one.drawn.mean()), "ci_low": low, "ci_high": high}
        out.append(plain | score | {"selectivity": None, "unconverged": None})
    return out


@dataclass(frozen=True, eq=False)
class _Scored:
    """A probe's fits.

    Args:
        x: [n, d] float64.
        sets: [n, sets] targets.
        columns: [n, sets, columns] the same as what is fitted.
        penalties: One where there is nothing to choose.
        standardise: Whether features are scaled.
        fit: The probe.
        numbers: Whether targets are numbers.
    """

    x: Tensor
    sets: Tensor
    columns: Tensor
    penalties: tuple[float, ...]
    standardise: bool
    fit: _Fit
    numbers: bool

    @staticmethod
    def of(name: ProbeName, x: Tensor, sets: Tensor, problem: Problem, penalties: Sequence[float]) -> "_Scored":
        """As the probe of this name has it; the strongest penalty first."""
        order, classes = tuple(sorted(penalties)), problem.classes
        if classes is None:
            fit = partial(newton_steps, penalties=order, classes=False)
            return _Scored(x, sets, sets.double()[..., None], order, True, fit, True)
        members = torch.nn.functional.one_hot(sets, classes).double()
        if name == "logistic":
            columns = members[..., 1:] if classes == 2 else members
            return _Scored(x, sets, columns, order, True, partial(newton_steps, penalties=order, classes=True), False)
        by_means = nearest_means
        if name == "lda":
            by_means = partial(discriminants, features=x.shape[1], shrinkage=SHRINKAGE)
        return _Scored(x, sets, members, (1.0,), False, lambda basis, own: iter([by_means(basis, own)]), False)

    def gains(self, train: Tensor, rows: Tensor) -> Tensor:
        """[penalties, rows, sets]: 1 where a prediction is right; of numbers less the squared error.

        Args:
            train: [n] mask.
            rows: [rows] indices.
        """
        basis = Basis.of(self.x, train, rows, standardise=self.standardise)
        wanted = self.sets[rows]
        return torch.stack([self._gain(found, wanted) for found in self.fit(basis, self.columns[train])])

    def _gain(self, found: Tensor, wanted: Tensor) -> Tensor:
        if self.numbers:
            return -(found[..., 0] - wanted).square()
        predicted = (found[..., 0] > 0).long() if found.shape[-1] == 1 else found.argmax(-1)
        return (predicted == wanted).double()

    def scores(self, nested: Nested) -> Tensor:
        """[sets]: accuracy (R²) over all held-out samples."""
        test = nested.outer.test.to(self.x.device)
        best = self._chosen(nested, test)
        total = torch.zeros(self.sets.shape[1], dtype=torch.float64, device=self.x.device)
        for fold, own in enumerate(test):
            gains = self.gains(~own, own.nonzero().flatten()).sum(1)
            total += gains.gather(0, best[fold][None])[0]
        if self.numbers:
            return 1 + total / (self.sets.var(0, correction=0) * len(self.sets))
        return total / len(self.sets)

    def _chosen(self, nested: Nested, test: Tensor) -> Tensor:
        """Index of every fold's penalty, [folds, sets]; of equal ones the strongest."""
        shape = (len(test), len(self.penalties), self.sets.shape[1])
        total = torch.zeros(shape, dtype=torch.float64, device=self.x.device)
        if len(self.penalties) == 1:
            return total.argmax(1)
        for train, scored in _choosing(nested, test):
            rows = torch.stack([mask for _, mask in scored]).any(0).nonzero().flatten()
            gains = self.gains(train, rows)
            for fold, mask in scored:
                total[fold] += gains[:, mask[rows]].sum(1)
        return total.argmax(1)


def _choosing(nested: Nested, test: Tensor) -> Iterator[tuple[Tensor, list[tuple[int, Tensor]]]]:
    """Training masks, and what each tests of which folds' training samples.

    Two folds leave nothing when both are left out: then the inner folds choose as they do for the score, though they
    do not keep their classes in every draw.
    """
    if len(test) > 2:
        for a, b in combinations(range(len(test)), 2):
            yield ~(test[a] | test[b]), [(a, test[b]), (b, test[a])]
        return
    for fold in range(len(test)):
        for train, inner in zip(nested.train[fold].to(test.device), nested.test[fold].to(test.device), strict=True):
            yield train, [(fold, inner)]
