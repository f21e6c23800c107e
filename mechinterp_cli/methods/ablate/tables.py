"""From the values of ablations to rows."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.ablate.options import ValueName
from mechinterp_cli.methods.ablate.units import Ablation, Unit, merge
from mechinterp_cli.methods.beside import Floats, Row, beside_random, estimate
from mechinterp_cli.methods.tables import Sweep, stats_options
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats.contrasts import contrast
from mechinterp_cli.token_metrics import split_name

HEAD_SITES = ("z", "scores")
FEWEST_OF_A_GROUP = 2
"""Prompts of a group that a contrast needs."""


@dataclass(frozen=True, eq=False)
class AblationSpec:
    """A trial as tables see it.

    Args:
        trial: The trial; its index counts from 0 for every value.
        units: All units.
        value: What stands in place.
        anatomy: The model's.
    """

    trial: Ablation
    units: Sequence[Unit]
    value: ValueName
    anatomy: Anatomy

    @property
    def index(self) -> int:
        """Its number among the trials of one value."""
        return self.trial.index

    @property
    def chosen(self) -> list[Unit]:
        """What is ablated."""
        return [self.units[unit] for unit in self.trial.units]

    @property
    def family(self) -> str:
        """Trials of one design, block and value are corrected together; random rankings are a family of their own."""
        random = "" if self.trial.ranking is None else " random"
        return f"{self.value} {self.trial.design}{random} block {self._one('block')}"

    def _one(self, name: str) -> Any:
        """What all units have in common, or None."""
        found = {getattr(unit, name) for unit in self.chosen}
        return next(iter(found)) if len(found) == 1 else None

    @property
    def label(self) -> str:
        """The trial in words."""
        names = "+".join(unit.name for unit in self.chosen)
        about = {
            "cumulative": f"top {self.trial.k}: " if self.trial.ranking is None else f"random {self.trial.k}: ",
            "keep": f"all but {self.trial.set}",
            "set": f"{self.trial.set}: ",
            "everything": "everything",
        }.get(self.trial.design, "")
        listed = "" if self.trial.design in ("keep", "everything") else names
        return f"{about}{listed}"[:200] + f", {self.value}"

    def columns(self) -> dict[str, Any]:
        """Where it acts, and which design it belongs to."""
        unit = self.chosen[0] if len(self.chosen) == 1 else None
        kind = None if unit is None else unit.kind
        return {
            "label": self.label,
            "site": self._site(),
            "layer": self._one("layer"),
            "head": unit.number if unit is not None and kind in ("head", "edge") else None,
            "kv_head": self._kv_head(unit),
            "neuron": unit.number if unit is not None and kind == "neuron" else None,
            "position": None if unit is None else unit.place.position,
            "span": None if unit is None else unit.place.span,
            "template": None if unit is None else unit.place.template,
            "ablation": self.value,
            "design": self.trial.design,
            "k": self.trial.k,
            "set": self.trial.set,
            "ranking": self.trial.ranking,
            "block": self._one("block"),
        }

    def _site(self) -> str:
        """The kind of unit; that of several units where they share it."""
        return self._one("kind") or "set"

    def _kv_head(self, unit: Unit | None) -> int | None:
        if unit is None or unit.number is None or unit.kind not in ("head", "kv_head", "edge"):
            return None
        heads = self.anatomy.layers[unit.layer].heads
        if unit.kind == "kv_head" or heads is None:
            return unit.number
        return heads.shared_by(unit.number)

    def trial_rows(self, reference: str, first: int) -> list[Row]:
        """One row per edited site: one for each head or neuron where there are several."""
        rows: list[Row] = []
        for merged in merge(self.chosen):
            part = merged.part
            for unit in [None] if part.units is None else part.units:
                heads = self.anatomy.layers[part.layer].heads
                is_head = unit is not None and part.kind in HEAD_SITES
                row = {
                    "trial": first + self.index,
                    "edit": len(rows),
                    "op": self.value,
                    "site": part.kind,
                    "layer": part.layer,
                    "head": unit if is_head else None,
                    "kv_head": heads.shared_by(unit) if is_head and heads and unit is not None else None,
                    "neuron": unit if part.kind == "neuron" else None,
                    "position": merged.place.position,
                    "span": merged.place.span,
                    "template": merged.place.template,
                    "key_position": None if merged.keys is None else merged.keys.position,
                    "key_span": None if merged.keys is None else merged.keys.span,
                    "reference": reference,
                    "ablation": self.value,
                }
                design = {"design": self.trial.design, "k": self.trial.k, "ranking": self.trial.ranking}
                rows.append(row | design | {"set": self.trial.set})
        return rows


@dataclass(frozen=True, eq=False)
class _Measured:
    """One metric on the prompts where it is a number, unedited and in every trial.

    Args:
        base: [prompts] of the unedited model.
        values: [trials, prompts], mean over draws.
        clusters: Of these prompts.
    """

    base: Floats
    values: Floats
    clusters: list[str]

    @property
    def effects(self) -> Floats:
        """[trials, prompts]: ablated minus unedited."""
        return self.values - self.base


@dataclass(frozen=True, eq=False)
class Done:
    """The finished ablations of one value.

    Args:
        sweep: Values and streams.
        value: What stood in place.
        units: All units.
        trials: The trials, in the order of the sweep.
        stats: How intervals are made.
        margin: The smallest effect that matters, in the metric's unit.
        draws: Random rankings that were asked for.
        left_out: Prompts that were not measured.
    """

    sweep: Sweep
    value: ValueName
    units: Sequence[Unit]
    trials: Sequence[Ablation]
    stats: StatsSection
    margin: float
    draws: int = 0
    left_out: frozenset[int] = frozenset()

    @property
    def kept(self) -> list[int]:
        """The prompts that were measured."""
        return [i for i in range(len(self.sweep.prompts.prompts)) if i not in self.left_out]

    def _measured(self) -> Iterator[tuple[str, _Measured]]:
        """Every metric's name, with what was measured of it; metrics that no prompt has are left out."""
        for metric, name in enumerate(self.sweep.metrics):
            base, values = self.base(metric), self.values(metric)
            known = np.isfinite(base) & np.isfinite(values).all(0)
            if known.any():
                clusters = [self.sweep.clusters[i] for i, usable in zip(self.kept, known, strict=True) if usable]
                yield name, _Measured(base[known], values[:, known], clusters)

    def base(self, metric: int) -> Floats:
        """[measured prompts] of the unedited model."""
        return np.asarray(self.sweep.streams[self.sweep.base][..., metric].mean(-1)[self.kept])

    def values(self, metric: int) -> Floats:
        """[trials, measured prompts], mean over draws."""
        return np.asarray(self.sweep.values[..., metric].mean(-1)[:, self.kept])

    def effects(self, metric: int) -> Floats:
        """[trials, prompts]: ablated minus unedited."""
        return self.values(metric) - self.base(metric)

    def curve(self) -> list[Row]:
        """Cumulative: the ranking's top k beside random rankings, for every metric."""
        rows = []
        for name, seen in self._measured():
            effects, clusters = seen.effects, seen.clusters
            for trial in [t for t in self.trials if t.design == "cumulative" and t.ranking is None]:
                random = [t.index for t in self.trials if t.ranking is not None and t.k == trial.k]
                own = effects[trial.index]
                found = estimate(own[None], None, clusters, self.stats)
                row: Row = {"ablation": self.value, "k": trial.k, "units": self._names(trial), "metric": name}
                row |= {"baseline": float(seen.base.mean()), "effect": float(own.mean()), "n": len(own)}
                row |= {"draws": len(random), **found.ends(0, "ci_low", "ci_high")}
                if random:
                    row |= beside_random(
                        own, effects[random], clusters, self.stats, margin=self.margin, draws=self.draws
                    )
                rows.append(row)
        return rows

    def _names(self, trial: Ablation) -> str:
        return "+".join(self.units[unit].name for unit in trial.units)

    def circuits(self) -> list[Row]:
        """Keep: faithfulness of every set, and completeness: how much is left without it.

        faithfulness = (m(set alone) − m(nothing)) / (m(all) − m(nothing)); completeness = 1 − the same of everything
        but the set, so that a set without which nothing is left has 1. Means over prompts, then the ratio.
        """
        by_design = {(t.design, t.set): t for t in self.trials}
        empty = by_design.get(("everything", None))
        if empty is None:
            return []
        rows = []
        for name, seen in self._measured():
            values, full = seen.values, seen.base
            nothing = values[empty.index]
            for kept in [t for t in self.trials if t.design == "keep"]:
                removed = by_design["set", kept.set]
                alone, without = values[kept.index], values[removed.index]
                rows.append(
                    {"ablation": self.value, "set": kept.set, "size": len(removed.units), "metric": name}
                    | {"full": float(full.mean()), "empty": float(nothing.mean())}
                    | {"alone": float(alone.mean()), "without": float(without.mean()), "n": len(full)}
                    | self._share("faithfulness", alone - nothing, full - nothing, seen.clusters)
                    | self._share("completeness", full - without, full - nothing, seen.clusters)
                )
        return rows

    def _share(self, name: str, numerators: Floats, denominators: Floats, clusters: list[str]) -> Row:
        if abs(float(denominators.mean())) < self.stats.denominator_absolute:
            return {name: None}
        found = estimate(numerators[None], denominators, clusters, self.stats)
        return {name: float(found.estimate[0]), **found.ends(0, f"{name}_low", f"{name}_high")}

    def interactions(self) -> list[Row]:
        """Pairs: joint effect minus the sum of the single effects."""
        single = {t.units[0]: t.index for t in self.trials if t.design == "single"}
        rows = []
        for name, seen in self._measured():
            effects = seen.effects
            for pair in [t for t in self.trials if t.design == "pairs"]:
                a, b = (effects[single[unit]] for unit in pair.units)
                joint = effects[pair.index]
                found = estimate((joint - a - b)[None], None, seen.clusters, self.stats)
                names = [self.units[unit].name for unit in pair.units]
                rows.append(
                    {"ablation": self.value, "a": names[0], "b": names[1], "metric": name, "n": len(joint)}
                    | {"effect_a": float(a.mean()), "effect_b": float(b.mean()), "joint": float(joint.mean())}
                    | {"interaction": float(found.estimate[0]), **found.ends(0, "ci_low", "ci_high")}
                )
        return rows

    def contrasts(self, first: int) -> tuple[list[Row], list[str]]:
        """Groups of prompts, two by two: is a trial's effect another in one than in the other?

        Random rankings are left out, and groups of which a single prompt was measured, with a warning. Trials are
        counted from `first`.
        """
        groups, clusters = ([of[i] for i in self.kept] for of in (self.sweep.groups, self.sweep.clusters))
        sizes = Counter(group for group in groups if group)
        names = sorted(name for name, size in sizes.items() if size >= FEWEST_OF_A_GROUP)
        chosen = [trial for trial in self.trials if trial.ranking is None]
        rows: list[Row] = []
        single = sorted(set(sizes) - set(names))
        warnings = [f"group {name} has a single prompt and is compared with none" for name in single if names]
        for metric, name in enumerate(self.sweep.metrics):
            effects = self.effects(metric)[[trial.index for trial in chosen]]
            for a, b in itertools.combinations(names, 2):
                options = stats_options(self.stats, raw_margin=self.margin)
                found = contrast(effects, groups, clusters, a, b, options)
                warnings += found.warnings
                rows += [
                    {"trial": first + trial.index, "ablation": self.value, "metric": name, "group_a": a, "group_b": b}
                    | {"label": self.sweep.specs[trial.index].columns()["label"], "n_a": found.n_a, "n_b": found.n_b}
                    | {"effect_a": _known(found.mean_a[i]), "effect_b": _known(found.mean_b[i])}
                    | {"difference": _known(found.difference[i]), "p": _known(found.p[i])}
                    | {"p_adjusted": _known(found.p_adjusted[i])}
                    | {"ci_low": _known(found.low[i]), "ci_high": _known(found.high[i])}
                    | {"verdict": str(found.verdict[i])}
                    for i, trial in enumerate(chosen)
                ]
        return rows, list(dict.fromkeys(warnings))

    def positions(self, whole: Sweep, first: int) -> pd.DataFrame:
        """What whole texts measure at every position: means over the prompts of each template, with intervals.

        Args:
            whole: The sweep with its numbers at every position (`loss@17`).
            first: Trials are counted from here; the unedited model's rows have none.
        """
        kept = [trial for trial in self.trials if trial.ranking is None]
        templates = [prompt.template for prompt in self.sweep.prompts.prompts]
        rows: list[Row] = []
        for metric, name in enumerate(whole.metrics):
            base, position = split_name(name)
            for template in dict.fromkeys(templates) if position is not None else ():
                of = [i for i in self.kept if templates[i] == template]
                values = whole.values[..., metric].mean(-1)[[trial.index for trial in kept]][:, of]
                unedited = whole.streams[whole.base][..., metric].mean(-1)[of]
                # Units that this template does not have were not ablated here.
                here = np.isfinite(values).all(1)
                if not of or not here.any() or not np.isfinite(unedited).all():
                    continue
                tried = [trial for trial, known in zip(kept, here, strict=True) if known]
                where = {"metric": base, "template": template, "position": position, "n": len(of)}
                rows += [row | where for row in self._at(tried, values[here], unedited, first)]
        return pd.DataFrame(rows).assign(ablation=self.value).astype({"trial": "Int64"}) if rows else pd.DataFrame()

    def _at(self, kept: Sequence[Ablation], values: Floats, unedited: Floats, first: int) -> list[Row]:
        """One metric at one position of one template: the unedited model, then every trial."""
        clusters = [str(i) for i in range(len(unedited))]
        plain = estimate(unedited[None], None, clusters, self.stats)
        found = estimate(values - unedited, None, clusters, self.stats)
        rows: list[Row] = [{"label": "unedited", "value": float(unedited.mean()), **plain.ends(0, "ci_low", "ci_high")}]
        for i, trial in enumerate(kept):
            row = {"trial": first + trial.index, "label": self.sweep.specs[trial.index].columns()["label"]}
            row |= {"value": float(values[i].mean()), "effect": float(found.estimate[i])}
            rows.append(row | found.ends(i, "ci_low", "ci_high"))
        return rows


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def offset(frame: pd.DataFrame, first: int) -> pd.DataFrame:
    """The frame with its trials counted from `first`."""
    return frame.assign(trial=frame["trial"] + first)


def unjudged(summary: pd.DataFrame) -> pd.DataFrame:
    """No p-value and no verdict for what was drawn at random."""
    random = summary["ranking"].notna().to_numpy()
    cleared: Mapping[str, Any] = {
        name: _cleared(summary[name], random) for name in ("p", "p_adjusted", "p_method", "family", "verdict")
    }
    return summary.assign(**cleared)


def _cleared(values: pd.Series, where: npt.NDArray[np.bool_]) -> pd.Series:
    """The values, null in some rows and where they were."""
    if isinstance(values.dtype, pd.ArrowDtype):
        return values.mask(where)
    return values.astype(object).where(~where & values.notna().to_numpy(), None)
