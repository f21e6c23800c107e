"""How long zero-ablating every head takes with the engine, against plain hooks.

`python -m benchmarks.ablate_heads [--model NAME|PATH] [--prompts N] [--rounds N] [--sample N] [--threads N]` runs both
in one process, taking turns, and prints a Markdown table. It ends with 1 where the engine's values are not those of
the hooks. How it is measured stands in `benchmarks/README.md`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.patch_sweep import Options, at_input
from benchmarks.sweep_clock import Stopwatch
from benchmarks.sweep_engine import MEMORY_SHARE
from benchmarks.sweep_prompts import Pairs, ioi_pairs
from benchmarks.sweep_report import machine_facts
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.capture import last_logits
from mechinterp_cli.engine.edits import Bucket, Edit, Site, Trial
from mechinterp_cli.engine.execute import execute, executor_named
from mechinterp_cli.engine.plan import CPU_ROWS_PER_CALL, GPU_ROWS_PER_CALL, Work, free_memory, make_plan
from mechinterp_cli.engine.proof import prove
from mechinterp_cli.engine.wavefront import Settings
from mechinterp_cli.errors import MechinterpError, UserError
from mechinterp_cli.metrics import Measurer
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.tasks.prompts import Prompt

METRICS = ("logit_diff", "kl")
TARGET = 3.0
"""How many times faster than plain hooks with last logits the engine is to be."""
TOLERANCE = 1e-4
"""Largest difference, nats, that is rounding in float32; asked of every value of the two metrics."""
PROMPTS = 8
Head = tuple[int, int]
"""Layer and head."""


def all_heads(loaded: LoadedModel) -> list[Head]:
    """Every head that has an output of its own, layer by layer."""
    layers = enumerate(loaded.anatomy.layers)
    return [(layer, head) for layer, one in layers if one.heads is not None for head in range(one.heads.query)]


class Engine:
    """The engine, with an executor that has proved itself on these trials.

    Args:
        loaded: The model.
        pairs: Prompts; only the clean ones are used.
        heads: What is ablated, one at a time.
        rows_per_call: As in a run.
    """

    def __init__(self, loaded: LoadedModel, pairs: Pairs, heads: Sequence[Head], rows_per_call: int) -> None:
        self.loaded, self.pairs, self.heads = loaded, pairs, heads
        self.settings = Settings(rows_per_call=rows_per_call)
        self.executor = prove(loaded.model, loaded.anatomy, [self._work()], settings=self.settings).executor

    def values(self) -> Tensor:
        """[heads, prompts, metrics], everything included: the clean pass, making trials, planning, measuring."""
        model, anatomy, work = self.loaded.model, self.loaded.anatomy, self._work()
        measurer = self._measurer()
        budget = int(MEMORY_SHARE * free_memory(model.device))
        rows = self.settings.rows_per_call
        plan = make_plan(model, anatomy, [work], executor=self.executor, rows_per_call=rows, budget=budget)
        executor = executor_named(self.executor, model, anatomy, self.settings)
        values = torch.full((len(self.heads), self.pairs.size, len(METRICS)), torch.nan, dtype=torch.float64)
        for done in execute(executor, plan, [work], [lambda logits, prompt, _read: measurer(logits, prompt)]):
            values[[work.trials[i].index for i in done.unit.trials]] = done.values.trials[:, :, 0]
        return values

    def _work(self) -> Work:
        everywhere = (tuple(range(self.pairs.length)),) * self.pairs.size
        trials = [
            Trial(
                index,
                "clean",
                (Edit(Site("z", layer), "zero", everywhere, units=(head,)),),
                tuple(range(self.pairs.size)),
            )
            for index, (layer, head) in enumerate(self.heads)
        ]
        return Work(Bucket.of({"clean": self.pairs.clean}), tuple(trials))

    def _measurer(self) -> Measurer:
        prompts = [
            Prompt("", tuple(tokens), (answer,), "", wrong_answer=(wrong,))
            for tokens, (answer, wrong) in zip(self.pairs.clean.tolist(), self.pairs.answers.tolist(), strict=True)
        ]
        model = self.loaded.model
        return Measurer(METRICS, prompts, last_logits(model, self.pairs.clean), device=model.device)


class Hooks:
    """Plain hooks: a forward pass per head over all prompts at once, last logits only. No code of the engine is used.

    Args:
        model: A model shaped like Llama: `model.layers`, each with `self_attn.o_proj`.
        pairs: Prompts; only the clean ones are used.
    """

    def __init__(self, model: Any, pairs: Pairs) -> None:
        self.model = model
        self.layers: list[Any] = list(getattr(getattr(model, "model", None), "layers", []))
        if not self.layers or not all(hasattr(getattr(x, "self_attn", None), "o_proj") for x in self.layers):
            raise UserError(
                f"--model: {type(model).__name__} has no model.layers[…].self_attn.o_proj",
                "The plain hooks of this benchmark are written for models shaped like Llama.",
            )
        self.tokens, self.answers = pairs.clean.to(model.device), pairs.answers.to(model.device)
        with torch.no_grad():
            self.clean = self._log_probabilities()

    @torch.no_grad()
    def values(self, heads: Sequence[Head]) -> Tensor:
        """[heads, prompts, metrics]."""
        return torch.stack([self._ablated(*head) for head in heads]).double().cpu()

    def _ablated(self, layer: int, head: int) -> Tensor:
        size = self.model.config.head_dim

        def change(z: Tensor) -> Tensor:
            z = z.clone()
            z[..., head * size : (head + 1) * size] = 0
            return z

        module: nn.Module = self.layers[layer].self_attn.o_proj
        with at_input(module, change):
            found = self._log_probabilities()
        own = found.gather(1, self.answers)
        kl = (self.clean.exp() * (self.clean - found)).sum(-1)
        return torch.stack([own[:, 0] - own[:, 1], kl], dim=-1)

    def _log_probabilities(self) -> Tensor:
        logits: Tensor = self.model(input_ids=self.tokens, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float().log_softmax(-1)


@dataclass(frozen=True)
class Result:
    """What was measured.

    Args:
        heads: Trials.
        prompts: Each ablated on so many.
        tokens: Of every prompt.
        executor: That proved itself.
        rounds: Of which the best counts.
        checked: Heads that plain hooks computed at least once.
        engine_seconds: All heads.
        hooks_seconds: All heads; scaled from the share of a round.
        differences: Largest |difference| of each metric, nats.
        largest: Largest |value| of each metric by hooks, for comparison.
    """

    heads: int
    prompts: int
    tokens: int
    executor: str
    rounds: int
    checked: int
    engine_seconds: float
    hooks_seconds: float
    differences: dict[str, float]
    largest: dict[str, float]

    @property
    def ratio(self) -> float:
        """How many times faster than plain hooks."""
        return self.hooks_seconds / self.engine_seconds

    @property
    def equal(self) -> bool:
        """Whether the engine's values are those of the hooks."""
        return max(self.differences.values()) <= TOLERANCE


def measure(loaded: LoadedModel, options: Options, prompts: int) -> Result:
    """Rounds of engine and hooks, taking turns, after a warm-up."""
    pairs = ioi_pairs(loaded.tokenizer, prompts, "late")
    heads = all_heads(loaded)
    hooks = Hooks(loaded.model, pairs)
    engine, watch = Engine(loaded, pairs, heads, options.rows_per_call), Stopwatch(loaded.model.device)
    # the proof has warmed the engine up
    hooks.values(heads[:1])
    _say(f"proved: {engine.executor}")
    differences = largest = torch.zeros(len(METRICS), dtype=torch.float64)
    shares = options.shares(len(heads))
    for number, share in enumerate(shares, start=1):
        found = watch.time("engine", engine.values)
        wanted = watch.time("hooks", partial(hooks.values, [heads[i] for i in share]), per=len(share))
        # NaN is as far off as can be: a value that is not there is not the same value
        off = (found[share] - wanted).abs().nan_to_num(nan=torch.inf).amax((0, 1))
        differences, largest = torch.maximum(differences, off), wanted.abs().amax((0, 1)).maximum(largest)
        _say(f"round {number} of {len(shares)}: {_so_far(watch, len(heads))}")
    return Result(
        heads=len(heads),
        prompts=pairs.size,
        tokens=pairs.length,
        executor=engine.executor,
        rounds=len(shares),
        checked=len({i for share in shares for i in share}),
        engine_seconds=watch.best["engine"],
        hooks_seconds=watch.best["hooks"] * len(heads),
        differences=dict(zip(METRICS, differences.tolist(), strict=True)),
        largest=dict(zip(METRICS, largest.tolist(), strict=True)),
    )


def _so_far(watch: Stopwatch, heads: int) -> str:
    engine, hooks = watch.best["engine"], watch.best["hooks"] * heads
    return f"best so far: engine {engine:.1f} s, hooks {hooks:.1f} s, {hooks / engine:.1f} times"


_HEAD = (
    "heads", "prompts", "engine s", "hooks last s", "×", "hooks computed", *(f"difference, {name}" for name in METRICS),
    "largest kl",
)  # fmt: skip


def markdown(facts: dict[str, str], result: Result) -> str:
    """Facts and one row."""
    cells = (
        f"{result.heads}",
        f"{result.prompts} of {result.tokens} tokens",
        f"{result.engine_seconds:.2f}",
        f"{result.hooks_seconds:.1f}",
        f"**{result.ratio:.1f}**",
        f"{result.checked} of {result.heads}",
        *(f"{result.differences[name]:.1e}" for name in METRICS),
        f"{result.largest['kl']:.2f}",
    )
    rows = [_HEAD, ["---"] * len(_HEAD), cells]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    rounds = f"Best of {result.rounds} rounds, {result.executor} executor; at least {TARGET:g} is asked."
    return f"# Zero-ablation of every head: engine against plain hooks\n\n{about}\n\n{table}\n\n{rounds}\n"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablate_heads", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="name, folder or id of a model shaped like Llama")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=_positive, help="of torch; its own choice if not given")
    add("--prompts", type=_positive, default=PROMPTS, help="an even number")
    add("--rounds", type=_positive, default=3, help="timings of each, the best of which counts")
    add("--sample", type=_positive, help="heads that plain hooks compute in a round; all of them if not given")
    add("--rows-per-call", type=_positive, help="of the engine; as in a run if not given")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(arguments)


def _options(arguments: argparse.Namespace, loaded: LoadedModel) -> Options:
    rows = GPU_ROWS_PER_CALL if loaded.model.device.type == "cuda" else CPU_ROWS_PER_CALL
    sample = arguments.sample or len(all_heads(loaded))
    return Options(arguments.rounds, sample, arguments.rows_per_call or rows, stride=1, sgemm_layers=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where the engine's values are not those of plain hooks.
    """
    asked = parsed(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        loaded = load_model(ModelOptions(id=asked.model, dtype="float32", device=asked.device))
        options = _options(asked, loaded)
        result = measure(loaded, options, asked.prompts)
    except MechinterpError as error:
        _say(str(error))
        return int(error.exit_code)
    facts = machine_facts(loaded, options.rows_per_call, "")
    print(markdown(facts, result))
    if asked.json is not None:
        numbers = {"facts": facts, **asdict(result), "ratio": result.ratio}
        asked.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not result.equal:
        _say(f"the engine's values are not those of plain hooks: a difference is above {TOLERANCE:g} nats")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
