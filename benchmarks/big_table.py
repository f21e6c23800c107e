"""Writing a huge results table: seconds and memory, from a sweep's numbers to a checked Parquet file and its hash.

`python -m benchmarks.big_table` makes the values of 40,000 neurons x 64 prompts x 2 metrics (5.12 million rows) at
random, in memory; no model runs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.sweep_clock import PeakMemory
from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.specs import Place, TrialSpec
from mechinterp_cli.methods.tables import Sweep, result_columns
from mechinterp_cli.runs.schema import validate
from mechinterp_cli.runs.tables import write_csv, write_parquet
from mechinterp_cli.tasks.prompts import Prompt, PromptSet

METRICS = ("logit_diff", "prob")
NEURONS, POSITIONS = 1536, 10
MEMORY_LIMIT, SECONDS_LIMIT = 2.0, 30.0
MIB = 2**20


def random_sweep(trials: int, prompts: int, *, seed: int = 0) -> Sweep:
    """A sweep over single neurons with random values, a tenth of its observations trivial.

    Args:
        trials: How many neurons x positions.
        prompts: How many prompts, of four templates' clusters and two groups.
        seed: Of the values.
    """
    random = np.random.default_rng(seed)
    places = [Place(((position,),) * prompts, position=position, template="ABBA") for position in range(POSITIONS)]
    specs = []
    for index in range(trials):
        neuron, position = divmod(index, POSITIONS)
        layer, neuron = divmod(neuron, NEURONS)
        specs.append(TrialSpec(index, 0, "neuron", layer, (layer,), (neuron,), places[position], None))
    chosen = tuple(
        Prompt(f"prompt {i}", (1, 2), (3,), "yes", group="ab"[i % 2], template="ABBA", cluster=f"template {i % 4}")
        for i in range(prompts)
    )
    status = (random.random((trials, prompts)) < 0.1).astype(np.int8)
    values = random.normal(size=(trials, prompts, 1, len(METRICS)))
    streams = {name: random.normal(size=(prompts, 1, len(METRICS))) for name in ("corrupt", "clean")}
    return Sweep(PromptSet("random", chosen), specs, METRICS, values, status, streams, "corrupt", "clean")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where memory or time is above what is allowed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_table", description=__doc__)
    parser.add_argument("--trials", type=int, default=40_000)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--csv", action="store_true", help="write CSV too, as output.formats: [parquet, csv] does")
    options = parser.parse_args(arguments)
    register_all()
    sweep = random_sweep(options.trials, options.prompts)
    seconds, memory = 0.0, PeakMemory(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder, memory.watch():
        took, table = _timed(lambda: validate("results", result_columns(sweep, StatsOptions()), "patch"))
        seconds += _say("table made", took, f"{table.num_rows:,} rows, {table.nbytes / MIB:.0f} MiB in memory")
        writing = PeakMemory(torch.device("cpu"))
        for write in (write_parquet, write_csv) if options.csv else (write_parquet,):
            took = _write(write, table, Path(folder) / "results", writing)
            seconds += took if write is write_parquet else 0.0
    share = memory.above / table.nbytes
    print(f"highest memory: {memory.above / MIB:.0f} MiB in all, {share:.2f} x the table")
    print(f"of that while writing, beyond the table: {writing.above / MIB:.0f} MiB")
    print(f"to the Parquet file and its hash: {seconds:.1f} s")
    return int(share > MEMORY_LIMIT or seconds > SECONDS_LIMIT)


def _write(write: Callable[[pa.Table, Path], Any], table: pa.Table, path: Path, memory: PeakMemory) -> float:
    with memory.watch():
        took, info = _timed(lambda: write(table, path))
    return _say(f"{write.__name__} and hash", took, f"{info.bytes / MIB:.0f} MiB on disk")


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def _say(what: str, seconds: float, more: str) -> float:
    print(f"{what}: {seconds:.1f} s, {more}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
