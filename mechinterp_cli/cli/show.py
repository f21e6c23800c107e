"""`mechinterp show`."""

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, show_outcome
from mechinterp_cli.cli.resume import Run


def show(run: Run, as_json: Json = False) -> None:
    """Show a run's maps and strongest trials again.

    Example: mechinterp show runs/2026-01-31T120000Z-patch-ioi-0a1b2c
    """
    from mechinterp_cli.report.view import read_outcome

    show_outcome(Console.choose(as_json=as_json), read_outcome(run))
