"""`mechinterp resume`."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_cli.cli.completion import complete_run
from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, Quiet, show_outcome

Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run directory.", show_default=False, autocompletion=complete_run),
]


def resume(run: Run, quiet: Quiet = False, as_json: Json = False) -> None:
    """Go on with a run that was stopped, killed or failed.

    What it saved is used; config, model, prompts and package versions must be what they were. The finished tables are
    those of a run that nothing stopped, byte for byte. A complete run is left as it is.

    Example: mechinterp resume runs/2026-01-31T120000Z-patch-ioi-0a1b2c
    """
    from mechinterp_cli.cli.registry import register_all
    from mechinterp_cli.runs.directory import find_run

    find_run(run)  # a path that is none is told before torch is imported
    register_all()
    from mechinterp_cli.methods.resume import resume_experiment

    console = Console.choose(quiet=quiet, as_json=as_json)
    with console.progress() as progress:
        outcome = resume_experiment(run, progress=progress)
    show_outcome(console, outcome)
