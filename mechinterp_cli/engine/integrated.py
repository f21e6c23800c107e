"""Integrated gradients on nodes, along the straight line from the base's embeddings to the source's.

Two quantities go by that name, and both are here. With α the place on the line and a(α) an activation there,
`ig_inputs` is the mean gradient ∫ ∂M/∂a dα times a_source − a_base (complete at `embed` alone), and `conductance` is
∫ ∂M/∂a · da (Dhamdhere et al., 1805.12233), whose sum over any cut of the network is M(end) − M(base).
Integrals are sums by the midpoint rule.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_cli.engine.atp import Estimates, Inquiry, Tally, contribution, difference
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Pass, differentiated, observed
from mechinterp_cli.engine.softmax_fix import widened

Changes = Callable[[range], Callable[[Site], Tensor]]
"""Steps to site to what gradients are multiplied with there, [steps or 1, n, positions, *features]."""


def ig_inputs(asked: Inquiry, steps: int) -> Estimates:
    """Mean gradient along the line, times a_source − a_base.

    Args:
        asked: What is asked; the line ends at the sources' `embed`.
        steps: So many points on the line, at (k + ½) / steps.

    Raises:
        UserError: A layer lacks a site, or nothing can be differentiated there.
        RunError: An estimate is not finite.
        ValueError: Fewer than one step.
    """

    def answer(prompts: Pass) -> Estimates:
        sites = asked.sites | {EMBED}
        source = asked.sources(prompts.prompts, sites)
        base, here = observed(asked.model, asked.anatomy, prompts, asked.metric, sites)
        line = _Line.of(asked, prompts, here[EMBED], source[EMBED], steps)
        change = {site: difference(site, source[site], here[site]).div_(steps)[None] for site in asked.sites}
        end, _ = observed(asked.model, asked.anatomy, line.at([1.0]), asked.metric, ())
        return line.integral(lambda _steps: change.__getitem__).estimates(base, end)

    return asked.answered(answer)


def conductance(asked: Inquiry, steps: int) -> Estimates:
    """Σ over steps of the gradient in the middle of a step, times the activation's change over the step.

    Args:
        asked: What is asked; of the sources only `embed` is looked at.
        steps: Into so many the line is cut.

    Raises:
        UserError: A layer lacks a site, or nothing can be differentiated there.
        RunError: An estimate is not finite.
        ValueError: Fewer than one step.
    """

    def answer(prompts: Pass) -> Estimates:
        source = asked.sources(prompts.prompts, {EMBED})
        _, here = observed(asked.model, asked.anatomy, prompts, asked.metric, {EMBED})
        line = _Line.of(asked, prompts, here[EMBED], source[EMBED], steps)
        ends: list[Tensor] = []

        def changes(chunk: range) -> Callable[[Site], Tensor]:
            marks = line.at([k / steps for k in range(chunk.start, chunk.stop + 1)])
            values, seen = observed(asked.model, asked.anatomy, marks, asked.metric, asked.sites)
            ends.append(line.by_step(values))

            def change(site: Site) -> Tensor:
                along = line.by_step(seen[site])
                return line.by_step(difference(site, along[1:].flatten(0, 1), along[:-1].flatten(0, 1)))

            return change

        tally = line.integral(changes)
        return tally.estimates(ends[0][0], ends[-1][-1])

    return asked.answered(answer)


@dataclass(frozen=True, eq=False)
class _Line:
    """The line for some prompts, cut into steps; several steps share a pass, as if they were more prompts."""

    asked: Inquiry
    prompts: Pass
    base: Float[Tensor, "n positions d_model"]
    source: Float[Tensor, "n positions d_model"]
    steps: int

    @classmethod
    def of(cls, asked: Inquiry, prompts: Pass, base: Tensor, source: Tensor, steps: int) -> "_Line":
        if steps < 1:
            raise ValueError(f"{steps} steps: at least one is needed")
        source = source if source.ndim < base.ndim else source[:, : base.shape[1]]
        base = widened(base)  # in half precision neighbouring places would be one
        return cls(asked, prompts, base, source.to(base).expand_as(base), steps)

    def at(self, places: Collection[float]) -> Pass:
        """The prompts at places on the line, one place after the other."""
        weights = torch.tensor(list(places), dtype=self.base.dtype, device=self.base.device)
        embed = torch.lerp(self.base[None], self.source[None], weights[:, None, None, None])
        own, times = self.prompts, len(places)
        return Pass(own.tokens.repeat(times, 1), own.read.repeat(times), own.prompts.repeat(times), embed.flatten(0, 1))

    def by_step(self, x: Tensor) -> Tensor:
        """[steps × n, …] as [steps, n, …]."""
        return torch.unflatten(x, 0, (-1, len(self.base)))

    def _chunks(self) -> Iterator[range]:
        size = max(1, self.asked.batching.at_once(self.base.shape[1]) // len(self.base))
        for start in range(0, self.steps, size):
            yield range(start, min(start + size, self.steps))

    def integral(self, changes: Changes) -> Tally:
        """Σ over steps of the gradient in the middle of a step × change."""
        asked, tally = self.asked, Tally()
        for chunk in self._chunks():
            change = changes(chunk)

            def use(
                site: Site,
                metric: int,
                _activation: Tensor,
                gradient: Tensor,
                change: Callable[[Site], Tensor] = change,
            ) -> None:
                tally.add(site, metric, contribution(site, change(site), self.by_step(gradient)).sum(0))

            differentiated(
                asked.model,
                asked.anatomy,
                self.at([(k + 0.5) / self.steps for k in chunk]),
                asked.metric,
                asked.sites,
                use,
                checkpointing=asked.batching.checkpointing,
            )
            asked.tick(len(chunk) * len(self.base))
        return tally
