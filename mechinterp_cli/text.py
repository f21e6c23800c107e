"""Text from models, files and configs, made safe to show: terminals and pages show it, they never run it; counts."""

import re

# C0 and C1 controls (ESC among them), and the marks that reorder or hide text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_BUT_LINES = re.compile(_UNSAFE.pattern.replace("\x00-\x1f", "\x00-\x09\x0b-\x1f"))


def visible(text: str, *, lines: bool = False) -> str:
    r"""Write control characters, direction marks and lone surrogates as escapes (`\x1b`, `\n`, `\u202e`).

    Args:
        text: Anything: a token, a path, an error message.
        lines: Whether line breaks stay as they are.

    Returns:
        Text without any character that a terminal acts on.
    """
    return (_BUT_LINES if lines else _UNSAFE).sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def counted(count: int, noun: str, plural: str = "") -> str:
    """So many of something: `1 prompt`, `1,200 prompts`.

    Args:
        count: How many.
        noun: One of them; a verb may follow it.
        plural: Several of them, where that is not the noun and an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
