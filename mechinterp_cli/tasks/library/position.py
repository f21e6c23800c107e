"""The position of a token in random tokens: a regression at every token, for any tokenizer.

Tokens are drawn independently of their places, so nothing but the position tells the position. Positions count from 0
and include a beginning-of-sequence token where one is added, which has no label. Spans: `target`, all labelled tokens;
`end`, the last one.
"""

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


class PositionOptions(GeneratedOptions):
    """Options of `position`: where a token stands, as a number; nothing is asked."""

    task_name: ClassVar[str] = "position"
    has_answers: ClassVar[bool] = False
    has_labels: ClassVar[bool] = True
    name: Literal["position"] = "position"
    """The task."""
    length: Annotated[int, Field(strict=True, ge=2)] = 32
    """Random tokens in a prompt."""
    n: Count = 32
    """How many prompts, all different."""


@builds(PositionOptions)
def build_position(options: PositionOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts of one length; each is its own cluster."""
    draw = Draw(options.seed)
    check_random_tokens(encoder, options.length, "task.length")
    pool = ordinary_tokens(encoder, draw)
    if len(pool) ** options.length < 2 * options.n:
        cause = f"task position: {len(pool)} ordinary tokens make too few prompts of {options.length} tokens"
        raise UserError(cause, "Lower task.n, or raise task.length.")
    bodies: dict[tuple[int, ...], None] = {}
    while len(bodies) < options.n:
        bodies[tuple(draw.choice(pool) for _ in range(options.length))] = None
    return Built([_prompt(index, body, encoder) for index, body in enumerate(bodies)])


def _prompt(index: int, body: tuple[int, ...], encoder: Encoder) -> Prompt:
    start = len(encoder.prefix)
    labels = [(position, float(position)) for position in range(start, start + len(body))]
    words = label_tokens(encoder, encoder.prefix + body, labels)
    return token_prompt(encoder, body, words, f"prompt-{index}")
