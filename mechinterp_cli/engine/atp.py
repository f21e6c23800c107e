"""Attribution patching (AtP, 2403.00745): what patching every node would do, from one gradient.

The estimate of a node is (a_source − a_base) · ∂M/∂a at the base, summed over the node's features: to first order the
change M(patched) − M(base) that patching measures.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import Context, Differentiable, Pass, check_sites, differentiated, graph_bytes
from mechinterp_cli.engine.instrument import read_sites
from mechinterp_cli.engine.softmax_fix import widened
from mechinterp_cli.errors import RunError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.kinds import HEAD_KINDS, RESIDUAL_KINDS

TOKENS_PER_PASS = 1024

Sources = Callable[[Tensor, Collection[Site]], Mapping[Site, Tensor]]
"""(prompts of the bucket [n], sites) to what would be put there, that broadcasts to [n, positions, *features].

Positions and keys past the bucket's length are not looked at.
"""


def stream(model: nn.Module, anatomy: Anatomy, tokens: Int[Tensor, "prompts positions"]) -> Sources:
    """Activations of other prompts, one for each of the bucket.

    Args:
        model: The model.
        anatomy: Its anatomy.
        tokens: The other prompts' ids.
    """

    def read(prompts: Tensor, sites: Collection[Site]) -> Mapping[Site, Tensor]:
        top = model.get_submodule(anatomy.layers[max(site.layer for site in sites)].module)

        def run() -> None:
            forward_until(model, tokens[prompts], top, lambda _output: True)

        return read_sites(model, anatomy, set(sites), run)

    return read


def zeros(_prompts: Tensor, sites: Collection[Site]) -> Mapping[Site, Tensor]:
    """Zero everywhere."""
    return {site: torch.zeros(()) for site in sites}


@dataclass(frozen=True)
class Batching:
    """How prompts are shared out over passes; it decides memory and time, and no number but by rounding.

    Args:
        tokens: Tokens of a pass, at least one prompt's.
        checkpointing: Keep what enters layers alone, and compute them again in the backward pass.
    """

    tokens: int = TOKENS_PER_PASS
    checkpointing: bool = False

    def at_once(self, length: int) -> int:
        """How many prompts of a length one pass takes."""
        return max(1, self.tokens // length)


@dataclass(frozen=True, eq=False)
class Inquiry:
    """What is asked of the prompts of one length: how would metrics change if activations were replaced?

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids of the base stream, that is patched into.
        read: The position of each prompt whose logits are measured.
        metric: What is measured.
        sources: What would be put there.
        sites: Where.
        batching: How prompts are shared out over passes.
        check_finite: Whether an estimate that is not finite is an error.
        tick: Told of every backward pass how many prompts (and steps) it was for.
    """

    model: nn.Module
    anatomy: Anatomy
    tokens: Int[Tensor, "prompts positions"]
    read: Int[Tensor, " prompts"]
    metric: Differentiable
    sources: Sources
    sites: frozenset[Site]
    batching: Batching = Batching()
    check_finite: bool = True
    tick: Callable[[int], None] = lambda _items: None

    def passes(self) -> Iterator[Pass]:
        """The base stream, some prompts at a time."""
        for prompts in torch.split(torch.arange(len(self.tokens)), self.batching.at_once(self.tokens.shape[1])):
            yield Pass(self.tokens[prompts], self.read[prompts], prompts)

    def answered(self, answer: "Callable[[Pass], Estimates]") -> "Estimates":
        """The estimates of all prompts, from those of each pass.

        Raises:
            RunError: One is not finite.
        """
        check_sites(self.anatomy, self.sites)
        found = Estimates.joined([answer(prompts) for prompts in self.passes()])
        if self.check_finite:
            found.check_finite()
        return found


def batching_within(asked: Inquiry, memory: int) -> Batching:
    """As many prompts at once as memory allows, measured on the first; one, and checkpointing, where not even that.

    Args:
        asked: What will be asked; its own batching is not looked at.
        memory: Bytes for what one pass holds until its backward pass.
    """
    first = Pass(asked.tokens[:1], asked.read[:1], torch.zeros(1, dtype=torch.long))
    held = graph_bytes(asked.model, asked.anatomy, first, asked.metric, asked.sites)
    return Batching(asked.tokens.shape[1] * max(1, memory // held), checkpointing=held > memory)


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimates of nodes, on the CPU.

    Args:
        by_site: Site to [metrics, prompts, positions, *units]: no units for residual kinds, heads for `q`, `k`, `v`
            and `z`, neurons for `neuron`, heads × keys for `scores` and `pattern` (positions are queries there).
        base: The metrics [metrics, prompts] at the base.
        end: The metrics at the end of the path, where the estimator has one.
    """

    by_site: dict[Site, Tensor]
    base: Float[Tensor, "metrics prompts"]
    end: Float[Tensor, "metrics prompts"] | None = None

    @classmethod
    def joined(cls, parts: Sequence["Estimates"]) -> "Estimates":
        """Those of several batches of prompts as one."""
        ends = [part.end for part in parts if part.end is not None]
        return cls(
            {site: torch.cat([part.by_site[site] for part in parts], dim=1) for site in sorted(parts[0].by_site)},
            torch.cat([part.base for part in parts], dim=1),
            torch.cat(ends, dim=1) if ends else None,
        )

    def check_finite(self) -> None:
        """Raise a RunError that names the first site at which an estimate is NaN or infinite."""
        for site, values in self.by_site.items():
            if not bool(torch.isfinite(values.sum())) and not bool(torch.isfinite(values).all()):
                raise RunError(
                    f"layer {site.layer} has a gradient or an activation at {site.kind} that is NaN or infinite",
                    "Try model.dtype: float32.",
                )


@dataclass(eq=False)
class Tally:
    """Sums of contributions by site and metric."""

    sums: dict[tuple[Site, int], Tensor] = field(default_factory=dict)

    def add(self, site: Site, metric: int, values: Tensor) -> None:
        """Add to a site's numbers, [n, positions, *units]."""
        known = self.sums.get((site, metric))
        self.sums[site, metric] = values if known is None else known.add_(values)

    def estimates(self, base: Tensor, end: Tensor | None = None) -> Estimates:
        """The sums; metrics are given as [n, metrics]."""
        sites = {site for site, _ in self.sums}
        stacked = {site: torch.stack([self.sums[site, m] for m in range(base.shape[1])]).cpu() for site in sites}
        return Estimates(stacked, base.T.cpu(), None if end is None else end.T.cpu())


def difference(site: Site, source: Tensor, activation: Tensor) -> Tensor:
    """Source − activation; 0 for scores that a mask hides, whose gradient is 0."""
    here = widened(activation)
    if source.ndim == here.ndim:
        source = source[:, : here.shape[1]]
        source = source[..., : here.shape[-1]] if site.kind in ("scores", "pattern") else source
    change = source.to(here) - here
    return torch.where(change.isfinite(), change, 0) if site.kind == "scores" else change


def contribution(site: Site, change: Tensor, gradient: Tensor) -> Tensor:
    """Change × gradient, summed over a node's features: [n, positions, *units]."""
    if site.kind in RESIDUAL_KINDS + HEAD_KINDS:
        product: Any = torch.linalg.vecdot(change, gradient.to(change.dtype))
        return torch.as_tensor(product)
    return change * gradient


def atp(asked: Inquiry, *, rules: Context = nullcontext) -> Estimates:
    """Attribution patching: one pass over the source, one over the base, and one backward pass per metric.

    Args:
        asked: What is asked.
        rules: What holds during the base's passes: with `relevance_rules` this is RelP.

    Raises:
        UserError: A layer lacks a site, or nothing can be differentiated there.
        RunError: An estimate is not finite.
    """

    def answer(prompts: Pass) -> Estimates:
        source, tally = asked.sources(prompts.prompts, asked.sites), Tally()

        def use(site: Site, metric: int, activation: Tensor, gradient: Tensor) -> None:
            change = difference(site, source[site], activation)
            tally.add(site, metric, contribution(site, change, gradient))

        values = differentiated(
            asked.model,
            asked.anatomy,
            prompts,
            asked.metric,
            asked.sites,
            use,
            rules=rules,
            checkpointing=asked.batching.checkpointing,
        )
        asked.tick(len(prompts.tokens))
        return tally.estimates(values)

    return asked.answered(answer)
