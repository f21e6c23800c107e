"""Checksums of what a model is made of, hexadecimal sha256."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_tensors(state: "Mapping[str, Tensor]") -> str:
    """Checksum of named float32 tensors: names, shapes and values, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def sha256_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Checksum of all that decides how a text is tokenised, the chat template included."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    text = f"{rules}\n{sorted(tokenizer.special_tokens_map.items())!r}\n{tokenizer.chat_template!r}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
