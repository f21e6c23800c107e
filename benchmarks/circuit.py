"""What circuits cost: scores of all edges, and runs of the circuits of all sizes.

`python -m benchmarks.circuit [--model NAME|PATH] [--prompts N] [--steps N] [--rounds N] [--threads N] [--scores-only]`
scores every edge by EAP-IG-inputs, runs the circuits of MIB's ten sizes, checks both against versions written by hand
for models shaped like Llama, and prints Markdown tables. It ends with 1 where numbers differ. How it is measured stands
in `benchmarks/README.md`.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import circuit_evaluation, circuit_scores
from benchmarks.ablate_heads import PROMPTS, _positive, _say
from benchmarks.circuit_evaluation import Evaluated, evaluate
from benchmarks.circuit_scores import Scored, score
from benchmarks.sweep_prompts import ioi_pairs
from benchmarks.sweep_report import machine_facts
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.plan import CPU_ROWS_PER_CALL
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.errors import MechinterpError
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel

PREFIX = 1
"""A token in front of the 14 of the sentence: 15 in all."""


def measure(
    loaded: LoadedModel, *, prompts: int, steps: int, rounds: int, scores_only: bool
) -> tuple[Scored, Evaluated | None]:
    """Score all edges and, unless told not to, run the circuits of all sizes.

    Args:
        loaded: The model.
        prompts: Pairs, whose second subject differs.
        steps: Of the Riemann sum.
        rounds: Timings of each, the best of which counts.
        scores_only: Whether no circuit is run.
    """
    pairs = ioi_pairs(loaded.tokenizer, prompts, "late", PREFIX)
    begin = time.perf_counter()
    wiring = wired(loaded.model, loaded.anatomy)
    proof_seconds = time.perf_counter() - begin
    scored, scores = score(wiring, pairs, steps=steps, rounds=rounds, proof_seconds=proof_seconds)
    return scored, None if scores_only else evaluate(wiring, pairs, scores, rounds)


def markdown(facts: Mapping[str, str], scored: Scored, evaluated: Evaluated | None, rounds: int) -> str:
    """Facts and two tables."""
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    parts = ["# Circuits", about, "## Scores of all edges", _table(circuit_scores.HEAD, circuit_scores.row(scored))]
    parts.append(f"At most {circuit_scores.SECONDS:g} s and {circuit_scores.GIB:g} GiB in all are asked of two cores.")
    if evaluated is not None:
        parts += ["## Circuits of all sizes", _table(circuit_evaluation.HEAD, circuit_evaluation.row(evaluated))]
    return "\n\n".join([*parts, f"Best of {rounds} rounds."]) + "\n"


def _table(head: Sequence[str], cells: Sequence[str]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), cells))


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuit", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="name, folder or id of a model shaped like Llama")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=_positive, help="of torch; its own choice if not given")
    add("--prompts", type=_positive, default=PROMPTS, help="an even number")
    add("--steps", type=_positive, default=5, help="of the Riemann sum")
    add("--rounds", type=_positive, default=3, help="timings of each, the best of which counts")
    add("--scores-only", action="store_true", help="run no circuits")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where numbers are not those of the versions written by hand.
    """
    asked = parsed(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        loaded = load_model(ModelOptions(id=asked.model, dtype="float32", device=asked.device))
        scored, evaluated = measure(
            loaded, prompts=asked.prompts, steps=asked.steps, rounds=asked.rounds, scores_only=asked.scores_only
        )
    except MechinterpError as error:
        _say(str(error))
        return int(error.exit_code)
    facts = machine_facts(loaded, CPU_ROWS_PER_CALL, "")
    print(markdown(facts, scored, evaluated, asked.rounds))
    if asked.json is not None:
        found = {"facts": facts, "scores": asdict(scored), "evaluation": evaluated and asdict(evaluated)}
        asked.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if not (scored.equal and (evaluated is None or evaluated.equal)):
        _say("numbers differ from those of the versions written by hand")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
