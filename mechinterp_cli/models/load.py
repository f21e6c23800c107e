"""Loading a model: from the config's `model:` section to a `LoadedModel` that is fit to be measured.

The id is tried as a name of the zoo, a local folder, a GGUF file and a Hugging Face id, in this order.
Whatever the way, the model ends in evaluation mode, without gradients, every weight read from a file
(none made up) and finite.
"""

import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import RunError, UserError
from mechinterp_cli.models import hub
from mechinterp_cli.models.checksum import sha256_of, sha256_of_tokenizer
from mechinterp_cli.models.folder import read_folder
from mechinterp_cli.models.gguf import read_gguf
from mechinterp_cli.models.loaded import LoadedModel, ModelSource
from mechinterp_cli.models.read import ReadModel, pretrained_options, refuse_revision
from mechinterp_cli.models.symbol_models import read_planted, read_toy
from mechinterp_cli.models.zoo import find_entry, models_folder, status


def load_model(options: ModelOptions) -> LoadedModel:
    """Load a model, check it, and find its anatomy.

    Args:
        options: The `model:` section.

    Raises:
        UserError: The id cannot be resolved, its files are missing, damaged or refused, a weight is not
            finite, the device is not there, or the model is no decoder.
        RunError: The model does not fit the device's memory.
    """
    from mechinterp_cli.models.anatomy import find_anatomy

    device = find_device(options.device)
    read = _read(options)
    model = read.model.train(False).requires_grad_(False)
    check_finite(model, options)
    _move(model, device)
    return LoadedModel(
        model=model,
        tokenizer=read.tokenizer,
        anatomy=find_anatomy(model, options.anatomy),
        source=_source(read, options, device),
    )


def find_device(name: str) -> torch.device:
    """The device that `model.device` means.

    Args:
        name: `cpu`, `cuda`, `cuda:N`, `mps`, or `auto` for the first CUDA device, else the CPU.

    Raises:
        UserError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"model.device: {name} is not there (PyTorch {torch.__version__} sees {count} CUDA devices)",
            "Set model.device: auto or cpu, or install a PyTorch build with CUDA.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device: mps is not there", "Set model.device: auto or cpu.")
    return device


def check_finite(model: PreTrainedModel, options: ModelOptions) -> None:
    """Look through every weight for NaN and infinity.

    Raises:
        UserError: Names the first such parameter, its layer and how many of its values are not finite.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not _finite(weight):
            bad = int((~weight.isfinite()).sum())
            layer = re.search(r"\.(\d+)\.", name)
            raise UserError(
                f"model.id: {options.id}: {name}{f' (layer {layer[1]})' if layer else ''} holds {bad} NaN or infinite "
                f"values of {weight.numel()}, read as {options.dtype}",
                "The file is damaged, or its values overflow: download it again, or set model.dtype: float32."
                if options.dtype == "float16"
                else "The file is damaged: download it again.",
            )


def _finite(weight: torch.Tensor) -> bool:
    # One pass and no temporaries, a third of the time of isfinite; smallest and largest value carry NaN on.
    return weight.numel() == 0 or bool(torch.stack(torch.aminmax(weight)).isfinite().all())


def _read(options: ModelOptions) -> ReadModel:
    """Resolve the id and read the model's files."""
    if find_entry(options.id) is not None:
        return _read_zoo(options)
    path = Path(options.id).expanduser()
    if path.is_dir():
        refuse_revision(options, f"{options.id} is a local folder")
        return read_folder(path, options, path="folder")
    if path.suffix.lower() == ".gguf" and path.is_file():
        return _read_gguf_file(path, options)
    # A Hugging Face id has one slash at most and begins with none: this can only have been meant as a path.
    if path.suffix.lower() == ".gguf" or options.id.startswith(("/", ".", "~")) or options.id.count("/") > 1:
        raise UserError(f"model.id: there is no folder and no .gguf file {options.id}", "Correct the path.")
    snapshot = hub.download(options, tried="a name from `mechinterp models`, a local folder or a .gguf file")
    return read_folder(snapshot, options, path="hub", revision=snapshot.name)


def _read_zoo(options: ModelOptions) -> ReadModel:
    bundled = {"toy-induction": read_toy, "planted-induction": read_planted}.get(options.id)
    if bundled is not None:
        return bundled(options)
    refuse_revision(options, f"{options.id} is one set of weights")
    entry = find_entry(options.id)
    folder = status(entry).folder if entry is not None else None
    if folder is None:
        raise UserError(
            f"model.id: {options.id} is not at hand (looked in {models_folder()})",
            f"Run: mechinterp models fetch {options.id}",
        )
    return replace(read_folder(folder, options, path="zoo"), quantization="gguf, dequantised")


def _read_gguf_file(path: Path, options: ModelOptions) -> ReadModel:
    refuse_revision(options, f"{options.id} is a file")
    model, tokenizer = read_gguf(path, **pretrained_options(options))
    return ReadModel(model, tokenizer, "gguf", {path.name: sha256_of(path)}, quantization="gguf, dequantised")


def _move(model: torch.nn.Module, device: torch.device) -> None:
    try:
        model.to(device)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"model.device: the model does not fit the memory of {device}: {error}",
            "Set model.dtype: bfloat16, or a device with more free memory.",
        ) from error


def _source(read: ReadModel, options: ModelOptions, device: torch.device) -> ModelSource:
    return ModelSource(
        id=options.id,
        path=read.path,
        revision=read.revision,
        weight_files=read.weight_files,
        tokenizer_sha256=sha256_of_tokenizer(read.tokenizer),
        dtype=options.dtype,
        device=str(device),
        attn_implementation=str(getattr(read.model.config, "_attn_implementation", None) or ""),
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        quantization=read.quantization,
    )
