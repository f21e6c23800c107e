"""What probes of later layers read of what was erased, on prompts that they were not fitted on."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp_cli.engine.edits import Site
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.probe.causal_split import subset
from mechinterp_cli.methods.probe.directions import is_right
from mechinterp_cli.methods.probe.downstream import captured_under, downstream_rows
from mechinterp_cli.methods.probe.fitting import Fitted
from mechinterp_cli.methods.probe.interventions import ProbedSite
from mechinterp_cli.methods.probe.readout import Readout
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.tasks.prompts import PromptSet

Row = dict[str, Any]
FEW = 5
"""Layers that are erased where none are named."""


@dataclass(frozen=True, eq=False)
class Later:
    """Erases where a probe reads, and reads on with the probes of all later layers at the same kind of site.

    Args:
        setting: Config, model, prompts.
        layers: Which are erased: `all`, a list, or None for a few.
        held: Numbers of the prompts that are read.
    """

    setting: Setting
    layers: str | tuple[int, ...] | None
    held: Sequence[int]

    def rows(self, fitted: Sequence[Fitted], sites: Sequence[ProbedSite]) -> list[Row]:
        """One row per erased layer and later layer; of whole activations only, as heads are others in every layer.

        Args:
            fitted: The probes.
            sites: What is erased, one for each of them.
        """
        families: dict[tuple[str, str], list[tuple[Fitted, ProbedSite]]] = defaultdict(list)
        for found, site in zip(fitted, sites, strict=True):
            if site.unit is None:
                families[site.kind, site.name].append((found, site))
        return [row for family in families.values() for row in self._family(family)]

    def _family(self, family: Sequence[tuple[Fitted, ProbedSite]]) -> Iterator[Row]:
        chosen = self._chosen([site.layer for _, site in family])
        for found, erased in family:
            later = {other.readout.reading.site: other for other, site in family if site.layer > erased.layer}
            place = self._place(found.readout)
            if erased.layer in chosen and later and any(place.positions):
                captured = captured_under(self.setting.model, self._prompts, erased, place, later)

                def score(site: Site, x: Tensor, later: dict[Site, Fitted] = later) -> float:
                    return self._score(later[site], x)

                chance = {site: self._chance(one) for site, one in later.items()}
                yield from downstream_rows(erased, captured, score, chance)

    def _chosen(self, layers: Sequence[int]) -> set[int]:
        if self.layers is None:
            before = layers[:-1] or layers
            return {before[int(i)] for i in np.linspace(0, len(before) - 1, FEW).round()}
        return set(layers) if isinstance(self.layers, str) else set(self.layers)

    @cached_property
    def _prompts(self) -> PromptSet:
        return subset(self.setting.prompts, self.held)

    def _samples(self, readout: Readout) -> list[tuple[int, int, int]]:
        """Prompt, position and row of every sample of the prompts held out, in the order of what is captured."""
        view, held = readout.reading.view, set(self.held)
        found = zip(view.prompts, view.positions, strict=True)
        return sorted((prompt, at[0], row) for row, (prompt, at) in enumerate(found) if prompt in held)

    def _place(self, readout: Readout) -> Place:
        positions: dict[int, list[int]] = {prompt: [] for prompt in self.held}
        for prompt, position, _ in self._samples(readout):
            positions[prompt].append(position)
        return Place(tuple(tuple(at) or None for at in positions.values()))

    def _targets(self, one: Fitted) -> Tensor:
        return one.readout.problem.targets[[row for *_, row in self._samples(one.readout)]]

    def _score(self, one: Fitted, x: Tensor) -> float:
        """Accuracy, or R²."""
        targets, predicted = self._targets(one), one.linear.predict(x)
        if one.readout.problem.classes is not None:
            return float(is_right(predicted, targets, one.readout.problem.classes).mean())
        targets = targets.to(predicted)
        return float(1 - (predicted - targets).square().mean() / targets.var(correction=0))

    def _chance(self, one: Fitted) -> float:
        """Saying the class that is commonest where the probe was fitted, or the mean."""
        if one.readout.problem.classes is None:
            return 0.0
        commonest = Counter(one.targets.tolist()).most_common(1)[0][0]
        return float(torch.eq(self._targets(one), commonest).double().mean())
