"""`mechinterp heads`."""

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Config, Device, DryRun, Json, Out, Overrides, Quiet, Resume, execute


def heads(
    config: Config,
    set_: Overrides = None,
    out: Out = None,
    device: Device = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find induction heads and their kin.

    Scores every head, and ablates the strongest beside random ones: does the model's in-context learning need them?

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp heads configs/heads-toy.yaml --out runs
    """
    execute("heads", config, set_, out, device, dry_run, Console.choose(quiet=quiet, as_json=as_json), resume)
