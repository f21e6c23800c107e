"""`mechinterp report`."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_cli.cli.completion import complete_run
from mechinterp_cli.cli.console import Console

Runs = Annotated[
    list[Path],
    typer.Argument(metavar="RUN...", help="Run directories.", show_default=False, autocompletion=complete_run),
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the page there; RUN/report.html for one run."),
]


def report(runs: Runs, output: Output = None) -> None:
    """Make the report page again, of one run or several.

    One HTML file that asks for nothing: figures to be pointed at, the strongest results, every prompt, the proof, how
    to repeat it. Of several runs, each is compared with the first.

    Prints the file's path on stdout.

    Example: mechinterp report runs/A runs/B -o comparison.html
    """
    from mechinterp_cli.cli.registry import register_all
    from mechinterp_cli.report.page.save import save_page

    register_all()  # a method says which of its tables is compared
    Console.choose().result(save_page(runs, output))
