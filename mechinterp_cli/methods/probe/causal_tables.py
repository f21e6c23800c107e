"""From the values of the causal follow-up to rows: effects beside random directions, verdicts, prompts, downstream."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import estimate
from mechinterp_cli.methods.job import Swept
from mechinterp_cli.methods.probe.causal import Arm
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.interventions import PROBE, ProbedSite
from mechinterp_cli.methods.probe.verdicts import Beside, Readability, family_rows, read_columns
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
Question = tuple[int, int, str, float | None, str]
ALL = "all"
"""The group of all prompts."""


@dataclass(frozen=True, eq=False)
class Followed:
    """A finished causal follow-up.

    Args:
        arms: The trials.
        sites: The probed sites.
        places: Positions.
        prompts: The measured prompts.
        metrics: Names along the last axis of the values.
        swept: The values.
        options: The section.
        stats: How intervals are made.
    """

    arms: Sequence[Arm]
    sites: Sequence[ProbedSite]
    places: Sequence[Place]
    prompts: PromptSet
    metrics: Sequence[str]
    swept: Swept
    options: CausalOptions
    stats: StatsSection

    @cached_property
    def groups(self) -> tuple[str, ...]:
        """`all`, and the groups of the prompts where there are several."""
        named = sorted({prompt.group for prompt in self.prompts.prompts})
        return (ALL, *named) if len(named) > 1 else (ALL,)

    def members(self, place: int, group: str = ALL) -> list[int]:
        """The prompts of a group that a place has positions in."""
        touched = [i for i, positions in enumerate(self.places[place].positions) if positions]
        return [i for i in touched if group in (ALL, self.prompts.prompts[i].group)]

    def effects(self, arms: Sequence[Arm], metric: int, group: str = ALL) -> Floats:
        """Metric after minus before, [arms, prompts of their place]; arms of one place and stream."""
        members = self.members(arms[0].place, group)
        before = self.swept.streams[arms[0].stream][members, 0, metric]
        after = self.swept.values[[arm.index for arm in arms]][:, members, 0, metric]
        return np.asarray(after - before)

    @cached_property
    def _random(self) -> Mapping[Question, list[Arm]]:
        found: dict[Question, list[Arm]] = defaultdict(list)
        for arm in self.arms:
            if arm.draw is not None:
                found[arm.question].append(arm)
        return found

    @property
    def _named(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.draw is None]

    def effect_rows(self) -> list[Row]:
        """One row per site, place, intervention, strength, direction, metric and group of prompts.

        Where a metric has a sign of its own on every prompt (the logit difference of its own answer), steering moves
        prompts of two labels in opposite ways, and their mean says little: groups tell them apart.
        """
        rows: list[Row] = []
        for metric in range(len(self.metrics)):
            for group in self.groups:
                asked = [arm for arm in self._named if self.members(arm.place, group)]
                beside = self._beside(asked, metric, group)
                for arm in asked:
                    row = self._place(arm) | self._what(arm) | self._effect(arm, metric, group)
                    rows.append(row | beside.get(arm.index, {}))
        return rows

    def _place(self, arm: Arm) -> Row:
        site, place = self.sites[arm.site], self.places[arm.place]
        by_kv_head = site.kind in ("k", "v")
        return {
            "probe": site.name,
            "site": site.kind,
            "layer": site.layer,
            "head": None if by_kv_head else site.unit,
            "kv_head": site.unit if by_kv_head else None,
            "position": place.position,
            "span": place.span,
            "template": place.template,
        }

    def _what(self, arm: Arm) -> Row:
        site = self.sites[arm.site]
        return {
            "intervention": arm.intervention,
            "strength": arm.strength,
            "stream": arm.stream,
            "direction": arm.direction,
            "rank": site.rank(arm.intervention, arm.direction),
            "removed": site.removed(arm.intervention, arm.direction),
            "spread": site.subspace(arm.direction).spread,
        }

    def _effect(self, arm: Arm, metric: int, group: str) -> Row:
        """The mean effect with its interval over prompts; numbers that are not finite have none."""
        members = self.members(arm.place, group)
        before = self.swept.streams[arm.stream][members, 0, metric]
        effects = self.effects([arm], metric, group)
        row: Row = {"metric": self.metrics[metric], "group": group}
        row |= {"baseline": float(before.mean()), "n": len(members)}
        row |= {"draws": len(self._random[arm.question]) if arm.direction == PROBE else 0}
        if not np.isfinite(effects).all():
            return row | {"effect": float("nan"), "status": "nan"}
        found = estimate(effects, None, self._clusters(arm.place, group), self.stats)
        row |= {"effect": float(effects.mean()), "clusters": found.units.count, "status": "ok"}
        return row | found.ends(0, "ci_low", "ci_high")

    def _clusters(self, place: int, group: str) -> list[str]:
        return [self.prompts.prompts[i].cluster for i in self.members(place, group)]

    def _beside(self, asked: Sequence[Arm], metric: int, group: str) -> dict[int, Row]:
        """By arm of the probe what stands beside its effect: random subspaces, and those of control labels."""
        families: dict[str, list[Arm]] = defaultdict(list)
        for arm in asked:
            random = self._random.get(arm.question, [])
            if arm.direction == PROBE and random and np.isfinite(self.effects([arm, *random], metric, group)).all():
                families[self._family(arm, metric, group)].append(arm)
        margin = self.options.margin if metric == 0 else None
        found: dict[int, Row] = {}
        for name, arms in families.items():
            compared = family_rows([self._compared(arm, metric, group) for arm in arms], self.stats, margin=margin)
            found |= {arm.index: row | {"family": name} for arm, row in zip(arms, compared, strict=True)}
        for arm in asked:
            if arm.direction == PROBE:
                found[arm.index] = found.get(arm.index, {}) | {"margin": margin} | self._controlled(arm, metric, group)
        return found

    def _family(self, arm: Arm, metric: int, group: str) -> str:
        """All layers, heads, positions and strengths of one probe's intervention are corrected together."""
        site = self.sites[arm.site]
        return f"{self.metrics[metric]} {site.name} {site.kind} {arm.intervention} {arm.stream} {group}"

    def _compared(self, arm: Arm, metric: int, group: str) -> Beside:
        site, random = self.sites[arm.site], self._random[arm.question]
        matched = site.random_for(arm.intervention).matched
        own, other = self.effects([arm], metric, group)[0], self.effects(random, metric, group)
        return Beside(own, other, self._clusters(arm.place, group), matched)

    def _controlled(self, arm: Arm, metric: int, group: str) -> Row:
        """The difference from the mean effect of the subspaces of control labels."""
        controls = [other for other in self._named if other.question == arm.question and other.direction != PROBE]
        if not controls:
            return {}
        own, other = self.effects([arm], metric, group), self.effects(controls, metric, group).mean(0)
        if not np.isfinite(own - other).all():
            return {}
        found = estimate(own - other, None, self._clusters(arm.place, group), self.stats)
        row: Row = {"control_effect": float(other.mean()), "control_difference": float((own - other).mean())}
        return row | found.ends(0, "control_low", "control_high")

    def verdict_rows(
        self, effects: Sequence[Row], readable: Mapping[int, Readability], *, score_margin: float
    ) -> list[Row]:
        """One row per site, place, intervention, stream that it is done to and group of prompts: readable? used?

        Args:
            effects: From `effect_rows`.
            readable: Of each probed site, by its number.
            score_margin: The smallest difference of a score from chance that matters.
        """
        rows = []
        for arm, effect in self._judged(effects):
            keys = (
                "probe",
                "site",
                "layer",
                "head",
                "kv_head",
                "position",
                "span",
                "template",
                "intervention",
                "strength",
            )
            sizes = ("size", "size_difference", "size_low", "size_high", "size_p_adjusted")
            numbers = (
                "stream",
                "metric",
                "group",
                "effect",
                "difference",
                "difference_low",
                "difference_high",
                "p_adjusted",
            )
            row = {key: effect.get(key) for key in (*keys, *numbers, *sizes, "margin")}
            row |= {"used": effect.get("verdict"), **read_columns(readable.get(arm.site), score_margin)}
            rows.append(row)
        return rows

    def _judged(self, effects: Sequence[Row]) -> Iterator[tuple[Arm, Row]]:
        """The probe's arms with their rows of the first metric; of strengths the largest with random ones beside it."""
        random = self.options.steered_at_random
        largest = max(random, key=lambda strength: (abs(strength), strength)) if random else None
        asked = [arm for group in self.groups for arm in self._named if self.members(arm.place, group)]
        for arm, effect in zip(asked, effects, strict=False):  # those of the first metric come first
            if arm.direction == PROBE and arm.strength in (None, largest):
                yield arm, effect

    def prompt_rows(self) -> list[Row]:
        """One row per arm that is not random, prompt and metric."""
        rows = []
        for arm in self._named:
            members = self.members(arm.place)
            shared = self._place(arm) | {key: self._what(arm)[key] for key in ("intervention", "strength", "stream")}
            for metric, name in enumerate(self.metrics):
                effects, after = self.effects([arm], metric)[0], self.swept.values[arm.index, members, 0, metric]
                rows += [
                    shared
                    | {"direction": arm.direction, "prompt": prompt, "cluster": self.prompts.prompts[prompt].cluster}
                    | {"metric": name, "value": float(after[i]), "effect": float(effects[i])}
                    for i, prompt in enumerate(members)
                ]
        return rows

    def warnings(self) -> list[str]:
        """What a reader of the numbers must know."""
        told = []
        for site in self.sites:
            for name, random in site.random.items():
                if not random.matched:
                    nearest = f"{float(random.removed.min()):.3g} to {float(random.removed.max()):.3g}"
                    told.append(
                        f"causal: {site.kind} {site.layer}: random directions beside {name} remove {nearest} of the "
                        f"variance, not {random.wanted:.3g}; no verdict is given"
                    )
        return told
