"""Prompts of the patching benchmarks: indirect objects, one template, one length, with or without a few-shot prefix."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechinterp_cli.errors import UserError

Differ = Literal["late", "early"]
"""Where clean and corrupt first differ: at the second subject, or at the first name (the second token)."""

TEMPLATE = "When {a} and {b} went to the store, {subject} gave a drink to"
COUPLES = (("Mary", "John"), ("Tom", "James"), ("Sarah", "Mark"), ("Anna", "Peter"))
"""Each gives two prompts, in both orders."""
# fmt: off
MORE_NAMES = (
    "Emma", "David", "Alice", "Paul", "Laura", "Daniel", "Kate", "Robert", "Lisa", "Michael", "Jane", "William",
    "Susan", "George", "Helen", "Simon", "Lucy", "Adam", "Rachel", "Ben", "Julia", "Sam", "Amy", "Jack", "Ruth",
    "Henry", "Kevin", "Linda",
)
# fmt: on
"""Neighbours in this circle are the couples after the first four: 64 prompts in all, more with wider steps."""

SHOT = "When {a} and {b} went to the {place}, {b} gave a {thing} to {a}.\n"
SHOT_COUPLES = (("Chris", "Claire"), ("Frank", "Grace"), ("Steve", "Karen"), ("Brian", "Diana"), ("Alex", "Maria"))
SHOT_PLACES = ("park", "school", "office", "beach")
SHOT_THINGS = ("book", "letter", "ball")


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean and corrupt prompts of one length.

    Args:
        clean: Token ids [prompts, positions].
        corrupt: Token ids of the same shape.
        answers: Ids of the answer and of the wrong answer, [prompts, 2].
        prefix: Number of leading tokens that all prompts share and that no trial patches.
    """

    clean: Tensor
    corrupt: Tensor
    answers: Tensor
    prefix: int

    @property
    def size(self) -> int:
        """Number of prompts."""
        return self.clean.shape[0]

    @property
    def length(self) -> int:
        """Tokens of every prompt, the prefix among them."""
        return self.clean.shape[1]

    @property
    def first_difference(self) -> tuple[int, ...]:
        """For every prompt the first position at which clean and corrupt differ."""
        return tuple((self.clean != self.corrupt).int().argmax(1).tolist())


def ioi_pairs(tokenizer: PreTrainedTokenizerBase, n: int, differ: Differ, prefix: int = 0) -> Pairs:
    """Build prompt pairs.

    Args:
        tokenizer: The model's.
        n: Number of prompts, even.
        differ: What the corruption exchanges.
        prefix: Tokens of few-shot examples in front, the same for all prompts.

    Raises:
        UserError: A name is more than one token, or there are not as many couples.
    """
    names = _ordered_couples(n)
    clean = [TEMPLATE.format(a=a, b=b, subject=b) for a, b in names]
    swapped = [(a, b, a) if differ == "late" else (b, a, b) for a, b in names]
    corrupt = [TEMPLATE.format(a=a, b=b, subject=subject) for a, b, subject in swapped]
    answers = torch.stack([_last_tokens(tokenizer, [pair[i] for pair in names]) for i in (0, 1)], dim=1)
    front = _few_shot(tokenizer, prefix).expand(n, -1)
    ids = [torch.cat([front, _rectangle(tokenizer, texts)], dim=1) for texts in (clean, corrupt)]
    return Pairs(ids[0], ids[1], answers, prefix)


def _ordered_couples(n: int) -> list[tuple[str, str]]:
    """The first n couples, each in both orders."""
    found = [order for couple in islice(_couples(), n // 2) for order in (couple, couple[::-1])]
    if len(found) != n:
        raise UserError(f"--pairs: {n} is odd or more than there are couples of names", "Give an even, smaller number.")
    return found


def _couples() -> Iterator[tuple[str, str]]:
    yield from COUPLES
    for step in range(1, len(MORE_NAMES) // 2):
        yield from ((name, MORE_NAMES[(i + step) % len(MORE_NAMES)]) for i, name in enumerate(MORE_NAMES))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _rectangle(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """Ids [texts, positions] of texts that must have as many tokens."""
    rows = [_ids(tokenizer, text) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) != len(rows[0]):
            raise UserError(
                f"{text!r} has {len(row)} tokens, {texts[0]!r} has {len(rows[0])}",
                "The benchmark needs a model whose tokenizer has its names as single tokens.",
            )
    return torch.tensor(rows)


def _last_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> Tensor:
    return _rectangle(tokenizer, [f"When {name}" for name in names])[:, -1]


def _few_shot(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Tensor:
    """The last `tokens` ids of a text of solved examples, so that the last example is whole."""
    ids: list[int] = []
    shots = _shots()
    while len(ids) < tokens:
        ids = _ids(tokenizer, next(shots)) + ids
    return torch.tensor(ids[len(ids) - tokens :], dtype=torch.long)


def _shots() -> Iterator[str]:
    count = 0
    while True:
        a, b = SHOT_COUPLES[count % len(SHOT_COUPLES)]
        place, thing = SHOT_PLACES[count % len(SHOT_PLACES)], SHOT_THINGS[count % len(SHOT_THINGS)]
        yield SHOT.format(a=a, b=b, place=place, thing=thing)
        count += 1
