"""Numbers and gaps of tables as words."""

import math
from collections.abc import Iterable

import pandas as pd


def missing(value: object) -> bool:
    """Whether a cell holds nothing: null or NaN."""
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def number(value: object) -> float:
    """A cell as a number; NaN where it holds nothing."""
    return math.nan if missing(value) else float(str(value))


def text(value: object) -> str:
    """A cell as text; empty where it holds nothing."""
    return "" if missing(value) else str(value)


def figure(value: object, digits: int = 3, *, sign: bool = False) -> str:
    """A number with so many decimals; empty where there is none. What rounds to 0 has no minus."""
    if missing(value):
        return ""
    rounded = round(float(str(value)), digits) + 0.0
    return f"{rounded:+.{digits}f}" if sign else f"{rounded:.{digits}f}"


def interval(low: object, high: object, digits: int = 3) -> str:
    """Two ends in brackets; empty where one is missing."""
    ends = figure(low, digits), figure(high, digits)
    return f"[{ends[0]}, {ends[1]}]" if all(ends) else ""


def probability(value: object) -> str:
    """A p-value."""
    if missing(value):
        return ""
    known = float(str(value))
    return f"{known:.4f}" if known >= 0.0001 else f"{known:.0e}"


def between(counts: Iterable[object]) -> str:
    """The smallest and the largest of some counts: `16`, `2 to 16`; empty where none is known."""
    known = sorted({int(number(count)) for count in counts if not missing(count)})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((known[0], known[-1]))) if known else ""


def counted_between(counts: Iterable[object], noun: str, plural: str = "") -> str:
    """The same with what is counted: `1 prompt`, `2 to 16 prompts`; empty where none is known."""
    told = between(counts)
    return f"{told} {noun if told == '1' else plural or f'{noun}s'}" if told else ""
