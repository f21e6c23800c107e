"""`mechinterp init`."""

import inspect
import os
import shlex
from pathlib import Path
from typing import Annotated

import typer

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.experiments import EXPERIMENTS
from mechinterp_cli.cli.options import Quiet
from mechinterp_cli.text import visible

SCHEMA_FILE = "mechinterp.schema.json"
_HEAD = """# yaml-language-server: $schema={schema}
# Editors complete and check this file once that one is beside it: mechinterp schema > {schema}
#
# {about}
# Run it: mechinterp {kind} {file}
# What is commented out with `#` alone stands at its default: take the # away to change it.

"""


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in EXPERIMENTS if kind.startswith(incomplete)]


Kind = Annotated[
    str,
    typer.Argument(metavar="KIND", help=f"One of {', '.join(EXPERIMENTS)}.", show_default=False, autocompletion=_kinds),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there; KIND.yaml here if not given.")
]


def init(kind: Kind, output: Output = None, quiet: Quiet = False) -> None:
    """Write a config to start from, with a comment on every key.

    It runs as it is, in less than a minute, on a model that comes with the package. A file that is there already stays.

    Prints the file's path on stdout; what to do next goes to stderr.

    Example: mechinterp init patch -o my-patch.yaml
    """
    from mechinterp_cli.cli.registry import register_all

    _check_kind(kind)
    path = output if output is not None else Path(f"{kind}.yaml")
    _check_free(path)
    register_all()
    from mechinterp_cli.runs.atomic import write_bytes

    write_bytes(path, starter(kind, path).encode())
    console = Console.choose(quiet=quiet)
    console.say(next_steps(kind, path))
    console.result(path)


def starter(kind: str, path: Path) -> str:
    """The commented config of a subcommand; tasks and methods are registered.

    Args:
        kind: One of `EXPERIMENTS`.
        path: What the file will be called, as the user named it.
    """
    from mechinterp_cli.cli.starters import STARTERS
    from mechinterp_cli.config.base import MethodOptions
    from mechinterp_cli.config.commented import commented
    from mechinterp_cli.config.jsonschema import experiment_schema
    from mechinterp_cli.metric_names import ANSWER_METRICS

    about = inspect.cleandoc(EXPERIMENTS[kind]).splitlines()[0]
    head = _HEAD.format(schema=SCHEMA_FILE, about=about, kind=kind, file=_quoted(path))
    fixed = ("metrics",) if MethodOptions.registry[kind].own_metrics else ()
    notes = {"metrics": f"There are {', '.join(ANSWER_METRICS)}."}
    return head + commented(experiment_schema(), STARTERS[kind], left_out=fixed, notes=notes)


def next_steps(kind: str, path: Path) -> str:
    """What to do with a config that was just written, as lines with commands to copy."""
    run = f"mechinterp {kind} {_quoted(path)}"
    schema = f"mechinterp schema > {shlex.quote(str(path.with_name(SCHEMA_FILE)))}"
    steps = {
        f"{run} --dry-run": "what it would compute",
        run: "run it: less than a minute",
        schema: "editors then complete it",
    }
    widest = max(map(len, steps))
    return "\n".join(["next:", *(f"  {command.ljust(widest)}  # {what}" for command, what in steps.items())])


def _quoted(path: Path) -> str:
    return visible(shlex.quote(str(path)))


def _check_kind(kind: str) -> None:
    if kind not in EXPERIMENTS:
        from mechinterp_cli.config.problems import nearest
        from mechinterp_cli.errors import UserError

        known = ", ".join(EXPERIMENTS)
        remedy = nearest(kind, tuple(EXPERIMENTS)) or "For example: mechinterp init patch"
        raise UserError(f"KIND: {kind!r} is no kind of experiment; there are {known}", remedy)


def _check_free(path: Path) -> None:
    """Refuse a path at which a file stands, or for which there is no folder."""
    from mechinterp_cli.errors import UserError

    if os.path.lexists(path):
        raise UserError(f"{path}: there is such a file already", "Name another one with -o FILE, or remove it.")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}", f"mkdir -p {_quoted(path.parent)}")
