"""The causal follow-up of a probing run: directions of some prompts are tried in the model on others.

Scores come from cross-validation over all prompts. Directions are fitted once more, by the first linear probe, on the
prompts that are not held out; what they do is measured on prompts that are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from mechinterp_cli.engine.activations import feature_shape
from mechinterp_cli.methods.bench import Bench
from mechinterp_cli.methods.beside import SIGNIFICANT
from mechinterp_cli.methods.dry_run import cost_of
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.methods.job import Swept
from mechinterp_cli.methods.measure import Metrics, clean_logits, needs_clean_logits
from mechinterp_cli.methods.probe.causal import Arm, check_apart, lay_out, make_job
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.causal_split import Split, subset
from mechinterp_cli.methods.probe.causal_tables import Followed
from mechinterp_cli.methods.probe.comes_back import Later
from mechinterp_cli.methods.probe.fitting import Fitted
from mechinterp_cli.methods.probe.interventions import ProbedSite, blank_site, probed_site
from mechinterp_cli.methods.probe.options import ProbeName
from mechinterp_cli.methods.probe.readout import Readout
from mechinterp_cli.methods.probe.verdicts import Readability
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.kinds import HEAD_KINDS
from mechinterp_cli.tasks.prompts import PromptSet

Row = dict[str, Any]
Score = Callable[[Readout], Readability]


@dataclass(frozen=True, eq=False)
class FollowUp:
    """A causal follow-up that is checked.

    Args:
        setting: Config, model, prompts.
        options: The section.
        name: The probe whose directions are tried.
        split: Which prompts are fitted on, and which are measured.
        readouts: The places with directions.
        places: Where it is intervened, positions of the measured prompts.
        where: By the name of a view the numbers of its places.
    """

    setting: Setting
    options: CausalOptions
    name: ProbeName
    split: Split
    readouts: Sequence[Readout]
    places: Sequence[Place]
    where: Mapping[str, Sequence[int]]

    @cached_property
    def measured(self) -> PromptSet:
        """The prompts that are measured."""
        return subset(self.setting.prompts, self.split.measured)

    def check(self) -> None:
        """Refuse what cannot be done, and to measure on texts that directions are fitted on.

        Raises:
            UserError: As `lay_out` and `check_apart`.
        """
        prompts = self.setting.prompts.prompts
        check_apart([prompts[i].clean_tokens for i in self.split.fitted], self.measured)
        self._arms([self._blank(readout) for readout in self.readouts], self.readouts)

    def plan(self) -> dict[str, Any]:
        """What it will take; directions are not fitted."""
        sites = [self._blank(readout) for readout in self.readouts]
        arms = self._arms(sites, self.readouts)
        job = make_job(arms, sites, self.places, self.measured, self._metrics(self._logits()))
        cost = cost_of(self.setting.loaded.config.engine, self.setting.model, job)
        counts = {"fitted": len(self.split.fitted), "measured": len(self.split.measured), "sites": len(sites)}
        return {"probe": self.name, **counts, **cost}

    def tables(self, fitted: Sequence[Fitted], score: Score, bench: Bench) -> dict[str, Any]:
        """Sweep, and say what came of it.

        Args:
            fitted: Directions, at every place of `readouts` that has any.
            score: How well a place is read.
            bench: Computes the trials.
        """
        bench.stage("fitting random directions")
        sites = [self._site(found) for found in fitted]
        arms = self._arms(sites, [found.readout for found in fitted])
        swept = bench.sweep(make_job(arms, sites, self.places, self.measured, self._metrics(self._logits())))
        followed = self._followed(arms, sites, swept)
        for warning in (*followed.warnings(), *self._cannot(swept)):
            bench.warn(warning)
        effects = followed.effect_rows()
        readable = {number: score(found.readout) for number, found in enumerate(fitted)}
        verdicts = followed.verdict_rows(effects, readable, score_margin=self.options.score_margin)
        bench.stage("reading what is left in later layers")
        later = Later(self.setting, self.options.downstream, self.split.held).rows(fitted, sites)
        found: dict[str, Any] = {
            "causal_effects": effects,
            "causal_verdicts": verdicts,
            "causal_prompts": list(self._numbered(followed.prompt_rows())),
            "causal_downstream": later,
        }
        return {name: rows for name, rows in found.items() if rows}

    def _followed(self, arms: Sequence[Arm], sites: Sequence[ProbedSite], swept: Swept) -> Followed:
        config = self.setting.loaded.config
        return Followed(
            arms, sites, self.places, self.measured, config.metrics, swept, self.options, config.stats
        )  # fmt: skip

    def _numbered(self, rows: Sequence[Row]) -> Iterator[Row]:
        """Rows with prompts by their numbers among all of the task's."""
        for row in rows:
            yield row | {"prompt": self.split.measured[row["prompt"]]}

    def _arms(self, sites: Sequence[ProbedSite], readouts: Sequence[Readout]) -> list[Arm]:
        where = [self.where[readout.reading.view.name] for readout in readouts]
        return lay_out(sites, self.places, self.options, self.measured, where)

    def _logits(self) -> Tensor | None:
        """Clean logits [prompts, vocab] where a metric needs them; zeros without forward passes."""
        model = self.setting.model
        if not needs_clean_logits(self.setting.loaded):
            return None
        if not self.setting.compute:
            return torch.zeros(len(self.measured.prompts), model.anatomy.vocab_size)
        return clean_logits(model, self.measured)

    def _metrics(self, logits: Tensor | None) -> Metrics:
        return Metrics.of(self.setting.loaded.config.metrics, self.measured, logits, self.setting.model)

    def _named(self, readout: Readout) -> str:
        """The probe's name, with the view's where there are several: layers of one view are judged together."""
        return self.name if len(self.where) == 1 else f"{self.name}, {readout.reading.view.name}"

    def _shape(self, readout: Readout) -> tuple[int, ...]:
        """Features of what a probe reads."""
        shape = feature_shape(self.setting.model.anatomy, readout.reading.site)
        return shape if readout.reading.head is None else shape[1:]

    def _site(self, found: Fitted) -> ProbedSite:
        reading = found.readout.reading
        shape = self._shape(found.readout)
        return probed_site(
            reading.site.kind,
            reading.site.layer,
            found.basis,
            found.x,
            draws=self.options.random,
            seed=self.options.seed,
            unit=reading.head,
            controls=found.controls,
            leace=found.leace() if "leace" in self.options.interventions else None,
            orthogonal=self.options.orthogonal,
            name=self._named(found.readout),
            heads=shape[0] if len(shape) > 1 else None,
        )

    def _blank(self, readout: Readout) -> ProbedSite:
        reading, classes, shape = readout.reading, readout.problem.classes, self._shape(readout)
        features = shape[0] * shape[1] if len(shape) > 1 else shape[0]
        return blank_site(
            reading.site.kind,
            reading.site.layer,
            features,
            rank=1 if classes is None else min(classes - 1, features),
            draws=self.options.random,
            unit=reading.head if reading.site.kind in HEAD_KINDS else None,
            controls=self.options.controls,
            heads=shape[0] if len(shape) > 1 else None,
        )

    def _cannot(self, swept: Swept) -> Iterator[str]:
        """A model that does not do the task cannot use anything for it."""
        if self.setting.loaded.config.metrics[0] != "logit_diff":
            return
        found = swept.streams["clean"][:, 0, 0]
        right = int((found > 0).sum())
        if binomtest(right, len(found), alternative="greater").pvalue > SIGNIFICANT:
            yield (
                f"causal: the model prefers the right answer on {right} of {len(found)} measured prompts, no more than "
                "by chance: that it uses no direction for this says little"
            )
