"""What a model folder holds: which files are weights, whether they are whole, and their checksums."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mechinterp_cli.errors import UserError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


def weight_files(folder: Path, *, allow_pickle: bool) -> tuple[Path, ...]:
    """Find the weights of a model folder and check that every file is there and whole.

    Args:
        folder: A folder as `save_pretrained` writes it.
        allow_pickle: Accept pickle files where there is no safetensors file.

    Raises:
        UserError: No config, no weights, a missing shard, a damaged safetensors file, or pickle only.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"model.id: {folder} has no config.json", _without_config(folder))
    found = _safetensors(folder)
    if found:
        for path in found:
            _check_whole(path)
        return found
    pickles = tuple(p for p in sorted(folder.iterdir()) if p.name.startswith("pytorch_model") and p.suffix == ".bin")
    if pickles and allow_pickle:
        return pickles
    refused = pickles or tuple(p for p in sorted(folder.iterdir()) if p.suffix in PICKLE_SUFFIXES)
    if refused:
        raise UserError(
            f"model.id: {folder} has its weights only as pickle ({refused[0].name}), which can hold code",
            f"Convert them to {_SINGLE}, or set model.allow_pickle: true (for pytorch_model*.bin).",
        )
    raise UserError(f"model.id: {folder} has a config.json but no weights", f"Put {_SINGLE} (or its shards) there.")


def _without_config(folder: Path) -> str:
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        return f"To load the GGUF file in it: model.id: {ggufs[0]}"
    return "Give a folder as transformers' save_pretrained writes it."


def _safetensors(folder: Path) -> tuple[Path, ...]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return (folder / _SINGLE,) if (folder / _SINGLE).is_file() else ()
    names = _shard_names(index)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"model.id: {folder} lacks {name}, one of {len(names)} files that {_INDEX} names",
                "Copy or download the folder again.",
            )
    return tuple(folder / name for name in names)


def _shard_names(index: Path) -> tuple[str, ...]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(sorted({str(name) for name in names}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"model.id: {index} cannot be read: {error!r}", "Copy or download the folder again.") from error


def _check_whole(path: Path) -> None:
    """The header says how long the file must be; reading it finds a file that was cut short."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"model.id: {path} is damaged or cut short ({path.stat().st_size} bytes): {error}",
            "Copy or download the file again.",
        ) from error
