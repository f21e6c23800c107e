"""Labelled texts: what a probe is fitted to.

Labels stand in the prompts themselves (`Prompt.label`, `Prompt.words`), so that tokens, spans, hashes, the table of
prompts and dropping work as for any other task. Here they are read as examples with numbered classes: example `i` is
prompt `i`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.prompts import Dropped, Label, Prompt, PromptSet
from mechinterp_cli.tasks.registry import tasks_with_labels

Target = int | float
"""A class by its index in `LabelledSet.classes`, or a number."""


@dataclass(frozen=True)
class LabelledWord:
    """A word of an example that is labelled by itself."""

    positions: tuple[int, ...]
    """Its tokens, in order."""
    type: str
    """What all occurrences of the word share: control labels depend on it alone."""
    target: Target


@dataclass(frozen=True)
class Example:
    """A text with a label, or with labels at its words.

    Token positions count from 0 and include a beginning-of-sequence token where one was added.
    """

    text: str
    tokens: tuple[int, ...]
    target: Target | None
    """None where the words are labelled."""
    words: tuple[LabelledWord, ...]
    """Empty where the text has one label."""
    group: str
    """Texts of one group never stand on both sides of a split: the prompt's cluster."""
    factor: str
    """What scores may be told apart by (`affirmative`, `negated`): the prompt's group."""
    template: str
    """Positions mean the same thing only within one."""
    spans: Mapping[str, tuple[int, ...]]
    """Span name (`target`, `end`) to its token positions."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The text's one, or its words'."""
        return tuple(word.target for word in self.words) if self.target is None else (self.target,)


@dataclass(frozen=True)
class LabelledSet:
    """The examples of a task, in the order of its prompts."""

    task: str
    examples: tuple[Example, ...]
    classes: tuple[str, ...] | None
    """Names of the classes, numbers by value and words by alphabet; None where labels are numbers."""
    per_word: bool
    """Whether words are labelled, or whole texts."""
    dropped: tuple[Dropped, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets: one for each text, or for each labelled word of each text in turn."""
        return tuple(target for example in self.examples for target in example.targets)

    @property
    def groups(self) -> tuple[str, ...]:
        """The group that each of `targets` belongs to."""
        return tuple(example.group for example in self.examples for _ in example.targets)

    @property
    def word_types(self) -> tuple[str, ...]:
        """The type of the word that each of `targets` belongs to; none where whole texts are labelled."""
        return tuple(word.type for example in self.examples for word in example.words)


def labelled(prompts: PromptSet) -> LabelledSet:
    """Read a task's prompts as labelled examples.

    Args:
        prompts: The prompts of a task with labels.

    Raises:
        UserError: A prompt has no label, or all labels are the same.
    """
    _check_all_labelled(prompts)
    labels = [label for prompt in prompts.prompts for label in labels_of(prompt)]
    check_labels_differ(labels, f"task {prompts.task}")
    classes = class_names(labels)
    index = None if classes is None else {name: i for i, name in enumerate(classes)}
    return LabelledSet(
        task=prompts.task,
        examples=tuple(_example(prompt, index) for prompt in prompts.prompts),
        classes=classes,
        per_word=bool(prompts.prompts[0].words),
        dropped=prompts.dropped,
    )


def label_rows(examples: LabelledSet) -> list[dict[str, Any]]:
    """One row per labelled text or word, for a table beside `prompts`.

    Args:
        examples: The set.

    Returns:
        Rows with `prompt` (index), `word` (index within the prompt's labelled ones) and `positions` and `word_type`
        (None where the text is labelled), `class` and `target` (the class's index, or the number; `class` is None for
        numbers), `group` and `factor` as in `Example`.
    """
    return [row for index, example in enumerate(examples.examples) for row in _rows(index, example, examples.classes)]


def labels_of(prompt: Prompt) -> tuple[Label, ...]:
    """The labels of a prompt's words, or its own one; none where it has none."""
    if prompt.words:
        return tuple(word.label for word in prompt.words)
    return () if prompt.label is None else (prompt.label,)


def class_names(labels: Iterable[Label]) -> tuple[str, ...] | None:
    """The different classes in their order, or None for numbers."""
    names = {label for label in labels if isinstance(label, str)}
    return tuple(sorted(names, key=_order)) if names else None


def check_labels_differ(labels: Iterable[Label], where: str) -> None:
    """Check that there is something to tell apart.

    Args:
        labels: All of them.
        where: What to call the set in an error.

    Raises:
        UserError: All labels are the same.
    """
    different = list(dict.fromkeys(labels))
    if len(different) < 2:
        raise UserError(f"{where}: every label is {different[0]!r}", "A probe needs two different labels at least.")


def _order(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name


def _check_all_labelled(prompts: PromptSet) -> None:
    first = prompts.prompts[0]
    for index, prompt in enumerate(prompts.prompts):
        if not labels_of(prompt):
            cause = f"task {prompts.task!r} has no labels: prompt {index} has none"
            raise UserError(cause, f"Use a task with labels: {', '.join(tasks_with_labels())}.")
        if bool(prompt.words) != bool(first.words):
            raise ValueError(f"task {prompts.task}: some prompts have a label and some have labelled words")


def _example(prompt: Prompt, index: Mapping[str, int] | None) -> Example:
    return Example(
        text=prompt.clean,
        tokens=prompt.clean_tokens,
        target=None if prompt.label is None or prompt.words else _target(prompt.label, index),
        words=tuple(LabelledWord(word.positions, word.type, _target(word.label, index)) for word in prompt.words),
        group=prompt.cluster,
        factor=prompt.group,
        template=prompt.template,
        spans=prompt.spans,
    )


def _target(label: Label, index: Mapping[str, int] | None) -> Target:
    if isinstance(label, str) != (index is not None):
        raise ValueError(f"label {label!r} is among labels of another kind")
    return index[label] if index is not None and isinstance(label, str) else float(label)


def _rows(index: int, example: Example, classes: tuple[str, ...] | None) -> list[dict[str, Any]]:
    words = example.words or (None,)
    return [
        {
            "prompt": index,
            "word": None if word is None else number,
            "positions": None if word is None else list(word.positions),
            "word_type": None if word is None else word.type,
            "class": None if classes is None else classes[int(target)],
            "target": target,
            "group": example.group,
            "factor": example.factor,
        }
        for number, (word, target) in enumerate(zip(words, example.targets, strict=True))
    ]
