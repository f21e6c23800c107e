"""Labelled texts from a file: CSV, JSONL or JSON, for probes.

Columns: `text`; `label` (a class, or a number), or `labels` (one for each word, in JSON a list, in CSV with blanks
between; words are what blanks separate); and optionally `group` (texts of one group never stand on both sides of a
split) and a target, which becomes the span `target`: `target` as characters ("12:18", the end after the last one) or as
a text that occurs once, or `target_start` and `target_end`, or `task.marks` in the text itself.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mechinterp_cli.config.types import Count, Text
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, unasked
from mechinterp_cli.tasks.items import sampled
from mechinterp_cli.tasks.label_files import Kind, LabelledText, LabelledTexts, labelled_texts
from mechinterp_cli.tasks.labelled import check_labels_differ, labels_of
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Dropped, Prompt
from mechinterp_cli.tasks.reading import read_rows
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.spans import tokens_of
from mechinterp_cli.tasks.tokenise import Encoded, Encoder
from mechinterp_cli.tasks.words import labelled_words, word_ranges

_TARGET = "target"
_SHOWN = 5
"""So many texts with two labels are told one by one."""


class LabelledOptions(CommonOptions):
    """Options of `labelled`: texts with labels, in a file; nothing is asked."""

    task_name: ClassVar[str] = "labelled"
    has_answers: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    name: Literal["labelled"] = "labelled"
    """The task."""
    n: Count | None = None
    """Take a seeded sample of so many rows; null takes all."""
    path: Text
    """Path of a .csv, .jsonl or .json file, from the folder the command runs in."""
    labels: Kind | None = None
    """Whether labels are classes or numbers; null: numbers, unless one is not, or they are 10 whole ones or fewer."""
    marks: tuple[Text, Text] | None = None
    """What stands before and after the target in every text, such as ["[[", "]]"]; it is taken out."""
    length: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Keep only so many tokens of each text, not counting what the tokenizer puts first; null keeps all. Words that are
    cut lose their label."""

    @model_validator(mode="after")
    def _check_length(self) -> "LabelledOptions":
        if self.length is not None and self.chat_template:
            raise ValueError("`length`: a text that is cut short does not fit into a chat template; leave out one")
        return self


@builds(LabelledOptions)
def build_labelled(options: LabelledOptions, encoder: Encoder) -> Built:
    """Tokenise the texts of the file, in its order.

    A row that says again what an earlier one said is left out and counted; one that says otherwise is told.
    """
    given = labelled_texts(read_rows(options.path, "task.path"), options.labels, options.marks)
    texts, dropped, warnings = _distinct(given)
    prompts: list[Prompt] = []
    for index, text in texts:
        prompt = _prompt(index, text, options, encoder, per_word=given.per_word)
        if labels_of(prompt):
            prompts.append(prompt)
        else:
            dropped.append(Dropped(text.text, f"{text.where}: task.length leaves no whole word"))
    kept = sampled(prompts, options)
    if kept:
        check_labels_differ([label for prompt in kept for label in labels_of(prompt)], f"{options.path}: as sampled")
    return Built(kept, dropped, warnings)


def _distinct(given: LabelledTexts) -> tuple[list[tuple[int, LabelledText]], list[Dropped], list[str]]:
    """The rows that say something new, with the number of the first row of their text; the others; and warnings."""
    numbers = {text.text: i for i, text in reversed(list(enumerate(given.texts)))}
    first: dict[object, LabelledText] = {}
    said: dict[object, LabelledText] = {}
    kept, dropped, told = [], list[Dropped](), list[str]()
    for text in given.texts:
        same = said.setdefault((text.text, text.target, text.labels), text)
        if same is not text:
            dropped.append(Dropped(text.text, f"{text.where} repeats {same.where}"))
            continue
        earlier = first.setdefault((text.text, text.target), text)
        if earlier is not text:
            labels = " and ".join(_shown(one, given.per_word) for one in (text, earlier))
            told.append(f"{text.where} has the text of {earlier.where} and another label: {labels}")
        kept.append((numbers[text.text], text))
    more = [f"{len(told) - _SHOWN} more rows have another label than an earlier row of their text"]
    return kept, dropped, told[:_SHOWN] + (more if len(told) > _SHOWN else [])


def _shown(text: LabelledText, per_word: bool) -> str:
    return repr(list(text.labels)) if per_word else repr(text.labels[0])


def _prompt(first: int, text: LabelledText, options: LabelledOptions, encoder: Encoder, *, per_word: bool) -> Prompt:
    """The prompt of a row; `first` is the number of the first row with this text."""
    # The context is checked below, where the target is known.
    encoded = replace(encoder, max_length=None).encode(text.text, text.where, first=options.length)
    end = max(end for _, end in encoded.offsets)
    _check_room(text, encoded, encoder)
    _check_target(text, end)
    clean = text.text if options.length is None else text.text[:end]
    spans = {} if text.target is None else {_TARGET: text.target}
    # Without a group rows that share their text must not stand on both sides of a split.
    draft = Draft(text.where, clean, (), spans=spans, cluster=text.group or f"text-{first}")
    prompt = unasked(draft, encoded)
    if not per_word:
        return replace(prompt, label=text.labels[0])
    words = [(span, label) for span, label in zip(word_ranges(text.text), text.labels, strict=True) if span[1] <= end]
    return replace(prompt, words=labelled_words(clean, encoded, words, text.where))


def _check_room(text: LabelledText, encoded: Encoded, encoder: Encoder) -> None:
    """Check that the model's context holds the text, and say so where that is at the target's cost."""
    if encoder.max_length is None or len(encoded.tokens) <= encoder.max_length:
        return
    cause = f"{text.where}: {len(encoded.tokens)} tokens are more than the model's context of {encoder.max_length}"
    if text.target is not None:
        last = tokens_of(encoded, text.target, f"{text.where}: target")[-1]
        cut = "would be cut off" if last >= encoder.max_length else "would not"
        cause += f"; its target, which ends at token {last}, {cut}"
    most = encoder.max_length - len(encoder.prefix)
    raise UserError(
        cause, f"Shorten the text{'' if encoder.chat_template else f', or set task.length to at most {most}'}."
    )


def _check_target(text: LabelledText, end: int) -> None:
    """Check that what is kept of the text, up to a character, holds the target."""
    if text.target is None or text.target[1] <= end:
        return
    start, stop = text.target
    if start + len(text.text[start:stop].rstrip()) > end:
        target = f"target {text.text[start:stop]!r} (characters {start} to {stop})"
        cause = f"{text.where}: {target} is cut off: the text is kept up to character {end}"
        raise UserError(cause, "Raise task.length, or shorten the text.")
