"""Sentiment of short reviews: "The film was wonderful." is positive, "I hated the concert." is negative.

One word, the span `target`, carries the sentiment, and each prompt's cluster is that word: a split then asks whether a
direction holds for words that it was not fitted on. With a question the prompt goes on " The review is", and
" positive" or " negative" is right.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mechinterp_cli.config.types import Count, Flag
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, by_lengths, finish, unasked
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import fill
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.words import check_words_known

Kind = Literal["adjectives", "verbs"]
Class = Literal["negative", "positive"]
TEMPLATES: Mapping[Kind, Sequence[str]] = {
    "adjectives": (
        "The {thing} was {target}.",
        "We went to see the {thing} and it was {target}.",
        "Everyone told me that the {thing} is {target}.",
        "What a {target} {thing} that was.",
        "In the end I found the {thing} {target}.",
    ),
    "verbs": (
        "I {target} the {thing}.",
        "My friends {target} every minute of the {thing}.",
        "We all {target} the {thing} last week.",
        "She said that she {target} the {thing}.",
        "The people around me {target} the {thing} from the start.",
    ),
}
_THINGS = """
    film book play concert show story song novel performance movie lecture dinner
"""
WORDS: Mapping[Kind, Mapping[Class, str]] = {
    "adjectives": {
        "positive": """
            wonderful great excellent brilliant charming delightful superb beautiful amazing fantastic lovely pleasant
            impressive clever moving perfect
        """,
        "negative": """
            terrible awful horrible boring dull dreadful poor ugly disappointing painful stupid miserable pathetic
            tedious clumsy worthless
        """,
    },
    "verbs": {
        "positive": "loved enjoyed admired liked praised adored appreciated treasured",
        "negative": "hated disliked despised regretted mocked loathed resented detested",
    },
}
THINGS = tuple(_THINGS.split())
_CLASSES: tuple[Class, Class] = ("positive", "negative")
_QUESTION = " The review is"


class SentimentOptions(GeneratedOptions):
    """Options of `sentiment`: positive and negative reviews."""

    task_name: ClassVar[str] = "sentiment"
    has_labels: ClassVar[bool] = True
    name: Literal["sentiment"] = "sentiment"
    """The task."""
    n: Count = 256
    """How many reviews, all different; as many positive ones as negative ones."""
    words: Literal["adjectives", "verbs", "both"] = "both"
    """What carries the sentiment; the group tells which."""
    question: Flag = True
    """End with " The review is", to be followed by " positive" or " negative"; else nothing is asked."""


@dataclass(frozen=True)
class _Review:
    kind: Kind
    label: Class
    word: str
    template: int
    thing: str


@builds(SentimentOptions)
def build_sentiment(options: SentimentOptions, encoder: Encoder) -> Built:
    """Draw reviews, a positive one and a negative one in turn, spread evenly over the words."""
    check_words_known(encoder, "sentiment", fill(TEMPLATES["verbs"][0], {"target": "loved", "thing": "film"}).text)
    draw = Draw(options.seed)
    drawn = {label: _drawn(options, label, draw) for label in _CLASSES}
    reviews = itertools.chain.from_iterable(zip(*drawn.values(), strict=True))
    return Built([_prompt(review, options, encoder) for review in itertools.islice(reviews, options.n)])


def _drawn(options: SentimentOptions, label: Class, draw: Draw) -> list[_Review]:
    """Half of the reviews: all words in turn, each with templates and things that differ."""
    n = -(-options.n // 2)
    kinds: Sequence[Kind] = ("adjectives", "verbs") if options.words == "both" else (options.words,)
    words = draw.shuffled([(kind, word) for kind in kinds for word in WORDS[kind][label].split()])
    needed = -(-n // len(words))
    room = len(TEMPLATES[kinds[0]]) * len(THINGS)
    if needed > room:
        cause = f"task sentiment: there are {2 * room * len(words)} different reviews, and {options.n} are asked for"
        raise UserError(cause, "Lower task.n, or set task.words to both.")
    codes = [draw.distinct(room, needed) for _ in words]
    reviews = []
    for i in range(n):
        kind, word = words[i % len(words)]
        template, thing = divmod(codes[i % len(words)][i // len(words)], len(THINGS))
        reviews.append(_Review(kind, label, word, template, THINGS[thing]))
    return reviews


def _prompt(review: _Review, options: SentimentOptions, encoder: Encoder) -> Prompt:
    text = fill(TEMPLATES[review.kind][review.template], {"target": review.word, "thing": review.thing})
    other = _CLASSES[review.label == "positive"]
    draft = Draft(
        where=f"task sentiment: {text.text!r}",
        clean=text.text + (_QUESTION if options.question else ""),
        answer=(encoder.reply(review.label),),
        wrong_answer=(encoder.reply(other),),
        spans={**text.spans, "review": (0, len(text.text))},
        group=review.kind,
        cluster=review.word,
    )
    prompt = (
        finish(draft, encoder, options)
        if options.question
        else unasked(draft, encoder.encode(draft.clean, draft.where))
    )
    return replace(by_lengths(prompt, f"{review.kind}-{review.template}", ("target", "thing")), label=review.label)
