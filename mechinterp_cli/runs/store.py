"""Finished work units on disk, so that a killed run loses the unit it was in and no more."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs.atomic import FileInfo
from mechinterp_cli.runs.tables import read_parquet, write_parquet

_UNIT = re.compile(r"([0-9a-z-]+)\.parquet")


@dataclass(frozen=True)
class UnitStore:
    """The folder `units/` of a run directory."""

    folder: Path

    def path(self, unit: str) -> Path:
        """Give the file of a unit."""
        return self.folder / f"{unit}.parquet"

    def write(self, unit: str, table: pa.Table) -> FileInfo:
        """Save a finished unit, atomically.

        Args:
            unit: Its key: lower-case letters, digits and `-`.
            table: Its values.

        Raises:
            RunError: It cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be made: {error.strerror or error}", "Check the folder.") from error
        return write_parquet(table, self.path(unit))

    def finished(self) -> list[str]:
        """List the units that are saved, in order; temporaries of a killed run are not among them."""
        if not self.folder.is_dir():
            return []
        matches = (_UNIT.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(match[1] for match in matches if match)

    def read(self, unit: str) -> pa.Table:
        """Read a unit back, checked.

        Raises:
            RunError: It is missing or damaged.
        """
        return read_parquet(self.path(unit))

    def remove(self) -> None:
        """Delete all units and what a killed run may have left beside them.

        Called when the run's tables are on disk; what cannot be deleted stays and does no harm.
        """
        if not self.folder.is_dir():
            return
        with contextlib.suppress(OSError):
            for path in list(self.folder.iterdir()):
                path.unlink()
            self.folder.rmdir()
