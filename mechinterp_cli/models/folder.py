"""Reading a model folder as transformers' `save_pretrained` writes it (a hub snapshot is one too)."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.checksum import sha256_of
from mechinterp_cli.models.files import weight_files
from mechinterp_cli.models.quiet import quiet
from mechinterp_cli.models.read import ReadModel, pretrained_options, read_causal_lm

_READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


def read_folder(folder: Path, options: ModelOptions, *, path: str, revision: str | None = None) -> ReadModel:
    """Read model and tokenizer from a folder.

    Args:
        folder: The folder.
        options: The model section.
        path: How the id was resolved, for the manifest.
        revision: The commit that the folder is, for the manifest.

    Raises:
        UserError: Something is missing, damaged or refused.
    """
    files = weight_files(folder, allow_pickle=options.allow_pickle)
    config = _config(folder)
    _refuse_remote_code(folder, config, options)
    return ReadModel(
        model=_model(folder, options, safe=files[0].suffix == ".safetensors"),
        tokenizer=_tokenizer(folder, options),
        path=path,
        weight_files={file.name: sha256_of(file) for file in files},
        revision=revision,
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
    )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"model.id: {path} is not valid JSON: {error}", "Copy or download the folder again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"model.id: {path} does not say its model_type", "Give a folder of a transformers model.")
    return config


def _refuse_remote_code(folder: Path, config: dict[str, Any], options: ModelOptions) -> None:
    """Without this transformers would ask at the terminal."""
    own_code = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    if own_code and not options.trust_remote_code and config["model_type"] not in CONFIG_MAPPING:
        raise UserError(
            f"model.id: {options.id} brings its own Python code ({own_code}), which is not run unless asked for",
            f"Read the code in {folder}, then set model.trust_remote_code: true.",
        )


def _model(folder: Path, options: ModelOptions, *, safe: bool) -> PreTrainedModel:
    try:
        with quiet():
            model, missing = read_causal_lm(
                folder,
                use_safetensors=safe,
                weights_only=True,
                trust_remote_code=options.trust_remote_code,
                **pretrained_options(options),
            )
    except UnpicklingError as error:
        raise UserError(
            f"model.id: a pickle file in {folder} is damaged or holds more than tensors, and was not read",
            "Use the model's safetensors.",
        ) from error
    except _READ_ERRORS as error:
        raise UserError(
            f"model.id: transformers cannot read the model in {folder}: {_one_line(error)}",
            "Give a causal language model that this version of transformers knows, as save_pretrained writes it.",
        ) from error
    if missing:
        raise UserError(
            f"model.id: the weights in {folder} lack {len(missing)} of the model's parameters, first {missing[0]}; "
            "they would be random",
            "Give a folder whose weights belong to its config.json.",
        )
    return model


def _tokenizer(folder: Path, options: ModelOptions) -> PreTrainedTokenizerBase:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model.id: {folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)})",
            "Put the model's tokenizer.json and tokenizer_config.json there.",
        )
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=options.trust_remote_code
            )
    except _READ_ERRORS as error:
        raise UserError(
            f"model.id: the tokenizer in {folder} cannot be read: {_one_line(error)}",
            "Copy or download the tokenizer's files again.",
        ) from error
    return tokenizer


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
