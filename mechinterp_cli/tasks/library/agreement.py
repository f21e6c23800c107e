"""Subject-verb agreement (Linzen et al. 1611.01368): "The key near the cabinets" is followed by " is", not by " are".

The corrupt prompt has the subject in the other number. With an attractor, a second noun stands between subject and
verb; the group says whether its number is the subject's (`aligned`) or the other (`conflicting`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import fill, one_length, room_for
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder

_PLAIN = ("We know that the {subject}", "At the moment the {subject}", "I heard that the {subject}")
_WITH_ATTRACTOR = (
    "The {subject} near the {attractor}",
    "The {subject} behind the {attractor}",
    "The {subject} with the {attractor}",
    "The {subject} beside the {attractor}",
)
_BEFORE_VERB = " now"
_NOUNS = """
    key:keys cabinet:cabinets boy:boys girl:girls doctor:doctors teacher:teachers student:students car:cars
    house:houses book:books tree:trees dog:dogs cat:cats bird:birds farmer:farmers lawyer:lawyers author:authors
    picture:pictures table:tables door:doors window:windows road:roads bridge:bridges ship:ships friend:friends
    king:kings queen:queens player:players worker:workers actor:actors
"""
NOUNS = tuple(tuple(entry.split(":")) for entry in _NOUNS.split())
"""Singular and plural."""
_VERBS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "is": (("is",), ("are",)),
    "all": (("is", "was", "has"), ("are", "were", "have")),
}
_SINGULAR, _PLURAL = 0, 1


class AgreementOptions(GeneratedOptions):
    """Options of `agreement`: a verb in its subject's number."""

    task_name: ClassVar[str] = "agreement"
    name: Literal["agreement"] = "agreement"
    """The task."""
    attractor: Literal["none", "aligned", "conflicting", "both"] = "both"
    """Whether a second noun stands before the verb, and in whose number."""
    adverb: bool = False
    """Whether " now" stands before the verb, so that the last token is not the nearest noun itself."""
    verbs: Literal["is", "all"] = "is"
    """The answers: is against are, or the sets is, was, has against are, were, have."""


@dataclass(frozen=True)
class _Case:
    """One prompt's words: nouns by their place in the list, numbers as 0 (singular) or 1 (plural)."""

    text: str
    label: str
    subject: Sequence[str]
    number: int
    attractor: Sequence[str]
    group: str


@builds(AgreementOptions)
def build_agreement(options: AgreementOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts, spread evenly over groups; the cluster is the subject's noun.

    With `attractor: both` every prompt has a twin in the other group, of the same words but for the number of the
    attractor.
    """
    nouns = [noun for noun in NOUNS if all(encoder.word(form) is not None for form in noun)]
    verbs = _verbs(options, encoder)
    if len(nouns) < 2:
        found = f"{len(nouns)} of the {len(NOUNS)} nouns"
        cause = f"task agreement: this tokenizer has {found} as single tokens in both numbers; 2 are needed"
        raise UserError(cause, "Use another task with this model, or give prompts of your own (task.prompts).")
    draw = Draw(options.seed)
    groups = _groups(options)
    codes = _codes(draw, groups, nouns, -(-options.n // len(groups)))
    cases = [_case(codes[i // len(groups)], groups[i % len(groups)], nouns, options) for i in range(options.n)]
    return Built(one_length([finish(_draft(case, verbs, encoder), encoder, options) for case in cases]))


def _groups(options: AgreementOptions) -> tuple[str, ...]:
    if options.attractor == "none":
        return ("",)
    return ("aligned", "conflicting") if options.attractor == "both" else (options.attractor,)


def _verbs(options: AgreementOptions, encoder: Encoder) -> tuple[Sequence[str], Sequence[str]]:
    """Answers for a singular and for a plural subject: the pairs of which both are single tokens."""
    pairs = [pair for pair in zip(*_VERBS[options.verbs], strict=True) if all(map(encoder.single, pair))]
    if not pairs:
        raise UserError("task agreement: no verb is a single token with this tokenizer", "Use another task.")
    return tuple(pair[_SINGULAR] for pair in pairs), tuple(pair[_PLURAL] for pair in pairs)


def _texts(group: str) -> Sequence[str]:
    return _WITH_ATTRACTOR if group else _PLAIN


def _codes(draw: Draw, groups: Sequence[str], nouns: Sequence[Sequence[str]], n: int) -> list[int]:
    """Numbers that stand for a text, a subject, its number, and an attractor's noun."""
    others = len(nouns) - 1 if groups[0] else 1
    return room_for(draw, len(_texts(groups[0])) * len(nouns) * others * 2, n, "agreement")


def _case(code: int, group: str, nouns: Sequence[Sequence[str]], options: AgreementOptions) -> _Case:
    texts = _texts(group)
    code, number = divmod(code, 2)
    code, text = divmod(code, len(texts))
    subject, other = divmod(code, len(nouns) - 1 if group else 1)
    attractor = [noun for i, noun in enumerate(nouns) if i != subject][other]
    label = f"attractor-{text}" if group else f"plain-{text}"
    adverb = _BEFORE_VERB if options.adverb else ""
    return _Case(texts[text] + adverb, label, nouns[subject], number, attractor, group)


def _draft(case: _Case, verbs: tuple[Sequence[str], Sequence[str]], encoder: Encoder) -> Draft:
    second = case.number if case.group == "aligned" else 1 - case.number
    attractor = case.attractor[second]
    clean = fill(case.text, {"subject": case.subject[case.number], "attractor": attractor})
    corrupt = fill(case.text, {"subject": case.subject[1 - case.number], "attractor": attractor})
    return Draft(
        where=f"task agreement: {clean.text!r}",
        clean=clean.text,
        corrupt=corrupt.text,
        answer=tuple(map(encoder.reply, verbs[case.number])),
        wrong_answer=tuple(map(encoder.reply, verbs[1 - case.number])),
        spans=clean.spans,
        group=case.group,
        template=case.label,
        cluster=case.subject[_SINGULAR],
    )
