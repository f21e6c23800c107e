"""From a task's options to its prompts."""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from mechinterp_cli.config.base import TaskOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks import library
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Dropped, PromptSet
from mechinterp_cli.tasks.registry import BUILDERS
from mechinterp_cli.tasks.tokenise import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

for _module in pkgutil.iter_modules(library.__path__):
    importlib.import_module(f"{library.__name__}.{_module.name}")


def build(
    options: TaskOptions,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    vocab_size: int | None = None,
) -> PromptSet:
    """Build and check the prompts of a task.

    `keep: correct` needs the model, so it is left to the method, which uses `drop`.

    Args:
        options: The `task` section of the config.
        tokenizer: The model's tokenizer.
        max_length: The model's context in tokens; None: not checked.
        vocab_size: Rows of the model's embedding; None: not checked.

    Raises:
        UserError: The task cannot be built as asked with this tokenizer; the message says which prompt and why.
    """
    if not isinstance(options, CommonOptions):
        raise TypeError(f"{type(options).__name__} is not a CommonOptions")
    encoder = Encoder.of(
        tokenizer,
        add_bos=options.add_bos,
        chat_template=options.chat_template,
        max_length=max_length,
        vocab_size=vocab_size,
    )
    built = BUILDERS[type(options)](options, encoder)
    if not built.prompts:
        raise UserError(f"task {options.task_name!r} has no prompt", "Give at least one.")
    return PromptSet(
        task=options.task_name,
        prompts=tuple(built.prompts),
        dropped=tuple(built.dropped),
        add_bos=bool(encoder.prefix),
        chat_template=encoder.chat_template,
        warnings=tuple(built.warnings),
    )


def drop(prompts: PromptSet, indices: Iterable[int], reason: str) -> PromptSet:
    """Leave prompts out of a set and say why; the rest are numbered anew.

    Args:
        prompts: The set; it is not changed.
        indices: Which to leave out, counted from 0.
        reason: What the run shows beside them.

    Raises:
        IndexError: An index is not in the set.
    """
    out = sorted(set(indices))
    if out and not 0 <= out[0] <= out[-1] < len(prompts.prompts):
        raise IndexError(f"prompts {out} are not all in 0..{len(prompts.prompts) - 1}")
    gone = set(out)
    return replace(
        prompts,
        prompts=tuple(p for i, p in enumerate(prompts.prompts) if i not in gone),
        dropped=(*prompts.dropped, *(Dropped(prompts.prompts[i].clean, reason) for i in out)),
    )
