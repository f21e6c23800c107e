"""How far back each layer's attention sees: sliding windows and chunks, found from the masks and not from names."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mechinterp_cli.engine.early import forward_until
from mechinterp_cli.engine.instrument import layer_of
from mechinterp_cli.engine.patterns import attention_module, check_layers, mask_rows
from mechinterp_cli.errors import UserError
from mechinterp_cli.models.anatomy import Anatomy
from mechinterp_cli.models.interface import AttentionCall, additive, intercepted


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
