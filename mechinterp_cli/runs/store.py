"""Finished work units on disk, so that a killed run loses the unit it was in and no more."""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mechinterp_cli.errors import RunError
from mechinterp_cli.runs.atomic import FileInfo
from mechinterp_cli.runs.tables import read_parquet, write_parquet

_UNIT = re.compile(r"([0-9]{4,})\.parquet")


@dataclass(frozen=True)
class UnitStore:
    """The folder `units/` of a run directory."""

    folder: Path

    def path(self, unit: int) -> Path:
        """Give the file of a unit."""
        return self.folder / f"{unit:04d}.parquet"

    def write(self, unit: int, table: pa.Table) -> FileInfo:
        """Save a finished unit, atomically.

        Args:
            unit: Its place in the plan, from 0.
            table: Its values.

        Raises:
            RunError: It cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot be made: {error.strerror or error}", "Check the folder.") from error
        return write_parquet(table, self.path(unit))

    def finished(self) -> list[int]:
        """List the units that are saved, in order; temporaries of a killed run are not among them."""
        if not self.folder.is_dir():
            return []
        matches = (_UNIT.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def read(self, unit: int) -> pa.Table:
        """Read a unit back, checked.

        Raises:
            RunError: It is missing or damaged.
        """
        return read_parquet(self.path(unit))

    def read_all(self) -> Iterator[pa.Table]:
        """Read every saved unit, in order."""
        return (self.read(unit) for unit in self.finished())

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
