"""Which prompts means and resamples are taken from: never from other positions than those they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import measure as measuring
from mechinterp_cli.methods.ablate.averages import Sample
from mechinterp_cli.methods.ablate.options import MeanOptions, ResampleOptions, Stream
from mechinterp_cli.methods.experiment import Setting
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.prompts import Prompt, PromptSet

FEWEST = 2
"""A mean of a single prompt is that prompt."""
_SHOWN = 5
KeyPath = tuple[str | int, ...]
Group = tuple[str, int] | str | None
"""What prompts are averaged together by: template and length, template, or nothing."""


@dataclass(frozen=True)
class MeanSet:
    """What the mean is taken over, and whose mean stands for each prompt.

    Args:
        sample: Prompts and groups.
        group_of: For every prompt of the experiment its group.
        words: For the trials table.
    """

    sample: Sample
    group_of: tuple[int, ...]
    words: str


def mean_set(options: MeanOptions, setting: Setting) -> MeanSet:
    """The prompts of `ablate.mean`, grouped.

    Raises:
        UserError: The reference cannot be built, lacks a template or length that a prompt needs, a mean would be of
            fewer than two prompts, or a prompt has no corrupted twin.
    """
    own = setting.prompts
    source = own if options.reference is None else reference_prompts(options.reference, setting)
    groups = [_group(options, prompt) for prompt in own.prompts]
    order = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    members = [prompt for prompt in source.prompts if _group(options, prompt) in order]
    for group in order:
        _check_group(options, group, source, setting)
    chosen = [order[_group(options, prompt)] for prompt in members]
    tokens = _tokens(members, source, options.stream, setting, ("ablate", "mean", "stream"))
    sample = Sample(tokens, tuple(chosen), options.per == "position")
    kept = f"{len(members)} prompts of {source.task}" + (f" ({options.stream})" if options.stream != "clean" else "")
    per = {"position": "at each position by template and length", "all": "over all positions"}[options.per]
    by = " by template" if options.per == "all" and options.by == "template" else ""
    return MeanSet(sample, tuple(order[group] for group in groups), f"mean {per}{by}, {kept}")


def every_prompt(setting: Setting, groups: Sequence[int] | None = None) -> Sample:
    """The experiment's own prompts, all in one group unless told otherwise."""
    prompts = setting.prompts.prompts
    return Sample(tuple(p.clean_tokens for p in prompts), tuple(groups if groups is not None else [0] * len(prompts)))


def reference_prompts(options: TaskOptions, setting: Setting) -> PromptSet:
    """The prompts of the task `ablate.mean.reference`, built as the experiment's own are.

    Raises:
        UserError: They cannot be built; names the key.
    """
    model = setting.model
    try:
        prompts = measuring.build_prompts(options, model)
        if getattr(options, "keep", "all") == "correct" and setting.compute:
            prompts, _ = measuring.keep_correct(prompts, measuring.clean_logits(model, prompts), top=False)
    except UserError as error:
        raise setting.loaded.error(("ablate", "mean", "reference"), error.cause, error.remedy) from error
    return prompts


def _group(options: MeanOptions, prompt: Prompt) -> Group:
    if options.per == "position":
        return prompt.template, prompt.length
    return prompt.template if options.by == "template" else None


def _check_group(options: MeanOptions, group: Group, source: PromptSet, setting: Setting) -> None:
    """Enough prompts for one of the means."""
    count = sum(_group(options, prompt) == group for prompt in source.prompts)
    if count >= FEWEST:
        return
    have = "a single prompt" if count else "no prompt"
    needed = f"a mean takes {FEWEST} prompts or more"
    if isinstance(group, tuple):
        template, length = group
        lengths = sorted({p.length for p in source.prompts if p.template == template})
        there = f"lengths of this template there: {_listed(lengths)}" if lengths else _templates(source)
        problem = f"{source.task} has {have} of template {template!r} with {length} tokens, and {needed} ({there})"
        fix = "Use per: all, raise the number of prompts, or use prompts of one length."
        key: KeyPath = ("ablate", "mean", "per")
    elif isinstance(group, str):
        problem = f"{source.task} has {have} of template {group!r}, and {needed} ({_templates(source)})"
        fix, key = "Use by: all, or raise the number of prompts.", ("ablate", "mean", "by")
    else:
        problem, fix = f"{source.task} has {have}, and {needed}", "Raise the number of prompts."
        key = ("ablate", "mean")
    if options.reference is not None:
        key = ("ablate", "mean", "reference")
    raise setting.loaded.error(key, problem, fix)


def _templates(source: PromptSet) -> str:
    return f"templates there: {_listed(sorted({repr(prompt.template) for prompt in source.prompts}))}"


def _listed(items: Sequence[object]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(map(str, items[:_SHOWN])) + more


def _tokens(
    members: Sequence[Prompt], source: PromptSet, stream: Stream, setting: Setting, path: KeyPath
) -> tuple[tuple[int, ...], ...]:
    """The tokens of a stream of some prompts."""
    if stream == "clean":
        return tuple(prompt.clean_tokens for prompt in members)
    chosen = tuple(prompt.corrupt_tokens for prompt in members if prompt.corrupt_tokens is not None)
    if len(chosen) < len(members):
        place = next(i for i, prompt in enumerate(source.prompts) if prompt.corrupt_tokens is None)
        problem = f"corrupt: prompt {place} of {source.task} has no corrupted twin"
        raise setting.loaded.error(path, problem, "Give every prompt a `corrupt`, or use stream: clean.")
    return chosen


@dataclass(frozen=True)
class Donors:
    """Whose activations stand in place of each prompt's.

    Args:
        tokens: For every prompt, one sequence per draw: another prompt's, of the same template and length.
        draws: How many there are.
        wanted: How many were asked for.
    """

    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    draws: int
    wanted: int


def donors(options: ResampleOptions, setting: Setting) -> Donors:
    """Other prompts for every prompt: the draws of a prompt differ, and in each draw every prompt serves once.

    They depend on the seed and on the prompt set; not on how prompts are batched.

    Raises:
        UserError: A template has a single prompt of some length, or a prompt has no corrupted twin.
    """
    prompts = setting.prompts.prompts
    tokens = _tokens(prompts, setting.prompts, options.stream, setting, ("ablate", "resample", "stream"))
    groups: dict[tuple[str, int], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault((prompt.template, prompt.length), []).append(index)
    for (template, length), members in groups.items():
        if len(members) < FEWEST:
            problem = f"template {template!r} has a single prompt of {length} tokens: there is no other to draw from"
            fix = "Raise task.n, use prompts of one length, or another value."
            raise setting.loaded.error(("ablate", "resample"), problem, fix)
    draws = min(options.draws, min(map(len, groups.values())) - 1)
    chosen: dict[int, tuple[tuple[int, ...], ...]] = {}
    for place, members in enumerate(groups.values()):
        draw = Draw(options.seed * 1_000_003 + place)
        order, steps = draw.shuffled(members), draw.sample(range(1, len(members)), draws)
        for here, index in enumerate(order):
            chosen[index] = tuple(tokens[order[(here + step) % len(order)]] for step in steps)
    return Donors(tuple(chosen[index] for index in range(len(prompts))), draws, options.draws)
