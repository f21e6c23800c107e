"""What gathering activations for probes costs beyond the forward passes themselves.

`python -m benchmarks.probe_activations [--model NAME|PATH] [--sentences N] [--rounds N] [--threads N]` reads the
residual stream after every layer at the last token of every sentence, checks it against the hidden states that
transformers gives out, and prints a Markdown table. It ends with 1 where they differ. How it is measured stands in
`benchmarks/README.md`.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablate_heads import _positive, _say
from benchmarks.sweep_report import machine_facts
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.activations import CPU_TOKENS_PER_PASS, View, gather
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.errors import MechinterpError
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel

TARGET = 1.1
"""Forward passes of the same prompts that it may cost."""
TOLERANCE = 1e-4
"""Largest difference from transformers' hidden states, in parts of the layer's largest: rounding in float32."""
SENTENCES = 512
TOKENS_PER_PASS = CPU_TOKENS_PER_PASS

_SUBJECTS = ("The doctor", "A young girl", "My old neighbour", "The train", "Nobody", "The small dog by the door")
_VERBS = ("saw", "liked", "waited for", "wrote about", "never forgot")
_OBJECTS = ("the house", "a red apple", "an old friend of mine", "the long way home", "music")
_ENDS = ("", " yesterday", " in the morning", " when it rained", " before anyone else in town had heard of it")


def sentences(count: int) -> list[str]:
    """Sentences of many lengths, always the same ones."""
    chosen = random.Random(0)
    parts = (_SUBJECTS, _VERBS, _OBJECTS, _ENDS)
    return ["{} {} {}{}.".format(*(chosen.choice(part) for part in parts)) for _ in range(count)]


class Capture:
    """All layers at the last token, and the passes without anything being read.

    Args:
        loaded: The model.
        count: Sentences.
    """

    def __init__(self, loaded: LoadedModel, count: int) -> None:
        self.loaded = loaded
        self.tokens = [loaded.tokenizer(text)["input_ids"] for text in sentences(count)]
        everyone = tuple(range(count))
        self.view = View("last", everyone, tuple((len(row) - 1,) for row in self.tokens))
        self.sites = [Site("resid_post", layer) for layer in range(loaded.anatomy.n_layers)]

    def ours(self) -> Tensor:
        """[layers, sentences, d_model], everything included."""
        model, anatomy = self.loaded.model, self.loaded.anatomy
        asked = {site: [self.view] for site in self.sites}
        rows = gather(model, anatomy, self.tokens, asked, tokens_per_pass=TOKENS_PER_PASS)
        return torch.stack([rows[site, "last"] for site in self.sites])

    @torch.no_grad()
    def bare(self, *, states: bool = False) -> dict[int, Tensor]:
        """The same passes by transformers alone, without the unembedding; by sentence its states, if they are asked."""
        decoder: Any = self.loaded.model.base_model
        found: dict[int, Tensor] = {}
        for batch in self._batches():
            tokens = torch.tensor([self.tokens[i] for i in batch], device=self.loaded.model.device)
            output = decoder(input_ids=tokens, use_cache=False, output_hidden_states=states)
            if states:
                last = torch.stack([layer[:, -1] for layer in output.hidden_states]).cpu()
                found |= {number: last[:, place] for place, number in enumerate(batch)}
        return found

    def _batches(self) -> list[list[int]]:
        """Sentences of one length, as many as a pass has room for."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(self.tokens):
            by_length[len(row)].append(number)
        steps = {length: max(1, TOKENS_PER_PASS // length) for length in by_length}
        return [m[i : i + steps[n]] for n, m in sorted(by_length.items()) for i in range(0, len(m), steps[n])]

    def difference(self) -> float:
        """Largest difference of the two in parts of a layer's largest, but of the last, which is given out normed."""
        ours, states = self.ours()[:-1], self.bare(states=True)
        theirs = torch.stack([states[i] for i in range(len(self.tokens))], dim=1)[1:-1].float()
        off = (ours - theirs).abs().nan_to_num(nan=torch.inf).amax((1, 2)) / theirs.abs().amax((1, 2))
        return float(off.max())


class Clock:
    """The fewest seconds of each thing that was timed: processor seconds of this process, wall seconds on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.best: dict[str, float] = {}

    def time(self, name: str, call: Callable[[], object]) -> None:
        """Call it and note its seconds where they are the fewest yet."""
        begin = self._now()
        call()
        seconds = self._now() - begin
        self.best[name] = min(seconds, self.best.get(name, seconds))

    def _now(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Result:
    """What was measured.

    Args:
        sentences: How many.
        tokens: Of all of them.
        layers: That are read.
        rounds: Of which the best counts.
        bare_seconds: The passes alone: processor seconds on a CPU.
        ours_seconds: With the activations.
        difference: From transformers' hidden states, in parts of a layer's largest.
    """

    sentences: int
    tokens: int
    layers: int
    rounds: int
    bare_seconds: float
    ours_seconds: float
    difference: float

    @property
    def ratio(self) -> float:
        """Cost in plain forward passes."""
        return self.ours_seconds / self.bare_seconds

    @property
    def equal(self) -> bool:
        """Whether the activations are those of transformers."""
        return self.difference <= TOLERANCE


def measure(loaded: LoadedModel, count: int, rounds: int) -> Result:
    """Rounds of both, each beginning in turn; the check before them warms up."""
    capture = Capture(loaded, count)
    clock, difference = Clock(loaded.model.device), capture.difference()
    calls: list[tuple[str, Callable[[], object]]] = [("bare", capture.bare), ("ours", capture.ours)]
    for number in range(1, rounds + 1):
        for name, call in calls if number % 2 else reversed(calls):
            clock.time(name, call)
        best = clock.best
        _say(f"round {number} of {rounds}: best so far {best['ours']:.2f} s, {best['ours'] / best['bare']:.3f} passes")
    return Result(
        sentences=count,
        tokens=sum(map(len, capture.tokens)),
        layers=len(capture.sites),
        rounds=rounds,
        bare_seconds=clock.best["bare"],
        ours_seconds=clock.best["ours"],
        difference=difference,
    )


_HEAD = ("sentences", "tokens", "layers", "passes alone s", "with activations s", "forward passes", "difference")


def markdown(facts: Mapping[str, str], result: Result) -> str:
    """Facts and one row."""
    cells = (
        f"{result.sentences:,}",
        f"{result.tokens:,}",
        f"{result.layers}",
        f"{result.bare_seconds:.2f}",
        f"{result.ours_seconds:.2f}",
        f"**{result.ratio:.3f}**",
        f"{result.difference:.1e}",
    )
    table = "\n".join(f"| {' | '.join(row)} |" for row in (_HEAD, ["---"] * len(_HEAD), cells))
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    rounds = f"Best of {result.rounds} rounds; at most {TARGET:g} forward passes are asked."
    return f"# The residual stream after every layer at the last token\n\n{about}\n\n{table}\n\n{rounds}\n"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_activations", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="name, folder or id of a model")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=_positive, help="of torch; its own choice if not given")
    add("--sentences", type=_positive, default=SENTENCES, help="how many")
    add("--rounds", type=_positive, default=5, help="timings of each, the best of which counts")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where the activations are not those of transformers.
    """
    asked = parsed(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        loaded = load_model(ModelOptions(id=asked.model, dtype="float32", device=asked.device))
        result = measure(loaded, asked.sentences, asked.rounds)
    except MechinterpError as error:
        _say(str(error))
        return int(error.exit_code)
    facts = machine_facts(loaded, TOKENS_PER_PASS, "")
    print(markdown(facts, result))
    if asked.json is not None:
        numbers = {"facts": facts, **asdict(result), "ratio": result.ratio}
        asked.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not result.equal:
        _say(f"the activations are not those of transformers: a difference is above {TOLERANCE:g} of the largest")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
