"""The errors a user can meet, and the exit code that each one ends with.

Every message is two sentences at most: what is wrong and where, then how to put it right.
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """What `mechinterp` tells the shell (design: command line)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DIFFERS = 3
    UNPROVED = 4
    INTERRUPTED = 130
    TERMINATED = 143


class MechinterpError(Exception):
    """An error with a one-line cause and a one-line remedy.

    Args:
        cause: What is wrong, where, and what is allowed.
        remedy: What to do about it; empty only where the cause says it already.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        """The cause, and below it the remedy."""
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class UserError(MechinterpError):
    """The config, the command line, a file or a model is not what it must be: exit 2."""

    exit_code = ExitCode.USAGE


class DifferenceError(MechinterpError):
    """A repeated or checked result is not the recorded one: exit 3."""

    exit_code = ExitCode.DIFFERS


class ProofError(MechinterpError):
    """No executor could prove itself on this model: exit 4."""

    exit_code = ExitCode.UNPROVED


class RunError(MechinterpError):
    """The run itself failed (NaN in the model, disk full, out of memory): exit 1."""
