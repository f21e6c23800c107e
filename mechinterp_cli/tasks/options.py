"""Options that every task has."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.config.types import Count, Flag, Seed, Text

TemplateNumber = Annotated[int, Field(strict=True)]
Templates = TemplateNumber | Literal["all"] | Annotated[tuple[TemplateNumber | Text, ...], Field(min_length=1)]
"""Which of a task's templates: a number, all, or a list of numbers and of own templates."""


class CommonOptions(TaskOptions):
    """Options of every task: how many prompts, which to keep, how they are tokenised."""

    has_answers: ClassVar[bool] = True
    """Whether its prompts have a right answer; those of `repeats` and `text` have none."""
    has_labels: ClassVar[bool] = False
    """Whether its prompts, or their words, have labels that a probe can be fitted to."""

    n: Count | None = 32
    """How many prompts; null takes every row of `file` and `inline`."""
    seed: Seed = 0
    """Seed of every draw the task makes."""
    keep: Literal["all", "correct"] = "all"
    """`correct` drops, and counts, the prompts that the model gets wrong."""
    add_bos: Flag | None = None
    """Put a beginning-of-sequence token before every prompt; null does as the tokenizer does."""
    chat_template: Flag | None = None
    """True wraps the prompt in the tokenizer's chat template as the user's message; the answer then opens the reply."""
    answer_tokens: Literal["single", "first"] = "single"
    """`single` refuses an answer of several tokens; `first` takes the first token of a longer answer."""

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: str) -> str:
        if keep == "correct" and not cls.has_answers:
            raise ValueError(f"task {cls.task_name} has no answers that could be correct, so only all is allowed")
        return keep


class GeneratedOptions(CommonOptions):
    """Options of a task that draws its own prompts: there is always a number of them."""

    n: Count = 32
    """How many prompts, all different."""
