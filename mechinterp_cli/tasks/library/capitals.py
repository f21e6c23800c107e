"""Facts: "The capital of France is" is followed by " Paris".

The corrupt prompt asks for another country whose name is as many tokens long; its capital is the wrong answer. The span
`subject` is the country's name, of one or several tokens.
"""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import chosen_templates, fill, room_for
from mechinterp_cli.tasks.options import GeneratedOptions, Templates
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder

TEMPLATES = (
    "The capital of {subject} is",
    "The capital city of {subject} is called",
    "As everyone knows, the capital of {subject} is",
    "Question: What is the capital of {subject}? Answer:",
    "She moved to the capital of {subject}, which is",
)
_FACTS = """
    Afghanistan:Kabul Albania:Tirana Algeria:Algiers Angola:Luanda Argentina:Buenos_Aires Armenia:Yerevan
    Australia:Canberra Austria:Vienna Azerbaijan:Baku Bangladesh:Dhaka Belarus:Minsk Belgium:Brussels
    Bosnia_and_Herzegovina:Sarajevo Botswana:Gaborone Bulgaria:Sofia Cambodia:Phnom_Penh Canada:Ottawa Chile:Santiago
    China:Beijing Colombia:Bogotá Croatia:Zagreb Cuba:Havana Cyprus:Nicosia Denmark:Copenhagen Ecuador:Quito
    Egypt:Cairo El_Salvador:San_Salvador England:London Estonia:Tallinn Ethiopia:Addis_Ababa Finland:Helsinki
    France:Paris Georgia:Tbilisi Germany:Berlin Ghana:Accra Greece:Athens Hungary:Budapest Iceland:Reykjavik
    India:New_Delhi Indonesia:Jakarta Iran:Tehran Iraq:Baghdad Ireland:Dublin Italy:Rome Jamaica:Kingston Japan:Tokyo
    Jordan:Amman Kenya:Nairobi Latvia:Riga Lebanon:Beirut Libya:Tripoli Lithuania:Vilnius
    Malaysia:Kuala_Lumpur Mali:Bamako Mongolia:Ulaanbaatar Morocco:Rabat Mozambique:Maputo Nepal:Kathmandu
    New_Zealand:Wellington Nicaragua:Managua Nigeria:Abuja North_Korea:Pyongyang Norway:Oslo Oman:Muscat
    Pakistan:Islamabad Peru:Lima Poland:Warsaw Portugal:Lisbon Qatar:Doha Romania:Bucharest Russia:Moscow
    Rwanda:Kigali Saudi_Arabia:Riyadh Scotland:Edinburgh Senegal:Dakar Serbia:Belgrade Slovakia:Bratislava
    Slovenia:Ljubljana Somalia:Mogadishu South_Korea:Seoul Spain:Madrid Sudan:Khartoum Sweden:Stockholm
    Switzerland:Bern Syria:Damascus Taiwan:Taipei Thailand:Bangkok Tunisia:Tunis Turkey:Ankara Uganda:Kampala
    Ukraine:Kyiv Uruguay:Montevideo Venezuela:Caracas Vietnam:Hanoi Wales:Cardiff Yemen:Sanaa Zambia:Lusaka
    Zimbabwe:Harare
"""


@dataclass(frozen=True)
class Fact:
    """A country and its capital."""

    country: str
    capital: str


FACTS = tuple(Fact(*(part.replace("_", " ") for part in entry.split(":"))) for entry in _FACTS.split())


class CapitalsOptions(GeneratedOptions):
    """Options of `capitals`: the capital of a country."""

    task_name: ClassVar[str] = "capitals"
    name: Literal["capitals"] = "capitals"
    """The task."""
    templates: Templates = 0
    """A template's number (0 to 4), all, or a list of numbers and of own templates with {subject}."""


@dataclass(frozen=True)
class _Usable:
    """A fact, the number of tokens of its country, and the token that its capital begins with."""

    fact: Fact
    length: int
    token: int


@builds(CapitalsOptions)
def build_capitals(options: CapitalsOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts, spread evenly over templates; the cluster is the country."""
    templates = _templates(options.templates)
    facts = _usable(options, encoder)
    draw = Draw(options.seed)
    sizes = [len(range(i, options.n, len(templates))) for i in range(len(templates))]
    drawn = [[facts[i] for i in room_for(draw, len(facts), size, "capitals")] for size in sizes]
    prompts = []
    for i in range(options.n):
        (label, text), fact = templates[i % len(templates)], drawn[i % len(templates)][i // len(templates)]
        other = draw.choice([f for f in facts if f.length == fact.length and f.token != fact.token])
        prompts.append(finish(_draft(label, text, fact, other, encoder), encoder, options))
    return Built(prompts)


def _draft(label: str, text: str, fact: _Usable, other: _Usable, encoder: Encoder) -> Draft:
    clean = fill(text, {"subject": fact.fact.country})
    return Draft(
        where=f"task capitals: {fact.fact.country}",
        clean=clean.text,
        corrupt=fill(text, {"subject": other.fact.country}).text,
        answer=(encoder.reply(fact.fact.capital),),
        wrong_answer=(encoder.reply(other.fact.capital),),
        spans={"subject": clean.spans["subject"]},
        # Names of different lengths shift what follows, so positions agree within one length only.
        template=f"{label}-{fact.length}",
        cluster=fact.fact.country,
    )


def _templates(asked: Templates) -> list[tuple[str, str]]:
    found = chosen_templates(asked, TEMPLATES)
    for label, text in found:
        if [field for _, field, _, _ in string.Formatter().parse(text) if field is not None] != ["subject"]:
            cause = f"task.templates: {label} is {text!r}; it needs {{subject}} once"
            raise UserError(cause, "Nothing else may stand in braces.")
    return found


def _usable(options: CapitalsOptions, encoder: Encoder) -> list[_Usable]:
    """Facts whose capital is one token (or any, where its first token will do) and that have a partner."""
    measured = [_measured(fact, encoder, options.answer_tokens == "first") for fact in FACTS]
    known = [usable for usable in measured if usable is not None]
    found = [fact for fact in known if any(f.length == fact.length and f.token != fact.token for f in known)]
    if not found:
        cause = f"task capitals: this tokenizer has none of the {len(FACTS)} capitals as a single token"
        raise UserError(cause, "Set task.answer_tokens to first, or use another task with this model.")
    return found


def _measured(fact: Fact, encoder: Encoder, first: bool) -> _Usable | None:
    country, capital = encoder.word_ids(fact.country), _capital_ids(fact, encoder)
    if not country or not capital or (len(capital) > 1 and not first):
        return None
    return _Usable(fact, len(country), capital[0])


def _capital_ids(fact: Fact, encoder: Encoder) -> Sequence[int]:
    return encoder.ids(fact.capital) if encoder.chat_template else encoder.word_ids(fact.capital)
