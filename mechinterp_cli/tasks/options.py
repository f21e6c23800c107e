"""Options that every task has."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from mechinterp_cli.config.base import TaskOptions

Count = Annotated[StrictInt, Field(ge=1)]
Templates = StrictInt | Literal["all"] | Annotated[tuple[StrictInt | StrictStr, ...], Field(min_length=1)]


class CommonOptions(TaskOptions):
    """Options of every task: how many prompts, which to keep, how they are tokenised."""

    n: Count | None = 32
    """How many prompts; null takes every row of `file` and `inline`."""
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    """Seed of every draw the task makes."""
    keep: Literal["all", "correct"] = "all"
    """`correct` drops, and counts, the prompts that the model gets wrong."""
    add_bos: StrictBool | None = None
    """Put a beginning-of-sequence token before every prompt; null does as the tokenizer does."""
    chat_template: StrictBool | None = None
    """True puts the prompt into the tokenizer's chat template as the user's message; the answer then opens the reply."""
    answer_tokens: Literal["single", "first"] = "single"
    """`single` refuses an answer of several tokens; `first` takes the first token of a longer answer."""


class GeneratedOptions(CommonOptions):
    """Options of a task that draws its own prompts: there is always a number of them."""

    n: Count = 32
    """How many prompts, all different."""
