"""Attention patterns of chosen layers, one layer at a time, within a budget of memory.

A forward pass goes through the model's own attention; beside it the asked-for layers' probabilities are
computed from the same q, k and mask, shown to a visitor and forgotten. The pass ends after the last layer
asked for. What the pattern gives for `z` is compared with what the model's own attention gave, every time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp_cli.engine.capture import TOKENS_PER_PASS
from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.instrument import layer_of
from mechinterp_cli.engine.proof import FLOAT32_TOLERANCE, NOISE_FACTOR
from mechinterp_cli.engine.wavefront import check_finite
from mechinterp_cli.errors import ProofError, RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.interface import (
    AttentionCall,
    SoftmaxRule,
    intercepted,
    masked_scores,
    softmax,
    weigh,
)

BUDGET = 256 * 2**20
"""Bytes that patterns take at most unless said otherwise."""
WORKING_COPIES = 6
"""Tensors as large as a block of scores that are alive at once while its softmax is taken."""
SMALLEST_SCALE = 1e-3
"""Of the layer's largest |z|: a head whose z is smaller yet is compared with this."""

PatternVisitor = Callable[[int, Tensor, slice, slice], None]
"""Gets a layer, its pattern [prompts, heads, queries, keys], which prompts these are and which query heads.

The pattern is forgotten after the call: keep numbers made from it, not the tensor.
"""


@dataclass(frozen=True)
class PatternProof:
    """How well the patterns explain what the model's own attention gave.

    Deviations are the largest |pattern · v − z| of any head, as a share of that head's largest |z|.
    """

    by_layer: Mapping[int, float] = field(default_factory=dict)
    tolerance: float = FLOAT32_TOLERANCE
    """What was allowed; in half precision the largest that was allowed in any layer."""

    @property
    def deviation(self) -> float:
        """The largest of all layers."""
        return max(self.by_layer.values(), default=0.0)


def attention_patterns(
    model: nn.Module,
    anatomy: Anatomy,
    tokens: Tensor,
    layers: Sequence[int],
    visit: PatternVisitor,
    *,
    budget: int = BUDGET,
    tick: Callable[[int], None] = lambda done: None,
) -> PatternProof:
    """Show `visit` the attention probabilities that the model really uses, layer by layer.

    Prompts are taken in chunks, and where one prompt's layer is beyond the budget, its heads too. At no time is
    more than one layer's pattern alive.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] of one length.
        layers: Which layers.
        visit: Called for every layer and chunk as `visit(layer, pattern, prompts, heads)`.
        budget: Bytes that a pattern and the scores it is made from may take together.
        tick: Called with the number of (prompt, layer) pairs that are done.

    Returns:
        What was proved.

    Raises:
        UserError: A layer has no softmax attention that can be seen; says which and why.
        RunError: One head's pattern is beyond the budget, or a layer gives NaN or infinity.
        ProofError: A pattern does not give the model's own z.
    """
    wanted = frozenset(layers)
    if not wanted or not len(tokens):
        return PatternProof()
    check_layers(anatomy, layers)
    sizes = Sizes.of(model, anatomy, wanted, tokens.shape[1], budget)
    reader = _Reader(anatomy, layer_of(model, anatomy), wanted, visit, sizes, tick)
    last = attention_module(model, anatomy, max(wanted))
    for lo in range(0, len(tokens), sizes.prompts):
        reader.begin(lo)
        with intercepted(model, reader):
            forward_until(model, tokens[lo : lo + sizes.prompts], last, lambda _: reader.seen == wanted)
        reader.check_complete()
    return PatternProof(dict(sorted(reader.deviations.items())), reader.tolerance)


def check_layers(anatomy: Anatomy, layers: Sequence[int]) -> None:
    """Refuse layers without attention patterns.

    Raises:
        UserError: Names the layers and the reason of the first.
    """
    without = [layer for layer in sorted(set(layers)) if "pattern" in anatomy.layers[layer].missing]
    if not without:
        return
    named = f"layer {without[0]} has" if len(without) == 1 else f"layers {', '.join(map(str, without))} have"
    seen = [layer.index for layer in anatomy.layers if "pattern" not in layer.missing]
    raise UserError(
        f"{named} no attention pattern: {anatomy.layers[without[0]].missing['pattern']}",
        f"Layers of this model that have one: {', '.join(map(str, seen)) or 'none'}.",
    )


def attention_module(model: nn.Module, anatomy: Anatomy, layer: int) -> nn.Module:
    """The module of a layer that calls the attention function."""
    found = anatomy.layers[layer]
    return model.get_submodule(found.attention or found.module)


@dataclass(frozen=True)
class Sizes:
    """How much is taken at once so that memory stays within the budget: half for the pattern, half for its making."""

    prompts: int
    """Of a forward pass."""
    heads: int
    """Of a pattern."""
    block: int
    """Bytes of the scores whose softmax is taken at once."""

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy, layers: frozenset[int], length: int, budget: int) -> "Sizes":
        """Sizes for prompts of `length` tokens.

        Raises:
            RunError: The budget does not hold one head's pattern; says how much does.
        """
        heads = max(found.query for found in (anatomy.layers[i].heads for i in layers) if found is not None)
        one = length * max(length, WORKING_COPIES) * 4
        fitting = budget // 2 // one
        if fitting == 0:
            raise RunError(
                f"the attention pattern of one head on {length} tokens needs {2 * one / 2**20:.1f} MiB, "
                f"the budget is {budget / 2**20:.1f} MiB",
                "Allow more memory or use shorter prompts.",
            )
        prompts = max(1, min(fitting // heads, TOKENS_PER_PASS // length))
        return cls(prompts, min(heads, fitting), budget // 2 // WORKING_COPIES)


class _Reader:
    """Answers a model's attention calls natively and shows the wanted layers' patterns to a visitor."""

    def __init__(
        self,
        anatomy: Anatomy,
        index_of: Mapping[int, int],
        wanted: frozenset[int],
        visit: PatternVisitor,
        sizes: Sizes,
        tick: Callable[[int], None],
    ) -> None:
        self.index_of = index_of
        self.wanted = wanted
        self.visit = visit
        self.sizes = sizes
        self.tick = tick
        self.eager = anatomy.attn_implementation == "eager"
        self.start = 0
        self.done = 0
        self.seen: set[int] = set()
        self.deviations: dict[int, float] = {}
        self.tolerance = FLOAT32_TOLERANCE

    def begin(self, start: int) -> None:
        """Get ready for a pass whose first prompt is `start`."""
        self.start, self.seen = start, set()

    def check_complete(self) -> None:
        """Raise a ProofError if a layer's attention was not called."""
        if self.seen != self.wanted:
            raise ProofError(
                f"layer {min(self.wanted - self.seen)}: its attention was not called in a forward pass",
                "Leave the layer out, and please report the model.",
            )

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """Handler of an attention call: the model's own z, whatever is looked at."""
        layer = self.index_of.get(id(call.module), -1)
        if layer not in self.wanted:
            return call.native(call.q, call.k, call.v, call.mask)
        if layer in self.seen:
            raise ProofError(
                f"layer {layer} calls its attention more than once in a forward pass", "Leave the layer out."
            )
        z = call.native(call.q, call.k, call.v, call.mask)[0]  # an eager layer's own pattern is let go here
        check_finite(z, layer, "its attention")
        self._show(layer, call, z)
        self.seen.add(layer)
        self.done += len(z)
        self.tick(self.done)
        return z, None

    def _show(self, layer: int, call: AttentionCall, z: Float[Tensor, "b q h dv"]) -> None:
        """Show a layer's pattern, some heads at a time, and compare what each gives with z."""
        prompts = slice(self.start, self.start + len(z))
        smallest = float(z.abs().max()) * SMALLEST_SCALE
        for lo in range(0, call.q.shape[1], self.sizes.heads):
            heads = slice(lo, min(lo + self.sizes.heads, call.q.shape[1]))
            maker = PatternMaker.of(call, heads, in_own_dtype=self.eager)
            pattern, errors = maker.pattern(z[:, :, heads], self.sizes.block, smallest)
            self._judge(layer, errors, z.dtype)
            self.visit(layer, pattern, prompts, heads)
            del pattern  # before the next heads' is made

    def _judge(self, layer: int, errors: "Errors", dtype: torch.dtype) -> None:
        allowed = FLOAT32_TOLERANCE
        if dtype.itemsize < 4:
            allowed = NOISE_FACTOR * max(torch.finfo(dtype).eps, errors.rounding)
            self.tolerance = max(self.tolerance, allowed)
        self.deviations[layer] = max(self.deviations.get(layer, 0.0), errors.deviation)
        if not errors.deviation <= allowed:
            raise ProofError(
                f"layer {layer}: the attention pattern gives z wrong by {errors.deviation:.1e} of its scale, "
                f"{allowed:.0e} are allowed",
                "The layer's attention does more than scaling, soft-cap, sinks and mask; leave the layer out.",
            )


@dataclass(frozen=True)
class Errors:
    """Of a pattern, as a share of each head's largest |z|: against the model, and between two ways of rounding."""

    deviation: float
    rounding: float


@dataclass(frozen=True, eq=False)
class PatternMaker:
    """Some heads of an attention call, ready to have their probabilities computed by blocks of queries.

    Args:
        rule: How scores become probabilities, for these heads.
        q: Queries [prompts, heads, queries, d].
        k: Keys [prompts, heads, keys, d], one per query head.
        v: Values [prompts, heads, keys, dv], one per query head.
        mask: The call's mask for these heads.
        in_own_dtype: Whether scores are rounded to the model's dtype, as eager attention rounds them; sdpa
            keeps them in float32.
    """

    rule: SoftmaxRule
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    in_own_dtype: bool

    @classmethod
    def of(cls, call: AttentionCall, heads: slice, *, in_own_dtype: bool) -> "PatternMaker":
        """Cut some query heads out of a call."""
        rule = SoftmaxRule.of(call)
        if rule.sinks is not None:
            rule = replace(rule, sinks=rule.sinks[heads])
        shared = torch.arange(call.q.shape[1], device=call.q.device)[heads] // (call.q.shape[1] // call.k.shape[1])
        mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask[:, heads]
        return cls(rule, call.q[:, heads], call.k[:, shared], call.v[:, shared], mask, in_own_dtype)

    def pattern(self, z: Float[Tensor, "b q h dv"], block: int, smallest: float) -> tuple[Tensor, Errors]:
        """The pattern [prompts, heads, queries, keys] and how far what it gives is from `z`.

        Args:
            z: What the model's own attention gave for these heads.
            block: Bytes of a block of scores.
            smallest: The least that a head's errors are compared with.
        """
        prompts, heads, queries, _ = self.q.shape
        keys = self.k.shape[2]
        scale = z.abs().amax((0, 1, 3)).float().clamp(min=max(smallest, torch.finfo(torch.float32).tiny))
        step = max(1, block // (prompts * heads * keys * 4))
        parts = [slice(lo, min(lo + step, queries)) for lo in range(0, queries, step)]
        narrow = z.dtype.itemsize < 4
        pattern: Tensor | None = None
        deviation, rounding = torch.zeros(()), torch.zeros(())
        for rows in parts:
            part = self._rows(rows, own_dtype=self.in_own_dtype)
            deviation = torch.maximum(deviation, self._gap(part, z[:, rows], scale).cpu())
            if narrow:
                other = self._rows(rows, own_dtype=not self.in_own_dtype)
                rounding = torch.maximum(rounding, self._gap(other, weigh(part.to(self.v.dtype), self.v), scale).cpu())
            if len(parts) == 1:
                pattern = part
            else:
                pattern = part.new_empty(prompts, heads, queries, keys) if pattern is None else pattern
                pattern[:, :, rows] = part
        assert pattern is not None
        return pattern, Errors(float(deviation), float(rounding))

    def _gap(self, part: Float[Tensor, "b h q k"], z: Float[Tensor, "b q h dv"], scale: Tensor) -> Tensor:
        """Largest |pattern · v − z| as a share of each head's scale."""
        own = weigh(part.to(self.v.dtype), self.v).float()
        return ((own - z.float()).abs().amax((0, 1, 3)) / scale).max()

    def _rows(self, rows: slice, *, own_dtype: bool) -> Float[Tensor, "b h q k"]:
        """Probabilities of some queries over all keys."""
        q = self.q[:, :, rows]
        q, k = (q, self.k) if own_dtype else (q.float(), self.k.float())
        return softmax(self.rule, masked_scores(self.rule, q, k, mask_rows(self.mask, rows, self.q, self.k)))


def mask_rows(mask: Tensor | None, rows: slice, q: Tensor, k: Tensor) -> Tensor:
    """The rows of a call's mask for some of its queries [batch or 1, heads or 1, queries, keys]; None is causal.

    Args:
        mask: As the layer got it.
        rows: Which queries, with a start and a stop.
        q: All queries [prompts, heads, queries, d].
        k: All keys [prompts, kv_heads, keys, d].
    """
    if mask is not None:
        return mask if mask.shape[-2] == 1 else mask[..., rows, :]
    queries, keys = q.shape[2], k.shape[2]
    visible = torch.ones(rows.stop - rows.start, keys, dtype=torch.bool, device=q.device)
    return visible.tril(keys - queries + rows.start)[None, None]
