"""Which share of a run's time goes into saving finished units and the manifest.

`python -m benchmarks.saving [CONFIG] [--set KEY=VALUE ...]` runs a config (configs/patch-ioi.yaml) in a temporary
folder and clocks every call that exists only so that a stopped run can be gone on with. Tables and pictures, which a
run writes at its end anyhow, are not among them.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.config.loader import load_config
from mechinterp_cli.errors import MechinterpError
from mechinterp_cli.methods.run import run_experiment
from mechinterp_cli.runs.lock import Lock
from mechinterp_cli.runs.outcome import SilentProgress
from mechinterp_cli.runs.recorder import RunRecorder
from mechinterp_cli.runs.store import UnitStore

CLOCKED: tuple[tuple[type, str], ...] = (
    (UnitStore, "write"),
    (UnitStore, "remove"),
    (RunRecorder, "units_done"),
    (Lock, "release"),
)


def clocked(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    """The function, its seconds added up under a name."""

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.perf_counter() - begin

    return timed


def main(arguments: list[str] | None = None) -> int:
    """Run and report; exit code as the command line's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/patch-ioi.yaml", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    seconds: dict[str, float] = defaultdict(float)
    for owner, name in CLOCKED:
        setattr(owner, name, clocked(getattr(owner, name), seconds, f"{owner.__name__}.{name}"))
    register_all()
    try:
        loaded = load_config(options.config, options.set)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            run_experiment(loaded, out=Path(folder), progress=SilentProgress())
            whole = time.perf_counter() - begin
    except MechinterpError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    saving = sum(seconds.values())
    parts = ", ".join(f"{name} {value * 1000:.1f} ms" for name, value in seconds.items())
    share = f"{saving:.3f} s = {saving / whole:.2%}"
    sys.stdout.write(f"{options.config}: {whole:.1f} s, of which saving {share} ({parts})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
