"""Scores of a circuit's edges from gradients: EAP and its kin.

The estimate of an edge u→v is Σ over positions of (u's output in the source − u's output in the base) · ∂M/∂(the
stream that v reads), to first order the change M(patched) − M(base) when v alone reads the source's u. With the clean
prompt as base an edge that helps has a *negative* estimate of a metric that is better the higher it is; the published
*score* is its negative: what the metric loses. Four gradients are taken:

- `eap` (2310.10348): at the base.
- `eap_ig_inputs` (2403.17806): the mean over m places on the line between the embeddings, e_source + (k/m)(e_base −
  e_source), k = 1 … m as published (`right`; `left` is k = 0 … m − 1, `midpoint` k − ½), the rest following freely.
- `clean_corrupted`: the mean of the gradients at the base and at the source.
- `eap_ig_activations` (2403.17806): for the edges of one block (a layer's heads, an MLP, `embed`), the mean while what
  the block adds to the stream goes the same m places from the source's to the base's, the rest being the base's.

A prompt's numbers depend on no other prompt and on no batch. Usage:

    wiring = wired(model, anatomy, Graph.of(anatomy))
    found = edge_scores(wiring, Pairs(clean, corrupt, read), metric, method="eap_ig_inputs", steps=5)
    found.scores            # [edges], the mean over prompts; edge e goes graph.edge_source[e] → graph.edge_target[e]
    found.by_prompt         # [prompts, edges] float32: estimates, for resampling
    found.of_items(wiring.graph)  # the same by items: edges again, or nodes

A node's number is the sum over its edges: since the stream is a sum, that is the gradient at the node's own output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.atp import Batching
from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Context, Differentiable, Pass, observed
from mechinterp_cli.engine.instrument import visiting
from mechinterp_cli.engine.metric_slopes import Sloped, refuse_flat
from mechinterp_cli.engine.target_gradients import Group, target_gradients
from mechinterp_cli.engine.wiring import Wiring
from mechinterp_cli.errors import RunError

Method = Literal["eap", "eap_ig_inputs", "eap_ig_activations", "clean_corrupted"]
Rule = Literal["right", "midpoint", "left"]

TOKENS_PER_PASS = 192
"""Tokens, those of all steps together, that one pass takes on a CPU: more take memory and save next to no time."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """Prompts of one length.

    Args:
        base: Ids of the stream that is patched into: the clean one.
        source: Ids of the stream that is patched from.
        read: The position of each prompt whose logits are measured.
        spans: For every position its span, as an index into the graph's `spans`; −1 for none. Not needed where the
            graph has one.
    """

    base: Int[Tensor, "prompts positions"]
    source: Int[Tensor, "prompts positions"]
    read: Int[Tensor, " prompts"]
    spans: Int[Tensor, "prompts positions"] | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError where prompts do not pair up."""
        shapes = {x.shape for x in (self.base, self.source, self.spans) if x is not None}
        if len(shapes) > 1 or len(self.read) != len(self.base):
            raise ValueError(f"base, source, spans and read do not fit: {sorted(shapes)}, {len(self.read)} reads")


@dataclass(frozen=True, eq=False)
class EdgeScores:
    """Estimates of edges, and the metric at both ends.

    Args:
        by_prompt: M(patched) − M(base) as estimated, float32; edges are numbered as in the graph.
        base: M at the base.
        source: M at the source.
    """

    by_prompt: Float[np.ndarray, "prompts edges"]
    base: Float[np.ndarray, " prompts"]
    source: Float[np.ndarray, " prompts"]

    @property
    def estimates(self) -> Float[np.ndarray, " edges"]:
        """The mean over prompts, float64."""
        return np.asarray(self.by_prompt.mean(axis=0, dtype=np.float64))

    @property
    def scores(self) -> Float[np.ndarray, " edges"]:
        """Positive: without the edge the metric is lower (with the clean prompt as base)."""
        return -self.estimates

    def of_items(self, graph: Graph) -> Float[np.ndarray, "prompts items"]:
        """Estimates by item of a graph: of edges, or of nodes, which are their edges' sums; float64.

        Args:
            graph: With the same edges.
        """
        if graph.granularity == "edge":
            return self.by_prompt.astype(np.float64)
        sums = [np.bincount(graph.edge_item, weights=row, minlength=graph.n_items) for row in self.by_prompt]
        return np.stack(sums)

    @classmethod
    def joined(cls, parts: Sequence["EdgeScores"]) -> "EdgeScores":
        """Those of several lots of prompts, one after the other."""
        fields = ("by_prompt", "base", "source")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def places(steps: int, rule: Rule = "right") -> tuple[float, ...]:
    """How far towards the source each step's place is, from 0 (the base) to 1.

    Args:
        steps: How many.
        rule: Of the Riemann sum; `right` has the base and not the source.

    Raises:
        ValueError: Fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least one is needed")
    shift = {"right": 0.0, "midpoint": 0.5, "left": 1.0}[rule]
    return tuple((steps - k + shift) / steps for k in range(1, steps + 1))


def edge_scores(
    wiring: Wiring,
    pairs: Pairs,
    metric: Differentiable,
    *,
    method: Method = "eap_ig_inputs",
    steps: int = 5,
    rule: Rule = "right",
    batching: Batching | None = None,
    tick: Callable[[int], None] = lambda _passes: None,
) -> EdgeScores:
    """Estimate what patching each edge of a graph would do.

    Args:
        wiring: The model as its graph.
        pairs: Prompts of one length.
        metric: One metric, [n, 1].
        method: Which gradient is taken.
        steps: Places on the line, for the two methods that have one.
        rule: Where these places are.
        batching: How prompts and steps are shared out over passes; it changes no number but by rounding.
        tick: Told of every backward pass how many prompts (and steps) it was for.

    Raises:
        UserError: The metric has no gradient where the method takes it, such as KL to the clean output at the clean
            prompt with `eap`.
        RunError: An estimate is not finite.
        ValueError: Fewer than one step.
    """
    asked = _Asked(wiring, pairs, metric, batching or Batching(TOKENS_PER_PASS), tick)
    line = line_of(method, steps, rule)

    def scored(prompts: Tensor) -> tuple[EdgeScores, Tensor]:
        lot = _Lot.of(asked, prompts)
        return lot.scored(line, by_block=method == "eap_ig_activations"), lot.slopes

    found, slopes = in_lots(pairs, asked.batching.at_once(pairs.base.shape[1] * len(line)), scored)
    if set(line) == {0.0}:
        refuse_flat(slopes, method)
    refuse_infinite(found, lambda edge: f"edge {wiring.graph.edge_name(edge)}")
    return found


def line_of(method: Method, steps: int, rule: Rule) -> tuple[float, ...]:
    """The places whose gradients a method takes the mean of, from 0 (the base) to 1 (the source).

    Raises:
        ValueError: Fewer than one step.
    """
    return {"eap": (0.0,), "clean_corrupted": (0.0, 1.0)}.get(method) or places(steps, rule)


def in_lots(
    pairs: Pairs, at_once: int, scored: Callable[[Int[Tensor, " n"]], tuple[EdgeScores, Tensor]]
) -> tuple[EdgeScores, Float[Tensor, "prompts 2"]]:
    """Estimates and slopes of all prompts, some at once.

    Args:
        pairs: The prompts.
        at_once: How many.
        scored: Estimates and slopes of the prompts of these indices.
    """
    parts, slopes = zip(*map(scored, torch.split(torch.arange(len(pairs.base)), at_once)), strict=True)
    return EdgeScores.joined(parts), torch.cat(slopes)


def refuse_infinite(found: EdgeScores, name: Callable[[int], str]) -> None:
    """Refuse estimates that are no numbers.

    Args:
        found: The estimates.
        name: What an estimate's number is called.

    Raises:
        RunError: One is not finite.
    """
    bad = np.flatnonzero(~np.isfinite(found.by_prompt).all(axis=0))
    if len(bad):
        raise RunError(f"the estimate of {name(int(bad[0]))} is NaN or infinite", "Try model.dtype: float32.")


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked."""

    wiring: Wiring
    pairs: Pairs
    metric: Differentiable
    batching: Batching
    tick: Callable[[int], None]


@dataclass(frozen=True, eq=False)
class _Lot:
    """Some prompts: what sources write in both streams, and the scores so far.

    Args:
        asked: What is asked.
        prompts: Indices of the prompts, [n].
        change: Outputs in the source − outputs in the base.
        seen: Activations of the base and of the source.
        values: The metric at both, [n, 2].
        slopes: Sum of the sizes of its gradient with respect to the logits at both, [n, 2].
        found: Estimates, which are added to.
    """

    asked: _Asked
    prompts: Int[Tensor, " n"]
    change: Float[Tensor, "n sources positions d_model"]
    seen: Sequence[dict[Site, Tensor]]
    values: Float[Tensor, "n 2"]
    slopes: Float[Tensor, "n 2"]
    found: Float[Tensor, "n edges"] = field(init=False)

    def __post_init__(self) -> None:
        """Begin at 0."""
        edges = self.asked.wiring.graph.n_edges
        object.__setattr__(self, "found", self.change.new_zeros(len(self.prompts), edges))

    @classmethod
    def of(cls, asked: _Asked, prompts: Tensor) -> "_Lot":
        """Run both streams once."""
        sloped = Sloped(asked.metric)
        sites = set(asked.wiring.sites)
        sites |= {Site("attn_out", layer.index) for layer in asked.wiring.anatomy.layers}
        seen, values = [], []
        for tokens in (asked.pairs.base, asked.pairs.source):
            run = Pass(tokens[prompts], asked.pairs.read[prompts], prompts)
            value, activations = observed(asked.wiring.model, asked.wiring.anatomy, run, sloped, sites)
            seen.append(activations)
            values.append(value.double().cpu())
        change = asked.wiring.changed(*seen)
        return cls(asked, prompts, change, seen, torch.cat(values, 1), torch.stack(sloped.slopes, 1))

    def scored(self, line: Sequence[float], *, by_block: bool) -> EdgeScores:
        """The estimates, from the mean gradient over places on a line.

        Args:
            line: The places.
            by_block: Whether what each block adds goes along the line by itself, or the embeddings with all else.
        """
        graph = self.asked.wiring.graph
        blocks = list(self._blocks()) if by_block else [_Block(EMBED, 0, len(graph.sources))]
        size = max(1, self.asked.batching.at_once(self.change.shape[2]) // len(self.prompts))
        for block in blocks:
            for start in range(0, len(line), size):
                self._add(block, line[start : start + size], 1 / len(line))
        base, source = self.values.numpy().T
        return EdgeScores(self.found.float().cpu().numpy(), base, source)

    def _blocks(self) -> Iterator["_Block"]:
        """What adds to the stream at one site, and the sources that it consists of."""
        sources = self.asked.wiring.graph.sources
        for index, source in enumerate(sources):
            if source.kind == "embed":
                yield _Block(EMBED, index, index + 1)
            elif source.kind == "mlp":
                yield _Block(Site("mlp_out", source.layer), index, index + 1)
            elif source.head == 0:
                heads = sum(x.kind == "head" and x.layer == source.layer for x in sources)
                yield _Block(Site("attn_out", source.layer), index, index + heads)

    def _add(self, block: "_Block", at: Sequence[float], weight: float) -> None:
        """Add the products with the gradients at some places, each with a weight."""
        asked, times = self.asked, len(at)
        prompts = self.prompts.repeat(times)
        embed, rules = self._put(block, at)
        run = Pass(asked.pairs.base[prompts], asked.pairs.read[prompts], prompts, embed)
        gradients = target_gradients(
            asked.wiring,
            run,
            asked.metric,
            above=block.first,
            rules=rules,
            checkpointing=asked.batching.checkpointing,
        )
        for group, gradient in gradients:
            self._contract(block, group, torch.unflatten(gradient, 0, (times, -1)).sum(0).mul_(weight))
        asked.tick(len(prompts))

    def _put(self, block: "_Block", at: Sequence[float]) -> tuple[Tensor | None, Context]:
        """What enters layer 0, and what puts the block's activation there, at some places on the line."""
        base, source = (seen[block.site] for seen in self.seen)
        weights = torch.tensor(at, dtype=base.dtype, device=base.device)
        along = torch.lerp(base[None], source[None], weights.view(-1, 1, 1, 1)).flatten(0, 1)
        if block.site == EMBED:
            return (None, nullcontext) if set(at) == {0.0} else (along, nullcontext)
        wiring = self.asked.wiring

        def put() -> AbstractContextManager[None]:
            wanted = {block.site.layer: frozenset({block.site.kind})}
            return visiting(wiring.model, wiring.anatomy, wanted, lambda _site, _activation: along)

        return None, put

    def _contract(self, block: "_Block", group: Group, gradient: Float[Tensor, "n targets positions d_model"]) -> None:
        """Add change · gradient, summed over positions and features, for a block's sources and a group's targets."""
        graph = self.asked.wiring.graph
        last = min(block.last, group.reads)
        change = self.change[:, block.first : last].flatten(2).transpose(1, 2)
        for span in range(len(graph.spans)):
            start = span * graph.edges_per_span + int(graph.first[group.first])
            edges = self.found[:, start : start + group.size * group.reads]
            into = torch.unflatten(edges, 1, (group.size, group.reads))[:, :, block.first : last]
            into += self._within(span, gradient).flatten(2) @ change

    def _within(self, span: int, gradient: Tensor) -> Tensor:
        """Gradients at a span's positions, and 0 elsewhere."""
        spans = self.asked.pairs.spans
        if spans is None:
            return gradient
        inside = (spans[self.prompts] == span).to(gradient.device)
        return gradient * inside[:, None, :, None]


@dataclass(frozen=True)
class _Block:
    """Sources `first` … `last` − 1, which add to the stream at one site."""

    site: Site
    first: int
    last: int
