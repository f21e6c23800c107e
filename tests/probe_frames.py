"""Tables as a `probe` run leaves them, made up: read from layer 2 on, used at layer 3 alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

import mechinterp_cli.methods.probe.columns  # noqa: F401  the tables' columns are registered there
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import to_frame

WORDS = (" the", " Mary", "\n", " John", "ing", ",", " cafés", " 中", " went", "<|im_start|>", " store", " gave")
Rows = list[dict[str, Any]]
USED = 3
"""The layer where what is read is used."""


def frame(name: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table of that name, with the types that it is read with."""
    return to_frame(validate(name, list(rows), "probe"))


@dataclass(frozen=True)
class Fake:
    """A run."""

    layers: int = 6
    heads: int = 0
    """Of z; 0: the residual stream."""
    positions: int = 0
    """Each by itself; 0: the last one alone."""
    spans: Sequence[str] = ()
    """Read each by itself, where there are no positions."""
    templates: Sequence[str] = ("t",)
    probes: Sequence[str] = ("logistic",)
    baselines: Sequence[str] = ("majority", "bag", "random_weights")
    control: bool = True
    code: bool = False
    learning: Sequence[int] = ()
    """How many training samples there are."""
    classes: Sequence[str] = ("false", "true")
    """None: numbers."""
    projected: bool = False
    interventions: Sequence[str] = ()
    strengths: Sequence[float] = (-4, -2, 2, 4)
    groups: Sequence[str] = ()
    """The second is moved the other way round."""
    draws: int = 199
    labelled: bool = False
    """Effects of single prompts are known: those of the first class are moved the other way round."""
    erased: Sequence[int] = ()
    """Layers under whose erasure later ones are read."""
    tokens: Sequence[str] = WORDS
    checkpoints: Sequence[tuple[str | None, int | None]] = ((None, None),)
    top: int = 10
    display: Mapping[str, str] = field(
        default_factory=lambda: {
            "title": "probes, truth",
            "scale": "Accuracy on samples that a probe was not fitted on.",
        }
    )

    @property
    def manifest(self) -> Manifest:
        section = {"causal": {"margin": 0.1} if self.interventions else None}
        config = {"metrics": ["logit_diff"], "output": {"top": self.top}, "probe": section, "stats": {"ci": 0.95}}
        made = Manifest("probe", "fake", config, "0", status="complete")
        made.model, made.display = {"id": "toy-induction"}, dict(self.display)
        made.task = {"name": "truth", "samples": 64, "classes": list(self.classes) or None}
        return made

    @property
    def measure(self) -> str:
        return "accuracy" if self.classes else "r2"

    def score(self, place: Mapping[str, Any], probe: str) -> float:
        """What a probe reads: nothing below layer 2, and less with later probes and at other places."""
        depth = max(0, place["layer"] - 1) / max(1, self.layers - 2)
        apart = 0.04 * (place["head"] or 0) + 0.03 * (place["position"] or 0) + 0.05 * self._span(place)
        return float(round(max(0.5 + 0.45 * depth - apart - 0.06 * list(self.probes).index(probe), 0.3), 6))

    def _span(self, place: Mapping[str, Any]) -> int:
        return list(self.spans).index(place["span"]) if place["span"] in self.spans else 0

    @property
    def views(self) -> Rows:
        """Where a probe reads, at any site."""
        none = {"position": None, "span": None, "template": None}
        if self.positions:
            several = len(self.templates) > 1
            return [
                {
                    **none,
                    "position": at,
                    "template": name,
                    "view": f"position {at}" + (f" of {name}" if several else ""),
                }
                for name in self.templates
                for at in range(self.positions)
            ]
        if self.spans:
            return [{**none, "span": name, "view": f"span {name}"} for name in self.spans]
        return [{**none, "span": "end", "view": "last"}]

    @property
    def places(self) -> Iterator[dict[str, Any]]:
        """Every place."""
        site = "z" if self.heads else "resid_post"
        for layer in range(self.layers):
            for head in range(self.heads) if self.heads else [None]:
                for view in self.views:
                    named = f", head {head}" if self.heads else ""
                    label = f"{site}, layer {layer}{named}, {view['view']}"
                    yield {"label": label, "site": site, "layer": layer, "head": head, **view}

    def every(self, rows: Rows) -> Rows:
        """The rows at every checkpoint."""
        return [{**row, "checkpoint": name, "tokens_seen": seen} for name, seen in self.checkpoints for row in rows]

    def probes_table(self) -> pd.DataFrame:
        rows: Rows = []
        shared = {"target": "label", "split": "test", "measure": self.measure, "n": 64, "unconverged": 0}
        for place in self.places:
            for probe in self.probes:
                score = self.score(place, probe)
                own = {
                    **shared,
                    **place,
                    "probe": probe,
                    "score": score,
                    "ci_low": score - 0.05,
                    "ci_high": score + 0.04,
                }
                control = 0.52 if self.control and self.classes else None
                rows.append({**own, "selectivity": None if control is None else score - control})
                rows.append({**own, "score": score - 0.3, "fold": 0, "penalty": 1.0, "n_train": 48, "n": 16})
                if control is not None:
                    rows.append({**own, "target": "control", "score": control, "ci_low": 0.45, "ci_high": 0.6})
            if "random_weights" in self.baselines:
                beside = {**shared, **place, "probe": self.probes[0], "baseline": "random_weights"}
                rows.append({**beside, "score": 0.55, "ci_low": 0.48, "ci_high": 0.61})
        for view in self.views:
            for name in self.baselines:
                if name != "random_weights":
                    score = {"majority": 0.5, "bag": 0.47}.get(name, 0.53)
                    rows.append({**shared, **view, "label": view["view"], "baseline": name, "score": score})
        return frame("probes", self.every(rows))

    def code_table(self) -> pd.DataFrame:
        bits = [80 - 5.0 * place["layer"] + 5 * self._span(place) for place in self.places]
        rows = [
            {**place, "bits": own, "uniform": 64.0, "compression": 64 / own}
            for place, own in zip(self.places, bits, strict=True)
        ]
        return frame("code", self.every(rows))

    def learning_table(self) -> pd.DataFrame:
        rows = []
        for place in self.places:
            for probe in self.probes:
                for size in self.learning:
                    score = 0.5 + (self.score(place, probe) - 0.5) * size / max(self.learning)
                    ends = {"ci_low": score - 0.05, "ci_high": score + 0.04}
                    known = {"probe": probe, "measure": self.measure, "n_train": size, "n": 64}
                    rows.append({**place, **known, "score": score, **ends})
        return frame("learning", self.every(rows))

    def projections_table(self) -> pd.DataFrame:
        rng = np.random.default_rng(0)
        rows = []
        for place in self.places:
            for probe in self.probes:
                apart = 4 * (self.score(place, probe) - 0.5)
                for prompt in range(64):
                    known = {"prompt": prompt, "class": self.classes[prompt % 2]}
                    at = apart * (prompt % 2 * 2 - 1) / 2 + float(rng.normal())
                    rows.append({**place, "probe": probe, **known, "projection": at})
        return frame("projections", self.every(rows))

    def _causal_place(self, layer: int, head: int | None) -> dict[str, Any]:
        site = "z" if self.heads else "resid_post"
        return {"probe": self.probes[0], "site": site, "layer": layer, "head": head, "span": "end"}

    @property
    def _asked(self) -> Iterator[tuple[str, float | None, str]]:
        for name in self.interventions:
            if name == "steer":
                yield from ((name, strength, "clean") for strength in self.strengths)
            elif name == "swap":
                yield from ((name, None, stream) for stream in ("clean", "corrupt"))
            else:
                yield name, None, "clean"

    def effect(self, layer: int, strength: float | None, group: str) -> float:
        """At the used layer half a unit, or that of the strength; over two labels nothing remains."""
        whole = (0.5 if layer == USED else 0.02) * (strength or -1)
        sign = 1.0 if len(self.groups) < 2 else {"all": 0.05}.get(group, -1.0 if group == self.groups[1] else 1.0)
        return whole * sign

    def _judged(self, each: Callable[[dict[str, Any], str], dict[str, Any]]) -> Rows:
        rows = []
        for layer in range(self.layers):
            for head in range(self.heads) if self.heads else [None]:
                for intervention, strength, stream in self._asked:
                    for group in ("all", *self.groups):
                        asked = {"intervention": intervention, "strength": strength, "stream": stream, "group": group}
                        found = self._causal_place(layer, head) | asked | {"metric": "logit_diff"}
                        rows.append(found | each(found, group))
        return rows

    def _numbers(self, row: Mapping[str, Any], group: str) -> dict[str, Any]:
        effect = self.effect(row["layer"], row["strength"], group) / (1 + (row["head"] or 0))
        size = abs(self.effect(row["layer"], row["strength"], self.groups[0] if self.groups else "all"))
        largest = max(self.strengths, key=lambda strength: (abs(strength), strength))
        if row["intervention"] == "steer" and row["strength"] != largest:
            return {"effect": effect, "size": None}
        known = self.draws >= 199
        verdict = "yes" if size > 0.2 else "no" if row["layer"] < USED else "inconclusive"
        judged = {"p_adjusted": 0.4 if self.groups else 0.005, "size_p_adjusted": 0.005 if size > 0.2 else 0.6}
        return {
            "effect": effect, "difference": effect - 0.01, "difference_low": effect - 0.03,
            "difference_high": effect + 0.02, "size": size, "size_difference": size - 0.03, "size_low": size - 0.05,
            "size_high": size - 0.01, "margin": 0.1, "verdict": verdict if known else None,
            **(judged if known else {}),
        }  # fmt: skip

    def causal_effects_table(self) -> pd.DataFrame:
        def each(row: dict[str, Any], group: str) -> dict[str, Any]:
            numbers = self._numbers(row, group)
            effect = numbers["effect"]
            beside = {"random_effect": 0.01, "random_low": -0.06, "random_high": 0.07, "random_size": 0.03}
            beside |= {"control_effect": 0.03, "draws": self.draws}
            found = {"direction": "probe", "status": "ok", "rank": 1, "removed": 0.1, "spread": 2.0, "baseline": 1.5,
                     "ci_low": effect - 0.02, "ci_high": effect + 0.02, "n": 16, "clusters": 8, "draws": 0}  # fmt: skip
            return found | numbers | (beside if numbers["size"] is not None else {})

        rows = self._judged(each)
        plain = {"direction": "control 0", "effect": 9.0, "draws": 0}
        kept = ("probe", "site", "layer", "head", "span", "intervention", "strength", "stream", "group", "metric",
                "status", "rank", "removed", "spread", "baseline", "n")  # fmt: skip
        rows += [{name: row[name] for name in kept} | plain for row in rows]
        return frame("causal_effects", self.every(rows))

    def causal_verdicts_table(self) -> pd.DataFrame:
        def each(row: dict[str, Any], group: str) -> dict[str, Any]:
            numbers = self._numbers(row, group)
            read = {"score": self.score({"position": 0, **row}, self.probes[0]), "score_p": 0.01, "chance": 0.5}
            answer = "yes" if row["layer"] >= 2 else "inconclusive"
            return numbers | read | {"readable": answer, "used": numbers.get("verdict")}

        rows = [{name: value for name, value in row.items() if name != "verdict"} for row in self._judged(each)
                if row["intervention"] != "steer" or row["strength"] == max(self.strengths)]  # fmt: skip
        return frame("causal_verdicts", self.every(rows))

    def causal_prompts_table(self) -> pd.DataFrame:
        rows = [
            self._causal_place(layer, None)
            | {"intervention": "steer", "strength": strength, "stream": "clean", "metric": "logit_diff"}
            | {"direction": direction, "prompt": prompt, "cluster": str(prompt), "value": 0.0}
            | {
                "effect": self.effect(layer, strength, "all")
                * (prompt % 2 * 2 - 1)
                * (1 if direction == "probe" else 7)
            }
            for layer in range(self.layers)
            for strength in self.strengths
            for prompt in range(8)
            for direction in ("probe", "control 0")
        ]
        return frame("causal_prompts", self.every(rows))

    def labels_table(self) -> pd.DataFrame:
        rows = [{"prompt": prompt, "class": self.classes[prompt % 2], "target": prompt % 2} for prompt in range(64)]
        return frame("labels", self.every(rows))

    def causal_downstream_table(self) -> pd.DataFrame:
        rows = [
            {"probe": self.probes[0], "erased_site": "resid_post", "erased_layer": erased, "site": "resid_post",
             "layer": layer, "score_before": 0.9, "score_after": min(0.9, 0.5 + 0.1 * (layer - erased)), "chance": 0.5}
            for erased in self.erased
            for layer in range(erased + 1, self.layers)
        ]  # fmt: skip
        return frame("causal_downstream", self.every(rows))

    def prompts_table(self) -> pd.DataFrame:
        return frame("prompts", [
            {"prompt": at, "stream": "clean", "text": "".join(self.tokens), "tokens": list(self.tokens),
             "token_ids": list(range(len(self.tokens))), "template": name}
            for at, name in enumerate(self.templates)
        ])  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables that the run has."""
        names = (
            ["probes", "prompts"]
            + ["code"] * self.code
            + ["learning"] * bool(self.learning)
            + ["projections"] * self.projected
        )
        names += ["causal_effects", "causal_verdicts"] * bool(self.interventions)
        names += ["causal_downstream"] * bool(self.erased) + ["causal_prompts", "labels"] * self.labelled
        return {name: getattr(self, f"{name}_table")() for name in names}
