"""Numbers that are finished, kept in the run's work units until its tables are there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import pyarrow as pa

from mechinterp_cli.errors import RunError
from mechinterp_cli.methods.bench import Bench


@dataclass(frozen=True, eq=False)
class Saving:
    """One unit of work.

    Args:
        bench: Whose run keeps it.
        name: Of the unit: lower-case letters, digits and `-`.
        facts: What must be the same for the numbers to be these.
    """

    bench: Bench
    name: str
    facts: Mapping[str, str]

    @property
    def _key(self) -> str:
        return self.bench.unit_key(self.name)

    def write(self, values: npt.NDArray[Any]) -> None:
        """Save numbers of any shape, bit for bit."""
        table = pa.table({"value": values.reshape(-1)}).replace_schema_metadata(dict(self.facts))
        self.bench.run.units.write(self._key, table)

    def read(self) -> npt.NDArray[Any] | None:
        """The numbers as one row; None where none are saved, or others, or where the file is damaged."""
        units = self.bench.run.units
        if not units.path(self._key).exists():
            return None
        try:
            table = units.read(self._key)
        except RunError:
            table = None
        known = {} if table is None else table.schema.metadata or {}
        if table is None or any(known.get(name.encode()) != value.encode() for name, value in self.facts.items()):
            self.bench.run.warn(f"units/{self._key}.parquet was damaged; it is computed again")
            return None
        values: npt.NDArray[Any] = table["value"].to_numpy()
        return values
