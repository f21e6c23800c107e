"""Which executor proves itself on every architecture of transformers' causal-LM mapping.

`python -m benchmarks.architectures [--only NAME ...] [--out docs/architectures.md] [--jobs N]` builds a tiny
random model of each entry in a process of its own, finds its anatomy, lets the engine prove itself on it, and
writes a table.
"""

import argparse
import logging
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from benchmarks.architecture_table import Examination, markdown
from benchmarks.architecture_trials import proof_work
from benchmarks.isolation import Failure, Isolated
from benchmarks.tiny import UNBUILDABLE, entries, tiny_model, tiny_tokens
from mechinterp_cli.engine.proof import prove
from mechinterp_cli.errors import MechinterpError, ProofError
from mechinterp_cli.models.anatomy import find_anatomy
from mechinterp_cli.models.walk import forward

TIMEOUT = 120.0
ENTRY_ERRORS = (MechinterpError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What third-party model code raises when it is called in a way that it was not written for."""


def examine(entry: str) -> Examination:
    """Build an entry's tiny model, find its anatomy and let the engine prove itself.

    Any of `ENTRY_ERRORS` becomes the reason.
    """
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    begin = time.perf_counter()
    found = Examination(entry)
    try:
        if entry in UNBUILDABLE:
            return replace(found, reason=UNBUILDABLE[entry])
        found = _proved(found)
    except ENTRY_ERRORS as error:
        found = replace(found, reason=essence(error))
    return replace(found, seconds=time.perf_counter() - begin)


def _proved(found: Examination) -> Examination:
    model = tiny_model(found.entry)
    tokens = tiny_tokens()
    with torch.no_grad():
        before = forward(model, tokens)
    anatomy = find_anatomy(model)
    softmax = tuple(layer.index for layer in anatomy.layers if layer.by_interface)
    found = replace(found, layers=anatomy.n_layers, softmax=softmax, sites=anatomy.sites)
    try:
        proof = prove(model, anatomy, [proof_work(anatomy)])
    except ProofError as error:
        return replace(found, reason=error.cause)
    with torch.no_grad():
        if not torch.equal(forward(model, tokens), before):
            return replace(found, reason="the proof left the model changed")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in proof.rejected.items())
    return replace(found, executor=proof.executor, deviation=proof.deviation, reason=reasons)


def essence(error: BaseException) -> str:
    """An error in one line: its cause, or type, message and innermost place."""
    if isinstance(error, MechinterpError):
        return error.cause
    message = (str(error).splitlines() or [""])[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {message[:160]} ({Path(frame.filename).name}:{frame.lineno})"


def examine_all(names: Sequence[str], *, jobs: int, timeout: float) -> list[Examination]:
    """Examine each entry in a process of its own and say on stderr how it went."""
    rows = []
    for entry, result in Isolated(examine, timeout).over(names, jobs):
        row = Examination(entry, reason=result.reason) if isinstance(result, Failure) else result
        rows.append(row)
        print(f"{len(rows)}/{len(names)} {entry}: {row.executor} {row.reason}", file=sys.stderr)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=entries(), help="these entries alone")
    parser.add_argument("--out", type=Path, help="Markdown file to write; standard output if not given")
    parser.add_argument("--jobs", type=int, default=1, help="entries at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds after which an entry is given up")
    options = parser.parse_args(arguments)
    page = markdown(
        examine_all(options.only or entries(), jobs=options.jobs, timeout=options.timeout), transformers.__version__
    )
    if options.out is None:
        print(page)
    else:
        options.out.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
