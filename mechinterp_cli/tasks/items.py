"""Prompts that a user gives, inline or in a file: one model for both, from which drafts are made."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from mechinterp_cli.config.base import BaseConfig
from mechinterp_cli.config.types import Index, Number, Text
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Answers, Draft, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Dropped, Prompt
from mechinterp_cli.tasks.registry import Built
from mechinterp_cli.tasks.spans import END, find_text
from mechinterp_cli.tasks.tokenise import Encoder, Range, check_text

AnswerField = Text | Index | Annotated[tuple[Text | Index, ...], Field(min_length=1)]
SpanField = Text | tuple[Index, Index]


class PromptItem(BaseConfig):
    """One prompt as a user gives it."""

    clean: Annotated[str, Field(strict=True)]
    """The prompt."""
    corrupt: Annotated[str, Field(strict=True)] | None = None
    """Its corruption, of as many tokens; methods that need none do without."""
    answer: AnswerField
    """What should come next, with the space before it (quote it: `" Paris"`); a list is a set of right answers."""
    wrong_answer: AnswerField | None = None
    """What should not; a list is a set."""
    group: str = ""
    """What results may be split by."""
    cluster: str = ""
    """Prompts that are not independent of each other share it; else those of one template do, else none do."""
    template: str = ""
    """Prompts of one template have the same parts at the same positions."""
    label: Text | Number | None = None
    """For probes: a class where it is text, else a number."""
    spans: dict[Text, SpanField] = {}
    """Span name to a text that occurs once in `clean`, or to characters [start, end]."""


def build_items(items: Sequence[tuple[str, PromptItem]], options: CommonOptions, encoder: Encoder) -> Built:
    """Tokenise and check prompts that a user gave.

    A repeated prompt is left out and counted. With `n`, a seeded sample of that size is taken, in the given order.

    Args:
        items: What an error calls each prompt, and the prompt.
        options: The task's options.
        encoder: The tokenizer and the model's limits.

    Raises:
        UserError: As in `finish`, when there are fewer than `n`, and when some labels are numbers and some are not.
    """
    _check_labels(items)
    first: dict[tuple[object, ...], str] = {}
    prompts: list[Prompt] = []
    dropped: list[Dropped] = []
    for index, (where, item) in enumerate(items):
        prompt = replace(finish(_draft(index, where, item), encoder, options), label=item.label)
        key = _identity(prompt)
        if key in first:
            dropped.append(Dropped(prompt.clean, f"{where} repeats {first[key]}"))
            continue
        first[key] = where
        prompts.append(prompt)
    return Built(sampled(prompts, options), dropped)


def _check_labels(items: Sequence[tuple[str, PromptItem]]) -> None:
    kinds = {isinstance(item.label, str): (where, item.label) for where, item in items if item.label is not None}
    if len(kinds) > 1:
        (text, name), (other, number) = kinds[True], kinds[False]
        cause = f"{text}: label {name!r} is a class, and {number!r} of {other} is a number"
        raise UserError(cause, "Write all labels as text, or all as numbers.")


def _identity(prompt: Prompt) -> tuple[object, ...]:
    """What makes a prompt the same as another: its text, what is asked of it, and its label."""
    return prompt.clean, prompt.corrupt, prompt.answer, prompt.wrong_answer, prompt.label


def sampled(prompts: list[Prompt], options: CommonOptions) -> list[Prompt]:
    """A seeded sample of `n` prompts in the given order; all where `n` is null.

    Raises:
        UserError: There are fewer than `n`.
    """
    if options.n is None:
        return prompts
    if options.n > len(prompts):
        cause = f"task.n: {options.n} prompts are asked for and {len(prompts)} different ones are given"
        raise UserError(cause, "Lower task.n, or leave it out to take all.")
    return [prompts[i] for i in sorted(Draw(options.seed).distinct(len(prompts), options.n))]


def _draft(index: int, where: str, item: PromptItem) -> Draft:
    check_text(item.clean, f"{where}: clean")
    return Draft(
        where=where,
        clean=item.clean,
        corrupt=item.corrupt,
        answer=_answers(item.answer),
        wrong_answer=() if item.wrong_answer is None else _answers(item.wrong_answer),
        spans={name: _characters(item.clean, name, span, where) for name, span in item.spans.items()},
        group=item.group,
        template=item.template,
        cluster=item.cluster or item.template or f"prompt-{index}",
    )


def _answers(given: AnswerField) -> Answers:
    return given if isinstance(given, tuple) else (given,)


def _characters(clean: str, name: str, span: SpanField, where: str) -> Range:
    label = f"{where}: span {name!r}"
    if name == END:
        raise UserError(f"{label} is always the last token", "Choose another name.")
    if isinstance(span, str):
        return find_text(clean, span, label)
    if not span[0] < span[1] <= len(clean):
        cause = f"{label}: characters {span[0]} to {span[1]} are not within 0 to {len(clean)}"
        raise UserError(cause, "Give [start, end] with the end after the last character.")
    return span
