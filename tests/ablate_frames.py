"""Tables as an `ablate` run leaves them, made up: heads 1.1 and 2.0 matter, together less than their sum."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

import mechinterp_cli.methods.ablate.columns  # noqa: F401  the tables' columns are registered there
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import to_frame

WORDS = (" the", " Mary", "\n", " John", "ing", ",", " cafés", " 中", " went", "<|im_start|>", " store", " gave")
Rows = list[dict[str, Any]]


def frame(name: str, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as the table of that name, with the types that it is read with."""
    return to_frame(validate(name, list(rows), "ablate"))


def records(rows: pd.DataFrame) -> Rows:
    """A frame's rows, to be changed and made into a table again."""
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


@dataclass(frozen=True)
class Fake:
    """A run."""

    design: str = "single"
    layers: int = 3
    heads: int = 4
    values: Sequence[str] = ("zero", "mean")
    metrics: Sequence[str] = ("loss", "kl")
    normalised: bool = False
    kind: str = "head"
    positions: int = 0
    """Positions that heads are ablated at, one by one; 0: all together."""
    checkpoints: Sequence[tuple[str | None, int | None]] = ((None, None),)
    ks: Sequence[int] = (1, 2, 4, 8)
    draws: int = 20
    sets: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"circuit": ("1.1", "2.0"), "other": ("0.3",)})
    groups: Sequence[str] = ()
    verdict: str = ""
    margin: float = 0.05
    length: int = 0
    """Positions that loss is told of."""
    tokens: Sequence[str] = WORDS
    continuations: Sequence[str] = ()
    """Of the unedited model and of every ablation in turn."""
    top: int = 10
    display: Mapping[str, str] = field(default_factory=lambda: {"title": "repeats, single", "scale": "Change."})

    @property
    def manifest(self) -> Manifest:
        section: dict[str, Any] = {"units": [{"kind": self.kind}], "values": list(self.values)}
        section |= {"design": self.design, "margin": self.margin}
        config = {"metrics": list(self.metrics), "output": {"top": self.top}, "ablate": section}
        made = Manifest("ablate", "fake", config, "0", status="complete")
        made.model, made.task, made.display = {"id": "toy-induction"}, {"name": "repeats"}, dict(self.display)
        return made

    def strength(self, name: str) -> float:
        """What ablating a unit does."""
        planted = {"1.1": 1.4, "2.0": 2.1}
        seed = [ord(letter) for letter in name]
        return planted.get(name.split("@")[0], 0.0) + 0.2 * float(np.random.default_rng(seed).normal())

    @property
    def units(self) -> Rows:
        """Every head, at every position."""
        return [
            {"label": f"{layer}.{head}" + (f"@{place}" if self.positions else ""), "site": "z", "layer": layer,
             "head": head, "block": 0, "position": place if self.positions else None}
            for layer in range(self.layers)
            for head in range(self.heads)
            for place in range(max(1, self.positions))
        ]  # fmt: skip

    @property
    def trials(self) -> Rows:
        """Every trial of the design under one value, and its effect on the first metric."""
        if self.design == "single":
            return [{**unit, "design": "single", "effect": self.strength(unit["label"])} for unit in self.units]
        if self.design == "cumulative":
            return [row for k in self.ks for row in self._ranked(k)]
        if self.design == "pairs":
            single = [row for row in self.units if row["label"] in ("1.1", "2.0", "0.3")]
            alone = [{**row, "design": "single", "effect": self.strength(row["label"])} for row in single]
            joint = [{"label": f"{a}+{b}", "design": "pairs", "set": f"{a}+{b}", "effect": 2.2} for a, b in self.pairs]
            return [*alone, *joint]
        found = [{"label": f"{name}: {'+'.join(members)}", "set": name, "design": "set", "effect": 1.5 - i}
                 for i, (name, members) in enumerate(self.sets.items())]  # fmt: skip
        if self.design == "keep":
            kept = [{**row, "label": f"all but {row['set']}", "design": "keep", "effect": 0.4} for row in found]
            return [{"label": "everything", "design": "everything", "effect": 5.0}, *found, *kept]
        return found

    def _ranked(self, k: int) -> Rows:
        top = {"label": f"top {k}: 2.0+1.1", "design": "cumulative", "k": k, "effect": self.top_effect(k)}
        return [top, *[{**top, "label": f"random {k}: 0.0", "ranking": i, "effect": 90.0 + i} for i in range(2)]]

    def top_effect(self, k: int) -> float:
        """What ablating the top k does."""
        return 2.4 * (1 - 0.5**k)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return (("1.1", "2.0"), ("1.1", "0.3"), ("2.0", "0.3"))

    def every(self, make: Callable[[str, float], Rows]) -> Rows:
        """Rows of every checkpoint and value; effects are smaller with the later values and the earlier checkpoints."""
        rows = []
        for i, (name, seen) in enumerate(self.checkpoints):
            moment = (i + 1) / len(self.checkpoints)
            for place, value in enumerate(self.values):
                made = make(value, moment * 0.8**place)
                rows += [{**row, "ablation": value, "checkpoint": name, "tokens_seen": seen} for row in made]
        return rows

    def summary_table(self) -> pd.DataFrame:
        return frame("summary", self.every(self._summary))

    def _summary(self, value: str, factor: float) -> Rows:
        rows = []
        first = list(self.values).index(value) * len(self.trials)
        for number, trial in enumerate(self.trials, start=first):
            for place, metric in enumerate(self.metrics):
                effect = factor * trial["effect"] / (1 + place)
                row = {**trial, "trial": number, "metric": metric, "group": "all", "aggregate": "mean"}
                row["label"] = f"{trial['label']}, {value}"
                row |= {"value": 2.0 + effect, "effect": effect, "n": 32, "n_dropped": 0, "status": "ok"}
                row |= {"ci_low": effect - 0.2, "ci_high": effect + 0.3, "p_adjusted": 0.004, "verdict": "yes"}
                rows.append(row)
                if self.normalised:
                    ends = {name: row[name] / 4 for name in ("ci_low", "ci_high")}
                    rows.append({**row, "aggregate": "ratio_of_means", "normalized": effect / 4, **ends})
                for at, group in enumerate(self.groups):
                    moved = {name: row[name] + (0.3 if at else -0.3) for name in ("effect", "ci_low", "ci_high")}
                    rows.append({**row, "group": group, **moved})
        return rows

    def curve_table(self) -> pd.DataFrame:
        return frame("curve", self.every(self._curve))

    def _curve(self, value: str, factor: float) -> Rows:
        names = ("2.0", "1.1", "1.3", "2.3", "0.1", "0.2", "1.0", "1.2", *(f"{i}.3" for i in range(3, 30)))
        known = self.draws >= 199
        rows = []
        for metric in self.metrics:
            for k in self.ks:
                effect, chance = factor * self.top_effect(k), 0.03 * k
                rows.append({
                    "metric": metric, "k": k, "n": 32, "draws": self.draws, "units": "+".join(names[:k]),
                    "baseline": 2.0, "effect": effect, "ci_low": effect * 0.8, "ci_high": effect * 1.15,
                    "random_effect": chance, "random_low": -0.02 * k, "random_high": 0.11 * k,
                    "difference": effect - chance, "difference_low": effect * 0.7, "difference_high": effect,
                    "p": 0.005 if known else None, "verdict": "yes" if known else None,
                })  # fmt: skip
        return rows

    def circuits_table(self) -> pd.DataFrame:
        return frame("circuits", self.every(self._circuits))

    def _circuits(self, value: str, factor: float) -> Rows:
        return [
            {"set": name, "metric": metric, "size": len(members), "n": 32, "full": 2.0, "empty": 7.0, "alone": 2.4,
             "without": 3.5, "faithfulness": 0.92 - 0.7 * i, "faithfulness_low": 0.85 - 0.7 * i,
             "faithfulness_high": 0.97 - 0.7 * i, "completeness": 0.3 * factor, "completeness_low": 0.2 * factor,
             "completeness_high": 0.4 * factor}
            for metric in self.metrics
            for i, (name, members) in enumerate(self.sets.items())
        ]  # fmt: skip

    def interactions_table(self) -> pd.DataFrame:
        return frame("interactions", self.every(self._interactions))

    def _interactions(self, value: str, factor: float) -> Rows:
        rows = []
        for metric in self.metrics:
            for i, (a, b) in enumerate(self.pairs):
                found = factor * (-1.3, 0.05, 0.4)[i]
                joint = self.strength(a) + self.strength(b) + found
                rows.append({
                    "a": a, "b": b, "metric": metric, "n": 32, "effect_a": self.strength(a),
                    "effect_b": self.strength(b), "joint": joint, "interaction": found, "ci_low": found - 0.1,
                    "ci_high": found + 0.1,
                })  # fmt: skip
        return rows

    def contrasts_table(self) -> pd.DataFrame:
        return frame("contrasts", self.every(self._contrasts))

    def _contrasts(self, value: str, factor: float) -> Rows:
        rows = []
        a, b = self.groups[:2]
        first = list(self.values).index(value) * len(self.trials)
        for number, trial in enumerate(self.trials, start=first):
            for place, metric in enumerate(self.metrics):
                effect = factor * trial["effect"] / (1 + place)
                rows.append({
                    "trial": number, "metric": metric, "group_a": a, "group_b": b, "n_a": 16, "n_b": 17,
                    "label": f"{trial['label']}, {value}", "p_adjusted": 0.003,
                    "effect_a": effect - 0.3, "effect_b": effect + 0.3, "difference": -0.6,
                    "ci_low": -0.8, "ci_high": -0.41, "p": 0.002, "verdict": self.verdict or "yes",
                })  # fmt: skip
        return rows

    def positions_table(self) -> pd.DataFrame:
        return frame("positions", self.every(self._positions))

    def _positions(self, value: str, factor: float) -> Rows:
        rows = []
        first = list(self.values).index(value) * len(self.trials)
        told = [(None, None), *[(number, trial["label"]) for number, trial in enumerate(self.trials, start=first)]]
        for number, label in told:
            for position in range(1, self.length):
                late = position > self.length // 2
                effect = 0.0 if number is None else factor * 0.5 * (1 + number % 7) * (1 if late else 0.1)
                row = {"trial": number, "label": label, "template": "t", "metric": "loss", "position": position}
                row |= {"n": 32, "value": (0.4 if late else 4.1) + effect}
                edited = {
                    "effect": effect,
                    "ci_low": effect - 0.2,
                    "ci_high": effect + 0.2,
                    "label": f"{label}, {value}",
                }
                rows.append({**row, **({} if number is None else edited)})
        return rows

    def words_table(self) -> pd.DataFrame:
        without, *edited = self.continuations
        rows: Rows = [{"prompt": 0, "trial": None, "label": "unedited", "text": without, "token_ids": [0]}]
        for number, text in enumerate(edited):
            label = f"{self.trials[number]['label']}, {self.values[0]}"
            row = {"prompt": 0, "trial": number, "ablation": self.values[0], "label": label, "text": text}
            rows.append({**row, "token_ids": [0] if text == without else [number + 1]})
        name, seen = self.checkpoints[-1]
        return frame("words", [{**row, "checkpoint": name, "tokens_seen": seen} for row in rows])

    def prompts_table(self) -> pd.DataFrame:
        row = {"prompt": 0, "stream": "clean", "text": "".join(self.tokens), "tokens": list(self.tokens)}
        return frame("prompts", [{**row, "token_ids": list(range(len(self.tokens))), "template": "t"}])

    def baselines_table(self) -> pd.DataFrame:
        return frame("baselines", [
            {"prompt": prompt, "stream": "clean", "metric": metric, "value": 2.0 + prompt / 10, "status": "ok",
             "checkpoint": name, "tokens_seen": seen}
            for name, seen in self.checkpoints
            for metric in self.metrics
            for prompt in range(3)
        ])  # fmt: skip

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables that the run has."""
        found = {"summary": self.summary_table(), "prompts": self.prompts_table(), "baselines": self.baselines_table()}
        own: tuple[str, ...] = {"cumulative": ("curve",), "keep": ("circuits",), "pairs": ("interactions",)}.get(
            self.design, ()
        )
        own += ("contrasts",) * bool(self.groups) + ("positions",) * bool(self.length)
        own += ("words",) * bool(self.continuations)
        return found | {name: getattr(self, f"{name}_table")() for name in own}
