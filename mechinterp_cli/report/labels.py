"""Text from tokens, files and models made fit to be shown: nothing invisible, nothing that acts."""

import unicodedata

_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_PLAIN_MARKS = {" ": "_", "\n": "\\n", "\t": "\\t", "\r": "\\r", "·": "_", "⏎": "\\n", "⇥": "\\t"}
"""What the marks above become where only ASCII is wanted."""
_PLAIN_SIGNS = {"…": "...", "−": "-", "–": "-", "±": "+-", "×": "x", "→": "->", "≥": ">=", "≤": "<="}
"""What signs of our own captions become there; in a token they stand for themselves and are written as codes."""
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Unicode categories that are not seen, or act on their neighbours: controls, formats, surrogates, odd spaces."""
_COMBINING = {"Mn", "Me"}
_CARRIER = "◌"
"""Stands under a combining mark that begins a token, as it would else sit on what comes before."""

EMPTY = "∅"


def show_token(token: str, *, longest: int = 14, plain: bool = False) -> str:
    """A token with its spaces and invisible characters marked.

    Space is `·`, newline `⏎`; anything else that is not seen (escape, zero width, direction override, lone
    surrogate) is written as its code.

    Args:
        token: As decoded.
        longest: Longer ones are cut and end with an ellipsis.
        plain: Only ASCII: space is `_`, letters outside ASCII are written as their code.
    """
    if not token:
        return "(empty)" if plain else EMPTY
    pieces = [_CARRIER] if not plain and unicodedata.category(token[0]) in _COMBINING else []
    for character in token:
        piece = _show(character, plain)
        if sum(map(len, pieces)) + len(piece) > longest:
            return "".join(pieces) + ("..." if plain else "…")
        pieces.append(piece)
    return "".join(pieces)


def _show(character: str, plain: bool) -> str:
    marks = _PLAIN_MARKS if plain else _MARKS
    if character in marks:
        return marks[character]
    if unicodedata.category(character) in _HIDDEN or (plain and not character.isascii()):
        return _code(character)
    return character


def _code(character: str) -> str:
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def show_text(text: str, *, plain: bool = False) -> str:
    """A title or sentence on one line: as `show_token`, but ordinary spaces stay."""
    signs = _PLAIN_SIGNS if plain else {}
    return "".join(c if c == " " else signs.get(c) or _show(c, plain) for c in text)
