"""Repeated random tokens (Olsson et al. 2209.11895): what followed a token once follows it again.

A prompt is `prefix` tokens, a block of `block` tokens, and the first `seen` tokens of that block again; all tokens but
the repeated ones differ. The answer is the block's next token. Spans, in the clean prompt: `matched` is the first
occurrence of the current (last) token, `copied` the token after it, which is the answer, `end` the current token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mechinterp_cli.config.types import Count, Index
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.vocabulary import ordinary_tokens


class InductionOptions(GeneratedOptions):
    """Options of `induction`: random tokens, repeated."""

    task_name: ClassVar[str] = "induction"
    name: Literal["induction"] = "induction"
    """The task."""
    block: Annotated[int, Field(strict=True, ge=2)] = 12
    """Tokens in the block that is repeated."""
    prefix: Index = 4
    """Random tokens before the first block."""
    seen: Count | None = None
    """Tokens of the block that are repeated before the answer is asked for, below `block`; null: half of them."""
    corruption: Literal["matched", "copied", "all"] = "matched"
    """What changes: the first occurrence of the token to be matched, or of the one to be copied; or `all`: every token
    is another one, and none is repeated."""


@dataclass(frozen=True)
class _Shape:
    """Lengths of a prompt's parts and places in it, counted without what the tokenizer puts before it."""

    prefix: int
    block: int
    seen: int

    @property
    def matched(self) -> int:
        return self.prefix + self.seen - 1

    @property
    def copied(self) -> int:
        return self.prefix + self.seen

    @property
    def fresh(self) -> int:
        """Different tokens of a prompt."""
        return self.prefix + self.block


@builds(InductionOptions)
def build_induction(options: InductionOptions, encoder: Encoder) -> Built:
    """Draw `n` prompts of one length over ordinary tokens; each is its own cluster.

    The wrong answer is the token that the corrupt prompt would make right (`copied`), or else another token of the
    block, so that copying anything from the prompt is not enough (`matched`, `all`).
    """
    shape = _shape(options)
    if encoder.chat_template:
        raise UserError("task.chat_template: induction prompts are no messages", "Leave the key out.")
    draw = Draw(options.seed)
    pool = ordinary_tokens(encoder, draw)
    needed = shape.fresh + (shape.fresh + shape.seen if options.corruption == "all" else 1)
    if len(pool) < needed:
        found = f"this tokenizer has {len(pool)} ordinary ones"
        cause = f"task induction: a prompt needs {needed} different tokens and {found}"
        raise UserError(cause, "Lower task.block or task.prefix.")
    drawn: dict[tuple[int, ...], Prompt] = {}
    for _ in range(10 * options.n + 100):
        prompt = _prompt(options, shape, encoder, draw.sample(pool, needed), draw)
        prompt = replace(prompt, cluster=f"prompt-{len(drawn)}")
        drawn.setdefault(prompt.clean_tokens, prompt)
        if len(drawn) == options.n:
            return Built(list(drawn.values()))
    cause = f"task induction: only {len(drawn)} different prompts were found, and {options.n} are asked for"
    raise UserError(cause, "Lower task.n, or raise task.block.")


def _shape(options: InductionOptions) -> _Shape:
    seen = options.block // 2 if options.seen is None else options.seen
    if seen >= options.block:
        cause = f"task.seen: {seen} is not below task.block ({options.block}), so no token is left to be the answer"
        raise UserError(cause, f"Choose 1 to {options.block - 1}.")
    return _Shape(options.prefix, options.block, seen)


def _prompt(options: InductionOptions, shape: _Shape, encoder: Encoder, tokens: Sequence[int], draw: Draw) -> Prompt:
    fresh, others = tokens[: shape.fresh], tokens[shape.fresh :]
    block = fresh[shape.prefix :]
    clean, answer, new = [*fresh, *block[: shape.seen]], block[shape.seen], others[0]
    changed = shape.matched if options.corruption == "matched" else shape.copied
    corrupt = [*clean[:changed], new, *clean[changed + 1 :]] if options.corruption != "all" else list(others)
    foils = [token for i, token in enumerate(block) if i not in (shape.seen - 1, shape.seen)]
    other = draw.choice(foils) if foils else new
    return _finished(encoder, shape, clean, corrupt, answer, new if options.corruption == "copied" else other)


def _finished(
    encoder: Encoder, shape: _Shape, clean: Sequence[int], corrupt: Sequence[int], answer: int, wrong: int
) -> Prompt:
    n = len(encoder.prefix)
    text = encoder.text_of(tuple(clean))
    tokens = (*encoder.prefix, *clean)
    encoder.check(tokens, "task induction")
    return Prompt(
        clean=text,
        clean_tokens=tokens,
        answer=(answer,),
        answer_text=encoder.text_of((answer,)),
        corrupt=encoder.text_of(tuple(corrupt)),
        corrupt_tokens=(*encoder.prefix, *corrupt),
        wrong_answer=(wrong,),
        wrong_answer_text=encoder.text_of((wrong,)),
        spans={"matched": (n + shape.matched,), "copied": (n + shape.copied,), "end": (len(tokens) - 1,)},
        template=f"{shape.prefix}-{shape.block}-{shape.seen}",
    )
