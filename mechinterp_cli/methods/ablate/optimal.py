"""The value `optimal`: a constant for each trial, fitted on prompts that are not measured."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mechinterp_cli.config.loader import LoadedConfig
from mechinterp_cli.engine import optimal as engine
from mechinterp_cli.engine.capture import stream_means
from mechinterp_cli.engine.edits import Bucket, Edit, Site
from mechinterp_cli.engine.losses import kl_to_clean, next_token_loss
from mechinterp_cli.engine.optimal import fit_flops
from mechinterp_cli.methods.ablate.options import AblateOptions, OptimalOptions
from mechinterp_cli.methods.ablate.units import Ablation, Merged, Unit, merge
from mechinterp_cli.methods.ablate.values import Members, Optimal, Values, Zero
from mechinterp_cli.methods.dry_run import matmul_rate
from mechinterp_cli.models.anatomy import device_of
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import PromptSet

LONG_SECONDS = 60
"""Fits that take longer are announced with a warning."""


def fitting_prompts(options: OptimalOptions, count: int) -> frozenset[int]:
    """The prompts that constants are fitted on: a seeded share of all, at least one, and never all."""
    size = min(count - 1, max(1, round(options.share * count)))
    return frozenset(Draw(options.seed).sample(range(count), size))


def too_long(cost: Mapping[str, Any]) -> str | None:
    """What a reader must know before fits begin that take long.

    Args:
        cost: What `Fit.cost` says.
    """
    if cost["seconds"] <= LONG_SECONDS:
        return None
    return (
        f"{cost['fits']} fits of {cost['steps']} steps each, one after the other, take about "
        f"{cost['seconds'] / 60:.0f} minutes or more; fewer units or a smaller ablate.optimal.steps take less"
    )


def check_fits(
    loaded: LoadedConfig, options: AblateOptions, prompts: PromptSet, units: Sequence[Unit], trials: Sequence[Ablation]
) -> None:
    """Refuse trials that edit nothing of the prompts that are fitted on, before any is fitted.

    Raises:
        UserError: Names the trial's units.
    """
    chosen = fitting_prompts(options.optimal, len(prompts.prompts))
    for trial in _editing(trials):
        if not any(units[unit].place.positions[prompt] for unit in trial.units for prompt in chosen):
            names = "+".join(units[unit].name for unit in trial.units)
            problem = f"{names} is in none of the {len(chosen)} prompts that constants are fitted on"
            remedy = "Raise the number of prompts or ablate.optimal.share, or try another ablate.optimal.seed."
            raise loaded.error(("ablate", "values", options.values.index("optimal")), f"optimal: {problem}", remedy)


class Fitted(Values):
    """Constants that were fitted for each trial.

    Args:
        prompts: The experiment's prompts.
        by_trial: What the fit gave, by the trial's index.
    """

    def __init__(self, prompts: PromptSet, by_trial: Mapping[int, engine.Fitted]) -> None:
        fits = by_trial.values()
        kept = sum(fit.after >= min(fit.start, fit.zero) for fit in fits)
        note = f"{kept} of {len(by_trial)} fits found nothing better than the mean or zero (trials: fit_loss)"
        super().__init__(prompts, "fitted constant", notes=(note,) if kept else ())
        self.by_trial = by_trial

    def of(self, trial: Ablation) -> Values:
        """What stands in place in one trial."""
        return Optimal(self.prompts, self.by_trial[trial.index].constants)

    def facts(self, trial: int) -> dict[str, float]:
        """What was made small on the prompts that are fitted on: with the mean in place, with zeros, and in the end.

        Nothing of a trial that edits nothing.
        """
        fit = self.by_trial.get(trial)
        if fit is None:
            return {}
        return {"fit_mean": fit.start, "fit_zero": fit.zero, "fit_loss": fit.after, "fit_prompts": fit.prompts}

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """Not known without the trial.

        Raises:
            TypeError: Always; ask `of` first.
        """
        raise TypeError("constants are fitted trial by trial")


@dataclass(frozen=True, eq=False)
class Fit:
    """The fits of an experiment, before they are made.

    Made small is, where the task asks for answers, the divergence of the output at the last token from the unedited
    model's; else the mean loss of the next token.

    Args:
        model: The model.
        prompts: All prompts; a share of them is fitted on.
        units: All units.
        trials: What is ablated together.
        options: Steps, rate, share, seed.
        asks: Whether the task asks for answers.
    """

    model: LoadedModel
    prompts: PromptSet
    units: Sequence[Unit]
    trials: Sequence[Ablation]
    options: OptimalOptions
    asks: bool

    @cached_property
    def members(self) -> list[list[int]]:
        """The prompts that are fitted on, by length."""
        chosen = sorted(fitting_prompts(self.options, len(self.prompts.prompts)))
        lengths = sorted({self.prompts.prompts[i].length for i in chosen})
        return [[i for i in chosen if self.prompts.prompts[i].length == length] for length in lengths]

    @cached_property
    def buckets(self) -> list[Bucket]:
        """They, as the engine takes them."""
        tokens = [torch.tensor([self.prompts.prompts[i].clean_tokens for i in bucket]) for bucket in self.members]
        return [Bucket.of({"clean": ids}, None if self.asks else _all_reads(ids)) for ids in tokens]

    @property
    def cost(self) -> dict[str, Any]:
        """Fits, steps, FLOPs and seconds, about; one matrix product is timed."""
        steps, model = self.options.steps, self.model
        layers = Counter(
            min(part.layer for unit in trial.units for part in self.units[unit].parts)
            for trial in _editing(self.trials)
        )
        flops = sum(
            count * fit_flops(model.model, model.anatomy, self.buckets, layer, steps) for layer, count in layers.items()
        )
        return {
            "fits": layers.total(),
            "steps": steps,
            "prompts": sum(map(len, self.members)),
            "flops": flops,
            "seconds": round(flops / matmul_rate(device_of(model.model)), 1),
        }

    def run(self, tick: Callable[[int, int], None]) -> Fitted:
        """Fit every trial's constants, one trial after the other.

        Args:
            tick: Told how many steps are done, of how many.

        Raises:
            UserError: A part has no constant, or no prompt that is fitted on is edited.
            RunError: The loss is not finite.
        """
        model = self.model
        sites = {Site(merged.part.kind, merged.part.layer) for merged in merge(self.units)}
        start = stream_means(model.model, model.anatomy, sites, [bucket.tokens["clean"] for bucket in self.buckets])
        loss = kl_to_clean if self.asks else next_token_loss
        fitter = engine.ConstantFitter(model.model, model.anatomy, self.buckets, loss)
        found: dict[int, engine.Fitted] = {}
        trials, steps = _editing(self.trials), self.options.steps
        total = len(trials) * steps

        def told(step: int) -> None:
            tick(min(total, len(found) * steps + step + 1), total)

        for trial in trials:
            edits = self._edits(trial)
            own = {edit.site: start[edit.site] for some in edits for edit in some}
            how = {"steps": steps, "seed": self.options.seed}
            found[trial.index] = fitter.fit(edits, own, rate=self.options.rate, tick=told, **how)
        return Fitted(self.prompts, found)

    def _edits(self, trial: Ablation) -> list[list[Edit]]:
        """Where a trial's constants stand, by bucket."""
        zero = Zero(self.prompts, "")
        merged = merge([self.units[unit] for unit in trial.units])
        return [[edit for one in merged for edit in zero.edits(one, bucket)] for bucket in self.members]


def _editing(trials: Sequence[Ablation]) -> list[Ablation]:
    """Without the one that keeps everything, which has no constant."""
    return [trial for trial in trials if trial.units]


def _all_reads(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
