"""Indirect-object identification (Wang et al. 2211.00593).

"When Mary and John went to the store, John gave a drink to" is followed by " Mary". Of the two names, the one that
occurs twice is the subject (S1, S2), the other the indirect object (IO).
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import Filled, chosen_templates, fill, one_length, room_for
from mechinterp_cli.tasks.options import GeneratedOptions, Templates
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder

TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "After {A} and {B} met at the {place}, {S} handed a {object} to",
    "While {A} and {B} were working at the {place}, {S} passed a {object} to",
    "Then {A} and {B} had a long talk at the {place}, and {S} showed a {object} to",
    "Yesterday {A} and {B} walked to the {place}. Later {S} brought a {object} to",
    "Since {A} and {B} were both at the {place}, {S} decided to lend a {object} to",
    "Last week {A} and {B} spent an afternoon at the {place}, where {S} sold a {object} to",
    "Because {A} and {B} live near the {place}, {S} often gives a {object} to",
)
PLACES = ("store", "school", "park", "office", "station", "garden", "hospital", "house", "market", "library")
OBJECTS = ("drink", "book", "ring", "ball", "letter", "box", "card", "key", "picture", "coin")
_NAMES = """
    Mary John Tom James Dan Martin Amy Simon Alice Paul David Sarah Robert Michael William Richard Joseph Thomas
    Charles Daniel Matthew Mark Anthony Steven Andrew Kevin Brian George Edward Peter Jack Henry Adam Frank Scott Eric
    Stephen Larry Justin Patrick Alexander Jerry Tyler Aaron Jose Nathan Kyle Carl Arthur Roger Joe Albert Jesse Ryan
    Jacob Jason Gary Nicholas Jonathan Sam Ben Max Luke Alex Elizabeth Linda Barbara Susan Jessica Karen Lisa Nancy
    Sandra Ashley Emily Donna Michelle Carol Amanda Laura Rebecca Anna Kathleen Helen Rachel Maria Heather Diane
    Julie Victoria Kelly Christina Joan Judith Martha Hannah Jacqueline Ann Jean Rose Grace Jane Kate Emma Claire Lucy
    Sophie Julia Eva Sara Ruth Ellen
"""
NAMES = tuple(_NAMES.split())
_FIELDS = {"A", "B", "S", "place", "object"}
_NEEDED = {"A", "B", "S"}


class IoiOptions(GeneratedOptions):
    """Options of `ioi`: which of two people is given something."""

    task_name: ClassVar[str] = "ioi"
    name: Literal["ioi"] = "ioi"
    """The task."""
    templates: Templates = 0
    """A template's number (0 to 7), all, or a list of numbers and own templates ({A}, {B}, {S}, {place}, {object})."""
    order: Literal["ABBA", "BABA", "both"] = "ABBA"
    """ABBA names the indirect object first, BABA the subject."""
    corruption: Literal["swap_subject", "third_name", "random_names"] = "swap_subject"
    """What the corrupt prompt does: second subject to indirect object, or to a third name; or all names to others."""
    fillers: Literal["vary", "fixed"] = "vary"
    """Whether places and objects vary, or are always the store and the drink."""


@dataclass(frozen=True)
class _Cast:
    """Who and what one prompt is about."""

    io: str
    subject: str
    place: str
    object: str


@builds(IoiOptions)
def build_ioi(options: IoiOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts, spread evenly over templates and orders; the cluster is template × order."""
    orders = ("ABBA", "BABA") if options.order == "both" else (options.order,)
    cells = [(label, text, order) for label, text in _templates(options.templates) for order in orders]
    names, places, objects = _words(options, encoder)
    draw = Draw(options.seed)
    sizes = [len(range(i, options.n, len(cells))) for i in range(len(cells))]
    drafts: list[list[Draft]] = []
    for (label, text, order), size in zip(cells, sizes, strict=True):
        casts = _casts(draw, size, names, places, objects, text)
        drafts.append([_draft(options, text, f"{label}-{order}", order, cast, names, draw) for cast in casts])
    mixed = [drafts[i % len(cells)][i // len(cells)] for i in range(options.n)]
    spoken = [_reply(draft, encoder) for draft in mixed]
    return Built(one_length([finish(draft, encoder, options) for draft in spoken]))


def _templates(asked: Templates) -> list[tuple[str, str]]:
    found = chosen_templates(asked, TEMPLATES)
    for label, text in found:
        fields = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
        if not _NEEDED <= fields <= _FIELDS or text.index("{S}") < max(text.index("{A}"), text.index("{B}")):
            cause = f"task.templates: {label} is {text!r}; it needs {{A}} and {{B}}, then {{S}}"
            raise UserError(cause, "{place} and {object} may be used too, and nothing else in braces.")
    return found


def _words(options: IoiOptions, encoder: Encoder) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    names = [name for name in NAMES if encoder.single(name)]
    needed = {"swap_subject": 2, "third_name": 3, "random_names": 5}[options.corruption]
    if len(names) < needed:
        found = f"this tokenizer has {len(names)} of its {len(NAMES)} names as single tokens"
        cause = f"task ioi: no usable names: {found} and {needed} are needed"
        raise UserError(cause, "Use another task with this model, or give prompts of your own (task.prompts).")
    if options.fillers == "fixed":
        return names, PLACES[:1], OBJECTS[:1]
    places = [word for word in PLACES if encoder.word(word) is not None]
    objects = [word for word in OBJECTS if encoder.word(word) is not None]
    return names, places or PLACES[:1], objects or OBJECTS[:1]


def _casts(
    draw: Draw, n: int, names: Sequence[str], places: Sequence[str], objects: Sequence[str], text: str
) -> list[_Cast]:
    """`n` different casts for one template: a number below the product of the choices is a cast."""
    places = places if "{place}" in text else places[:1]
    objects = objects if "{object}" in text else objects[:1]
    pairs = len(names) * (len(names) - 1)
    space = pairs * len(places) * len(objects)
    return [_cast(code, names, places, objects) for code in room_for(draw, space, n, "ioi")]


def _cast(code: int, names: Sequence[str], places: Sequence[str], objects: Sequence[str]) -> _Cast:
    code, place = divmod(code, len(places))
    code, thing = divmod(code, len(objects))
    first, second = divmod(code, len(names) - 1)
    rest = [name for i, name in enumerate(names) if i != first]
    return _Cast(names[first], rest[second], places[place], objects[thing])


def _draft(
    options: IoiOptions, text: str, label: str, order: str, cast: _Cast, names: Sequence[str], draw: Draw
) -> Draft:
    clean = _sentence(text, order, cast.io, cast.subject, cast.subject, cast)
    corrupt = _sentence(text, order, *_corrupt_names(options, cast, names, draw), cast)
    first, second = ("IO", "S1") if order == "ABBA" else ("S1", "IO")
    spans = {first: clean.spans["A"], second: clean.spans["B"], "S2": clean.spans["S"]}
    return Draft(
        where=f"task ioi template {label}",
        clean=clean.text,
        corrupt=corrupt.text,
        answer=(cast.io,),
        wrong_answer=(cast.subject,),
        spans=spans,
        neighbours=("S1+1", "S2+1"),
        template=label,
        cluster=label,
    )


def _corrupt_names(options: IoiOptions, cast: _Cast, names: Sequence[str], draw: Draw) -> tuple[str, str, str]:
    """Indirect object, first and second subject of the corrupt prompt."""
    others = [name for name in names if name not in (cast.io, cast.subject)]
    if options.corruption == "swap_subject":
        return cast.io, cast.subject, cast.io
    if options.corruption == "third_name":
        return cast.io, cast.subject, draw.choice(others)
    io, first, second = draw.sample(others, 3)
    return io, first, second


def _sentence(text: str, order: str, io: str, s1: str, s2: str, cast: _Cast) -> Filled:
    a, b = (io, s1) if order == "ABBA" else (s1, io)
    return fill(text, {"A": a, "B": b, "S": s2, "place": cast.place, "object": cast.object})


def _reply(draft: Draft, encoder: Encoder) -> Draft:
    """The draft with its answers written as this encoder's replies are."""
    answer, wrong = (tuple(encoder.reply(str(a)) for a in texts) for texts in (draft.answer, draft.wrong_answer))
    return replace(draft, answer=answer, wrong_answer=wrong)
