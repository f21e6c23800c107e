"""Years (Hanna et al. 2305.00586): "The war lasted from the year 1732 to the year 17" is followed by a later year.

Tokenizers split years differently, so the answers are sets of tokens and are found by asking the tokenizer. The end
year is cut before its first token that holds the decade digit, the deciding token. A token is right when every year of
the century that it can begin is later than the start year, wrong when none is, and belongs to neither set otherwise:

- two digits to a token (17 32): the prompt ends after 17; right are 33 to 99, wrong 00 to 32;
- one digit to a token (1 7 3 2): the prompt ends after 17; right are 4 to 9, wrong 0 to 2, and 3 is neither;
- three digits, or whole years, to a token: the prompt ends before them; right are the tokens of later years.

The corrupt prompt starts in the year 01 of the same century, so that hardly any year is wrong any more.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from mechinterp_cli.errors import UserError
from mechinterp_cli.tasks.draft import Draft, finish
from mechinterp_cli.tasks.draw import Draw
from mechinterp_cli.tasks.fill import fill, one_length, room_for
from mechinterp_cli.tasks.options import GeneratedOptions
from mechinterp_cli.tasks.registry import Built, builds
from mechinterp_cli.tasks.tokenise import Encoder

_FRAME = "The {noun} lasted from the year {century}{YY} to the year "
_NOUNS = """
    war project trial campaign marriage contract study reign trip voyage attack program operation conflict journey
    siege strike tour plan test dispute drought famine crisis alliance
"""
NOUNS = tuple(_NOUNS.split())
Century = Annotated[int, Field(strict=True, ge=10, le=99)]


class GreaterThanOptions(GeneratedOptions):
    """Options of `greater_than`: an end year after the start year."""

    task_name: ClassVar[str] = "greater_than"
    name: Literal["greater_than"] = "greater_than"
    """The task."""
    centuries: Annotated[tuple[Century, ...], Field(min_length=1)] = (11, 12, 13, 14, 15, 16, 17)
    """First two digits of the years."""


@dataclass(frozen=True)
class _Deciding:
    """How a century's end years go on: the text before their deciding token, and the years that each token begins."""

    cut: str
    n_before: int
    years: Mapping[int, Sequence[int]]

    def later(self, start: int) -> tuple[int, ...]:
        """Tokens that only later years begin with."""
        return tuple(token for token, years in self.years.items() if min(years) > start)

    def not_later(self, start: int) -> tuple[int, ...]:
        """Tokens that no later year begins with."""
        return tuple(token for token, years in self.years.items() if max(years) <= start)


@builds(GreaterThanOptions)
def build_greater_than(options: GreaterThanOptions, encoder: Encoder) -> Built:
    """Draw `n` different prompts; the cluster is the noun. Spans: `noun`, `start` (the year), `YY` (its end)."""
    if encoder.chat_template:
        raise UserError("task.chat_template: greater_than goes on with a year, no reply does", "Leave the key out.")
    nouns = [noun for noun in NOUNS if encoder.word(noun) is not None]
    centuries = _centuries(options.centuries, encoder) if nouns else {}
    starts = _starts(centuries, encoder)
    if not nouns or not starts:
        cause = f"task greater_than: this tokenizer has {len(nouns)} usable nouns and {len(starts)} usable years"
        raise UserError(cause, "Use another task with this model, or give prompts of your own (task.prompts).")
    draw = Draw(options.seed)
    codes = room_for(draw, len(nouns) * len(starts), options.n, "greater_than")
    chosen = [(nouns[code % len(nouns)], *starts[code // len(nouns)]) for code in codes]
    drafts = [_draft(noun, century, year, centuries[century]) for noun, century, year in chosen]
    return Built(one_length([finish(draft, encoder, options) for draft in drafts]))


def _draft(noun: str, century: int, year: int, deciding: _Deciding) -> Draft:
    clean = fill(_FRAME, {"noun": noun, "century": str(century), "YY": f"{year:02}"})
    corrupt = fill(_FRAME, {"noun": noun, "century": str(century), "YY": "01"})
    start = (clean.spans["century"][0], clean.spans["YY"][1])
    return Draft(
        where=f"task greater_than: {century}{year:02}",
        clean=clean.text.rstrip() + deciding.cut,
        corrupt=corrupt.text.rstrip() + deciding.cut,
        answer=deciding.later(year),
        wrong_answer=deciding.not_later(year),
        spans={"noun": clean.spans["noun"], "start": start, "YY": clean.spans["YY"]},
        template="0",
        cluster=noun,
    )


def _centuries(asked: Sequence[int], encoder: Encoder) -> dict[int, _Deciding]:
    """Centuries whose end years are cut after equally many tokens: the most of them."""
    found = {century: _deciding(century, encoder) for century in dict.fromkeys(asked)}
    usable = {century: deciding for century, deciding in found.items() if deciding is not None}
    if not usable:
        return {}
    ((n_before, _),) = Counter(deciding.n_before for deciding in usable.values()).most_common(1)
    return {century: deciding for century, deciding in usable.items() if deciding.n_before == n_before}


def _deciding(century: int, encoder: Encoder) -> _Deciding | None:
    """Group a century's end years by what stands before their deciding token, and keep the largest group."""
    groups: dict[tuple[str, tuple[int, ...]], dict[int, list[int]]] = {}
    for year in range(100):
        cut = _cut(century, year, encoder)
        if cut is not None:
            text, before, token = cut
            groups.setdefault((text, before), {}).setdefault(token, []).append(year)
    if not groups:
        return None
    (text, before), years = max(groups.items(), key=lambda group: sum(len(y) for y in group[1].values()))
    return _Deciding(text, len(before), years)


def _cut(century: int, year: int, encoder: Encoder) -> tuple[str, tuple[int, ...], int] | None:
    """What of an end year the prompt shows, the tokens up to there, and the deciding token; None where it has none."""
    carrier = "The year"
    text = f"{carrier} {century}{year:02}"
    ids, offsets = encoder.ids_and_offsets(text)
    decade = len(text) - 2
    at = next((i for i, (start, end) in enumerate(offsets) if start <= decade < end), 0)
    if at == 0 or ids[at] == encoder.tokenizer.unk_token_id:
        return None
    prompt = text[: offsets[at - 1][1]]
    fits = len(prompt) >= len(carrier) and encoder.ids(prompt) == ids[:at]
    return (prompt[len(carrier) :], ids[:at], ids[at]) if fits else None


def _starts(centuries: Mapping[int, _Deciding], encoder: Encoder) -> list[tuple[int, int]]:
    """Start years with right and wrong answers, split into as many tokens as the year 01 and as each other."""
    lengths = {
        (century, year): len(encoder.word_ids(f"{century}{year:02}")) for century in centuries for year in range(1, 100)
    }
    lengths = {year: length for year, length in lengths.items() if length}
    if not lengths:
        return []
    ((length, _),) = Counter(lengths.values()).most_common(1)
    return [
        (century, year)
        for century, year in lengths
        if lengths[century, year] == length == lengths.get((century, 1))
        and year > 1
        and centuries[century].later(year)
        and centuries[century].not_later(year)
    ]
