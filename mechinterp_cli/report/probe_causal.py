"""What interventions on a probe's directions do, beside random ones: by layer, by strength, and downstream."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd

from mechinterp_cli.report.behind import Behind, behind
from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import between, counted_between, figure, missing, number, probability, text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import curve_of, numbers, random_curve
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, y_range

PROBE, STEER, ALL = "probe", "steer", "all"
VERDICTS = {
    "yes": "used",
    "no": "not used, within the margin",
    "inconclusive": "inconclusive",
    "": "no verdict",
}
MAX_PANELS = 12
MAX_LABELS = 4
"""Groups of prompts that are drawn apart."""
WIDTH = 270


@dataclass(frozen=True, eq=False)
class Effects:
    """The causal follow-up of a run; empty where it has none."""

    rows: pd.DataFrame
    """`causal_effects` of the first metric."""
    prompts: pd.DataFrame
    """`causal_prompts` of the probe's directions and that metric with each prompt's `class`; empty where words are
    labelled, or with numbers."""
    about: tuple[str, ...]
    """Task, model, prompts: for titles."""
    level: str = "95"
    """Of intervals, in percent."""

    @property
    def unit(self) -> str:
        """The metric with its unit."""
        return unit_of(text(self.rows["metric"].iloc[0]))

    @cached_property
    def own(self) -> pd.DataFrame:
        """Of the probes' directions."""
        return having(self.rows, direction=PROBE)

    @property
    def groups(self) -> list[str]:
        """The groups of prompts, without `all`."""
        return [group for group in distinct(self.own, "group") if group != ALL]

    def said(self, rows: pd.DataFrame, *, of_all: bool = True) -> str:
        """How many prompts, random draws and what the bands are.

        Args:
            rows: Of the probes' directions, those that are drawn.
            of_all: Whether intervals over all prompts are drawn.
        """
        rows = having(rows, group=ALL)
        drawn = rows[rows["draws"].fillna(0) > 0]["draws"]
        subspaces = "random subspaces of the same rank and removed variance"
        counts = [counted_between(rows["n"], "prompt"), f"{between(drawn)} {subspaces}" if len(drawn) else ""]
        words = f"{', '.join(filter(None, counts))}." if any(counts) else ""
        bands = [f"{self.level} % intervals over prompts" if of_all else ""]
        bands.append("of random subspaces the middle 95 % of draws" if len(drawn) else "")
        told = "; ".join(filter(None, bands))
        return f"{words} {f'Bands: {told}.' if told else ''}".strip()

    def apart(self, rows: pd.DataFrame) -> list[str]:
        """The groups to draw apart: those that some place moves in opposite ways; else all prompts together.

        Args:
            rows: Of the probes' directions.
        """
        if len(self.groups) < 2 or len(self.groups) > MAX_LABELS:
            return [ALL]
        signs: dict[tuple[str, ...], set[float]] = {}
        for row in records(having(rows, group=tuple(self.groups))):
            if number(row["ci_low"]) * number(row["ci_high"]) > 0:
                key = tuple(text(row[name]) for name in (*PLACE, "layer", "intervention", "strength", "stream"))
                signs.setdefault(key, set()).add(math.copysign(1.0, number(row["effect"])))
        return self.groups if any(len(found) > 1 for found in signs.values()) else [ALL]


PLACE = ("probe", "site", "head", "kv_head", "position", "span", "template")
"""What a place is, beside its layer."""


def done(row: Row) -> str:
    """An intervention in words.

    Args:
        row: Of `causal_effects` or `causal_verdicts`.
    """
    name = text(row["intervention"])
    if name == STEER:
        return f"steer {number(row['strength']):+g}"
    return f"swap into {text(row['stream'])}" if name == "swap" else name


def where(row: Row, *, several: Mapping[str, bool]) -> str:
    """A place without its layer: what has several values.

    Args:
        row: Of a causal table.
        several: Of which columns there are several values.
    """
    parts = [text(row["probe"]) if several.get("probe") else ""]
    parts += [f"head {text(row['head'])}"] if not missing(row["head"]) else []
    parts += [f"key/value head {text(row['kv_head'])}"] if not missing(row["kv_head"]) else []
    at = {name: several.get(name) and not missing(row[name]) for name in ("position", "span", "template")}
    parts += [f"position {text(row['position'])}"] if at["position"] else []
    parts += [text(row[name]) for name in ("span", "template") if at[name]]
    return ", ".join(filter(None, parts))


def several_of(rows: pd.DataFrame) -> dict[str, bool]:
    """Which columns of a place have several values.

    Args:
        rows: Of a causal table.
    """
    return {name: rows[name].nunique(dropna=False) > 1 for name in PLACE if name in rows}


def layer_curves(effects: Effects, kind: str) -> Curves:
    """The effect of every intervention by layer with the band of random subspaces, the margin, and the verdicts.

    Steering is drawn at the strength that has a verdict. Where magnitudes tell more than means, they have a panel too.

    Args:
        effects: All.
        kind: Of site.
    """
    rows = _judged(having(effects.own, site=kind))
    groups = effects.apart(rows)
    verdicts = [name for name in VERDICTS if name in {text(verdict) for verdict in rows["verdict"]}]
    panels: list[CurvePanel] = []
    largest = 0
    for title, part in _by_question(rows):
        named = [(title if group == ALL else f"{title}, {group}", having(part, group=group)) for group in groups]
        own = [_layer_panel(name, some, effects.unit, verdicts) for name, some in named]
        panels += [replace(panel, y_range=y_range(own)) for panel in own]
        whole = having(part, group=ALL)
        if _cancels(whole):
            panels.append(_size_panel(f"{title}, magnitude", whole, effects.unit, verdicts))
        largest = min(3, max(largest, len(own) + int(_cancels(whole))))
    notes = [effects.said(rows), _margin_note(rows)]
    notes.append(f"The first {MAX_PANELS} of {len(panels)} panels." if len(panels) > MAX_PANELS else "")
    notes.append("Of several heads, each layer's largest effect." if rows["head"].notna().any() else "")
    return Curves(
        title=f"{effects.about[0]}: is what probes read at {kind} used?",
        lines=(", ".join(effects.about[1:]), " ".join(filter(None, notes))),
        x_title="layer",
        panels=tuple(panels[:MAX_PANELS]),
        across=max(2, largest),
        width=WIDTH,
        one_legend=True,
        linear=True,
    )


def _judged(rows: pd.DataFrame) -> pd.DataFrame:
    """Of steering the strength with random directions beside it that is largest, else the largest."""
    steered = having(rows, intervention=STEER)
    if steered.empty:
        return rows
    known = steered[steered["random_effect"].notna()]
    strengths = [number(value) for value in (known if len(known) else steered)["strength"]]
    largest = max(strengths, key=lambda strength: (abs(strength), strength))
    keep = (rows["intervention"] != STEER) | (rows["strength"] == largest).fillna(False)
    return rows[keep.to_numpy(dtype=bool)]


def _by_question(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Rows of each intervention and place, heads together."""
    keys = ["probe", "position", "span", "template", "intervention", "strength", "stream"]
    several = several_of(rows.assign(head=None, kv_head=None))
    for _, part in rows.groupby(keys, sort=False, dropna=False):
        first = {**records(part)[0], "head": None, "kv_head": None}
        yield ", ".join(filter(None, (done(first), where(first, several=several)))), part


def _largest(rows: pd.DataFrame) -> list[Row]:
    """Each layer's row with the largest effect, by layer."""
    best: dict[int, Row] = {}
    for row in records(rows):
        layer = int(number(row["layer"]))
        if layer not in best or abs(number(row["effect"])) > abs(number(best[layer]["effect"])):
            best[layer] = row
    return [best[layer] for layer in sorted(best)]


def _layer_panel(title: str, rows: pd.DataFrame, unit: str, verdicts: Sequence[str]) -> CurvePanel:
    told = _largest(rows)
    own = curve_of("probe's subspace", told, "layer", "effect", look="line")
    random = random_curve("random subspaces", told, "layer", look="line")
    curves = (own, random, *_verdict_dots(told, "effect", verdicts, behind), *_margins(told))
    return CurvePanel(title=title, y_title=f"effect on {unit}", curves=curves)


def _verdict_dots(
    told: Sequence[Row], y: str, verdicts: Sequence[str], behind: Callable[[Row], Behind]
) -> Iterator[Curve]:
    for verdict in verdicts:
        own = [row for row in told if text(row.get("verdict")) == verdict]
        yield curve_of(VERDICTS[verdict], own, "layer", y, band=False, look="dots", told=behind)


def _margins(told: Sequence[Row]) -> list[Curve]:
    margin, x = _margin(told), numbers(told, "layer")
    if not math.isfinite(margin):
        return []
    return [Curve(name="± margin", x=x, y=(end,) * len(x), look="reference") for end in (margin, -margin)]


def _margin(told: Sequence[Row]) -> float:
    known = [number(row["margin"]) for row in told if not missing(row["margin"])]
    return known[0] if known else math.nan


def _margin_note(rows: pd.DataFrame) -> str:
    margin = _margin(records(rows))
    return f"Margin {margin:g}. Verdicts are corrected over all layers." if math.isfinite(margin) else ""


def _cancels(rows: pd.DataFrame) -> bool:
    """Whether prompts are moved in opposite ways, so that the mean hides what magnitudes show."""
    told = [row for row in records(rows) if math.isfinite(number(row["size"]))]
    largest = max((number(row["size"]) for row in told), default=0.0)
    return any(number(row["size"]) - abs(number(row["effect"])) > 0.25 * largest for row in told)


def _size_panel(title: str, rows: pd.DataFrame, unit: str, verdicts: Sequence[str]) -> CurvePanel:
    told = _largest(rows.assign(effect=rows["size"]))
    own = curve_of("probe's subspace", told, "layer", "size", band=False, look="line", told=_behind_size)
    random = curve_of("random subspaces", told, "layer", "random_size", band=False, look="line", told=_behind_draws)
    curves = (own, random, *_verdict_dots(told, "size", verdicts, _behind_size), *_margins(told)[:1])
    return CurvePanel(title=title, y_title=f"mean |effect| on {unit}", curves=curves)


def _behind_size(row: Row) -> Behind:
    """No interval: that of the table is of the difference from random subspaces."""
    return {"p": probability(row["size_p_adjusted"]), "n": text(row["n"])}


def _behind_draws(row: Row) -> Behind:
    return {"draws": text(row["draws"])}


def baseline_words(rows: pd.DataFrame) -> str:
    """The metric without an intervention, mean over prompts; empty where it is not known.

    Args:
        rows: `causal_effects` of one metric.
    """
    known = [number(value) for value in having(rows, group=ALL)["baseline"] if math.isfinite(number(value))]
    return figure(known[0]) if known else ""
