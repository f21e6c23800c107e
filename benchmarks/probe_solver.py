"""How long logistic probes of all sites, folds and penalties take, against a loop over scikit-learn.

`python -m benchmarks.probe_solver [--sites N] [--n N] [--d N] [--rounds N] [--sample N] [--threads N]` runs both in one
process, taking turns, and prints a Markdown table of wall and processor seconds. Where scikit-learn stops early, the
solver is timed once more, stopped as soon as no objective is above scikit-learn's. It ends with 1 where an objective is
above scikit-learn's. How it is measured stands in `benchmarks/README.md`.
"""

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from mechinterp_cli.methods.probe.folds import class_folds
from mechinterp_cli.methods.probe.logistic import MAX_STEPS, TOLERANCE, Logistic, Tasks, fit_logistic

Found = TypeVar("Found")
Floats = npt.NDArray[np.float64]
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 4))
TARGET = 10.0
"""How many times faster than scikit-learn's loop the solver is to be."""
LOOPS = {"default": (1e-4, 100), "converged": (1e-8, 10_000)}
"""Tolerance and most iterations of scikit-learn: as it comes, and until its objective is the optimum's."""
STOPS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
"""Most steps of the solver that are tried until no objective is above that of scikit-learn as it comes."""
Problem = tuple[int, int, int]
"""Site, fold, penalty."""
Solution = tuple[Floats, Floats]
"""Coefficients of standardised features, intercepts."""
Seconds = tuple[float, float]
"""On the wall, and of the processor."""


@dataclass(frozen=True)
class Data:
    """Activations like those of a residual stream, and labels that can be read in part.

    Args:
        x: [sites, n, d], float64.
        labels: [n].
        train: [folds, n] bool.
        classes: How many.
    """

    x: Tensor
    labels: Tensor
    train: Tensor
    classes: int

    def problems(self) -> list[Problem]:
        """All of them, penalties fastest."""
        sites, folds = len(self.x), len(self.train)
        return [(s, f, p) for s in range(sites) for f in range(folds) for p in range(len(PENALTIES))]


def make_data(sites: int, n: int, d: int, folds: int, classes: int, noise: float) -> Data:
    """Correlated features whose k-th principal spread falls as 1/√k; labels by a direction of the first site and noise.

    Args:
        sites: Each another rotation of the same samples, with noise of its own.
        n: Samples.
        d: Features.
        folds: Of the samples, stratified.
        classes: How many.
        noise: Of the scores that labels are made from, in units of their spread.
    """
    rng = np.random.default_rng(0)
    base = rng.normal(size=(n, d)) / np.sqrt(np.arange(1, d + 1))
    scores = base @ rng.normal(size=(d, classes))
    labels = (scores / scores.std() + noise * rng.normal(size=scores.shape)).argmax(1)
    each = [(base + 0.02 * rng.normal(size=(n, d))) @ np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(sites)]
    train = class_folds(labels, folds).train
    return Data(torch.tensor(np.stack(each)), torch.tensor(labels), train, classes)


def by_solver(data: Data, tolerance: float, max_steps: int = MAX_STEPS) -> Logistic:
    """Everything included: standardisation, eigenvectors, both precisions."""
    tasks = Tasks.of(data.labels, data.train, data.classes)
    return fit_logistic(data.x, tasks, PENALTIES, tolerance=tolerance, max_steps=max_steps)


def by_loop(data: Data, problems: Sequence[Problem], tolerance: float, iterations: int) -> list[Solution]:
    """Coefficients of standardised features, and intercepts; features are standardised once for all penalties."""
    out, last, scaled = [], (-1, -1), np.empty(0)
    labels = data.labels.numpy()
    for site, fold, penalty in problems:
        mask = data.train[fold].numpy()
        if (site, fold) != last:
            scaled, last = standardised(data, site, fold), (site, fold)
        probe = LogisticRegression(C=PENALTIES[penalty], tol=tolerance, max_iter=iterations)
        with warnings.catch_warnings():
            # that it stops at its limit of iterations is what the objectives are to show
            warnings.simplefilter("ignore")
            probe.fit(scaled, labels[mask])
        out.append((probe.coef_, probe.intercept_))
    return out


def standardised(data: Data, site: int, fold: int) -> Floats:
    """Training samples, by their own means and spreads."""
    x: Floats = data.x[site][data.train[fold]].numpy()
    return np.asarray((x - x.mean(0)) / x.std(0))


def objective(data: Data, problem: Problem, coefficients: Floats, intercepts: Floats) -> float:
    """Penalty × log-loss + ‖w‖²/2 in numpy; of no code of either solver."""
    site, fold, penalty = problem
    logits = standardised(data, site, fold) @ coefficients.T + intercepts
    if data.classes == 2:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=1)
    own = logits[np.arange(len(logits)), data.labels[data.train[fold]].numpy()]
    top = logits.max(1)
    loss = (top + np.log(np.exp(logits - top[:, None]).sum(1)) - own).sum()
    return float(PENALTIES[penalty] * loss + (coefficients**2).sum() / 2)


class Clock:
    """The fewest seconds of each thing that was timed, on the wall and of this process's processor."""

    def __init__(self) -> None:
        self.best: dict[str, Seconds] = {}

    def time(self, name: str, call: Callable[[], Found]) -> Found:
        """Call it and note its seconds where they are the fewest yet."""
        wall, processor = time.perf_counter(), time.process_time()
        found = call()
        taken = time.perf_counter() - wall, time.process_time() - processor
        before = self.best.get(name, taken)
        self.best[name] = min(before[0], taken[0]), min(before[1], taken[1])
        return found


@dataclass(frozen=True)
class Row:
    """The solver against one way of using scikit-learn, over the problems that this solved.

    Args:
        loop: Of `LOOPS`.
        max_steps: Of the solver.
        loop_seconds: All problems; scaled from those solved.
        seconds: Of the solver, all problems.
        solved: How many the loop solved.
        highest: Largest of (solver's objective − scikit-learn's) / scikit-learn's; above 0 the solver's is higher.
        lowest: Smallest of them.
        coefficients: Largest distance of coefficients, as a share of their norm.
    """

    loop: str
    max_steps: int
    loop_seconds: Seconds
    seconds: Seconds
    solved: int
    highest: float
    lowest: float
    coefficients: float


@dataclass(frozen=True)
class Result:
    """What was measured.

    Args:
        shape: Sites, samples, features, folds, penalties, classes.
        rounds: Of which the best counts.
        tolerance: Of the solver.
        unconverged: Problems that it says it has not solved, where it was not stopped.
        most_steps: Of any problem.
        rows: Each loop against the solver at its optimum; and `default` against the solver stopped at its objective.
    """

    shape: tuple[int, ...]
    rounds: int
    tolerance: float
    unconverged: int
    most_steps: int
    rows: tuple[Row, ...]

    @property
    def limit(self) -> float:
        """An objective that is higher by this share, or less, is equal: the optimum's may be lower by so much."""
        return self.tolerance**2

    @property
    def equal_or_lower(self) -> bool:
        """Whether no objective is above scikit-learn's."""
        return all(row.highest <= self.limit for row in self.rows)


def measure(data: Data, rounds: int, sample: int | None, tolerance: float) -> Result:
    """Rounds of solver and loops, taking turns; scikit-learn solves a seeded sample of (site, fold) if so asked."""
    pairs = [(s, f) for s in range(len(data.x)) for f in range(len(data.train))]
    picked = np.random.default_rng(1).permutation(len(pairs))[: sample or len(pairs)]
    problems = [(*pairs[i], p) for i in sorted(picked.tolist()) for p in range(len(PENALTIES))]
    share = len(problems) / len(data.problems())
    clock = Clock()
    found, solved, stop, stopped = None, {}, MAX_STEPS, None
    for number in range(rounds):
        found = clock.time("solver", partial(by_solver, data, tolerance))
        for name, (tol, iterations) in LOOPS.items():
            solved[name] = clock.time(name, partial(by_loop, data, problems, tol, iterations))
        if stopped is None:
            stop = _fewest(data, tolerance, problems, solved["default"])
        stopped = clock.time("stopped", partial(by_solver, data, tolerance, stop))
        spent = ", ".join(f"{name} {wall:.2f} s ({cpu:.2f} s)" for name, (wall, cpu) in clock.best.items())
        _say(f"round {number + 1} of {rounds}, wall (processor): {spent}")
    assert found is not None and stopped is not None
    tried = [(name, "solver", MAX_STEPS, found) for name in LOOPS] + [("default", "stopped", stop, stopped)]
    rows = []
    for name, ours, steps, fitted in tried:
        off, distances = compared(data, fitted, problems, solved[name])
        wall, processor = clock.best[name]
        taken = wall / share, processor / share
        rows.append(Row(name, steps, taken, clock.best[ours], len(problems), max(off), min(off), max(distances)))
    shape = (len(data.x), *data.x.shape[1:], len(data.train), len(PENALTIES), data.classes)
    return Result(
        shape, rounds, tolerance, int((~found.converged).sum()), int(found.steps.max()), tuple(rows)
    )  # fmt: skip


def _fewest(data: Data, tolerance: float, problems: Sequence[Problem], solved: Sequence[Solution]) -> int:
    """Steps after which no objective is above scikit-learn's; not timed."""
    for stop in STOPS:
        off, _ = compared(data, by_solver(data, tolerance, stop), problems, solved)
        if max(off) <= tolerance**2:
            return stop
    return MAX_STEPS


def compared(
    data: Data, found: Logistic, problems: Sequence[Problem], solved: Sequence[Solution]
) -> tuple[list[float], list[float]]:
    """Differences of objectives and distances of coefficients, as in `Row`, by problem."""
    differences, distances = [], []
    for (site, fold, penalty), (coefficients, intercepts) in zip(problems, solved, strict=True):
        raw = found.weights[site, fold, penalty]
        own: Floats = found.coefficients[site, fold, penalty].numpy()
        mean = data.x[site][data.train[fold]].mean(0)
        shift: Floats = (found.intercepts[site, fold, penalty] + raw @ mean).numpy()
        theirs = objective(data, (site, fold, penalty), coefficients, intercepts)
        difference = (objective(data, (site, fold, penalty), own, shift) - theirs) / theirs
        # NaN is as far above as can be
        differences.append(float(np.nan_to_num(difference, nan=np.inf)))
        distances.append(float(np.linalg.norm(own - coefficients) / np.linalg.norm(own)))
    return differences, distances


_HEAD = ("scikit-learn", "tolerance", "iterations", "solver's most steps", "loop s", "solver s", "×", "× processor",
         "solved by the loop", "objective, highest", "objective, lowest", "coefficients")  # fmt: skip


def markdown(result: Result) -> str:
    """Facts and one row per comparison."""
    rows: list[Sequence[str]] = [_HEAD, ["---"] * len(_HEAD)]
    total = int(np.prod([result.shape[0], *result.shape[3:5]]))
    for row in result.rows:
        tolerance, iterations = LOOPS[row.loop]
        wall, processor = (theirs / ours for theirs, ours in zip(row.loop_seconds, row.seconds, strict=True))
        rows.append((
            row.loop, f"{tolerance:g}", f"{iterations}", f"{row.max_steps}",
            f"{row.loop_seconds[0]:.2f}", f"{row.seconds[0]:.2f}", f"**{wall:.1f}**", f"{processor:.1f}",
            f"{row.solved} of {total}", f"{row.highest:+.1e}", f"{row.lowest:+.1e}", f"{row.coefficients:.1e}",
        ))  # fmt: skip
    sites, n, d, folds, penalties, classes = result.shape
    facts = (
        f"{sites} sites × {folds} folds × {penalties} penalties, n {n}, d {d}, {classes} classes; solver's tolerance"
        f" {result.tolerance:g}, {result.unconverged} not converged, at most {result.most_steps} steps; cores"
        f" {os.cpu_count()}, threads {torch.get_num_threads()}, {platform.machine()}; torch {torch.__version__};"
        f" scikit-learn {sklearn.__version__}"
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    rounds = f"Best of {result.rounds} rounds; at least {TARGET:g} is asked."
    what = "Objectives: the solver's less scikit-learn's, as a share of it."
    return f"# Logistic probes: solver against a loop over scikit-learn\n\n{facts}\n\n{table}\n\n{rounds} {what}\n"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_solver", description=__doc__)
    add = parser.add_argument
    add("--sites", type=_positive, default=31, help="layers, each with activations of its own")
    add("--n", type=_positive, default=1000, help="samples")
    add("--d", type=_positive, default=576, help="features")
    add("--folds", type=_positive, default=5, help="at least 2")
    add("--classes", type=_positive, default=2, help="at least 2")
    add("--noise", type=float, default=0.5, help="of the labels, in units of their scores' spread")
    add("--tolerance", type=float, default=TOLERANCE, help="of the solver")
    add("--rounds", type=_positive, default=3, help="timings of each, the best of which counts")
    add("--sample", type=_positive, help="site × fold pairs that scikit-learn solves; all of them if not given")
    add("--threads", type=_positive, help="of torch and of scikit-learn; their own choice if not given")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where an objective is above scikit-learn's.
    """
    asked = parsed(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    data = make_data(asked.sites, asked.n, asked.d, asked.folds, asked.classes, asked.noise)
    with threadpool_limits(asked.threads) if asked.threads is not None else nullcontext():
        result = measure(data, asked.rounds, asked.sample, asked.tolerance)
    print(markdown(result))
    if asked.json is not None:
        asked.json.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    if not result.equal_or_lower:
        _say(f"an objective is above scikit-learn's by more than {result.limit:g} of it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
