"""Prompts written into the config, under `task.prompts`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mechinterp_cli.config.types import Count
from mechinterp_cli.tasks.items import PromptItem, build_items
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder


class PromptsOptions(CommonOptions):
    """Options of `prompts`: the prompts stand in the config."""

    task_name: ClassVar[str] = "prompts"
    name: Literal["prompts"] = "prompts"
    """The task; the key `prompts` chooses it too."""
    n: Count | None = None
    """Take a seeded sample of so many; null takes all."""
    prompts: Annotated[tuple[PromptItem, ...], Field(min_length=1)]
    """The prompts."""


@builds(PromptsOptions)
def build_prompts(options: PromptsOptions, encoder: Encoder) -> Built:
    """Build the prompts of the config, in their order."""
    items = [(f"task.prompts[{i}]", item) for i, item in enumerate(options.prompts)]
    return build_items(items, options, encoder)
