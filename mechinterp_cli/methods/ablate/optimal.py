"""The value `optimal`: a constant for each trial, fitted on prompts that are not measured."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mechinterp_cli.engine.capture import stream_means
from mechinterp_cli.engine.edits import Bucket, Edit, Site
from mechinterp_cli.engine.losses import kl_to_clean, next_token_loss
from mechinterp_cli.engine.optimal import ConstantFitter
from mechinterp_cli.methods.ablate.options import OptimalOptions
from mechinterp_cli.methods.ablate.units import Ablation, Merged, Unit, merge
from mechinterp_cli.methods.ablate.values import Members, Optimal, Values, Zero
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import PromptSet

Constants = Mapping[Site, Tensor]


def fitting_prompts(options: OptimalOptions, count: int) -> frozenset[int]:
    """The prompts that constants are fitted on: a seeded share of all, at least one, and never all."""
    size = min(count - 1, max(1, round(options.share * count)))
    return frozenset(Draw(options.seed).sample(range(count), size))


class Fitted(Values):
    """Constants that were fitted for each trial."""

    def __init__(self, prompts: PromptSet, anatomy: Anatomy, by_trial: Mapping[int, Constants]) -> None:
        super().__init__(prompts, "fitted constant")
        self.anatomy = anatomy
        self.by_trial = by_trial

    def of(self, trial: Ablation) -> Values:
        """What stands in place in one trial."""
        return _OfTrial(self.prompts, self.anatomy, self.by_trial[trial.index])

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        """Not known without the trial.

        Raises:
            TypeError: Always; ask `of` first.
        """
        raise TypeError("constants are fitted trial by trial")


class _OfTrial(Values):
    """One trial's constants, [*features] of whole sites."""

    def __init__(self, prompts: PromptSet, anatomy: Anatomy, constants: Constants) -> None:
        super().__init__(prompts, "fitted constant")
        self.anatomy = anatomy
        self.constants = constants

    def edits(self, merged: Merged, members: Members) -> tuple[Edit, ...]:
        site = Site(merged.part.kind, merged.part.layer)
        units = merged.part.units
        constant = self.constants[site] if units is None else self.constants[site][list(units)]
        return Optimal(self.prompts, {site: constant}, self.anatomy).edits(merged, members)


def fit_trials(
    model: LoadedModel,
    prompts: PromptSet,
    units: Sequence[Unit],
    trials: Sequence[Ablation],
    options: OptimalOptions,
    *,
    asks: bool,
    tick: Callable[[int, int], None],
) -> Fitted:
    """Fit every trial's constants, one trial after the other.

    Made small is, where the task asks for answers, the divergence of the output at the last token from the unedited
    model's; else the mean loss of the next token.

    Args:
        model: The model.
        prompts: All prompts; a share of them is fitted on.
        units: All units.
        trials: What is ablated together.
        options: Steps, rate, share, seed.
        asks: Whether the task asks for answers.
        tick: Told how many steps are done, of how many.

    Raises:
        UserError: A part has no constant, or no prompt that is fitted on is edited.
        RunError: The loss is not finite.
    """
    chosen = sorted(fitting_prompts(options, len(prompts.prompts)))
    members = _by_length(prompts, chosen)
    tokens = [torch.tensor([prompts.prompts[i].clean_tokens for i in bucket]) for bucket in members]
    buckets = [Bucket.of({"clean": ids}, None if asks else _all_reads(ids)) for ids in tokens]
    sites = {Site(merged.part.kind, merged.part.layer) for merged in merge(units)}
    start = stream_means(model.model, model.anatomy, sites, tokens)
    fitter = ConstantFitter(model.model, model.anatomy, buckets, kl_to_clean if asks else next_token_loss)
    zero = Zero(prompts, "")
    found: dict[int, Constants] = {}
    total = len(trials) * options.steps

    def told(step: int) -> None:
        tick(min(total, len(found) * options.steps + step + 1), total)

    for trial in trials:
        merged = merge([units[unit] for unit in trial.units])
        edits = [[edit for one in merged for edit in zero.edits(one, bucket)] for bucket in members]
        own = {site: start[site] for site in {Site(one.part.kind, one.part.layer) for one in merged}}
        how = {"steps": options.steps, "seed": options.seed}
        found[trial.index] = fitter.fit(edits, own, rate=options.rate, tick=told, **how).constants
    return Fitted(prompts, model.anatomy, found)


def _by_length(prompts: PromptSet, chosen: Sequence[int]) -> list[list[int]]:
    lengths = sorted({prompts.prompts[i].length for i in chosen})
    return [[i for i in chosen if prompts.prompts[i].length == length] for length in lengths]


def _all_reads(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
