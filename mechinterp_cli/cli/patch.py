"""`mechinterp patch`."""

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Config, Device, DryRun, Json, Out, Overrides, Quiet, Resume, execute


def patch(
    config: Config,
    set_: Overrides = None,
    out: Out = None,
    device: Device = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Patch activations from prompt to prompt.

    Each trial replaces one activation (or several) and measures what that changes.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp patch configs/patch-ioi.yaml --set task.n=8 --out runs
    """
    execute("patch", config, set_, out, device, dry_run, Console.choose(quiet=quiet, as_json=as_json), resume)
