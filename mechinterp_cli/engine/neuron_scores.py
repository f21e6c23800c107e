"""Scores of embed, heads and single neurons from gradients: the sums of the scores of all edges that leave them.

The estimate of an item is Σ over positions of (what it adds in the source − what it adds in the base) · ∂M/∂(what its
block adds). A block is `embed`, a layer's attention or a layer's MLP. All readers of a part together have the gradient
at its block's own output, so that one backward pass serves all items; for a neuron the product is with its activation:
(neuron_source − neuron_base) · (W_downᵀ ∂M/∂mlp_out). The estimates of an MLP's neurons add up to the MLP's.

Gradients are taken where `edge_scores` takes them, and signs are its signs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_cli.engine.atp import Batching
from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.engine.edge_scores import (
    EdgeScores,
    Method,
    Pairs,
    Rule,
    in_lots,
    line_of,
    refuse_infinite,
)
from mechinterp_cli.engine.edits import Site
from mechinterp_cli.engine.gradients import EMBED, Context, Differentiable, Pass, differentiated, observed
from mechinterp_cli.engine.instrument import visiting
from mechinterp_cli.engine.metric_slopes import Sloped, refuse_flat
from mechinterp_cli.engine.neuron_wiring import NeuronWiring
from mechinterp_cli.engine.softmax_fix import widened

TOKENS_PER_PASS = 192
"""Tokens, those of all steps together, that one pass takes on a CPU: more take memory and save little time."""


def neuron_scores(
    wiring: NeuronWiring,
    pairs: Pairs,
    metric: Differentiable,
    *,
    method: Method = "eap_ig_inputs",
    steps: int = 5,
    rule: Rule = "right",
    batching: Batching | None = None,
    tick: Callable[[int], None] = lambda _passes: None,
) -> EdgeScores:
    """Estimate what patching each item would do: `edge_scores` summed over what leaves it.

    Args:
        wiring: The model as its graph, MLPs by neuron.
        pairs: Prompts of one length.
        metric: One metric, [n, 1].
        method: Which gradient is taken.
        steps: Places on the line, for the two methods that have one.
        rule: Where these places are.
        batching: How prompts and steps are shared out over passes; it changes no number but by rounding.
        tick: Told of every backward pass how many prompts (and steps) it was for.

    Returns:
        Estimates in which items stand in place of edges.

    Raises:
        UserError: The metric has no gradient where the method takes it.
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
    refuse_infinite(found, wiring.items.name)
    return found


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is asked."""

    wiring: NeuronWiring
    pairs: Pairs
    metric: Differentiable
    batching: Batching
    tick: Callable[[int], None]


@dataclass(frozen=True, eq=False)
class _Lot:
    """Some prompts: activations of both streams, and the scores so far.

    Args:
        asked: What is asked.
        prompts: Indices of the prompts, [n].
        seen: Activations of the base and of the source.
        values: The metric at both, [n, 2].
        slopes: Sum of the sizes of its gradient with respect to the logits at both, [n, 2].
        found: Estimates, which are added to.
    """

    asked: _Asked
    prompts: Int[Tensor, " n"]
    seen: Sequence[dict[Site, Tensor]]
    values: Float[Tensor, "n 2"]
    slopes: Float[Tensor, "n 2"]
    found: Float[Tensor, "n spans items"] = field(init=False)

    def __post_init__(self) -> None:
        """Begin at 0."""
        items = self.items
        shape = len(self.prompts), len(items.graph.spans), items.per_span
        object.__setattr__(self, "found", widened(self.seen[0][EMBED]).new_zeros(shape))

    @classmethod
    def of(cls, asked: _Asked, prompts: Tensor) -> "_Lot":
        """Run both streams once."""
        sloped, wiring = Sloped(asked.metric), asked.wiring.wiring
        sites = set(asked.wiring.sites) | {block.site for block in _blocks(asked.wiring)}
        seen, values = [], []
        for tokens in (asked.pairs.base, asked.pairs.source):
            run = Pass(tokens[prompts], asked.pairs.read[prompts], prompts)
            value, activations = observed(wiring.model, wiring.anatomy, run, sloped, sites)
            seen.append(activations)
            values.append(value.double().cpu())
        return cls(asked, prompts, seen, torch.cat(values, 1), torch.stack(sloped.slopes, 1))

    @property
    def items(self) -> Items:
        """What is scored."""
        return self.asked.wiring.items

    def scored(self, line: Sequence[float], *, by_block: bool) -> EdgeScores:
        """The estimates, from the mean gradient over places on a line.

        Args:
            line: The places.
            by_block: Whether what each block adds goes along the line by itself, or the embeddings with all else.
        """
        blocks = list(_blocks(self.asked.wiring))
        length = self.seen[0][EMBED].shape[1]
        size = max(1, self.asked.batching.at_once(length) // len(self.prompts))
        for moved, together in [(block, [block]) for block in blocks] if by_block else [(blocks[0], blocks)]:
            sums: dict[Site, Tensor] = {}
            for start in range(0, len(line), size):
                for site, gradient in self._gradients(moved, together, line[start : start + size]).items():
                    sums[site] = sums[site].add_(gradient) if site in sums else gradient
            for block in together:
                self._contract(block, sums.pop(block.site).div_(len(line)))
        base, source = self.values.numpy().T
        return EdgeScores(self.found.flatten(1).float().cpu().numpy(), base, source)

    def _gradients(
        self, moved: "_Block", wanted: Sequence["_Block"], at: Sequence[float]
    ) -> Mapping[Site, Float[Tensor, "n positions d_model"]]:
        """Gradients at blocks' outputs, summed over some places on the line that one block's output is moved on."""
        asked, times = self.asked, len(at)
        prompts, wiring = self.prompts.repeat(times), asked.wiring.wiring
        embed, rules = self._put(moved, at)
        run = Pass(asked.pairs.base[prompts], asked.pairs.read[prompts], prompts, embed)
        found: dict[Site, Tensor] = {}

        def use(site: Site, _metric: int, _activation: Tensor, gradient: Tensor) -> None:
            found[site] = torch.unflatten(widened(gradient.detach()), 0, (times, -1)).sum(0)

        differentiated(
            wiring.model,
            wiring.anatomy,
            run,
            asked.metric,
            {block.site for block in wanted},
            use,
            rules=rules,
            checkpointing=asked.batching.checkpointing,
        )
        asked.tick(len(prompts))
        return found

    def _put(self, block: "_Block", at: Sequence[float]) -> tuple[Tensor | None, Context]:
        """What enters layer 0, and what puts the block's activation there, at some places on the line."""
        base, source = (seen[block.site] for seen in self.seen)
        weights = torch.tensor(at, dtype=base.dtype, device=base.device)
        along = torch.lerp(base[None], source[None], weights.view(-1, 1, 1, 1)).flatten(0, 1)
        if block.site == EMBED:
            return (None, nullcontext) if set(at) == {0.0} else (along, nullcontext)
        wiring = self.asked.wiring.wiring

        def put() -> AbstractContextManager[None]:
            wanted = {block.site.layer: frozenset({block.site.kind})}
            return visiting(wiring.model, wiring.anatomy, wanted, lambda _site, _activation: along)

        return None, put

    def _contract(self, block: "_Block", gradient: Float[Tensor, "n positions d_model"]) -> None:
        """Add change · gradient, summed over positions and features, for a block's items."""
        found = self._products(block, gradient)
        spans = self.asked.pairs.spans
        for span in range(self.found.shape[1]):
            own = found
            if spans is not None:
                inside = (spans[self.prompts] == span).to(found.device)
                own = found * inside[..., None]
            self.found[:, span, block.first : block.last] += own.sum(1)

    def _products(self, block: "_Block", gradient: Tensor) -> Float[Tensor, "n positions items"]:
        """Change · gradient by position, summed over an item's features."""
        wiring, layer = self.asked.wiring, block.site.layer
        base, source = self.seen
        if block.site == EMBED:
            change = widened(source[EMBED]) - widened(base[EMBED])
            embedded: Tensor = torch.linalg.vecdot(change, gradient)
            return embedded[..., None]
        if block.site.kind == "mlp_out":
            return (wiring.neurons(layer, source) - wiring.neurons(layer, base)) * wiring.ways[layer].back(gradient)
        change = wiring.heads(layer, source) - wiring.heads(layer, base)
        into = gradient @ wiring.output(layer, gradient).T
        found: Tensor = torch.linalg.vecdot(change, into.view(change.shape))
        return found


@dataclass(frozen=True)
class _Block:
    """Items `first` … `last` − 1 of a span, which add to the stream at one site."""

    site: Site
    first: int
    last: int


def _blocks(wiring: NeuronWiring) -> Iterator[_Block]:
    """What adds to the stream at one site, and the items that it consists of."""
    items, sources = wiring.items, wiring.items.graph.sources
    for index, source in enumerate(sources):
        own = items.within(index)
        if source.kind == "embed":
            yield _Block(EMBED, own.start, own.stop)
        elif source.kind == "mlp":
            yield _Block(Site("mlp_out", source.layer), own.start, own.stop)
        elif source.head == 0:
            heads = sum(other.kind == "head" and other.layer == source.layer for other in sources)
            yield _Block(Site("attn_out", source.layer), own.start, own.start + heads)
