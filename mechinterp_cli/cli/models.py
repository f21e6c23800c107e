"""`mechinterp models`: the models that need no model hub."""

from typing import Annotated, Any

import typer

from mechinterp_cli.cli.completion import complete_model
from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Json, Quiet

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="As `mechinterp models` lists it.", show_default=False, autocompletion=complete_model
    ),
]
app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)

_RANKS = {"name": 0, "at_hand": 0, "MB": 1, "about": 2, "licence": 3, "source": 4}
"""What a narrow window shows first."""


@app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List and fetch models that need no hub.

    Any Hugging Face id, local folder or GGUF file can be used in a config too.

    Example: mechinterp models
    """
    if context.invoked_subcommand is None:
        from mechinterp_cli.models.zoo import list_models

        Console.choose(as_json=as_json).listing([_row(status) for status in list_models()], _RANKS)


@app.command()
def fetch(
    name: Name,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fetch a model once; print the folder it is kept in.

    Example: mechinterp models fetch smollm2-135m-instruct
    """
    from mechinterp_cli.models.zoo import fetch as fetch_model

    console = Console.choose(quiet=quiet, as_json=as_json)
    with console.progress() as progress:
        status = fetch_model(name, progress.part)
    console.listing([_row(status)]) if as_json or status.folder is None else console.result(status.folder)


def _row(status: Any) -> dict[str, Any]:
    entry = status.entry
    return {
        "name": entry.name,
        "MB": round(entry.size / 1e6, 1),
        "at_hand": status.at_hand,
        "licence": entry.licence,
        "source": entry.source,
        "about": entry.about,
    }
