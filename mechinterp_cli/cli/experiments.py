"""`mechinterp patch`, `ablate`, `heads`, ...: the commands that run an experiment; all have the same options."""

from collections.abc import Callable

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.options import Config, Device, DryRun, Json, Out, Overrides, Quiet, Resume, execute

EXPERIMENTS = {
    "patch": """Patch activations from prompt to prompt.

    Each trial replaces one activation (or several) and measures what that changes.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp patch configs/patch-ioi.yaml --set task.n=8 --out runs
    """,
    "ablate": """Take parts away and measure what breaks.

    Heads, neurons, blocks, layers, directions or attention edges: one by one, by a ranking, in sets, or in pairs.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp ablate configs/ablate-induction-heads.yaml --out runs
    """,
    "heads": """Find induction heads and their kin.

    Scores every head, and ablates the strongest beside random ones: does the model's in-context learning need them?

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp heads configs/heads-toy.yaml --out runs
    """,
    "attribute": """Estimate every component's share, and say how far to trust it.

    Attribution patching, integrated gradients, AtP* and RelP, checked against exact patching; direct logit attribution,
    the logit lens, and the share of each token of the prompt.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp attribute configs/attribute-ioi.yaml --out runs
    """,
    "probe": """Fit probes to activations, beside honest baselines.

    Nested cross-validation over labelled texts or words, at every layer; beside it the majority class, the tokens
    alone, random weights, control labels.

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp probe configs/probe-toy.yaml --out runs
    """,
    "circuit": """Find the edges that carry a behaviour, and test them.

    Edges are scored on some prompts; circuits of every size are run on others by patching all other edges. Beside them
    random circuits, a reference, and tests: is the circuit enough, needed, no larger than it must be?

    Prints the run directory's path on stdout; pictures and messages go to stderr.

    Example: mechinterp circuit configs/circuit-planted.yaml --out runs
    """,
}
"""Subcommand to its help."""


def command(method: str) -> Callable[..., None]:
    """The function that Typer makes a subcommand of.

    Args:
        method: One of `EXPERIMENTS`.
    """

    def run(
        config: Config,
        set_: Overrides = None,
        out: Out = None,
        device: Device = None,
        resume: Resume = None,
        dry_run: DryRun = False,
        quiet: Quiet = False,
        as_json: Json = False,
    ) -> None:
        execute(method, config, set_, out, device, dry_run, Console.choose(quiet=quiet, as_json=as_json), resume)

    run.__doc__ = EXPERIMENTS[method]
    return run
