"""What a run tells while it goes on, and what it gives when it is done."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Progress(Protocol):
    """Where a run tells how far it is; the command line shows it, a test may collect it."""

    def stage(self, text: str) -> None:
        """A step begins: `loading smollm2-135m-instruct`, `proving the engine`, `sweeping`."""

    def advance(self, done: int, total: int) -> None:
        """So many of all work units are done."""

    def message(self, text: str) -> None:
        """Something a person should know now, such as a warning."""


class SilentProgress:
    """Tells nobody."""

    def stage(self, text: str) -> None:
        """Do nothing."""

    def advance(self, done: int, total: int) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class RunOutcome:
    """A finished run."""

    path: Path
    """The run directory."""
    headline_rows: Sequence[Mapping[str, Any]] = ()
    """The strongest trials, strongest first: column name to value, all rows with the same columns."""
    draw: Callable[[int, bool], Iterable[Any]] | None = None
    """Given the terminal's width and whether it is plain (ASCII, no colour): what rich prints for a person."""
    notes: Sequence[str] = ()
    """Sentences that belong to the result: warnings, what was dropped, how certain it is."""
