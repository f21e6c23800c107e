"""A run along training: which checkpoints its tables hold, in which order, and the rows of the last."""

import math
from dataclasses import dataclass

import pandas as pd

from mechinterp_cli.report.cells import number


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run, early ones first."""

    names: tuple[str, ...] = ()
    """As in the tables; empty for a run on one model."""
    tokens: tuple[float, ...] | None = None
    """Tokens seen at each; None where they are not known of all."""

    def last(self, rows: pd.DataFrame) -> pd.DataFrame:
        """A table's rows of the last checkpoint, and those of no checkpoint, which hold for all."""
        if not self.names or "checkpoint" not in rows:
            return rows
        return rows[(rows["checkpoint"] == self.names[-1]).fillna(True).astype(bool)]

    @property
    def several(self) -> bool:
        """Whether there is anything to be drawn against training."""
        return len(self.names) > 1

    @property
    def about(self) -> str:
        """What a caption says of a map: which checkpoint it is of."""
        return f"checkpoint {self.names[-1]}, the last of {len(self.names)}" if self.several else ""


def checkpoints_of(rows: pd.DataFrame) -> Checkpoints:
    """Find the checkpoints of a table.

    They are ordered by the tokens seen where these are known of all and differ, else as they stand in the table.

    Args:
        rows: Any table; with columns `checkpoint` and `tokens_seen` where there are checkpoints.
    """
    if "checkpoint" not in rows:
        return Checkpoints()
    named = rows[rows["checkpoint"].notna()].drop_duplicates("checkpoint")
    names = [str(name) for name in named["checkpoint"]]
    seen = [number(count) for count in named["tokens_seen"]] if "tokens_seen" in named else [math.nan]
    if not names or any(map(math.isnan, seen)) or len(set(seen)) < len(seen):
        return Checkpoints(tuple(names))
    ordered = sorted(zip(seen, names, strict=True))
    return Checkpoints(tuple(name for _, name in ordered), tuple(count for count, _ in ordered))
