"""Run directories: made exclusively, never shared."""

import contextlib
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mechinterp_cli.errors import RunError, UserError

_ATTEMPTS = 16


@dataclass(frozen=True)
class RunDirectory:
    """One run's own folder."""

    path: Path

    @classmethod
    def create(cls, root: Path, subcommand: str, name: str, now: datetime | None = None) -> "RunDirectory":
        """Make `<root>/<UTC time>-<subcommand>-<name>-<6 random hex>/`, exclusively.

        Args:
            root: Folder that holds runs; made where missing.
            subcommand: `patch`.
            name: The run's name, a safe slug (see `config.types.check_slug`).
            now: The time; the clock's where not given.

        Raises:
            RunError: The folder cannot be made.
        """
        stamp = (now or datetime.now(UTC)).astimezone(UTC).strftime("%Y-%m-%dT%H%M%SZ")
        try:
            root.mkdir(parents=True, exist_ok=True)
            for _ in range(_ATTEMPTS):
                path = root / f"{stamp}-{subcommand}-{name}-{secrets.token_hex(3)}"
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    return cls(path)
        except OSError as error:
            raise RunError(f"{root}: no run directory can be made: {error.strerror or error}", _OTHER_FOLDER) from error
        raise RunError(f"{root}: {_ATTEMPTS} random names were all taken", "Run again.")

    @property
    def figures(self) -> Path:
        """Folder of the pictures, made when first asked for."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder


def find_run(path: Path) -> Path:
    """Make sure that a path is a run directory.

    Raises:
        UserError: It is not.
    """
    if not (path / "manifest.json").is_file():
        problem = "no such folder" if not path.exists() else "this is no run directory: it has no manifest.json"
        raise UserError(f"{path}: {problem}", "Give the path that a run printed; `mechinterp runs` lists them.")
    return path


_OTHER_FOLDER = "Choose another folder with --out, or `output.dir` in the config."


def check_writable(root: Path) -> None:
    """Find out before the model loads whether runs can be written there.

    Makes the folder where it is missing and writes a probe file into it.

    Args:
        root: Folder that holds runs.

    Raises:
        UserError: It is a file, or the system refuses to write there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe.{os.getpid()}.{secrets.token_hex(6)}.tmp"
        with probe.open("xb") as file:
            file.write(b"probe")
        probe.unlink()
    except FileExistsError as error:
        raise UserError(f"{root}: the output folder is a file", _OTHER_FOLDER) from error
    except OSError as error:
        raise UserError(
            f"{root}: the output folder is not writable: {error.strerror or error}", _OTHER_FOLDER
        ) from error
