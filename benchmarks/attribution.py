"""What attribution patching costs, in plain forward passes of the same prompts.

`python -m benchmarks.attribution [--model NAME|PATH] [--prompts N] [--rounds N] [--threads N]` estimates the effect of
every residual stream, head, MLP and neuron at every position, checks the estimates against plain hooks with PyTorch's
own gradients, and prints a Markdown table. It ends with 1 where they differ. How it is measured stands in
`benchmarks/README.md`.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.ablate_heads import PROMPTS, _positive, _say
from benchmarks.sweep_clock import PeakMemory, Stopwatch
from benchmarks.sweep_prompts import Pairs, ioi_pairs
from benchmarks.sweep_report import machine_facts
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.atp import Inquiry, atp, stream
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.plan import CPU_ROWS_PER_CALL
from mechinterp_cli.errors import MechinterpError, UserError
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel

KINDS = ("resid_pre", "z", "mlp_out", "neuron")
TARGET = 4.0
"""Plain forward passes of the same prompts that it may cost."""
TOLERANCE = 1e-4
"""Largest difference from plain hooks, in parts of the largest estimate: rounding in float32."""

Estimates = Mapping[Site, Tensor]
"""Site to [prompts, positions, *units]."""


class Ours:
    """The engine's estimates.

    Args:
        loaded: The model.
        pairs: Clean activations are put into the corrupted prompts.
    """

    def __init__(self, loaded: LoadedModel, pairs: Pairs) -> None:
        self.loaded, self.pairs = loaded, pairs
        self.sites = frozenset(Site(kind, layer) for kind in KINDS for layer in range(loaded.anatomy.n_layers))

    def values(self) -> Estimates:
        """Everything included: a pass over the source, one over the base, the backward pass, the products."""
        model, pairs = self.loaded, self.pairs
        asked = Inquiry(
            model.model,
            model.anatomy,
            pairs.corrupt,
            torch.full((pairs.size,), pairs.length - 1),
            lambda logits, prompts: _difference(logits, pairs.answers[prompts.cpu()])[:, None],
            stream(model.model, model.anatomy, pairs.clean),
            self.sites,
        )
        return {site: values[0] for site, values in atp(asked).by_site.items()}


def _difference(logits: Tensor, answers: Tensor) -> Tensor:
    own = logits.gather(1, answers.to(logits.device))
    return own[:, 0] - own[:, 1]


class Hooks:
    """Attribution patching by plain hooks: no code of the engine is used.

    Args:
        model: A model shaped like Llama.
        pairs: As for `Ours`.
    """

    def __init__(self, model: Any, pairs: Pairs) -> None:
        self.model, self.pairs = model, pairs
        self.layers: list[Any] = list(getattr(getattr(model, "model", None), "layers", []))
        if not self.layers or not all(hasattr(getattr(x, "mlp", None), "down_proj") for x in self.layers):
            raise UserError(
                f"--model: {type(model).__name__} has no model.layers[…].mlp.down_proj",
                "The plain hooks of this benchmark are written for models shaped like Llama.",
            )

    @torch.no_grad()
    def forward(self, *, last_only: bool) -> Tensor:
        """One plain forward pass of the base prompts."""
        keep: dict[str, int] = {"logits_to_keep": 1} if last_only else {}
        logits: Tensor = self.model(input_ids=self.pairs.corrupt.to(self.model.device), use_cache=False, **keep).logits
        return logits

    def values(self) -> Estimates:
        """Activations of both passes, gradients of the base's."""
        source: dict[Site, Tensor] = {}
        with torch.no_grad(), self._kept(source):
            self._logits(self.pairs.clean)
        base: dict[Site, Tensor] = {}
        with torch.enable_grad(), self._kept(base):
            self.model.requires_grad_(True)
            total = _difference(self._logits(self.pairs.corrupt), self.pairs.answers).sum()
            gradients = torch.autograd.grad(total, list(base.values()))
            self.model.requires_grad_(False)
        slopes = dict(zip(base, gradients, strict=True))
        found = {site: self._summed(site, (source[site] - base[site]) * slopes[site]) for site in base}
        return {site: values.detach().cpu() for site, values in found.items()}

    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens.to(self.model.device), use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]

    def _summed(self, site: Site, product: Tensor) -> Tensor:
        if site.kind == "neuron":
            return product
        if site.kind == "z":
            product = torch.unflatten(product, -1, (-1, self.model.config.head_dim))
        return product.sum(-1)

    @contextmanager
    def _kept(self, kept: dict[Site, Tensor]) -> Iterator[None]:
        """Keep activations (and their gradients) as modules are given them or give them."""

        def before(site: Site, _module: Any, given: Any) -> None:
            kept[site] = given[0]

        def after(site: Site, _module: Any, _given: Any, output: Any) -> None:
            kept[site] = output

        handles = []
        for index, layer in enumerate(self.layers):
            inputs: dict[str, nn.Module] = {
                "resid_pre": layer,
                "z": layer.self_attn.o_proj,
                "neuron": layer.mlp.down_proj,
            }
            for kind, module in inputs.items():
                handles.append(module.register_forward_pre_hook(partial(before, Site(kind, index))))
            handles.append(layer.mlp.register_forward_hook(partial(after, Site("mlp_out", index))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True)
class Result:
    """What was measured.

    Args:
        prompts: Pairs.
        tokens: Of every prompt.
        nodes: Estimates per prompt.
        rounds: Of which the best counts.
        forward_seconds: A plain forward pass of the base prompts, unembedding the last position alone.
        forward_full_seconds: The same, unembedding all.
        ours_seconds: All estimates.
        hooks_seconds: The same by plain hooks.
        peak_bytes: Memory of the estimates beyond that before.
        difference: Largest difference from plain hooks, in parts of the largest estimate of the site's kind.
    """

    prompts: int
    tokens: int
    nodes: int
    rounds: int
    forward_seconds: float
    forward_full_seconds: float
    ours_seconds: float
    hooks_seconds: float
    peak_bytes: int
    difference: float

    @property
    def ratio(self) -> float:
        """Cost in plain forward passes."""
        return self.ours_seconds / self.forward_seconds

    @property
    def equal(self) -> bool:
        """Whether the estimates are those of plain hooks."""
        return self.difference <= TOLERANCE


def measure(loaded: LoadedModel, prompts: int, rounds: int) -> Result:
    """Rounds of forward passes, estimates and hooks, taking turns, after a warm-up."""
    pairs = ioi_pairs(loaded.tokenizer, prompts, "early")
    ours, hooks = Ours(loaded, pairs), Hooks(loaded.model, pairs)
    watch, memory = Stopwatch(loaded.model.device), PeakMemory(loaded.model.device)
    difference = _largest_difference(ours.values(), hooks.values())
    for number in range(1, rounds + 1):
        watch.time("forward", lambda: hooks.forward(last_only=True))
        watch.time("full", lambda: hooks.forward(last_only=False))
        found = watch.time("ours", ours.values)
        watch.time("hooks", hooks.values)
        best = watch.best
        _say(f"round {number} of {rounds}: best so far {best['ours'] / best['forward']:.2f} forward passes")
    with memory.watch():
        ours.values()
    return Result(
        prompts=pairs.size,
        tokens=pairs.length,
        nodes=sum(values[0].numel() for values in found.values()),
        rounds=rounds,
        forward_seconds=watch.best["forward"],
        forward_full_seconds=watch.best["full"],
        ours_seconds=watch.best["ours"],
        hooks_seconds=watch.best["hooks"],
        peak_bytes=memory.above,
        difference=difference,
    )


def _largest_difference(found: Estimates, wanted: Estimates) -> float:
    """By kind of site, in parts of the largest estimate; NaN is as far off as can be."""
    worst = 0.0
    for kind in KINDS:
        sites = [site for site in wanted if site.kind == kind]
        largest = max(float(wanted[site].abs().max()) for site in sites)
        off = max(float((found[site] - wanted[site]).abs().nan_to_num(nan=torch.inf).max()) for site in sites)
        worst = max(worst, off / largest)
    return worst


_HEAD = (
    "prompts", "estimates per prompt", "forward s", "all logits s", "estimates s", "forward passes", "plain hooks s",
    "peak MiB", "difference",
)  # fmt: skip


def markdown(facts: Mapping[str, str], result: Result) -> str:
    """Facts and one row."""
    cells = (
        f"{result.prompts} of {result.tokens} tokens",
        f"{result.nodes:,}",
        f"{result.forward_seconds:.3f}",
        f"{result.forward_full_seconds:.3f}",
        f"{result.ours_seconds:.3f}",
        f"**{result.ratio:.2f}**",
        f"{result.hooks_seconds:.3f}",
        f"{result.peak_bytes / 2**20:.0f}",
        f"{result.difference:.1e}",
    )
    rows = [_HEAD, ["---"] * len(_HEAD), cells]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = "; ".join(f"{key} {value}" for key, value in facts.items())
    rounds = f"Best of {result.rounds} rounds; at most {TARGET:g} forward passes are asked."
    return f"# Attribution patching of {', '.join(KINDS)} at every position\n\n{about}\n\n{table}\n\n{rounds}\n"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attribution", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m-instruct", help="name, folder or id of a model shaped like Llama")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=_positive, help="of torch; its own choice if not given")
    add("--prompts", type=_positive, default=PROMPTS, help="an even number")
    add("--rounds", type=_positive, default=10, help="timings of each, the best of which counts")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 where the estimates are not those of plain hooks.
    """
    asked = parsed(arguments)
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    try:
        loaded = load_model(ModelOptions(id=asked.model, dtype="float32", device=asked.device))
        result = measure(loaded, asked.prompts, asked.rounds)
    except MechinterpError as error:
        _say(str(error))
        return int(error.exit_code)
    facts = machine_facts(loaded, CPU_ROWS_PER_CALL, "")
    print(markdown(facts, result))
    if asked.json is not None:
        numbers = {"facts": facts, **asdict(result), "ratio": result.ratio}
        asked.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not result.equal:
        _say(f"the estimates are not those of plain hooks: a difference is above {TOLERANCE:g} of the largest")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
