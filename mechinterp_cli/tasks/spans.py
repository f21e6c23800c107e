"""Spans: named parts of a prompt, from characters to token positions."""

import difflib
import re
from collections.abc import Mapping

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.prompts import Prompt, PromptSet
from mechinterp_cli.tasks.tokenise import Encoded, Range

END = "end"
_SHIFTED = re.compile(r"(?P<base>.+?)(?P<shift>[+-]\d{1,6})")


def tokens_of(encoded: Encoded, characters: Range, where: str) -> tuple[int, ...]:
    """Positions of the tokens that cover any of these characters of the prompt.

    Args:
        encoded: The tokenised prompt.
        characters: Start and end (exclusive) in the prompt as it was given.
        where: What to call the span in an error.

    Raises:
        UserError: No token does.
    """
    start, end = characters
    found = tuple(i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start and a < b)
    if not found:
        cause = f"{where}: characters {start} to {end} belong to no token"
        raise UserError(cause, "A span needs at least one character of the prompt that is not blank.")
    return found


def find_text(text: str, part: str, where: str) -> Range:
    """Where a span's text stands in a prompt.

    Args:
        text: The prompt.
        part: The span's text; it must occur once.
        where: What to call the span in an error.

    Raises:
        UserError: It is empty, does not occur, or occurs more than once.
    """
    count = text.count(part) if part else 0
    if count != 1:
        cause = f"{where}: {part!r} occurs {count} times in {text!r}"
        raise UserError(cause, "Give a text that occurs once, or the characters as [start, end].")
    start = text.index(part)
    return start, start + len(part)


def all_spans(encoded: Encoded, characters: Mapping[str, Range], where: str) -> dict[str, tuple[int, ...]]:
    """Token positions of every named span, and of `end`, the last token."""
    spans = {name: tokens_of(encoded, span, f"{where} span {name}") for name, span in characters.items()}
    return {**spans, END: (len(encoded.tokens) - 1,)}


def span_positions(prompt: Prompt, name: str) -> tuple[int, ...]:
    """Token positions of a span in one prompt.

    `S2+1` is the token after the last one of `S2`, `S2-1` the token before the first one.

    Args:
        prompt: The prompt.
        name: A span's name, with `+k` or `-k` after it where a neighbour is meant.

    Raises:
        UserError: The prompt has no such span, or the neighbour lies outside the prompt.
    """
    if name in prompt.spans:
        return tuple(prompt.spans[name])
    match = _SHIFTED.fullmatch(name)
    if match is None or match["base"] not in prompt.spans:
        raise _no_span(name, tuple(sorted(prompt.spans)))
    base, shift = prompt.spans[match["base"]], int(match["shift"])
    position = (max(base) if shift >= 0 else min(base)) + shift
    if not 0 <= position < prompt.length:
        cause = f"span {name!r} is outside {prompt.clean!r}: position {position} of 0..{prompt.length - 1}"
        raise UserError(cause, "Choose a smaller distance.")
    return (position,)


def resolve_span(prompts: PromptSet, name: str) -> tuple[tuple[int, ...], ...]:
    """Token positions of a span in every prompt of a set.

    Args:
        prompts: The prompt set.
        name: As in `span_positions`.

    Returns:
        One tuple of positions per prompt, in order.

    Raises:
        UserError: Some prompt does not have it; the message lists the spans that all have.
    """
    base = name if name in prompts.span_names else _base(name)
    if base not in prompts.span_names:
        raise _no_span(name, prompts.span_names, prompts.task)
    return tuple(span_positions(prompt, name) for prompt in prompts.prompts)


def _base(name: str) -> str:
    match = _SHIFTED.fullmatch(name)
    return match["base"] if match else name


def _no_span(name: str, names: tuple[str, ...], task: str = "") -> UserError:
    of = f" of task {task!r}" if task else ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    remedy = f"Did you mean {near[0]!r}?" if near else "A neighbour is written 'end-1' or 'S2+1'."
    return UserError(f"span {name!r}{of} does not exist; there are {', '.join(names)}", remedy)
