"""The causal follow-up of probes: subspaces are erased, moved along and swapped in the model, beside random ones.

All trials of all sites, the random ones among them, are one job of the engine: the streams are computed once, a trial
costs the rows from its first edited position on through the layers above its site, and trials go through a layer
together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mechinterp_cli.engine.edits import Bucket, Trial
from mechinterp_cli.engine.plan import Work
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.job import Job
from mechinterp_cli.methods.measure import Metrics, split_members
from mechinterp_cli.methods.probe.causal_options import CausalOptions, Intervention
from mechinterp_cli.methods.probe.interventions import PROBE, Changes, ProbedSite
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.kinds import KEY_KINDS
from mechinterp_cli.tasks.prompts import PromptSet

RANDOM = "random"
OTHER = {"clean": "corrupt", "corrupt": "clean"}


@dataclass(frozen=True)
class Arm:
    """One trial.

    Args:
        index: Its number.
        site: Which of the probed sites.
        place: Which of the places.
        intervention: What is done.
        strength: Of `steer`, else None.
        stream: The prompt that it is done to.
        direction: `probe`, the name of control labels, or `random`.
        draw: Of `random`.
    """

    index: int
    site: int
    place: int
    intervention: Intervention
    strength: float | None
    stream: str
    direction: str
    draw: int | None

    @property
    def question(self) -> tuple[int, int, str, float | None, str]:
        """What the probe's arm and the random ones that stand beside it share."""
        return self.site, self.place, self.intervention, self.strength, self.stream


def lay_out(
    sites: Sequence[ProbedSite],
    places: Sequence[Place],
    options: CausalOptions,
    prompts: PromptSet,
    where: Sequence[Sequence[int]] | None = None,
) -> list[Arm]:
    """Every trial, the random ones after the probe's and those of control labels.

    Args:
        sites: The probed sites.
        places: Positions of each prompt, as `methods.places.Binder` gives them.
        options: The section.
        prompts: The prompts that are measured.
        where: Of every site the numbers of its places; all of them where None.

    Raises:
        UserError: A site that has no directions, `leace` without a map, `swap` without paired prompts.
    """
    _check(sites, options, prompts)
    arms: list[Arm] = []
    for number, site in enumerate(sites):
        for place in range(len(places)) if where is None else where[number]:
            for intervention, strength, stream in _questions(options):
                for direction, draw in _directions(site, options, intervention, strength):
                    arms.append(Arm(len(arms), number, place, intervention, strength, stream, direction, draw))
    return arms


def _questions(options: CausalOptions) -> Iterator[tuple[Intervention, float | None, str]]:
    for intervention in options.interventions:
        if intervention == "steer":
            yield from ((intervention, strength, "clean") for strength in options.strengths)
        elif intervention == "swap":
            yield from ((intervention, None, stream) for stream in options.into)
        else:
            yield intervention, None, "clean"


def _directions(
    site: ProbedSite, options: CausalOptions, intervention: Intervention, strength: float | None
) -> Iterator[tuple[str, int | None]]:
    yield PROBE, None
    if intervention != "leace":
        yield from ((control.name, None) for control in site.controls)
    if intervention != "steer" or strength in options.steered_at_random:
        yield from ((RANDOM, draw) for draw in range(len(site.random_for(intervention).bases)))


def _check(sites: Sequence[ProbedSite], options: CausalOptions, prompts: PromptSet) -> None:
    for site in sites:
        if site.kind in KEY_KINDS:
            problem = f"probe.causal: {site.kind} has one number per key, and no directions that prompts share"
            raise UserError(problem, "Probe a site of the residual stream, neurons or heads.")
        if "leace" in options.interventions and site.leace is None:
            problem = (
                f"probe.causal.interventions: leace needs labels of classes or numbers at {site.kind} {site.layer}"
            )
            raise UserError(problem, "Leave out leace.")
    if "swap" in options.interventions and any(prompt.corrupt_tokens is None for prompt in prompts.prompts):
        problem = f"probe.causal.interventions: swap needs a corrupted twin of every prompt of task {prompts.task}"
        raise UserError(problem, "Leave out swap, or use a task or prompts with `corrupt`.")


def check_apart(fitted: Iterable[Sequence[int]], prompts: PromptSet) -> None:
    """Refuse to measure on prompts that directions were fitted on.

    Args:
        fitted: Token ids of the prompts that were fitted on.
        prompts: Those that are measured.

    Raises:
        UserError: Some prompts serve for both.
    """
    known = {tuple(tokens) for tokens in fitted}
    both = [i for i, prompt in enumerate(prompts.prompts) if prompt.clean_tokens in known]
    if both:
        some = f"{len(both)} of {len(prompts.prompts)} measured prompts were fitted on, prompt {both[0]} first"
        raise UserError(f"probe.causal: {some}", "Measure on other prompts than the directions were fitted on.")


def make_job(
    arms: Sequence[Arm],
    sites: Sequence[ProbedSite],
    places: Sequence[Place],
    prompts: PromptSet,
    metrics: Metrics,
    name: str = "causal",
) -> Job:
    """The engine's job: every arm on every prompt that its place has positions in.

    Args:
        arms: From `lay_out`.
        sites: As there.
        places: As there.
        prompts: The prompts.
        metrics: What is measured.
        name: Of the job.
    """
    members = split_members(prompts)
    changes = [Changes(site) for site in sites]
    paired = any(arm.intervention == "swap" for arm in arms)
    return Job(
        trials=len(arms),
        prompts=len(prompts.prompts),
        members=members,
        works=tuple(_work(arms, changes, places, prompts, bucket, paired) for bucket in members),
        measures=tuple(metrics.on(bucket) for bucket in members),
        metrics=metrics.names,
        name=name,
    )


def _work(
    arms: Sequence[Arm],
    changes: Sequence[Changes],
    places: Sequence[Place],
    prompts: PromptSet,
    members: Sequence[int],
    paired: bool,
) -> Work:
    chosen = [prompts.prompts[i] for i in members]
    tokens = {"clean": torch.tensor([prompt.clean_tokens for prompt in chosen])}
    if paired:
        tokens["corrupt"] = torch.tensor([prompt.corrupt_tokens for prompt in chosen])
    positions = [tuple(place.positions[i] or () for i in members) for place in places]
    measured = [tuple(row for row, at in enumerate(each) if at) for each in positions]
    trials = []
    for arm in arms:
        if measured[arm.place]:
            made = changes[arm.site]
            change = made.of(arm.intervention, _named(arm), draw=arm.draw, strength=arm.strength or 0.0)
            edits = made.site.edits(change, positions[arm.place], OTHER[arm.stream])
            trials.append(Trial(arm.index, arm.stream, edits, measured[arm.place]))
    return Work(Bucket.of(tokens), tuple(trials))


def _named(arm: Arm) -> str:
    return PROBE if arm.draw is not None else arm.direction
