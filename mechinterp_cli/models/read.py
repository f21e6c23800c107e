"""What every way of reading a model shares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError


@dataclass(frozen=True)
class ReadModel:
    """A model as it came from its files, not yet checked."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: str
    """`hub`, `folder`, `gguf` or `zoo`."""
    weight_files: dict[str, str]
    """File name to sha256."""
    revision: str | None = None
    quantization: str | None = None


def pretrained_options(options: ModelOptions) -> dict[str, Any]:
    """What `from_pretrained` is told, whatever it reads."""
    attention = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    return {"dtype": getattr(torch, options.dtype), **attention}


def read_causal_lm(folder: Path, **options: Any) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Read a causal language model with transformers.

    Args:
        folder: The folder its files are in.
        options: For `from_pretrained`.

    Returns:
        The model, and the names of the parameters that the files lack, which transformers made up.
    """
    auto: Any = AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    return model, tuple(sorted(report["missing_keys"]))


def refuse_revision(options: ModelOptions, what: str) -> None:
    """Refuse a revision where there are none; `what` says what the id is."""
    if options.revision is not None:
        raise UserError(
            f"model.revision: {options.revision!r} is given, but {what}, which has no revisions",
            "Remove model.revision.",
        )
