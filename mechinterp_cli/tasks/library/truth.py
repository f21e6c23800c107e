"""True and false statements: "The capital of France is Paris." and "The capital of France is not Berlin." are true.

Every fact is stated truly and falsely, and with negations in both polarities, so that no word tells which. With a
question the prompt goes on " This statement is", and " true" or " false" is right. Spans: `subject` and `object` of the
statement, `statement`, and `target`, its last token (the full stop), where a model has read all of it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from mechinterp_cli.config.types import Count, Flag, unique
from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, by_lengths, finish, unasked
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import fill
from mechinterp_cli.tasks.library.capitals import FACTS
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.prompts import Prompt
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder
from mechinterp_cli.tasks.words import check_words_known

NUMBERS = """
    two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty
"""
ANIMALS = (
    "ant flea bee fly",
    "mouse sparrow frog hamster",
    "rabbit cat duck squirrel",
    "sheep goat wolf pig",
    "horse cow bear camel",
    "elephant whale hippopotamus rhinoceros",
)
"""Smallest first; no animal of one row is as large as any of the next."""
_QUESTION = " This statement is"
Topic = Literal["capitals", "numbers", "animals"]
Polarity = Literal["affirmative", "negated"]


class TruthOptions(GeneratedOptions):
    """Options of `truth`: true and false statements."""

    task_name: ClassVar[str] = "truth"
    has_labels: ClassVar[bool] = True
    name: Literal["truth"] = "truth"
    """The task."""
    n: Count = 256
    """How many statements, all different; as many true ones as false ones."""
    topics: Annotated[tuple[Topic, ...], Field(min_length=1), AfterValidator(unique)] = (
        "capitals",
        "numbers",
        "animals",
    )
    """What the statements are about; facts are spread evenly over them."""
    negations: Literal["none", "both", "only"] = "both"
    """Whether statements hold a "not"; `both` says every fact with and without it, and the group tells which."""
    question: Flag = True
    """End with " This statement is", to be followed by " true" or " false"; else nothing is asked."""


@dataclass(frozen=True)
class _Fact:
    """What can be said of something: a template, and the words that make it true and false without a "not"."""

    topic: Topic
    name: str
    template: str
    true: Mapping[str, str]
    false: Mapping[str, str]


@builds(TruthOptions)
def build_truth(options: TruthOptions, encoder: Encoder) -> Built:
    """Draw facts and say each in all its ways; the cluster is the fact, the group the polarity."""
    check_words_known(encoder, "truth", "The capital of France is Paris.")
    ways = _ways(options)
    facts = _drawn(options, -(-options.n // len(ways)))
    said = itertools.islice(((fact, *way) for fact in facts for way in ways), options.n)
    return Built([_prompt(fact, polarity, true, options, encoder) for fact, polarity, true in said])


def _ways(options: TruthOptions) -> list[tuple[Polarity, bool]]:
    """Polarities and truths, a true one and a false one in turn."""
    polarities: Mapping[str, Sequence[Polarity]] = {
        "none": ("affirmative",),
        "both": ("affirmative", "negated"),
        "only": ("negated",),
    }
    return list(itertools.product(polarities[options.negations], (True, False)))


def _drawn(options: TruthOptions, n: int) -> list[_Fact]:
    """`n` different facts, in turn over the topics."""
    draw = Draw(options.seed)
    columns = []
    for i, topic in enumerate(options.topics):
        facts, needed = _TOPICS[topic](draw), len(range(i, n, len(options.topics)))
        if needed > len(facts):
            cause = (
                f"task truth: topic {topic} has {len(facts)} facts, and {needed} are needed for {options.n} statements"
            )
            raise UserError(cause, "Lower task.n, or use more topics (task.topics).")
        columns.append(draw.sample(facts, needed))
    return [columns[i % len(columns)][i // len(columns)] for i in range(n)]


def _prompt(fact: _Fact, polarity: Polarity, true: bool, options: TruthOptions, encoder: Encoder) -> Prompt:
    negated = polarity == "negated"
    words = {**(fact.true if true != negated else fact.false), "negation": "not " if negated else ""}
    statement = fill(fact.template, words)
    end = len(statement.text)
    draft = Draft(
        where=f"task truth: {statement.text!r}",
        clean=statement.text + (_QUESTION if options.question else ""),
        answer=(encoder.reply("true" if true else "false"),),
        wrong_answer=(encoder.reply("false" if true else "true"),),
        spans={
            "subject": statement.spans["subject"],
            "object": statement.spans["object"],
            "statement": (0, end),
            "target": (end - 1, end),
        },
        group=polarity,
        cluster=fact.name,
    )
    prompt = (
        finish(draft, encoder, options)
        if options.question
        else unasked(draft, encoder.encode(draft.clean, draft.where))
    )
    prompt = by_lengths(prompt, f"{fact.topic}-{polarity}", ("subject", "object"))
    return replace(prompt, label="true" if true else "false")


def _capitals(draw: Draw) -> list[_Fact]:
    template = "The capital of {subject} is {negation}{object}."
    facts = []
    for fact in FACTS:
        other = draw.choice([f.capital for f in FACTS if f.capital != fact.capital])
        true, false = ({"subject": fact.country, "object": capital} for capital in (fact.capital, other))
        facts.append(_Fact("capitals", fact.country, template, true, false))
    return facts


def _numbers(draw: Draw) -> list[_Fact]:
    return _comparisons(
        "numbers", "The number {subject} is {negation}%s than the number {object}.", NUMBERS.split(), draw
    )


def _animals(draw: Draw) -> list[_Fact]:
    facts = []
    for small, large in itertools.combinations(ANIMALS, 2):
        for pair in itertools.product(small.split(), large.split()):
            facts += _comparisons("animals", "The {subject} is {negation}%s than the {object}.", pair, draw)
    return facts


def _comparisons(topic: Topic, template: str, rising: Sequence[str], draw: Draw) -> list[_Fact]:
    """Every two of a rising list, each compared one way by chance, so that no word goes with the truth."""
    facts = []
    for low, high in itertools.combinations(rising, 2):
        larger = bool(draw.below(2))
        up, down = {"subject": high, "object": low}, {"subject": low, "object": high}
        true, false = (up, down) if larger else (down, up)
        facts.append(_Fact(topic, f"{low}-{high}", template % ("larger" if larger else "smaller"), true, false))
    return facts


_TOPICS: Mapping[Topic, Callable[[Draw], list[_Fact]]] = {
    "capitals": _capitals,
    "numbers": _numbers,
    "animals": _animals,
}
