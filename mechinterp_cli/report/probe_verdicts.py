"""Readable? Used? A table of verdicts, and one sentence of each probe and intervention."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.causal import unit_of
from mechinterp_cli.report.cells import figure, interval, missing, number, probability, text
from mechinterp_cli.report.probe_causal import ALL, PLACE, PROBE, baseline_words, done, several_of, where
from mechinterp_cli.report.rows import Row, having, records
from mechinterp_cli.report.tables import Column, line, text_table

WORDS = {"yes": "yes", "no": "no, within the margin", "inconclusive": "inconclusive", "": "no verdict"}
_COLUMNS = {
    "layer": Column(),
    "where": Column(left=True, broken=True),
    "readable": Column(left=True),
    "score": Column(2, together=True),
    "score p": Column(3),
    "used": Column(left=True),
    "effect": Column(1),
    "random band": Column(4),
    "|effect|": Column(5, together=True),
    "random |effect|": Column(5, together=True),
    "p adj.": Column(1),
}
_KEYS = (*PLACE, "layer", "intervention", "strength", "stream")
Key = tuple[str, ...]


def _key(row: Row) -> Key:
    return tuple(text(row[name]) for name in _KEYS)


def questions(verdicts: pd.DataFrame) -> Iterator[tuple[str, list[Row]]]:
    """The verdicts of each probe, kind of site and intervention over all prompts, by layer.

    Args:
        verdicts: The table, of one checkpoint.
    """
    rows = having(verdicts, group=ALL)
    if rows.empty:
        return
    keys = ["probe", "site", "intervention", "strength", "stream"]
    for _, part in rows.groupby(keys, sort=False, dropna=False):
        told = sorted(records(part), key=lambda row: number(row["layer"]))
        yield f"{text(told[0]['probe'])} at {text(told[0]['site'])}, {done(told[0])}", told


def telling(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows that say most, in their order: what is used, then the largest differences from random subspaces.

    Args:
        rows: Of one question.
        count: How many.
    """

    def weight(row: Row) -> tuple[bool, float]:
        found = [abs(number(row[name])) for name in ("difference", "size_difference")]
        return text(row["used"]) == "yes", max((value for value in found if math.isfinite(value)), default=-1.0)

    kept = sorted(range(len(rows)), key=lambda at: weight(rows[at]), reverse=True)[:count]
    return [rows[at] for at in sorted(kept)]


def verdict_tables(
    verdicts: pd.DataFrame, effects: pd.DataFrame, *, count: int, width: int, plain: bool
) -> Iterator[Group]:
    """A table for each probe, kind of site and intervention, then what it all says in sentences.

    Args:
        verdicts: The table, of one checkpoint.
        effects: `causal_effects` of the first metric.
        count: How many rows of each.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if verdicts.empty:
        return
    beside = {_key(row): row for row in records(having(effects, direction=PROBE, group=ALL))}
    for title, rows in questions(verdicts):
        several = several_of(pd.DataFrame(rows)) | {"probe": False}
        told = telling(rows, count)
        metric, unedited = unit_of(text(rows[0]["metric"])), baseline_words(effects)
        head = f"{title}: effect on {metric}" + (f", {unedited} unedited" if unedited else "")
        of = f"{len(told)} of {len(rows)} places, all in `causal_verdicts`" if len(told) < len(rows) else ""
        yield text_table(
            [_cells(row, beside.get(_key(row), {}), several) for row in told],
            _COLUMNS,
            lines=tuple(filter(None, (head, of))),
            width=width,
            plain=plain,
            notes=_notes(rows),
        )
    if sentences := verdict_sentences(verdicts):
        yield Group(*[line(sentence, plain) for sentence in sentences])


def _notes(rows: Sequence[Row]) -> dict[str, str]:
    margin = next((f"{number(row['margin']):g}" for row in rows if not missing(row["margin"])), "")
    within = f", the margin {margin}" if margin else ""
    return {
        "used": f"beside random subspaces of the same rank and removed variance{within}",
        "random band": "the middle 95 % of draws",
        "p adj.": "the smaller of mean and magnitude, corrected over all layers and both",
    }


def adjusted(row: Row) -> float:
    """The smaller of the corrected p of mean and magnitude: a verdict may rest on either; NaN where there is none.

    Args:
        row: Of `causal_verdicts`.
    """
    found = [number(row[name]) for name in ("p_adjusted", "size_p_adjusted")]
    return min((value for value in found if math.isfinite(value)), default=math.nan)


def _cells(row: Row, effect: Row, several: Mapping[str, bool]) -> dict[str, str]:
    return {
        "layer": text(row["layer"]),
        "where": where(row, several=several),
        "readable": text(row["readable"]) or "unknown",
        "score": figure(row["score"]),
        "score p": probability(row["score_p"]),
        "used": WORDS.get(text(row["used"]), text(row["used"])),
        "effect": figure(row["effect"], sign=True) or "undefined",
        "random band": interval(effect.get("random_low"), effect.get("random_high")),
        "|effect|": figure(row["size"]),
        "random |effect|": figure(effect.get("random_size")),
        "p adj.": probability(adjusted(row)),
    }


def verdict_sentences(verdicts: pd.DataFrame) -> list[str]:
    """One sentence of each probe and kind of site: where it is read, and where each intervention shows it used.

    Args:
        verdicts: The table, of one checkpoint.
    """
    found: dict[tuple[str, str], list[tuple[str, list[Row]]]] = {}
    for _, rows in questions(verdicts):
        found.setdefault((text(rows[0]["probe"]), text(rows[0]["site"])), []).append((done(rows[0]), rows))
    sentences = []
    for (probe, site), asked in found.items():
        read = _outcomes(asked[0][1], "readable", "read out", "not read out")
        used = "; ".join(f"{name}: {_outcomes(rows, 'used', 'used', 'not used')}" for name, rows in asked)
        sentences.append(f"{probe} at {site}: {read}. {used}.")
    return sentences


def _outcomes(rows: Sequence[Row], column: str, yes: str, no: str) -> str:
    """The layers of each outcome, in words."""
    names = {"yes": yes, "no": f"{no} (within the margin)", "inconclusive": "inconclusive", "": "no verdict"}
    layers: dict[str, list[int]] = {name: [] for name in names}
    for row in rows:
        layers.setdefault(text(row[column]), []).append(int(number(row["layer"])))
    known = {name: sorted(set(found)) for name, found in layers.items() if found}
    if len(known) == 1:
        (name,) = known
        return f"{names[name]} at every layer" if len(known[name]) > 1 else f"{names[name]} {_at(known[name])}"
    told = ([f"nowhere {yes}"] if "yes" not in known else []) + [
        f"{names[name]} {_at(found)}" for name, found in known.items()
    ]
    return ", ".join(told)


def _at(layers: Sequence[int]) -> str:
    """`at layer 3`, `at layers 1, 4 to 9`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    names = [f"{run[0]} to {run[-1]}" if len(run) > 2 else " and ".join(map(str, run)) for run in runs]
    return f"at layer{'s' if len(layers) > 1 else ''} {', '.join(names)}"
