"""A user's own text, in the config or in a file: nothing is asked, so there is no answer and no corrupt prompt.

The only span is `end`, the last token. Texts of fewer than two tokens (one predicts nothing) and texts whose tokens
are those of an earlier one are left out and counted.
"""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mechinterp_cli.config.types import Count, Text
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.items import sampled
from mechinterp_cli.tasks.options import CommonOptions
from mechinterp_cli.tasks.prompts import Dropped, Prompt
from mechinterp_cli.tasks.reading import Unit, read_pieces
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.spans import END
from mechinterp_cli.tasks.tokenise import Encoder, NoTokenError

_FEWEST = 2
_SHOWN = 200
"""So many characters of a text that was left out are kept."""


class TextOptions(CommonOptions):
    """Options of `text`: a user's own text, inline (`texts`) or in a file (`path`); no answer."""

    task_name: ClassVar[str] = "text"
    has_answers: ClassVar[bool] = False
    name: Literal["text"] = "text"
    """The task."""
    n: Count | None = None
    """Take a seeded sample of so many texts; null takes all."""
    texts: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """The texts themselves; either these or `path`."""
    path: Text | None = None
    """Path of a text file (UTF-8), from the folder the command runs in."""
    unit: Unit = "line"
    """What is one text in a file: a line, a paragraph (blank lines separate them), or the whole file."""
    length: Annotated[int, Field(strict=True, ge=_FEWEST)] | None = None
    """Keep only so many tokens of each text, not counting what the tokenizer puts first; null keeps all."""

    @model_validator(mode="after")
    def _check_source(self) -> "TextOptions":
        if (self.texts is None) == (self.path is None):
            raise ValueError("allowed: exactly one of `texts` (in this file) and `path` (another file)")
        if self.path is None and self.unit != "line":
            raise ValueError("`unit` says what is one text in a file: leave it out with `texts`")
        return self


@builds(TextOptions)
def build_text(options: TextOptions, encoder: Encoder) -> Built:
    """Tokenise the texts, in their order; each is its own cluster."""
    prompts: dict[tuple[int, ...], Prompt] = {}
    dropped: list[Dropped] = []
    for index, (where, text) in enumerate(_pieces(options, encoder)):
        prompt = _prompt(index, where, text, options, encoder)
        if prompt is None:
            dropped.append(Dropped(text[:_SHOWN], f"fewer than {_FEWEST} tokens"))
        elif prompt.clean_tokens in prompts:
            dropped.append(Dropped(text[:_SHOWN], "the same tokens as an earlier text"))
        else:
            prompts[prompt.clean_tokens] = prompt
    if not prompts:
        raise UserError(f"task text: every text has fewer than {_FEWEST} tokens", "Give longer ones.")
    return Built(sampled(list(prompts.values()), options), dropped)


def _pieces(options: TextOptions, encoder: Encoder) -> list[tuple[str, str]]:
    """What an error calls each text, and the text."""
    if options.length is not None and encoder.chat_template:
        cause = "task.length: a text that is cut short does not fit into a chat template"
        raise UserError(cause, "Leave out task.length or task.chat_template.")
    if options.path is not None:
        return read_pieces(options.path, options.unit)
    return [(f"task.texts[{i}]", text) for i, text in enumerate(options.texts or ())]


def _prompt(index: int, where: str, text: str, options: TextOptions, encoder: Encoder) -> Prompt | None:
    """The prompt, or None where it has too few tokens of its own."""
    try:
        # The context is checked below, since the remedy is another one.
        encoded = replace(encoder, max_length=None).encode(text, where, first=options.length)
    except NoTokenError:
        return None
    if len(encoded.tokens) - len(encoder.prefix) < _FEWEST:
        return None
    _check_length(len(encoded.tokens), where, encoder)
    clean = text if options.length is None else text[: max(end for _, end in encoded.offsets)]
    return Prompt(
        clean=clean,
        clean_tokens=encoded.tokens,
        answer=(),
        answer_text="",
        spans={END: (len(encoded.tokens) - 1,)},
        # Positions mean nothing across texts; a length is all that two of them can share.
        template=f"length-{len(encoded.tokens)}",
        cluster=f"prompt-{index}",
    )


def _check_length(length: int, where: str, encoder: Encoder) -> None:
    if encoder.max_length is None or length <= encoder.max_length:
        return
    cause = f"{where}: {length} tokens are more than the model's context of {encoder.max_length}"
    most = encoder.max_length - len(encoder.prefix)
    cut = "" if encoder.chat_template else f", or set task.length to at most {most}"
    raise UserError(cause, f"Shorten the text{cut}.")
