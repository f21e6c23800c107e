"""A prompt set: what a task hands to a method."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Label = str | float
"""What a text or a word is labelled with: the name of a class, or a number."""


@dataclass(frozen=True)
class Word:
    """A labelled word of a prompt, or a labelled token where texts have no words."""

    positions: tuple[int, ...]
    """Its tokens, in order; the last one is where a model has read all of it."""
    type: str
    """What all occurrences of the word share: control labels depend on it alone."""
    label: Label


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised: the clean text, its corruption and what is asked of it.

    Token positions count from 0 and include a beginning-of-sequence token where one was added.
    """

    clean: str
    clean_tokens: tuple[int, ...]
    answer: tuple[int, ...]
    """Token ids that count as the correct answer: one, or a set such as the later years; none where none is asked."""
    answer_text: str
    """Empty where nothing is asked."""
    corrupt: str | None = None
    corrupt_tokens: tuple[int, ...] | None = None
    """As long as `clean_tokens` where there is one."""
    wrong_answer: tuple[int, ...] = ()
    wrong_answer_text: str = ""
    spans: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Span name (`S2`, `subject`, `end`) to its token positions, the same in both streams."""
    group: str = ""
    """What results may be split by (`aligned`, `conflicting`)."""
    template: str = ""
    """Template and name order: positions mean the same thing only within one."""
    cluster: str = ""
    """Prompts of one cluster are not independent; intervals resample clusters, and splits keep them together."""
    label: Label | None = None
    """What the whole text is labelled with; None where nothing is."""
    words: tuple[Word, ...] = ()
    """Labelled words; none where the text has one label, or none."""

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.clean_tokens)


@dataclass(frozen=True)
class Dropped:
    """A prompt that was left out, and why."""

    text: str
    reason: str


@dataclass(frozen=True)
class PromptSet:
    """Every prompt of a task, in a fixed order; the index of a prompt is its identity in all tables."""

    task: str
    prompts: tuple[Prompt, ...]
    dropped: tuple[Dropped, ...] = ()
    add_bos: bool = False
    """Whether a beginning-of-sequence token was put before every prompt."""
    chat_template: bool = False
    warnings: tuple[str, ...] = ()
    """What looks unintended in what the user gave."""

    def buckets(self) -> dict[int, tuple[int, ...]]:
        """Indices of the prompts of each exact length, shortest first."""
        lengths = sorted({prompt.length for prompt in self.prompts})
        return {n: tuple(i for i, p in enumerate(self.prompts) if p.length == n) for n in lengths}

    @property
    def span_names(self) -> tuple[str, ...]:
        """Spans that every prompt has."""
        shared = [set(prompt.spans) for prompt in self.prompts]
        return tuple(sorted(set.intersection(*shared))) if shared else ()
