"""Where samples lie along the probes that were not fitted on them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from mechinterp_cli.methods.probe.logistic import Tasks, fit_site
from mechinterp_cli.methods.probe.means import linear_discriminant, mass_mean
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.readout import LABEL, Readout
from mechinterp_cli.methods.probe.scoring import SHRINKAGE, Problem
from mechinterp_cli.methods.probe.sites import Reading

Row = dict[str, Any]
LINEAR: tuple[ProbeName, ...] = ("logistic", "mass_mean", "mass_mean_whitened", "lda")
ROWS = 5_000
"""Places are told of from the best on up to so many rows; the best of each kind of site and probe always is."""


def boundaries(name: ProbeName, x: Tensor, problem: Problem, penalties: Sequence[float] = ()) -> tuple[Tensor, Tensor]:
    """Weights [folds, d] and intercepts [folds] of each fold's probe, float64: above 0 it says class 1.

    Args:
        name: One of `LINEAR`.
        x: [n, d] activations.
        problem: Two classes, and folds.
        penalties: The chosen one of each fold, of `logistic`.
    """
    train = problem.nested.outer.train
    if name == "logistic":
        asked = sorted(set(penalties))
        fitted = fit_site(x, Tasks.of(problem.targets, train.double(), 2), asked)
        folds, at = torch.arange(len(train)), [asked.index(penalty) for penalty in penalties]
        return fitted.weights[folds, at, 0], fitted.intercepts[folds, at, 0]
    if name == "lda":
        linear = linear_discriminant(x[None], problem.targets, train, classes=2, shrinkage=SHRINKAGE)
    else:
        linear = mass_mean(x[None], problem.targets, train, classes=2, whiten=name == "mass_mean_whitened")
    return linear.direction[0], linear.intercepts[0, :, 1] - linear.intercepts[0, :, 0]


def projected(x: Tensor, problem: Problem, weights: Tensor, intercepts: Tensor) -> Tensor:
    """[n]: each sample's distance from the boundary of the probe that was not fitted on it, class 1 above 0.

    The unit is the standard deviation of the projections of the samples that the probe was fitted on.

    Args:
        x: [n, d] activations.
        problem: Folds.
        weights: [folds, d].
        intercepts: [folds].
    """
    along = weights @ x.to(weights).T
    folds = problem.nested.outer
    spread = torch.stack([one[own].std(correction=0) for one, own in zip(along, folds.train.to(x.device), strict=True)])
    found = (along + intercepts[:, None]) / torch.where(spread > 0, spread, 1.0)[:, None]
    return (found * folds.test.to(found)).sum(0).cpu()


def projection_rows(
    readouts: Sequence[Readout],
    rows: Sequence[Row],
    labels: Sequence[Mapping[str, Any]],
    activations: Callable[[Reading], Tensor],
    place: Callable[[Reading], Row],
) -> list[Row]:
    """One row per place, probe and sample of the best places; none where labels are not of two classes.

    Args:
        readouts: Every place with its labels and folds.
        rows: Of the table `probes`.
        labels: Of the table `labels`.
        activations: [n, d] of a place.
        place: Columns of a place.
    """
    known = {readout.reading.label: readout for readout in readouts if readout.problem.classes == 2}
    found: list[Row] = []
    for score in _best(rows, {name: len(readout.problem.targets) for name, readout in known.items()}):
        readout, name = known[score["label"]], score["probe"]
        assert name in get_args(ProbeName)
        x = activations(readout.reading)
        along = projected(x, readout.problem, *boundaries(name, x, readout.problem, _penalties(rows, score)))
        shared = place(readout.reading) | {"probe": name}
        samples = [labels[example] for example in readout.reading.examples]
        found += [
            shared | {key: label[key] for key in ("prompt", "word", "class")} | {"projection": projection}
            for label, projection in zip(samples, along.tolist(), strict=True)
        ]
    return found


def _best(rows: Sequence[Row], sizes: Mapping[str, int]) -> list[Row]:
    """Scores of the places that are told of: the best of each kind of site and probe, then the second ones."""
    scored = [row for row in rows if row["label"] in sizes and _is_score(row) and row["fold"] is None]
    ranks: Counter[tuple[str, str]] = Counter()
    ranked = []
    for row in sorted(scored, key=lambda row: -row["score"]):
        kind = row["site"], row["probe"]
        ranked.append((ranks[kind], row))
        ranks[kind] += 1
    ranked.sort(key=lambda found: found[0])
    chosen, total = list[Row](), 0
    for rank, row in ranked:
        total += sizes[row["label"]]
        if rank and total > ROWS:
            break
        chosen.append(row)
    return chosen


def _is_score(row: Row) -> bool:
    return row["probe"] in LINEAR and row["target"] == LABEL and row["baseline"] is None and row["split"] == "test"


def _penalties(rows: Sequence[Row], score: Row) -> list[float]:
    """Of every fold, in order."""
    own = [row for row in rows if _is_score(row) and row["fold"] is not None]
    own = [row for row in own if (row["label"], row["probe"]) == (score["label"], score["probe"])]
    return [row["penalty"] for row in sorted(own, key=lambda row: row["fold"])]
