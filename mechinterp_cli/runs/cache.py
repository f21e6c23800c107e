"""Files that later runs may use again and no run needs: whole or not there, and never a reason to fail."""

import contextlib
from pathlib import Path

from mechinterp_cli.errors import RunError
from mechinterp_cli.models.zoo import models_folder
from mechinterp_cli.runs.atomic import write_bytes


def activations_folder() -> Path:
    """Where means and spreads of activations are kept: beside the fetched models."""
    return models_folder().parent / "activations"


def scripts_folder() -> Path:
    """Where scripts of the report page are kept: beside the fetched models."""
    return models_folder().parent / "scripts"


def read_kept(path: Path) -> bytes | None:
    """What stands in a file of the cache; None where it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def keep(path: Path, data: bytes) -> None:
    """Write a file of the cache, atomically; a cache that cannot be written is left as it is."""
    with contextlib.suppress(RunError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
