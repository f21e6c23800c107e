"""Random tokens, repeated: what heads that look back do on text without meaning (Olsson et al. 2209.11895).

A prompt is what the tokenizer puts first, then a block of random tokens `repeats` times over. The tokens of a block all
differ and are ordinary: no special tokens, and neither the most nor the least frequent ones. 2209.11895 leaves out 4 %
at either end. Frequencies are not at hand, so tokens are ranked by their id: the ids of byte-pair vocabularies rise as
merges get rarer. Tokenizers of symbols, which have few tokens, are not trimmed.

Nothing is asked, so there is no answer and no corrupt prompt. Spans: `first` and `second` are the tokens of the first
and of the second copy, in order; `end` is the last token.
"""

import itertools
import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.spans import END
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.vocabulary import Ordinary, trimmed_tokens

TwoOrMore = Annotated[int, Field(strict=True, ge=2)]
Lengths = TwoOrMore | Annotated[tuple[TwoOrMore, ...], Field(min_length=1)]
Shape = tuple[int, int]
"""Tokens in a block, and copies of it."""


class RepeatsOptions(GeneratedOptions):
    """Options of `repeats`: a block of random tokens, over and over; no answer."""

    task_name: ClassVar[str] = "repeats"
    has_answers: ClassVar[bool] = False
    name: Literal["repeats"] = "repeats"
    """The task."""
    block: Lengths = 20
    """Tokens in the block that is repeated, or a list of such lengths; `n` is shared out over all combinations."""
    repeats: Lengths = 2
    """Copies of the block, the first one included, or a list of such numbers."""
    trim: Annotated[float, Field(strict=True, ge=0, lt=0.4)] = 0.04
    """Share of the most frequent and of the least frequent tokens that is not used, ranked by token id."""


@builds(RepeatsOptions)
def build_repeats(options: RepeatsOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts, in turn over all combinations of `block` and `repeats`; each is its own cluster."""
    if encoder.chat_template:
        raise UserError("task.chat_template: repeated random tokens are no message", "Leave the key out.")
    shapes = _shapes(options)
    pool = trimmed_tokens(encoder, options.trim)
    for i, shape in enumerate(shapes):
        _check(shape, len(range(i, options.n, len(shapes))), pool, encoder)
    draw = Draw(options.seed)
    prompts: dict[tuple[int, ...], Prompt] = {}
    for i in range(options.n):
        prompt = _prompt(shapes[i % len(shapes)], i, pool, encoder, draw)
        while prompt.clean_tokens in prompts:
            prompt = _prompt(shapes[i % len(shapes)], i, pool, encoder, draw)
        prompts[prompt.clean_tokens] = prompt
    return Built(list(prompts.values()))


def _shapes(options: RepeatsOptions) -> list[Shape]:
    blocks, repeats = (
        dict.fromkeys(given if isinstance(given, tuple) else (given,)) for given in (options.block, options.repeats)
    )
    shapes = list(itertools.product(blocks, repeats))
    if options.n < len(shapes):
        cause = f"task.n: {options.n} prompts are fewer than the {len(shapes)} combinations of block and repeats"
        raise UserError(cause, f"Set task.n to {len(shapes)} or more.")
    return shapes


def _check(shape: Shape, n: int, pool: Ordinary, encoder: Encoder) -> None:
    """Check that a model can take prompts of this shape, and that there are `n` of them."""
    block, repeats = shape
    length = len(encoder.prefix) + block * repeats
    if encoder.max_length is not None and length > encoder.max_length:
        before = f" and {len(encoder.prefix)} put before them" if encoder.prefix else ""
        tokens = f"{repeats} x {block} tokens{before}"
        cause = f"task.block: {tokens} are more than the model's context of {encoder.max_length}"
        raise UserError(cause, "Lower task.block or task.repeats.")
    if block > len(pool.tokens):
        kept = f", of which task.trim leaves {len(pool.tokens)}" if len(pool.tokens) < pool.total else ""
        found = f"this tokenizer has {pool.total} ordinary ones{kept}"
        cause = f"task.block: {block} different tokens are needed, and {found}"
        raise UserError(cause, "Lower task.trim or task.block." if block <= pool.total else "Lower task.block.")
    if (different := math.perm(len(pool.tokens), block)) < n:
        cause = f"task.n: there are {different} different prompts of {block} x {repeats} tokens, and {n} are asked for"
        raise UserError(cause, "Lower task.n, or raise task.block.")


def _prompt(shape: Shape, index: int, pool: Ordinary, encoder: Encoder, draw: Draw) -> Prompt:
    block, repeats = shape
    start = len(encoder.prefix)
    body = tuple(draw.few(pool.tokens, block)) * repeats
    label = f"{block}x{repeats}"
    return Prompt(
        clean=encoder.text_of(body),
        clean_tokens=encoder.prefix + body,
        answer=(),
        answer_text="",
        spans={
            "first": tuple(range(start, start + block)),
            "second": tuple(range(start + block, start + 2 * block)),
            END: (start + len(body) - 1,),
        },
        group=label,
        template=label,
        cluster=f"prompt-{index}",
    )
