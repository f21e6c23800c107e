"""`mechinterp schema`."""

from mechinterp_cli.cli.console import Console


def schema() -> None:
    """Print the JSON Schema of config files.

    It lists every key with its type, its default and what it means; editors complete config files with it.

    Example: mechinterp schema > mechinterp.schema.json
    """
    from mechinterp_cli.cli.registry import register_all

    register_all()
    from mechinterp_cli.config.jsonschema import experiment_schema

    Console.choose().data(experiment_schema())
