"""Is the next token a repeat: labels at every token of random tokens of which some stretches come again.

A prompt is stretches of new tokens, all different, and after each one a stretch that has stood before, copied from a
random place. A token is labelled `repeat` if the next token has stood in the prompt before, else `new`; the last token
has no label. At the seams nothing foretells that a copy begins or ends, so no probe gets all of them right. Every token
but the first is labelled by the one before it, so a prompt has as many labels of either kind. Spans: `target`, all
labelled tokens; `end`, the last one.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mechinterp_cli.config.types import Count
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.vocabulary import ordinary_tokens
from mechinterp_cli.tasks.words import check_random_tokens, label_tokens, token_prompt


class InductionLabelsOptions(GeneratedOptions):
    """Options of `induction_labels`: is the next token a repeat; nothing is asked."""

    task_name: ClassVar[str] = "induction_labels"
    has_answers: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    name: Literal["induction_labels"] = "induction_labels"
    """The task."""
    n: Count = 32
    """How many prompts, all different."""
    repeated: Annotated[int, Field(strict=True, ge=2)] = 16
    """Tokens of a prompt that are repeats; as many others are new, and one more is the first."""
    stretches: Count = 3
    """Into how many stretches they are cut, at random; each has two tokens at least."""


@builds(InductionLabelsOptions)
def build_induction_labels(options: InductionLabelsOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts of one length; each is its own cluster."""
    if 2 * options.stretches > options.repeated:
        cause = f"task.stretches: {options.repeated} repeated tokens are too few for {options.stretches} stretches"
        raise UserError(cause, f"Choose 1 to {options.repeated // 2}, or raise task.repeated.")
    check_random_tokens(encoder, 2 * options.repeated + 1, "task.repeated")
    draw = Draw(options.seed)
    pool = ordinary_tokens(encoder, draw)
    if len(pool) <= options.repeated:
        found = f"this tokenizer has {len(pool)} ordinary ones"
        cause = f"task.repeated: a prompt needs {options.repeated + 1} different tokens and {found}"
        raise UserError(cause, "Lower task.repeated.")
    bodies: dict[tuple[int, ...], None] = {}
    for _ in range(10 * options.n + 100):
        bodies[_body(options, pool, draw)] = None
        if len(bodies) == options.n:
            return Built([_prompt(index, body, encoder) for index, body in enumerate(bodies)])
    cause = f"task induction_labels: only {len(bodies)} different prompts were found, and {options.n} are asked for"
    raise UserError(cause, "Lower task.n, or raise task.repeated.")


def _body(options: InductionLabelsOptions, pool: Sequence[int], draw: Draw) -> tuple[int, ...]:
    fresh = draw.few(pool, options.repeated + 1)
    body = [fresh.pop()]
    for size in _sizes(options.repeated, options.stretches, draw):
        body += [fresh.pop() for _ in range(size)]
        start = draw.below(len(body) - size + 1)
        body += body[start : start + size]
    return tuple(body)


def _sizes(total: int, parts: int, draw: Draw) -> list[int]:
    """Parts of two and more that add up to a total."""
    places = total - parts - 1
    cuts = sorted(cut + 1 for cut in draw.distinct(places, parts - 1))
    return [1 + end - start for start, end in zip([0, *cuts], [*cuts, places + 1], strict=True)]


def _prompt(index: int, body: tuple[int, ...], encoder: Encoder) -> Prompt:
    start = len(encoder.prefix)
    labels = [(start + i, "repeat" if following in body[: i + 1] else "new") for i, following in enumerate(body[1:])]
    words = label_tokens(encoder, encoder.prefix + body, labels)
    return token_prompt(encoder, body, words, f"prompt-{index}")
