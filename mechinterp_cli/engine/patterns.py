"""Attention patterns of chosen layers, one layer at a time, within a budget of memory.

A forward pass goes through the model's own attention; beside it the asked-for layers' probabilities are
computed from the same q, k and mask, shown to a visitor and forgotten. The pass ends after the last layer
asked for. What the pattern gives for `z` is compared with what the model's own attention gave, every time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp_cli.engine.capture import TOKENS_PER_PASS
from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.instrument import layer_of
from mechinterp_cli.engine.probabilities import Errors, PatternMaker, mask_rows
from mechinterp_cli.engine.proof import FLOAT32_TOLERANCE, NOISE_FACTOR
from mechinterp_cli.engine.wavefront import check_finite
from mechinterp_cli.errors import ProofError, RunError, UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.interface import AttentionCall, additive, intercepted

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

    def _judge(self, layer: int, errors: Errors, dtype: torch.dtype) -> None:
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


def reach(model: nn.Module, anatomy: Anatomy, tokens: Tensor, layers: Sequence[int]) -> dict[int, int]:
    """How many tokens back each layer sees, the query itself included, found from the mask it is given.

    A sliding window gives its width, chunked attention the length of a chunk, full attention the prompt's length;
    so does a mask with holes (learned sparse attention), which is no window.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] of the longest prompts; one forward pass on the first of them is made.
        layers: Which layers.

    Raises:
        UserError: A layer has no softmax attention that can be seen.
    """
    check_layers(anatomy, layers)
    wanted, index_of = frozenset(layers), layer_of(model, anatomy)
    found: dict[int, int] = {}
    if not wanted:
        return found

    def handler(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        layer = index_of.get(id(call.module), -1)
        if layer in wanted:
            found[layer] = _farthest(call)
        return call.native(call.q, call.k, call.v, call.mask)

    last = attention_module(model, anatomy, max(wanted))
    with intercepted(model, handler):
        forward_until(model, tokens[:1], last, lambda _: wanted <= found.keys())
    return dict(sorted(found.items()))


def _farthest(call: AttentionCall) -> int:
    """The largest distance, counted from 1, between a query and a key that it sees; all keys for a mask with holes."""
    queries, keys = call.q.shape[2], call.k.shape[2]
    farthest = 0
    for rows in _blocks(queries, max(1, 2**22 // keys)):
        mask = additive(mask_rows(call.mask, rows, call.q, call.k), rows.stop - rows.start, keys, call.q)
        seen = (mask > torch.finfo(mask.dtype).min / 2).flatten(0, 1).any(0).expand(rows.stop - rows.start, -1)
        first = seen.int().argmax(-1)  # the first key that is seen
        back = torch.arange(rows.start, rows.stop, device=first.device) + keys - queries - first + 1
        if bool((seen.sum(-1) < back).any()):
            return keys
        farthest = max(farthest, int(back.amax()))
    return farthest


def _blocks(total: int, step: int) -> Iterator[slice]:
    return (slice(lo, min(lo + step, total)) for lo in range(0, total, step))


def check_reach(model: nn.Module, anatomy: Anatomy, tokens: Tensor, layers: Sequence[int]) -> None:
    """Refuse prompts that are longer than what some layer sees.

    Args:
        model: The model, in evaluation mode.
        anatomy: Its anatomy.
        tokens: Ids [prompts, positions] of the longest prompts.
        layers: The layers whose attention is looked at.

    Raises:
        UserError: Names the layers, how far the first of them sees, and the prompts' length.
    """
    length = tokens.shape[1]
    short = {layer: seen for layer, seen in reach(model, anatomy, tokens, layers).items() if seen < length}
    if not short:
        return
    nearest = min(short.values())
    named = ", ".join(str(layer) for layer, seen in short.items() if seen == nearest)
    fitting = [layer for layer in sorted(set(layers)) if layer not in short]
    others = f", or take layers that see further ({', '.join(map(str, fitting))})" if fitting else ""
    raise UserError(
        f"a prompt of {length} tokens is longer than the {nearest} tokens that attention sees back "
        f"(sliding window or chunk) in layer{'s' if ',' in named else ''} {named}",
        f"Use prompts of at most {nearest} tokens{others}.",
    )
