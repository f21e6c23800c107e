"""`mechinterp ablate`."""

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Config, Device, DryRun, Json, Out, Overrides, Quiet, Resume, execute


def ablate(
    config: Config,
    set_: Overrides = None,
    out: Out = None,
    device: Device = None,
    resume: Resume = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Take parts away and measure what breaks.

    Heads, neurons, blocks, layers, directions or attention edges: one by one, by a ranking, in sets, or in pairs.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp ablate configs/ablate-induction-heads.yaml --out runs
    """
    execute("ablate", config, set_, out, device, dry_run, Console.choose(quiet=quiet, as_json=as_json), resume)
