"""Options that every experiment's command has, and what all of them do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mechinterp_cli.cli.completion import complete_config, complete_run
from mechinterp_cli.cli.console import Console

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="The experiment: a YAML file.", show_default=False, autocompletion=complete_config
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: --set task.n=8. Repeatable.")
]
Out = Annotated[
    Path | None, typer.Option("--out", metavar="FOLDER", help="Make the run directory there, not in output.dir.")
]
Device = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps or auto; as model.device.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan as JSON (trials, rows, FLOPs, bytes) and stop.")
]
Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        metavar="RUN",
        help="Go on with this run; the config must be the one it began with.",
        autocompletion=complete_run,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def execute(
    method: str,
    config: Path,
    overrides: Sequence[str] | None,
    out: Path | None,
    device: str | None,
    dry_run: bool,
    console: Console,
    resume: Path | None = None,
) -> None:
    """Run one experiment, or show its plan.

    Args:
        method: The subcommand.
        config: The YAML file.
        overrides: `--set` texts.
        out: `--out`.
        device: `--device`.
        dry_run: Whether only the plan is shown.
        console: Where to tell about it.
        resume: `--resume`.

    Raises:
        MechinterpError: Anything that the boundary turns into a message and an exit code.
    """
    from mechinterp_cli.cli.registry import register_all

    register_all()
    from mechinterp_cli.config.loader import load_config
    from mechinterp_cli.errors import UserError
    from mechinterp_cli.runs.directory import check_writable

    chosen = [f"model.device={device}"] if device is not None else []
    loaded = load_config(config, [*(overrides or ()), *chosen], method=method)
    if resume is not None and (out is not None or dry_run):
        raise UserError("--resume goes on in the run's own directory", "Leave out --out and --dry-run.")
    if not dry_run and resume is None:
        check_writable(out if out is not None else Path(loaded.config.output.dir))
    from mechinterp_cli.methods import run

    with loaded.located():
        if dry_run:
            console.data(run.dry_run(loaded))
            return
        with console.progress() as progress:
            if resume is None:
                outcome = run.run_experiment(loaded, out=out, progress=progress)
            else:
                from mechinterp_cli.methods.resume import resume_experiment

                outcome = resume_experiment(resume, progress=progress, given=loaded)
    show_outcome(console, outcome)


def show_outcome(console: Console, outcome: Any) -> None:
    """Show a finished run: the picture and the strongest trials to a person, the path to a program."""
    if outcome.draw is not None:
        console.draw(outcome.draw)
    else:
        console.table(outcome.headline_rows)
    for note in outcome.notes:
        console.say(note)
    page = outcome.path / "report.html"
    if page.is_file():
        console.say(f"the page to open: {page}")
    console.result(outcome.path, {"headline": list(outcome.headline_rows), "notes": list(outcome.notes)})
