"""`mechinterp`: the commands, and the one place where errors become messages and exit codes."""

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer
from typer.exceptions import Abort, TyperException

from mechinterp_cli import __version__
from mechinterp_cli.cli import compare, experiments, init, models, report, reproduce, resume, runs, schema, show
from mechinterp_cli.cli.completion import leave_values_unread
from mechinterp_cli.cli.console import Console
from mechinterp_cli.errors import ExitCode, MechinterpError
from mechinterp_cli.runs.signals import Terminated


@dataclass
class State:
    """Options that stand before the command."""

    debug: bool = False


FIRST_STEPS = """\b
First time here?
  mechinterp init patch            # writes a commented config, patch.yaml
  mechinterp patch patch.yaml      # runs it, in seconds, and shows the result
  mechinterp --install-completion  # then Tab completes commands, configs, runs"""
"""Below the commands, as it stands: `\\b` keeps the line breaks."""
HINTS = {
    "config": ", or for a config to start from: mechinterp init {command}",
    "name": ", and for the names there are: mechinterp models",
    "kind": ", for example: mechinterp init patch",
    "run": ", and for the runs there are: mechinterp runs",
    "runs": ", and for the runs there are: mechinterp runs",
}
"""What else helps where an argument is missing, by its name."""
app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, epilog=FIRST_STEPS,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command("init")(init.init)
for method in experiments.EXPERIMENTS:
    app.command(method)(experiments.command(method))
app.command("resume")(resume.resume)
app.command("reproduce")(reproduce.reproduce)
app.command("show")(show.show)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("runs")(runs.runs)
app.command("verify")(runs.verify)
app.add_typer(models.app, name="models")
app.command("schema")(schema.schema)


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mechinterp {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    """Causal experiments on language models, from one YAML file to a run directory."""
    context.obj.debug = debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; that of the process where not given.

    Returns:
        The exit code (see `errors.ExitCode`).
    """
    state, console = State(), Console.choose()
    if "_MECHINTERP_COMPLETE" in os.environ:
        leave_values_unread()
    try:
        code = app(args=arguments, prog_name="mechinterp", standalone_mode=False, obj=state)
    except MechinterpError as error:
        console.error("\n".join([error.cause, *getattr(error, "__notes__", [])]), error.remedy)
        return error.exit_code
    except TyperException as error:
        return _usage_error(console, error)
    except Terminated as error:
        console.error(str(error), "The run directory's manifest says `interrupted`; `mechinterp resume RUN` goes on.")
        return ExitCode.TERMINATED
    except Abort:
        return ExitCode.INTERRUPTED
    except Exception as error:  # the one boundary: nothing is swallowed, the exit code is 1
        return _unexpected(console, error, debug=state.debug)
    if code == ExitCode.INTERRUPTED:
        remedy = "A run that had begun says `interrupted` in its manifest; `mechinterp resume RUN` goes on."
        console.error("stopped by Ctrl-C", remedy)
    return int(code or ExitCode.DONE)


def _usage_error(console: Console, error: TyperException) -> int:
    """Tell what is wrong with the command line."""
    if type(error).__name__ == "NoArgsIsHelpError":
        console.say(error.format_message())
    else:
        console.error(error.format_message(), _usage_remedy(error))
    return ExitCode.USAGE


def _usage_remedy(error: TyperException) -> str:
    """Which help to read, and what else puts a missing argument right."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "mechinterp"
    argument = getattr(error, "param", None) if type(error).__name__ == "MissingParameter" else None
    hint = HINTS.get(argument.name, "") if argument is not None else ""
    return f"{command} --help{hint.format(command=command.split()[-1])}"


def _unexpected(console: Console, error: Exception, *, debug: bool) -> int:
    """Tell a fault of our own in one line; the traceback is in the run's log, or here with `--debug`."""
    if debug:
        sys.stderr.write("".join(traceback.format_exception(error)))
    text = str(error).splitlines()
    console.error(
        f"unexpected {type(error).__name__}: {text[0] if text else ''}",
        "" if debug else "`mechinterp --debug ...` shows where; a run that had begun has it in its log.jsonl.",
    )
    return ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
