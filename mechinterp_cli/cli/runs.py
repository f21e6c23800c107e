"""`mechinterp runs` and `mechinterp verify`."""

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, Quiet
from mechinterp_cli.cli.resume import Run
from mechinterp_cli.text import counted, visible

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that holds runs.")]
Statuses = Annotated[
    list[str] | None,
    typer.Option(
        "--status",
        metavar="STATUS",
        help="Only these: running, complete, interrupted, failed, crashed, unreadable. Repeatable.",
    ),
]
Kinds = Annotated[
    list[str] | None, typer.Option("--kind", metavar="KIND", help="Only runs of this command: patch. Repeatable.")
]
Model = Annotated[str | None, typer.Option("--model", metavar="TEXT", help="Only models with this in their id.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Only runs begun then or later: 2026-11-24. UTC.")
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Only runs begun then or earlier: 2026-11-24T08:30. UTC.")
]

_RANKS = {"name": 0, "status": 0, "note": 1, "seconds": 2, "units": 3, "model": 4, "kind": 5, "started (UTC)": 6}
"""What a narrow window shows first; a name says when the run began and of which command it is."""


def runs(
    context: typer.Context,
    folder: Folder = Path("runs"),
    status: Statuses = None,
    kind: Kinds = None,
    model: Model = None,
    since: Since = None,
    until: Until = None,
    as_json: Json = False,
) -> None:
    """List the runs in a folder, newest last.

    `crashed`: the manifest says `running` and no process works on the run. `unreadable`: the manifest is broken.

    Example: mechinterp runs --status crashed --status interrupted --since 2026-11-24
    """
    from mechinterp_cli.runs.listing import Filters, check_choices, check_status, list_runs, read_period

    statuses, period = check_status(tuple(status or ())), read_period(since, until)
    rows = list_runs(folder)
    known = {*_experiments(context), *(row.kind for row in rows if row.kind is not None)}
    kinds = check_choices("--kind", tuple(kind or ()), tuple(sorted(known)))
    wanted = Filters(statuses, kinds, model, *period)
    console = Console.choose(as_json=as_json)
    chosen = [row for row in rows if wanted.admits(row)]
    if chosen or as_json:
        console.listing([row.record() if as_json else row.cells() for row in chosen], _RANKS)
    else:
        console.say(f"{folder}: none of {counted(len(rows), 'run')} is wanted" if rows else f"{folder}: no runs")


def _experiments(context: typer.Context) -> list[str]:
    """The commands that make runs: those that take a config."""
    commands = getattr(context.find_root().command, "commands", {})
    return [name for name, command in commands.items() if any(option.name == "config" for option in command.params)]


def verify(run: Run, quiet: Quiet = False, as_json: Json = False) -> None:
    """Check that nothing in a run was changed.

    Every file has its recorded size and hash, every table its columns, types and rows, and the config its hash.

    Exits with 3 where something differs, or where the run is not complete.

    Example: mechinterp verify runs/2026-11-24T002710Z-patch-ioi-b26999
    """
    from mechinterp_cli.cli.registry import register_all
    from mechinterp_cli.runs.verify import check_is_run, verify_run

    check_is_run(run)
    register_all()
    found, console = verify_run(run), Console.choose(quiet=quiet, as_json=as_json)
    for name in found.unlisted:
        console.say(f"note: {visible(name)} is not in the manifest")
    if as_json:
        console.data(found.record())
    found.require_good()
    console.say(f"verified: {counted(found.files, 'file')}, {counted(found.bytes, 'byte')}")
    if not as_json:
        console.result(run)
