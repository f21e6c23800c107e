"""GGUF files: quantised weights in one file, read by transformers into ordinary float tensors."""

import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.quiet import quiet
from mechinterp_cli.models.read import read_causal_lm

# What transformers raises on a GGUF file that it cannot read.
_READ_ERRORS = (OSError, ValueError, KeyError, IndexError, TypeError, ImportError, RuntimeError, struct.error)
_MAGIC = b"GGUF"


def read_gguf(path: Path, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read and dequantise a GGUF file.

    Args:
        path: The file.
        options: For `from_pretrained` (`dtype`, `attn_implementation`).

    Returns:
        The model as if it had never been quantised, and its tokenizer.

    Raises:
        UserError: It is not a GGUF file, or of an architecture that transformers cannot read from GGUF.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(f"model.id: {path} is not a GGUF file (it does not begin with GGUF)", "Check the path.")
    try:
        with quiet():
            model, missing = read_causal_lm(path.parent, gguf_file=path.name, **options)
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except _READ_ERRORS as error:
        raise UserError(
            f"model.id: {path} cannot be read as GGUF: {error}",
            "Download it again; if it is whole, transformers does not know this architecture in GGUF: "
            "use the model's safetensors.",
        ) from error
    if missing:
        raise UserError(f"model.id: {path} lacks weights: {', '.join(missing[:3])}", "Download it again.")
    forget_quantisation(model)
    return model, tokenizer


def forget_quantisation(model: PreTrainedModel) -> None:
    """Remove what transformers keeps of the quantisation after it has dequantised everything.

    Raises:
        UserError: A weight is still quantised.
    """
    for name, weight in model.named_parameters():
        if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
            raise UserError(f"model.id: {name} is still quantised ({weight.dtype})", "Use the model's safetensors.")
    bare: Any = model
    bare.hf_quantizer = None
    bare.is_quantized = False
    if hasattr(bare.config, "quantization_config"):
        del bare.config.quantization_config


def convert_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as safetensors (float32) and its tokenizer into a folder."""
    model, tokenizer = read_gguf(path, dtype=torch.float32)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
