"""What a run ran on: packages, git, machine. Never environment variables, never credentials."""

import functools
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = (
    "accelerate", "altair", "gguf", "jaxtyping", "numpy", "pandas", "pyarrow", "pydantic", "safetensors",
    "scikit-learn", "scipy", "tokenizers", "torch", "transformers", "typer", "vl-convert-python",
)  # fmt: skip
_GIT_SECONDS = 10


def package_versions() -> dict[str, str]:
    """Give the versions of Python and of every package that bears on the numbers, without importing them."""
    found = {package: version for package in _PACKAGES if (version := _version(package)) is not None}
    return {"python": platform.python_version(), **found}


@functools.cache  # a tenth of a small run otherwise, as often as a process makes one
def _version(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Give commit and dirtiness of the work tree that a folder is in.

    Returns:
        `{"commit": ..., "dirty": ...}`, or None outside a work tree or without git.
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks: looking at a work tree must not disturb a git command that runs beside us.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def hardware() -> dict[str, Any]:
    """Give the machine: system, processor, cores this process may use, memory in bytes."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def peak_memory_bytes() -> int | None:
    """Give the largest resident memory this process has had, or None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
