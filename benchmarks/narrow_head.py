"""What it saves to compute the logits of the answers alone, in sweeps that are measured by the logit difference.

`python -m benchmarks.narrow_head [--model NAME|PATH] [--threads N]` runs three sweeps in one process, with the whole
head and with the answers' columns of it taking turns, and prints a Markdown table. It ends with 1 where the two differ,
and with 4 where some tokens' logits alone cannot prove themselves on the model. What each column is stands in
`benchmarks/README.md`.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_prompts import Pairs, ioi_pairs
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.execute import execute, executor_named
from mechinterp_cli.engine.narrow import prove_head
from mechinterp_cli.engine.plan import Work, cost, make_plan
from mechinterp_cli.engine.proof import prove
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.errors import MechinterpError, ProofError
from mechinterp_cli.methods.job import SetMeasure
from mechinterp_cli.metrics import Measurer
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import Prompt

BUDGET = 2**30
"""Bytes that a work unit may take."""
LARGEST_DIFFERENCE = 1e-4
"""Nats."""
DIRECTIONS = 16
"""Vectors that are added at each layer of the sweep like a probe's."""


@dataclass(frozen=True, eq=False)
class Sweep:
    """Trials that are timed.

    Args:
        name: What is swept.
        work: Prompts and trials.
        pairs: The prompts with their answers.
    """

    name: str
    work: Work
    pairs: Pairs


def steering(loaded: LoadedModel, pairs: Pairs) -> Sweep:
    """A vector added to the residual stream after every layer at the last token, as a probe's are: one row a trial."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(DIRECTIONS, 1, 1, loaded.anatomy.d_model, generator=generator)
    at = ((pairs.length - 1,),) * pairs.size
    edits = (
        Edit(Site("resid_post", layer), "add", at, values=vector)
        for layer in range(loaded.anatomy.n_layers)
        for vector in vectors
    )
    return _sweep("steering at the last token", pairs, {"clean": pairs.clean}, "clean", edits)


def patching(loaded: LoadedModel, pairs: Pairs) -> Sweep:
    """The clean residual stream at each position from the first that differs on, as in `patch`."""
    first = min(pairs.first_difference)
    edits = (
        Edit(Site("resid_pre", layer), "replace", ((position,),) * pairs.size, source="clean")
        for layer in range(1, loaded.anatomy.n_layers)
        for position in range(first, pairs.length)
    )
    streams = {"clean": pairs.clean, "corrupt": pairs.corrupt}
    return _sweep("patching each position", pairs, streams, "corrupt", edits)


def ablating(loaded: LoadedModel, pairs: Pairs) -> Sweep:
    """Zero in place of every head's output at all positions, as in `ablate`."""
    everywhere = (tuple(range(pairs.length)),) * pairs.size
    heads = ((layer.index, head) for layer in loaded.anatomy.layers if layer.heads for head in range(layer.heads.query))
    edits = (Edit(Site("z", layer), "zero", everywhere, units=(head,)) for layer, head in heads)
    return _sweep("ablating each head", pairs, {"clean": pairs.clean}, "clean", edits)


def _sweep(name: str, pairs: Pairs, streams: dict[str, Tensor], base: str, edits: Iterable[Edit]) -> Sweep:
    everyone = tuple(range(pairs.size))
    trials = (Trial(index, base, (edit,), everyone) for index, edit in enumerate(edits))
    return Sweep(name, Work(Bucket.of(streams), tuple(trials)), pairs)


SWEEPS: tuple[Callable[[LoadedModel, Pairs], Sweep], ...] = (steering, patching, ablating)


class Engine:
    """The engine on one sweep, whose executor and narrowed head have proved themselves.

    Args:
        loaded: The model.
        sweep: What is computed.

    Raises:
        ProofError: Some tokens' logits alone are not those of the whole.
    """

    def __init__(self, loaded: LoadedModel, sweep: Sweep) -> None:
        self.loaded, self.sweep = loaded, sweep
        pairs = sweep.pairs
        prompts = [
            Prompt("", tuple(tokens), (answer,), "", wrong_answer=(wrong,))
            for tokens, (answer, wrong) in zip(pairs.clean.tolist(), pairs.answers.tolist(), strict=True)
        ]
        measurer = Measurer(["logit_diff"], prompts, device=loaded.model.device)
        measure = SetMeasure(measurer, torch.arange(pairs.size))
        self.tokens = tuple(sorted(measure.tokens or ()))
        self.measures = {False: measure, True: measure.on_columns(self.tokens)}
        works, settings = [sweep.work], Settings()
        proof = prove(loaded.model, loaded.anatomy, works, settings=settings)
        head = prove_head(loaded.model, loaded.anatomy, works, self.tokens, proof, settings)
        if head.columns is None:
            raise ProofError(f"all logits are computed: {head.reason}", "Take another model.")
        self.executor = proof.executor

    def values(self, *, narrow: bool) -> Tensor:
        """The logit difference [trials, prompts], planned and computed."""
        model, anatomy, work = self.loaded.model, self.loaded.anatomy, self.sweep.work
        settings = Settings(tokens=self.tokens if narrow else None)
        rows = settings.rows_per_call
        plan = make_plan(model, anatomy, [work], executor=self.executor, rows_per_call=rows, budget=BUDGET)
        values = torch.empty(len(work.trials), self.sweep.pairs.size, dtype=torch.float64)
        executor = executor_named(self.executor, model, anatomy, settings)
        for done in execute(executor, plan, [work], [self.measures[narrow]]):
            values[list(done.unit.trials)] = done.values.trials[:, :, 0, 0]
        return values

    def gflop(self, *, narrow: bool) -> float:
        """What the plan counts."""
        columns = len(self.tokens) if narrow else None
        return cost(self.loaded.model, self.loaded.anatomy, self.sweep.work, self.executor, columns).flops / 1e9


@dataclass(frozen=True)
class Row:
    """What was measured of one sweep; of pairs the first is with the whole head, the second with the narrow one."""

    name: str
    trials: int
    columns: int
    seconds: tuple[float, float]
    processor: tuple[float, float]
    """Seconds of all processors together."""
    gflop: tuple[float, float]
    peak_mib: tuple[float, float]
    difference: float
    """Largest, nats."""

    def cells(self) -> list[str]:
        """The row of the table."""
        seconds, gflop, mib = (
            [f"{value:.{digits}f}" for value in two]
            for two, digits in ((self.seconds, 2), (self.gflop, 0), (self.peak_mib, 0))
        )
        times, processor, work = (two[0] / two[1] for two in (self.seconds, self.processor, self.gflop))
        ratios = [f"**{times:.2f}**", f"{processor:.2f}"]
        counts = [self.name, str(self.trials), str(self.columns)]
        return [*counts, *seconds, *ratios, *gflop, f"{work:.2f}", *mib, f"{self.difference:.1e}"]


HEAD = (
    "sweep", "trials", "columns", "whole s", "narrow s", "×", "× processor", "whole GFLOP", "narrow GFLOP",
    "× by GFLOP", "whole peak MiB over base", "narrow peak MiB over base", "difference",
)  # fmt: skip


def measured(loaded: LoadedModel, sweep: Sweep, rounds: int) -> Row:
    """Whole and narrow head taking turns; the best round of each counts."""
    engine, watch = Engine(loaded, sweep), Stopwatch(loaded.model.device)
    memory = {narrow: PeakMemory(loaded.model.device) for narrow in (False, True)}
    found: dict[bool, Tensor] = {}
    for _ in range(rounds):
        for narrow in (False, True):
            with memory[narrow].watch():
                found[narrow] = watch.time(str(narrow), partial(engine.values, narrow=narrow))
    return Row(
        sweep.name,
        len(sweep.work.trials),
        len(engine.tokens),
        (watch.best["False"], watch.best["True"]),
        (watch.least["False"], watch.least["True"]),
        (engine.gflop(narrow=False), engine.gflop(narrow=True)),
        (memory[False].above / 2**20, memory[True].above / 2**20),
        float((found[False] - found[True]).abs().nan_to_num(nan=torch.inf).max()),
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.narrow_head", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="name, folder or id")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="of torch; its own choice if not given")
    parser.add_argument("--pairs", type=int, default=8, help="prompts")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each, the best of which counts")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where values differ by more than `LARGEST_DIFFERENCE`.
    """
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        loaded = load_model(ModelOptions(id=options.model, device=options.device))
        pairs = ioi_pairs(loaded.tokenizer, options.pairs, "late")
        rows = [measured(loaded, make(loaded, pairs), options.rounds) for make in SWEEPS]
    except MechinterpError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    for cells in (HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)):
        print(f"| {' | '.join(cells)} |")
    return int(any(row.difference > LARGEST_DIFFERENCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
