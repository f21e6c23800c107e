"""Which tokens of a vocabulary random prompts are made of."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.tokenise import Encoder

_POOL = 2000
"""So many ordinary tokens are enough to draw from."""
_FEWEST_WORDS = 200
"""A tokenizer with fewer whole words than this is one of symbols, and any ordinary token will do."""


@dataclass(frozen=True)
class Ordinary:
    """The ordinary tokens of a tokenizer.

    `tokens` are ids in rising order, after trimming; `total` is how many there were before.
    """

    tokens: tuple[int, ...]
    total: int


def ordinary_tokens(encoder: Encoder, draw: Draw) -> list[int]:
    """Ids of tokens that are neither special nor a piece of a character, in a random order, at most 2,000.

    Whole words after a space where the tokenizer has enough of them, any visible text where it has not (symbols).
    """
    size = _size(encoder)
    words: list[int] = []
    others: list[int] = []
    for token, is_word in _ordinary(encoder, draw.distinct(size, size)):
        (words if is_word else others).append(token)
        if len(words) == _POOL:
            break
    return words if len(words) >= _FEWEST_WORDS else sorted(words + others)


def trimmed_tokens(encoder: Encoder, trim: float) -> Ordinary:
    """All ordinary tokens but the most and the least frequent ones.

    Frequencies are not at hand. Token ids stand in for them: those of byte-pair vocabularies rise as merges get rarer.
    A tokenizer of symbols has no frequent ones, and is not trimmed.

    Args:
        encoder: The tokenizer and the model's limits.
        trim: Share of the words that is left out at either end, at least 0 and below 0.5.
    """
    found = list(_ordinary(encoder, range(_size(encoder))))
    words = [token for token, is_word in found if is_word]
    if len(words) < _FEWEST_WORDS:
        return Ordinary(tuple(token for token, _ in found), len(found))
    out = int(trim * len(words))
    return Ordinary(tuple(words[out : len(words) - out]), len(words))


def _size(encoder: Encoder) -> int:
    return min(len(encoder.tokenizer), encoder.vocab_size or len(encoder.tokenizer))


def _ordinary(encoder: Encoder, ids: Iterable[int]) -> Iterator[tuple[int, bool]]:
    """Those of the ids that are ordinary tokens, and whether they are words."""
    special = set(encoder.tokenizer.all_special_ids) | set(encoder.tokenizer.added_tokens_decoder)
    for token in ids:
        if token in special:
            continue
        text = encoder.text_of((token,))
        if _is_word(str(encoder.tokenizer.convert_ids_to_tokens(token)), text):
            yield token, True
        elif _is_visible(text):
            yield token, False


def _is_word(raw: str, text: str) -> bool:
    """Whether a token is a word after a space; byte-level and SentencePiece vocabularies mark the space."""
    bare = text.strip()
    return raw[:1] in {"Ġ", "▁", " "} and len(bare) > 1 and bare.isascii() and bare.isalpha()


def _is_visible(text: str) -> bool:
    bare = text.strip()
    return bool(bare) and bare.isprintable() and "\ufffd" not in bare
