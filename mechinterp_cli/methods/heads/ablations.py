"""From ablations to rows: every trial, and the strongest heads beside random ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp_cli.config.schema import StatsOptions as StatsSection
from mechinterp_cli.methods.beside import beside_random
from mechinterp_cli.methods.heads.causal import Ablated
from mechinterp_cli.methods.heads.options import METRICS, CausalOptions
from mechinterp_cli.methods.heads.tables import kv_head
from mechinterp_cli.methods.job import Swept
from mechinterp_cli.methods.tables import plain_columns, stats_options
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.stats import Status, observe, summarise
from mechinterp_cli.tasks.prompts import PromptSet

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Ablations:
    """Finished ablations.

    Args:
        trials: The trials.
        swept: Their values, prompts counted from 0.
        members: Which prompts these are.
        prompts: All prompts.
        anatomy: The model's.
    """

    trials: Sequence[Ablated]
    swept: Swept
    members: Sequence[int]
    prompts: PromptSet
    anatomy: Anatomy

    @property
    def clusters(self) -> list[str]:
        """Each measured prompt's cluster."""
        return [self.prompts.prompts[i].cluster for i in self.members]

    def base(self, metric: int) -> Floats:
        """[prompts] of the unedited model."""
        return np.asarray(self.swept.streams["clean"][:, 0, metric])

    def effects(self, metric: int) -> Floats:
        """[trials, prompts]."""
        return np.asarray(self.swept.values[:, :, 0, metric] - self.base(metric))

    def trial_rows(self) -> list[Row]:
        """One row per trial and ablated head."""
        return [
            self._design(trial)
            | {"trial": trial.index, "edit": edit, "op": trial.ablation, "site": "z", "layer": layer, "head": head}
            | {"kv_head": kv_head(self.anatomy, layer, head), "reference": trial.score, "draw": trial.draw}
            for trial in self.trials
            for edit, (layer, head) in enumerate(trial.heads)
        ]

    def _design(self, trial: Ablated) -> Row:
        return {"design": trial.design, "k": trial.k, "set": trial.name}

    def _place(self, trial: Ablated) -> Row:
        row = {"trial": trial.index, "label": trial.label, "site": "z", "score": trial.score}
        row |= {"ablation": trial.ablation, **self._design(trial)}
        if len(trial.heads) > 1:
            return row | {"layer": None, "head": None, "kv_head": None}
        layer, head = trial.heads[0]
        return row | {"layer": layer, "head": head, "kv_head": kv_head(self.anatomy, layer, head)}

    def result_rows(self) -> pd.DataFrame:
        """One row per trial, prompt and metric."""
        places = pd.DataFrame([self._place(trial) | {"draw": trial.draw} for trial in self.trials])
        places = places.astype({name: "Int32" for name in ("layer", "head", "kv_head", "draw")})
        of = [self.prompts.prompts[i] for i in self.members]
        prompts = pd.DataFrame(
            {
                "prompt": list(self.members),
                "cluster": [prompt.cluster for prompt in of],
                "group": [prompt.group for prompt in of],
            }
        )
        frame = places.merge(prompts, how="cross").merge(pd.DataFrame({"metric": METRICS}), how="cross")
        values = self.swept.values[:, :, 0]
        effects = np.stack([self.effects(metric) for metric in range(len(METRICS))], axis=-1)
        status = np.where(np.isnan(effects), "nan", "ok")
        return frame.assign(value=values.reshape(-1), effect=effects.reshape(-1), status=status.reshape(-1))

    def summary(self, options: CausalOptions, stats: StatsSection) -> tuple[pd.DataFrame, list[str]]:
        """One row per trial and metric, with interval; p and verdict of the strong heads alone, not of random ones.

        Families, whose p-values are corrected together, are metric × score × ablation × design.
        """
        places = pd.DataFrame([self._place(trial) | {"draw": trial.draw} for trial in self.trials])
        places = places.astype({name: "Int32" for name in ("layer", "head", "kv_head", "draw")})
        frames: list[pd.DataFrame] = []
        warnings: list[str] = []
        for metric, name in enumerate(METRICS):
            status = np.full(self.swept.values.shape[:2], Status.OK, dtype=np.int8)
            seen = observe(self.swept.values[:, :, 0, metric], status, self.base(metric))
            families = [f"{name} {t.score} {t.ablation} {t.design}" for t in self.trials]
            found = summarise(
                seen,
                self.base(metric),
                None,
                clusters=self.clusters,
                families=families,
                options=stats_options(stats, raw_margin=options.margin),
            )
            warnings += found.warnings
            frame = pd.DataFrame(plain_columns(found.columns)).assign(metric=name).merge(places, on="trial", how="left")
            unjudged = (frame["design"] == "random").to_numpy()
            for column in ("p", "p_adjusted", "p_method", "family", "verdict"):
                frame[column] = frame[column].astype(object).where(~unjudged, None)
            frames.append(frame)
        return pd.concat(frames, ignore_index=True), list(dict.fromkeys(warnings))

    def causal_rows(self, summary: pd.DataFrame, options: CausalOptions, stats: StatsSection) -> list[Row]:
        """One row per score, ablation, k and metric: the strongest heads beside random ones."""
        effects = {name: self.effects(metric) for metric, name in enumerate(METRICS)}
        rows = []
        tops = summary[summary["design"] == "top"]
        for metric, name in enumerate(METRICS):
            for row in tops[tops["metric"] == name].to_dict("records"):
                top = self.trials[int(row["trial"])]
                draws = [t.index for t in self.trials if t.design == "random" and _same(t, top)]
                own, random = effects[name][top.index], effects[name][draws]
                rows.append(
                    {"score": top.score, "ablation": top.ablation, "k": top.k, "heads": top.name, "metric": name}
                    | {"baseline": float(self.base(metric).mean()), "n": len(self.members), "draws": len(draws)}
                    | {key: row[key] for key in ("effect", "ci_low", "ci_high")}
                    | (
                        beside_random(own, random, self.clusters, stats, margin=options.margin, draws=options.random)
                        if draws
                        else {}
                    )
                )
        return rows


def _same(random: Ablated, top: Ablated) -> bool:
    return (random.score, random.ablation, random.k) == (top.score, top.ablation, top.k)
