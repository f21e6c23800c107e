"""How long the engine takes for an activation-patching sweep, against plain hooks and this machine's sgemm.

`python -m benchmarks.patch_sweep [--model NAME|PATH] [--large] [--quick] [--full] [--threads N]` runs everything
in one process, engine, hooks and matrix products taking turns, and prints a Markdown table. It ends with 1 where
the engine's values are not those of the hooks. What each column is stands in `benchmarks/README.md`.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweep_cases import CASES, Case, Patch, Sweep, make_sweep
from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_engine import Engine, proved_engine
from benchmarks.sweep_prompts import Pairs, ioi_pairs
from benchmarks.sweep_report import CaseResult, EngineResult, PrefixResult, Report, machine_facts, markdown, to_json
from benchmarks.sweep_work import Sgemm, Sizes, stream_flops, trial_flops
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.plan import CPU_ROWS_PER_CALL, GPU_ROWS_PER_CALL, cost
from mechinterp_cli.engine.proof import FLOAT32_TOLERANCE, NOISE_FACTOR, implementation_noise
from mechinterp_cli.errors import MechinterpError, UserError
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel

PAIRS = 8
LARGE_PAIRS = 64
PREFIXES = (0, 128, 512)
QUICK_NOTE = "a quick run: its times mean nothing"


class Hooks:
    """Plain hooks: a forward pass per trial over all prompts at once. No code of the engine is used here.

    Args:
        model: A model shaped like Llama: `model.layers`, each with `self_attn.o_proj`.
        sweep: What is swept.
    """

    def __init__(self, model: Any, sweep: Sweep) -> None:
        self.model = model
        self.sweep = sweep
        decoder = getattr(model, "model", None)
        self.layers: list[Any] = list(getattr(decoder, "layers", []))
        if not self.layers or not all(hasattr(getattr(x, "self_attn", None), "o_proj") for x in self.layers):
            raise UserError(
                f"--model: {type(model).__name__} has no model.layers[…].self_attn.o_proj",
                "The plain hooks of this benchmark are written for models shaped like Llama.",
            )
        self.clean, self.corrupt, self.answers = (
            x.to(model.device) for x in (sweep.pairs.clean, sweep.pairs.corrupt, sweep.pairs.answers)
        )
        self.sources: dict[int, Tensor] = {}
        self.scale = self._streams()

    @torch.no_grad()
    def values(self, patches: Sequence[Patch], *, last: bool) -> Tensor:
        """Logits of answer and wrong answer [patches, prompts, 2]; all positions are unembedded unless `last`."""
        return torch.stack([self._patched(patch, last) for patch in patches]).double().cpu()

    def _patched(self, patch: Patch, last: bool) -> Tensor:
        source = self.sources[patch.layer]

        def change(hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            if self.sweep.case.kind == "z":
                size = self.model.config.head_dim
                head = slice(patch.unit * size, (patch.unit + 1) * size)
                hidden[:, self.sweep.pairs.prefix :, head] = source[:, self.sweep.pairs.prefix :, head]
            else:
                hidden[:, patch.unit] = source[:, patch.unit]
            return hidden

        with at_input(self._module(patch.layer), change):
            return self._logits(self.corrupt, last).gather(1, self.answers)

    @torch.no_grad()
    def _streams(self) -> float:
        """Record the clean activations; gives the largest |logit| of the two unedited passes."""
        with ExitStack() as stack:
            for layer in range(len(self.layers)):
                stack.enter_context(at_input(self._module(layer), partial(self.sources.setdefault, layer)))
            clean = self._logits(self.clean, True)
        return float(torch.stack([clean, self._logits(self.corrupt, True)]).abs().max())

    def _module(self, layer: int) -> nn.Module:
        module: nn.Module = self.layers[layer]
        return module if self.sweep.case.kind == "resid_pre" else module.get_submodule("self_attn.o_proj")

    def _logits(self, tokens: Tensor, last: bool) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False, logits_to_keep=int(last)).logits
        return logits[:, -1]


@contextmanager
def at_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a module's hidden state on its way in; undone at the end."""

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Options:
    """What the command line decides.

    Args:
        rounds: How often each thing is timed.
        sample: Trials that plain hooks compute in a round; None shares all of them out over the rounds.
        rows_per_call: The engine's, and the rows of the matrix products.
        stride: Every so many layers are swept.
        sgemm_layers: Layers whose shapes the matrix products go through.
        seed: Of the sample.
    """

    rounds: int
    sample: int | None
    rows_per_call: int
    stride: int
    sgemm_layers: int
    seed: int = 0

    def shares(self, trials: int) -> list[list[int]]:
        """For every round the trials that plain hooks compute, none of them twice before all have been once."""
        order = random.Random(self.seed).sample(range(trials), trials)
        size = -(-trials // self.rounds) if self.sample is None else min(self.sample, trials)
        wanted = min(trials, size * self.rounds) if self.sample is None else size * self.rounds
        endless = [order[i % trials] for i in range(wanted)]
        return [share for share in (endless[i : i + size] for i in range(0, wanted, size)) if share]


def tolerance(loaded: LoadedModel, sweep: Sweep) -> float:
    """How far values may be off, as a share of the logits' scale; measured noise decides in half precision."""
    if loaded.model.dtype == torch.float32:
        return FLOAT32_TOLERANCE
    with torch.no_grad():
        return NOISE_FACTOR * implementation_noise(loaded.model, sweep.bucket)[0]


def worst(found: Tensor, wanted: Tensor, scale: float) -> float:
    """Largest |difference| as a share of scale; NaN anywhere is infinite."""
    return float((found - wanted).abs().nan_to_num(nan=torch.inf).max()) / scale


class Rounds:
    """Engine, hooks and matrix products on one sweep, taking turns.

    Args:
        loaded: The model.
        sweep: What is swept.
        options: Sizes.
        engine: Proved on the sweep.
    """

    def __init__(self, loaded: LoadedModel, sweep: Sweep, options: Options, engine: Engine) -> None:
        self.sweep, self.engine, self.options = sweep, engine, options
        self.hooks = Hooks(loaded.model, sweep)
        self.watch = Stopwatch(loaded.model.device)
        self.sgemm = Sgemm(loaded.model, loaded.anatomy, options.rows_per_call, options.sgemm_layers)
        self.memory = {skip: PeakMemory(loaded.model.device) for skip in (True, False)}
        self.deviation = {True: 0.0, False: 0.0}
        self.checked: set[int] = set()

    def run(self) -> None:
        """All rounds, after a warm-up of each thing."""
        with self.memory[True].watch():
            self.engine.values(self.sweep, skip=True)
        self.hooks.values(self.sweep.patches[:1], last=False)
        self.sgemm.run()
        for share in self.options.shares(len(self.sweep.patches)):
            self._round(share)

    def _round(self, share: list[int]) -> None:
        patches = [self.sweep.patches[i] for i in share]
        found: dict[bool, Tensor] = {}
        for skip in (True, False):  # and last logits only in the first half, all logits in the second
            self.watch.time("sgemm", self.sgemm.run)
            with self.memory[skip].watch():
                found[skip] = self.watch.time(f"engine {skip}", partial(self.engine.values, self.sweep, skip=skip))
            wanted = self.watch.time(f"hooks {skip}", partial(self.hooks.values, patches, last=skip), per=len(share))
            for done, values in found.items():
                self._compare(done, values[share], wanted)
        # every trial is compared between the engine's own two ways, those that the hooks did not draw too
        self._compare(True, found[True], found[False])
        self.checked.update(share)

    def _compare(self, skip: bool, found: Tensor, wanted: Tensor) -> None:
        self.deviation[skip] = max(self.deviation[skip], worst(found, wanted, self.hooks.scale))

    def engine_result(self, *, skip: bool) -> EngineResult:
        """What was measured of the engine in one of its two ways."""
        loaded, pairs = self.engine.loaded, self.sweep.pairs
        work = self.sweep.work(skip=skip)
        sizes = Sizes.of(loaded.model, loaded.anatomy)
        flops = trial_flops(sizes, work.trials, pairs.length) + stream_flops(sizes, pairs.size, pairs.length)
        return EngineResult(
            computed=len(work.trials),
            seconds=self.watch.best[f"engine {skip}"],
            flops=flops.total,
            plan_flops=cost(loaded.model, loaded.anatomy, work, self.engine.executor).flops,
            peak_bytes=self.memory[skip].above,
            peak_total=self.memory[skip].absolute,
            deviation=self.deviation[skip],
        )


def measure_case(loaded: LoadedModel, case: Case, pairs: Pairs, options: Options) -> CaseResult:
    """Everything about one case."""
    sweep = make_sweep(case, pairs, loaded.anatomy, range(0, loaded.anatomy.n_layers, options.stride))
    engine = proved_engine(loaded, sweep, options.rows_per_call)
    rounds = Rounds(loaded, sweep, options, engine)
    rounds.run()
    trials = len(sweep.patches)
    return CaseResult(
        key=case.key,
        title=f"{case.kind}, pairs differ {case.differ}",
        pairs=pairs.size,
        tokens=pairs.length,
        trials=trials,
        executor=engine.executor,
        hooks_checked=len(rounds.checked),
        hooks_last_seconds=rounds.watch.best["hooks True"] * trials,
        hooks_full_seconds=rounds.watch.best["hooks False"] * trials,
        written=rounds.engine_result(skip=True),
        whole=rounds.engine_result(skip=False),
        sgemm=rounds.sgemm.flops / rounds.watch.best["sgemm"],
        tolerance=tolerance(loaded, sweep),
        target=case.target,
    )


def measure_prefix(loaded: LoadedModel, pairs: Pairs, options: Options) -> PrefixResult:
    """Time per trial of case (a), every trial computed, behind a shared prefix."""
    sweep = make_sweep(CASES["a"], pairs, loaded.anatomy, range(0, loaded.anatomy.n_layers, options.stride))
    engine = proved_engine(loaded, sweep, options.rows_per_call)
    hooks, watch = Hooks(loaded.model, sweep), Stopwatch(loaded.model.device)
    deviation = 0.0
    engine.streams(sweep)
    # a forward pass behind a long prefix takes seconds, so plain hooks compute no more than a few trials here
    few = replace(options, sample=4)
    for share in few.shares(len(sweep.patches)):
        watch.time("streams", partial(engine.streams, sweep))
        found = watch.time("engine", partial(engine.values, sweep, skip=False))
        patches = [sweep.patches[i] for i in share]
        wanted = watch.time("hooks", partial(hooks.values, patches, last=True), per=len(share))
        deviation = max(deviation, worst(found[share], wanted, hooks.scale))
    flops = trial_flops(Sizes.of(loaded.model, loaded.anatomy), sweep.work(skip=False).trials, pairs.length)
    return PrefixResult(
        prefix=pairs.prefix,
        pairs=pairs.size,
        trials=len(sweep.patches),
        seconds=watch.best["engine"],
        streams_seconds=watch.best["streams"],
        hooks_seconds=watch.best["hooks"] * len(sweep.patches),
        flops=flops.total,
        attention_flops=flops.attention,
        deviation=deviation,
        tolerance=tolerance(loaded, sweep),
    )


def measure(loaded: LoadedModel, arguments: argparse.Namespace) -> Report:
    """All that the command line asks for."""
    options = _options(arguments, loaded)
    # the loader gives every model that it takes a tokenizer
    pairs = partial(ioi_pairs, loaded.tokenizer)
    sizes = [arguments.pairs, LARGE_PAIRS] if arguments.large else [arguments.pairs]
    cases, prefixes = [], []
    for n in sizes:
        for case in (CASES[key] for key in arguments.cases):
            _say(f"({case.key}) {n} pairs")
            cases.append(measure_case(loaded, case, pairs(n, case.differ), options))
    for prefix in arguments.prefixes:
        _say(f"prefix of {prefix} tokens")
        prefixes.append(measure_prefix(loaded, pairs(arguments.pairs, "late", prefix), options))
    note = QUICK_NOTE if arguments.quick else ""
    return Report(machine_facts(loaded, options.rows_per_call, note), tuple(cases), tuple(prefixes))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _options(arguments: argparse.Namespace, loaded: LoadedModel) -> Options:
    rows = GPU_ROWS_PER_CALL if loaded.model.device.type == "cuda" else CPU_ROWS_PER_CALL
    return Options(
        rounds=arguments.rounds,
        sample=None if arguments.full else arguments.sample,
        rows_per_call=arguments.rows_per_call or rows,
        stride=max(1, loaded.anatomy.n_layers // 3) if arguments.quick else 1,
        sgemm_layers=2 if arguments.quick else loaded.anatomy.n_layers,
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults that `--quick` and `--large` set where nothing else is said."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patch_sweep", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="name, folder or id of a model shaped like Llama")
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--threads", type=_positive, help="of torch; its own choice if not given")
    add("--cases", nargs="+", choices=tuple(CASES), default=list(CASES), help="these sweeps alone")
    add("--pairs", type=_positive, help=f"prompts; {PAIRS} if not given")
    add("--rounds", type=_positive, help="timings of each thing, the best of which counts; 3 if not given")
    add("--sample", type=_positive, help="trials that plain hooks compute in a round; 24 if not given")
    add("--full", action="store_true", help="plain hooks compute every trial once, shared out over the rounds")
    add("--rows-per-call", type=_positive, help="the engine's; its default if not given")
    add("--large", action="store_true", help=f"also {LARGE_PAIRS} pairs, and prefixes of {PREFIXES} tokens")
    add("--prefixes", nargs="*", type=int, help="lengths of the few-shot prefix")
    add("--quick", action="store_true", help="2 pairs, three layers, one round: does it run at all")
    add("--json", type=Path, help="file for all numbers")
    add("--markdown", type=Path, help="file for the tables, beside standard output")
    found = parser.parse_args(arguments)
    defaults = {"pairs": 2, "rounds": 1, "sample": 4} if found.quick else {"pairs": PAIRS, "rounds": 3, "sample": 24}
    for name, value in defaults.items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    if found.prefixes is None:
        found.prefixes = list(PREFIXES) if found.large else []
    return found


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where the engine's values are not those of plain hooks.
    """
    options = parsed(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        loaded = load_model(ModelOptions(id=options.model, dtype=options.dtype, device=options.device))
        report = measure(loaded, options)
    except MechinterpError as error:
        _say(str(error))
        return int(error.exit_code)
    print(markdown(report))
    if options.json is not None:
        options.json.write_text(to_json(report), encoding="utf-8")
    if options.markdown is not None:
        options.markdown.write_text(markdown(report), encoding="utf-8")
    if not report.equal:
        _say("the engine's values are not those of plain hooks: see max difference")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
