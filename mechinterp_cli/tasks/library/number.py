"""The number of the subject, at every word after it: in "The key from the old cabinets", plural after "keys".

Between subject and verb stands a distractor. With `both`, every subject comes with a distractor of its own number and
with one of the other, so the nearest noun's number tells nothing. The prompt ends where the verb would stand, so it
asks for a verb, too, as `agreement` does; the corrupt prompt has the subject in the other number, where that is as many
tokens. Spans: `target`, the subject, and `distractor`.
"""

import itertools
from collections.abc import Sequence
from typing import ClassVar, Literal

from mechinterp_cli.config.types import Count
from mechinterp_cli.tasks.draft import Draft, by_lengths, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import fill, room_for
from mechinterp_cli.tasks.library.agreement import NOUNS
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.words import check_words_known, label_after

_TEMPLATES = (
    "The {target} next to the {distractor}",
    "The {target} that we saw behind the {distractor}",
    "The {target} from the story about the {distractor}",
    "The {target} far away from the old {distractor}",
    "The {target} that he had drawn beside the {distractor}",
    "The {target} in front of the little {distractor}",
)
"""Nothing but the two nouns has a number, and verbs are in the past, where both numbers are the same."""
_CLASSES = ("singular", "plural")
_VERBS = (("is", "was", "has"), ("are", "were", "have"))
_Ways = Sequence[tuple[int, int]]


class NumberOptions(GeneratedOptions):
    """Options of `number`: is the subject singular or plural, at every word after it."""

    task_name: ClassVar[str] = "number"
    has_labels: ClassVar[bool] = True
    name: Literal["number"] = "number"
    """The task."""
    n: Count = 256
    """How many prompts, all different; as many singular subjects as plural ones."""
    distractor: Literal["aligned", "conflicting", "both"] = "both"
    """Whether the noun between subject and verb has the subject's number; the group tells which."""


@builds(NumberOptions)
def build_number(options: NumberOptions, encoder: Encoder) -> Built:
    """Draw templates and nouns and say each in both numbers; the cluster is the subject's noun."""
    check_words_known(encoder, "number", fill(_TEMPLATES[0], {"target": NOUNS[0][0], "distractor": NOUNS[0][1]}).text)
    ways = _ways(options)
    n_codes = -(-options.n // len(ways))
    codes = room_for(Draw(options.seed), len(_TEMPLATES) * len(NOUNS) * (len(NOUNS) - 1), n_codes, "number")
    said = itertools.islice(itertools.product(codes, ways), options.n)
    return Built([_prompt(code, subject, other, options, encoder) for code, (subject, other) in said])


def _ways(options: NumberOptions) -> _Ways:
    """Numbers of subject and distractor (0 singular, 1 plural), a singular subject and a plural one in turn."""
    aligned, conflicting = [(0, 0), (1, 1)], [(0, 1), (1, 0)]
    return {"aligned": aligned, "conflicting": conflicting, "both": aligned + conflicting}[options.distractor]


def _prompt(code: int, number: int, other: int, options: NumberOptions, encoder: Encoder) -> Prompt:
    code, template = divmod(code, len(_TEMPLATES))
    first, second = divmod(code, len(NOUNS) - 1)
    noun, distractor = NOUNS[first], [n for i, n in enumerate(NOUNS) if i != first][second]
    text, corrupt = (
        fill(_TEMPLATES[template], {"target": form, "distractor": distractor[other]})
        for form in (noun[number], noun[1 - number])
    )
    paired = len(encoder.word_ids(noun[0])) == len(encoder.word_ids(noun[1]))
    draft = Draft(
        where=f"task number: {text.text!r}",
        clean=text.text,
        corrupt=corrupt.text if paired else None,
        answer=tuple(encoder.reply(verb) for verb in _VERBS[number]),
        wrong_answer=tuple(encoder.reply(verb) for verb in _VERBS[1 - number]),
        spans=text.spans,
        group="aligned" if number == other else "conflicting",
        cluster=noun[0],
    )
    prompt = by_lengths(finish(draft, encoder, options), str(template), ("target", "distractor"))
    encoded = encoder.encode(text.text, draft.where)
    return label_after(prompt, encoded, text.spans["target"][1], _CLASSES[number])
