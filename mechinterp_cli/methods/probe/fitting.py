"""Directions of the first linear probe at every place, fitted on chosen prompts, and those of control labels."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.probe.directions import FILE, PENALISED, Linear, as_file, fit_linear, tensor_name
from mechinterp_cli.methods.probe.honesty import control_labels, permuted_labels
from mechinterp_cli.methods.probe.interventions import AffineMap
from mechinterp_cli.methods.probe.leace import fit_leace
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.readout import LABEL, Readout
from mechinterp_cli.tasks.labelled import LabelledSet

Row = dict[str, Any]
ALIKE = 1e-5
"""Activations that differ by no more than this share of the largest number are the same."""
_TRIES = 20
"""For each set of control labels that has two classes at least."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A linear probe at one place, and what belongs to it.

    Args:
        readout: The place.
        linear: The probe.
        basis: Its directions, orthonormal rows [rank, d], float32.
        controls: Those of control labels, by name.
        x: The activations that it was fitted on, [samples, d].
        targets: Their classes, or numbers.
    """

    readout: Readout
    linear: Linear
    basis: Float[Tensor, "rank d"]
    controls: Mapping[str, Tensor]
    x: Float[Tensor, "samples d"]
    targets: Tensor

    def leace(self) -> AffineMap:
        """LEACE's map for the labels."""
        classes = self.readout.problem.classes
        z = self.targets[:, None].double()
        if classes is not None and classes > 2:
            z = torch.nn.functional.one_hot(self.targets.long(), classes).double()
        found = fit_leace(self.x, z)
        return AffineMap(found.matrix.float(), found.bias.float())


@dataclass(frozen=True, eq=False)
class Fitting:
    """How directions are fitted.

    Args:
        name: Which probe.
        examples: The labels.
        prompts: Numbers of the prompts that they are fitted on.
        penalties: By the label of a reading.
        controls: How many sets of control labels.
        seed: Of these.
    """

    name: ProbeName
    examples: LabelledSet
    prompts: frozenset[int]
    penalties: Mapping[str, float]
    controls: int = 0
    seed: int = 0

    def at(self, readout: Readout, x: Float[Tensor, "examples d"]) -> Fitted | None:
        """The directions at one place; None where activations, or the probe, tell nothing apart.

        Args:
            readout: The place.
            x: Activations of all its samples.
        """
        rows, problem = self.rows(readout), readout.problem
        own, targets = x[rows].float(), problem.targets[rows]
        if float((own - own.mean(0)).abs().max()) <= ALIKE * float(own.abs().max()):
            return None
        control = self._control_sets(readout, rows)
        penalty = self.penalties[readout.reading.label] if self.name in PENALISED else 1.0
        probe, *others = fit_linear(self.name, own, [targets, *control], problem.classes, penalty)
        if not len(basis := probe.basis):
            return None
        named = {f"control {i}": other.basis for i, other in enumerate(others) if len(other.basis)}
        return Fitted(readout, probe, basis, named, own, targets)

    def rows(self, readout: Readout) -> list[int]:
        """The samples of a place that belong to the prompts that are fitted on."""
        return [row for row, prompt in enumerate(readout.reading.view.prompts) if prompt in self.prompts]

    def _control_sets(self, readout: Readout, rows: Sequence[int]) -> list[Tensor]:
        problem = readout.problem
        targets = problem.targets[rows].numpy()
        if self._types and problem.classes is not None:
            types = [self._types[readout.reading.examples[row]] for row in rows]
            drawn = (control_labels(types, targets.tolist(), seed=self.seed + i) for i in range(_TRIES * self.controls))
            kept = [labels for labels in drawn if len(set(labels.tolist())) > 1]
            return [torch.from_numpy(labels) for labels in kept[: self.controls]]
        values, codes = np.unique(targets, return_inverse=True)
        groups = [problem.groups[row] for row in rows]
        sets = permuted_labels(codes, groups, draws=self.controls, seed=self.seed)
        return [torch.from_numpy(values[labels]) for labels in sets]

    @cached_property
    def _types(self) -> tuple[str, ...]:
        return self.examples.word_types


def usual_penalties(rows: Sequence[Row], name: ProbeName) -> dict[str, float]:
    """By the label of a reading the penalty that most folds chose; of several the strongest.

    Args:
        rows: Of the table `probes`.
        name: Which probe.
    """
    chosen: dict[str, Counter[float]] = defaultdict(Counter)
    for row in rows:
        ours = row["probe"] == name and row["target"] == LABEL and row["baseline"] is None
        if ours and row["split"] == "test" and row.get("penalty") is not None:
            chosen[row["label"]][row["penalty"]] += 1
    return {label: min(counts, key=lambda penalty: (-counts[penalty], penalty)) for label, counts in chosen.items()}


def save_directions(bench: Bench, fitted: Sequence[Fitted]) -> None:
    """Leave the directions in the run directory, a file for each of its models; none where there are none.

    Args:
        bench: The run.
        fitted: What was found.
    """
    views: dict[tuple[Site, int | None], set[str]] = defaultdict(set)
    for one in fitted:
        views[one.readout.reading.site, one.readout.reading.head].add(one.readout.reading.view.name)
    several = any(len(names) > 1 for names in views.values())
    named = {tensor_name(one.readout.reading, several=several): one.basis for one in fitted}
    if named:
        part = f"-{bench.part:03d}" if bench.parts > 1 else ""
        bench.run.write_file(f"{FILE}{part}.safetensors", as_file(named))
