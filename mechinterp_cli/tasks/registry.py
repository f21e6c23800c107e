"""Which function builds the prompts of which options class; each task registers its own, beside its options."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Dropped, Prompt
from mechinterp_cli.tasks.tokenise import Encoder


@dataclass(frozen=True)
class Built:
    """What a task's builder gives: the prompts, those it left out, and what looks unintended."""

    prompts: Sequence[Prompt]
    dropped: Sequence[Dropped] = ()
    warnings: Sequence[str] = ()


Options = TypeVar("Options", bound=TaskOptions)
Builder = Callable[[Options, Encoder], Built]

BUILDERS: dict[type[TaskOptions], Builder[TaskOptions]] = {}


def builds(options: type[Options]) -> Callable[[Builder[Options]], Builder[Options]]:
    """Decorate the function that builds the prompts of one options class.

    Args:
        options: The task's options class.

    Returns:
        A decorator that registers the function and gives it back unchanged.
    """

    def register(builder: Builder[Options]) -> Builder[Options]:
        BUILDERS[options] = builder  # type: ignore[assignment] # looked up by the class of the options it is called with
        return builder

    return register


def tasks_with_answers() -> tuple[str, ...]:
    """Names of the registered tasks whose prompts have a right answer."""
    answering = (chosen for chosen in BUILDERS if issubclass(chosen, CommonOptions) and chosen.has_answers)
    return tuple(sorted(chosen.task_name for chosen in answering))


def tasks_with_labels() -> tuple[str, ...]:
    """Names of the registered tasks whose prompts, or words of them, are labelled."""
    labelled = (chosen for chosen in BUILDERS if issubclass(chosen, CommonOptions) and chosen.has_labels)
    return tuple(sorted(chosen.task_name for chosen in labelled))
