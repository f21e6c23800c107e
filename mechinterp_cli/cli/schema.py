"""`mechinterp schema`."""

from typing import Annotated, Literal

import typer

from mechinterp_cli.cli.console import Console

What = Annotated[
    Literal["config", "manifest"],
    typer.Argument(metavar="WHAT", help="config (what you write) or manifest (what a run leaves)."),
]


def schema(what: What = "config") -> None:
    """Print the JSON Schema of config files, or of run manifests.

    It lists every key with its type, its default and what it means; editors complete config files with it.

    Example: mechinterp schema > mechinterp.schema.json
    """
    if what == "manifest":
        from mechinterp_cli.runs.manifest_schema import manifest_schema

        Console.choose().data(manifest_schema())
        return
    from mechinterp_cli.cli.registry import register_all

    register_all()
    from mechinterp_cli.config.jsonschema import experiment_schema

    Console.choose().data(experiment_schema())
