"""Tables as a `heads` run leaves them, made up: heads 1.1 (previous token) and 2.0 (induction) stand out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mechinterp_cli.runs.manifest import Manifest

WORDS = (" the", " Mary", "\n", " John", "ing", ",", " cafés", " 中", " went", "<|im_start|>", " store", " gave")
PATTERN_SCORES = ("previous_token", "induction", "first_token")
_TYPES = {
    "checkpoint": pa.string(), "tokens_seen": pa.int64(), "score": pa.string(), "layer": pa.int32(),
    "head": pa.int32(), "kv_head": pa.int32(), "from_layer": pa.int32(), "from_head": pa.int32(),
    "value": pa.float64(), "ci_low": pa.float64(), "ci_high": pa.float64(), "ci_method": pa.string(),
    "n": pa.int32(), "clusters": pa.int32(), "chance": pa.float64(), "status": pa.string(), "prompt": pa.int32(),
    "query": pa.int32(), "key": pa.int32(), "ablation": pa.string(), "k": pa.int32(), "heads": pa.string(),
    "metric": pa.string(), "baseline": pa.float64(), "effect": pa.float64(), "random_effect": pa.float64(),
    "random_low": pa.float64(), "random_high": pa.float64(), "draws": pa.int32(), "difference": pa.float64(),
    "difference_low": pa.float64(), "difference_high": pa.float64(), "p": pa.float64(), "verdict": pa.string(),
    "stream": pa.string(), "text": pa.string(), "tokens": pa.list_(pa.string()), "group": pa.string(),
    "design": pa.string(), "normalized": pa.float64(),
}  # fmt: skip


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows, to be changed and made into a table again."""
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def table(rows: Sequence[Mapping[str, Any]], *columns: str) -> pd.DataFrame:
    """Rows as a frame with Arrow-backed types, as tables are read; columns are for tables without rows."""
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    arrays = [pa.array([row.get(name) for row in rows], _TYPES[name]) for name in names]
    made: pd.DataFrame = pa.table(dict(zip(names, arrays, strict=True))).to_pandas(types_mapper=pd.ArrowDtype)
    return made


@dataclass(frozen=True)
class Fake:
    """A run."""

    layers: int = 3
    heads: int = 4
    kv_heads: int = 4
    scores: Sequence[str] = PATTERN_SCORES
    checkpoints: Sequence[tuple[str | None, int | None]] = ((None, None),)
    tokens: Sequence[str] = WORDS
    draws: int = 20
    ks: Sequence[int] = (1, 2, 4, 8)
    causal: Sequence[str] = ("induction",)
    drawn: Sequence[tuple[int, int]] = ((2, 0), (1, 1))
    """Heads whose attention was kept."""
    seed: int = 0
    top: int = 10
    display: Mapping[str, str] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        config = {"metrics": ["repeated_loss", "loss_gap", "first_loss"], "output": {"top": self.top}}
        made = Manifest("heads", "fake", config, "0", status="complete")
        made.model = {"id": "toy-induction"}
        made.task = {"name": "repeats"}
        return made

    def strength(self, score: str, layer: int, head: int, moment: float) -> float:
        """What a head's score is late in training, times how late it is."""
        planted = {("previous_token", 1, 1): 0.93, ("induction", 2, 0): 0.88, ("induction", 2, 1): 0.41}
        planted |= {("first_token", layer, self.heads - 1): 0.7}
        late = planted.get((score, layer, head), 0.0) * moment
        noise = 0.08 * np.random.default_rng([self.seed, layer, head, len(score)]).random()
        return float(late + noise)

    def scores_table(self) -> pd.DataFrame:
        rows = []
        for i, (name, seen) in enumerate(self.checkpoints):
            moment = 1 / (1 + np.exp(-(i - len(self.checkpoints) / 2) * 1.5)) if len(self.checkpoints) > 1 else 1.0
            for score in self.scores:
                rows += [
                    self._score(score, layer, head, float(moment)) | {"checkpoint": name, "tokens_seen": seen}
                    for layer in range(self.layers)
                    for head in range(self.heads)
                ]
        return table(rows, "checkpoint", "tokens_seen", "score", "layer", "head", "kv_head", "from_layer", "from_head",
                     "value", "ci_low", "ci_high", "chance", "n", "status")  # fmt: skip

    def _score(self, score: str, layer: int, head: int, moment: float) -> dict[str, Any]:
        value = self.strength(score, layer, head, moment)
        row: dict[str, Any] = {"score": score, "layer": layer, "head": head}
        row |= {"kv_head": head // (self.heads // self.kv_heads), "value": value, "status": "ok"}
        if score in ("copying", "copying_eigenvalues", "successor"):
            centre = {"copying": 0.5, "copying_eigenvalues": 0.0, "successor": 0.14}[score]
            return row | {"value": centre + 5 * (value - 0.04), "chance": centre}
        if score.endswith("composition"):
            first = {"value": None, "status": "undefined"} if layer == 0 else {"from_layer": layer - 1, "from_head": 2}
            return row | {"chance": 0.0417} | first
        if score == "direct_effect":
            return row | {"value": (value - 0.04) * 30, "ci_low": 0.0, "ci_high": 1.0, "n": 32}
        return row | {"ci_low": value - 0.03, "ci_high": value + 0.02, "n": 32, "clusters": 32, "chance": 0.0312}

    def patterns_table(self) -> pd.DataFrame:
        length, last = len(self.tokens), self.checkpoints[-1]
        rows = []
        for score in self.causal:
            for layer, head in self.drawn:
                pattern = self.pattern(layer, head, length)
                place = {"checkpoint": last[0], "tokens_seen": last[1], "score": score, "layer": layer, "head": head}
                rows += [
                    {**place, "prompt": 0, "query": i, "key": j, "value": float(pattern[i, j])}
                    for i in range(length)
                    for j in range(i + 1)
                ]
        return table(rows, "checkpoint", "tokens_seen", "score", "layer", "head", "prompt", "query", "key", "value")

    def pattern(self, layer: int, head: int, length: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Head (1, 1) looks one back; every other looks half the sequence back, but one."""
        logits = np.random.default_rng([self.seed, layer, head]).normal(size=(length, length))
        back = 1 if (layer, head) == (1, 1) else length // 2 - 1
        logits += 5.0 * np.eye(length, k=-back)
        weights: np.ndarray[Any, np.dtype[np.float64]] = np.exp(logits) * np.tri(length)
        weights /= weights.sum(1, keepdims=True)
        return weights

    def prompts_table(self) -> pd.DataFrame:
        row = {"prompt": 0, "stream": "clean", "text": "".join(self.tokens), "tokens": list(self.tokens), "group": ""}
        return table([row])

    def causal_table(self) -> pd.DataFrame:
        rows = []
        for score in self.causal:
            for ablation, factor in (("zero", 1.0), ("mean", 0.7)):
                for k in self.ks:
                    # The gap changes otherwise, by what ablation does to tokens that are new.
                    for metric, share in (("loss_gap", 1.25), ("repeated_loss", 1.0)):
                        place = {"score": score, "ablation": ablation, "k": k, "metric": metric}
                        rows.append(place | self._effect(k, factor * share))
        name, seen = self.checkpoints[-1]
        rows = [{**row, "checkpoint": name, "tokens_seen": seen} for row in rows]
        return table(rows, "score", "ablation", "k", "metric", "effect", "draws")

    def _effect(self, k: int, factor: float) -> dict[str, Any]:
        effect, chance = factor * 2.4 * (1 - 0.5**k), 0.03 * k
        known = self.draws >= 199
        names = ("2.0", "2.1", "1.3", "2.3", "0.1", "0.2", "1.0", "1.2", *(f"{i}.3" for i in range(3, 30)))
        return {
            "heads": "+".join(names[:k]), "baseline": 1.073, "effect": effect,
            "ci_low": effect * 0.8, "ci_high": effect * 1.15, "n": 32, "random_effect": chance,
            "random_low": -0.02 * k, "random_high": 0.11 * k, "draws": self.draws, "difference": effect - chance,
            "difference_low": effect * 0.7, "difference_high": effect, "p": 0.005 if known else None,
            "verdict": "yes" if known else None,
        }  # fmt: skip

    def summary_table(self) -> pd.DataFrame:
        verdicts = {(2, 0): "yes", (2, 1): "yes", (1, 3): "inconclusive", (0, 1): "no"}
        name, seen = self.checkpoints[-1]
        rows = [
            {"checkpoint": name, "tokens_seen": seen, "design": "single", "layer": layer, "head": head, "group": "all",
             "metric": metric, "effect": share / (1 + head), "verdict": verdict}
            for metric, share in (("loss_gap", 3.0), ("repeated_loss", 1.0))
            for (layer, head), verdict in verdicts.items()
        ]  # fmt: skip
        return table(rows)

    def baselines_table(self) -> pd.DataFrame:
        rows = []
        for i, (name, seen) in enumerate(self.checkpoints):
            late = 1 / (1 + np.exp(-(i - len(self.checkpoints) / 2) * 1.5))
            for metric, value in (("first_loss", 4.2), ("repeated_loss", 4.2 - 3.1 * late), ("loss_gap", -3.1 * late)):
                place = {"checkpoint": name, "tokens_seen": seen, "stream": "clean", "metric": metric, "status": "ok"}
                rows += [{**place, "prompt": prompt, "value": value + prompt / 100} for prompt in range(3)]
        return table(rows)

    def tables(self) -> dict[str, pd.DataFrame]:
        """All tables that a view reads."""
        return {
            "scores": self.scores_table(),
            "patterns": self.patterns_table(),
            "prompts": self.prompts_table(),
            "causal": self.causal_table(),
            "summary": self.summary_table(),
            "baselines": self.baselines_table(),
        }
