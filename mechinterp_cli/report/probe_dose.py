"""What strengths of steering do, and whether what was erased is read again in later layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from mechinterp_cli.report.behind import Behind
from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.probe_causal import ALL, MAX_PANELS, PLACE, STEER, WIDTH, Effects, several_of, where
from mechinterp_cli.report.rows import Row, having, records
from mechinterp_cli.report.series import curve_of, numbers, random_curve
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range
from mechinterp_cli.text import counted

BEST = 6
"""Places that steering is drawn of: those that it moves most."""
APART = 0.2
"""Classes are drawn apart where means have opposite signs, and the smaller is this share of the larger at least."""


def labelled_prompts(prompts: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Effects on prompts with the prompts' classes; none where words are labelled, or with numbers.

    Args:
        prompts: `causal_prompts`.
        labels: The table `labels`.
    """
    if prompts.empty or labels.empty or labels["word"].notna().any() or labels["class"].isna().any():
        return prompts.head(0)
    return prompts.merge(labels[["prompt", "class"]], on="prompt", how="inner")


@dataclass(frozen=True)
class _Split:
    """How prompts are told apart: by classes, by groups, or not at all."""

    classes: tuple[str, ...]
    groups: tuple[str, ...]

    def said(self, prompts: pd.DataFrame) -> str:
        """What is drawn apart.

        Args:
            prompts: The effects on prompts, with their classes.
        """
        if self.classes:
            sizes = {name: having(prompts, **{"class": name})["prompt"].nunique() for name in self.classes}
            of = " and ".join(f"{counted(size, 'prompt')} of {name}" for name, size in sizes.items())
            return f"Classes apart, as they are moved in opposite ways: means over {of}, without intervals."
        return "Groups of prompts apart, as they are moved in opposite ways." if self.groups != (ALL,) else ""


def dose_curves(effects: Effects, kind: str) -> Curves | None:
    """Effect against strength, a panel for each of the places that are moved most; what moves apart is drawn apart.

    Args:
        effects: All.
        kind: Of site.

    Returns:
        None where nothing is steered.
    """
    rows = having(effects.own, site=kind, intervention=STEER)
    if rows["strength"].nunique() < 2:
        return None
    prompts = having(effects.prompts, site=kind, intervention=STEER)
    split = _Split(_apart(prompts), tuple(effects.apart(rows)))
    places = list(rows.groupby([*PLACE, "layer"], sort=False, dropna=False))
    steered = [_Steered(part, _there(prompts, part)) for _, part in places]
    moved = sorted(steered, key=lambda one: -one.most(split))[:BEST]
    kept = [one for one in steered if one in moved]
    several = several_of(rows)
    panels = [one.panel(split, several, effects.unit) for one in kept]
    ends = y_range(panels)
    more = f"The {len(kept)} of {len(places)} places that are moved most." if len(places) > len(kept) else ""
    notes = (effects.said(rows, of_all=not split.classes), more, split.said(prompts))
    return Curves(
        title=f"{effects.about[0]}: steering along the probe's direction, {kind}",
        lines=(", ".join(effects.about[1:]), " ".join(filter(None, notes))),
        x_title="strength (standard deviations)",
        panels=tuple(replace(panel, y_range=ends) for panel in panels),
        across=3,
        width=WIDTH,
        one_legend=True,
        linear=True,
    )


def _there(prompts: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """The prompts' rows at a place."""
    first = records(part)[0]
    for name in (*PLACE, "layer"):
        if len(prompts):
            prompts = prompts[prompts[name].isna()] if missing(first[name]) else having(prompts, **{name: first[name]})
    return prompts


def _apart(prompts: pd.DataFrame) -> tuple[str, ...]:
    """The classes, where some place moves them in opposite ways."""
    if prompts.empty:
        return ()
    means = prompts.groupby([*PLACE, "layer", "strength", "class"], sort=False, dropna=False)["effect"].mean()
    table = means.unstack("class").astype(float)
    if len(table.columns) < 2:
        return ()
    low, high = table.min(axis=1), table.max(axis=1)
    smaller, larger = pd.concat([-low, high], axis=1).min(axis=1), pd.concat([-low, high], axis=1).max(axis=1)
    strongest = larger >= 0.5 * float(larger.max())
    return tuple(map(str, table.columns)) if bool((strongest & (smaller > APART * larger)).any()) else ()


@dataclass(frozen=True, eq=False)
class _Steered:
    """One place: its rows of the effects, and of prompts."""

    rows: pd.DataFrame
    prompts: pd.DataFrame

    def most(self, split: _Split) -> float:
        """The largest effect that is drawn."""
        shown = having(self.rows, group=split.groups)["effect"]
        of_classes = self.prompts.groupby(["class", "strength"])["effect"].mean() if split.classes else shown
        found = [abs(number(value)) for value in of_classes]
        return max((value for value in found if math.isfinite(value)), default=0.0)

    def panel(self, split: _Split, several: Mapping[str, bool], unit: str) -> CurvePanel:
        """Effect against strength."""
        first = records(self.rows)[0]
        curves = [self._class(name) for name in split.classes]
        groups = (ALL,) if split.classes else split.groups
        for group in groups:
            told = sorted(records(having(self.rows, group=group)), key=lambda row: number(row["strength"]))
            named = "" if group == ALL else f", {group}"
            if not split.classes:
                curves.append(_along(f"probe's direction{named}", told, "effect"))
            random = _known(told, "random_effect")
            curves.append(random_curve(f"random directions{named}", random, "strength"))
            if groups == (ALL,) and any(math.isfinite(number(row["control_effect"])) for row in told):
                curves.append(_along("control labels' direction", told, "control_effect"))
        title = ", ".join(filter(None, (f"layer {text(first['layer'])}", where(first, several=several))))
        drawn = tuple(curve for curve in curves if curve.x)
        return CurvePanel(title=title, y_title=f"effect on {unit}", curves=drawn)

    def _class(self, name: str) -> Curve:
        parts = having(self.prompts, **{"class": name}).groupby("strength")["effect"]
        means = parts.mean()
        sizes = tuple({"n": f"{size:g}"} for size in parts.count())
        x, y = (tuple(number(value) for value in values) for values in (means.index, means))
        return Curve(name=f"probe's direction, {name}", x=x, y=y, behind=sizes)


def _along(name: str, told: Sequence[Row], values: str) -> Curve:
    """A number against strength, where it is known; the effect with its interval."""
    own = None if values == "effect" else _behind_control
    return curve_of(name, _known(told, values), "strength", values, band=own is None, told=own)


def _known(told: Sequence[Row], values: str) -> list[Row]:
    return [row for row in told if math.isfinite(number(row[values]))]


def _behind_control(row: Row) -> Behind:
    """No interval: that of the table is of the difference from the probe's direction."""
    return {"n": text(row["n"])}


def downstream_curves(rows: pd.DataFrame, about: Sequence[str], measure: str) -> Curves | None:
    """What later probes read before and after an erasure, a panel for each place that is erased.

    Args:
        rows: The table `causal_downstream`, of one checkpoint.
        about: Task, model, prompts.
        measure: What scores are.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    keys = ["probe", "erased_site", "erased_layer", "erased_head", "site"]
    parts = list(rows.groupby(keys, sort=False, dropna=False))
    several = {name: rows[name].nunique() > 1 for name in keys}
    panels = [_downstream_panel(records(part), several, measure) for _, part in parts[:MAX_PANELS]]
    low, high = y_range(panels, zero=False)
    more = f" The first {MAX_PANELS} of {len(parts)} erasures." if len(parts) > MAX_PANELS else ""
    notes = f"Probes of unedited activations, on prompts that none was fitted on. No intervals.{more}"
    return Curves(
        title=f"{about[0]}: does what was erased come back?",
        lines=(", ".join(about[1:]), notes),
        x_title="layer that is read",
        panels=tuple(replace(panel, y_range=(low, high)) for panel in panels),
        across=3,
        width=WIDTH,
        one_legend=True,
        linear=True,
    )


def _downstream_panel(told: Sequence[Row], several: Mapping[str, bool], measure: str) -> CurvePanel:
    told = sorted(told, key=lambda row: number(row["layer"]))
    first, x = told[0], numbers(told, "layer")
    head = "" if missing(first["erased_head"]) else f", head {text(first['erased_head'])}"
    parts = [text(first["probe"]) if several["probe"] else "", text(first["site"]) if several["site"] else ""]
    title = ", ".join(
        filter(None, [f"erased at {text(first['erased_site'])} {text(first['erased_layer'])}{head}", *parts])
    )
    chance = numbers(told, "chance")
    curves = [
        Curve(name="before", x=x, y=numbers(told, "score_before")),
        Curve(name="after", x=x, y=numbers(told, "score_after")),
    ]
    if any(map(math.isfinite, chance)):
        curves.append(Curve(name="best baseline", x=x, y=chance, look="reference"))
    return CurvePanel(title=title, y_title=measure, curves=tuple(curves))
