"""Templates: filling them while noting where each word went, and drawing enough different prompts from them."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.options import Templates
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.tokenise import Range


@dataclass(frozen=True)
class Filled:
    """A filled template and the characters that each field's last use takes."""

    text: str
    spans: Mapping[str, Range]


def fill(template: str, words: Mapping[str, str]) -> Filled:
    """Fill a template's `{fields}` with words.

    Args:
        template: Text with named fields.
        words: A word for each field; words that it does not use are ignored.
    """
    text, spans = "", {}
    for literal, field, _, _ in string.Formatter().parse(template):
        text += literal
        if field is not None:
            spans[field] = (len(text), len(text) + len(words[field]))
            text += words[field]
    return Filled(text, spans)


def chosen_templates(asked: Templates, known: Sequence[str]) -> list[tuple[str, str]]:
    """The templates that the config asks for, each with a label: its number, or `own-k`.

    Raises:
        UserError: A number that no template has, or braces that do not pair.
    """
    if asked == "all":
        return [(str(i), text) for i, text in enumerate(known)]
    items = asked if isinstance(asked, tuple) else (asked,)
    own = [item for item in dict.fromkeys(items) if isinstance(item, str)]
    return [_template(item, known, own) for item in dict.fromkeys(items)]


def _template(item: int | str, known: Sequence[str], own: Sequence[str]) -> tuple[str, str]:
    if isinstance(item, str):
        _check_braces(item)
        return f"own-{own.index(item)}", item
    if not 0 <= item < len(known):
        listed = "; ".join(f"{i}: {text}" for i, text in enumerate(known))
        raise UserError(f"task.templates: {item} is outside 0..{len(known) - 1}", f"The templates are {listed}")
    return str(item), known[item]


def _check_braces(text: str) -> None:
    try:
        list(string.Formatter().parse(text))
    except ValueError as error:
        raise UserError(f"task.templates: {text!r} is no template: {error}", "Pair the braces.") from None


def room_for(draw: Draw, space: int, n: int, task: str) -> list[int]:
    """`n` different numbers below `space`, the count of different prompts that a template allows.

    Raises:
        UserError: There are fewer.
    """
    if n > space:
        cause = f"task {task}: a template allows {space} different prompts with this tokenizer, and {n} are asked for"
        raise UserError(cause, "Lower task.n, or use more templates (task.templates).")
    return draw.distinct(space, n)


def one_length(prompts: list[Prompt]) -> list[Prompt]:
    """Check that all prompts of one template are equally long, so that its positions mean one thing.

    Raises:
        UserError: They are not, because this tokenizer splits a word differently in its place.
    """
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(prompt.template, prompt)
        if other.length != prompt.length:
            cause = (
                f"template {prompt.template}: {other.clean!r} has {other.length} tokens and"
                f" {prompt.clean!r} has {prompt.length}"
            )
            raise UserError(cause, "This tokenizer joins words with their neighbours; use another template.")
    return prompts
