"""The answer of a run in a sentence."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mechinterp_cli.report.cells import figure, interval, missing, number, probability, text
from mechinterp_cli.report.rows import Row


def level_of(config: Mapping[str, Any]) -> str:
    """Of which intervals a run's tables are, in percent.

    Args:
        config: The manifest's.
    """
    level = (config.get("stats") or {}).get("ci")
    return f"{100 * number(0.95 if missing(level) else level):g}"


def certainty(row: Row) -> str:
    """What stands behind a number: ` [low, high] (adjusted p 0.0005, n = 64)`; what is not known is left out.

    Args:
        row: With `ci_low, ci_high, p_adjusted, n`, as far as they are there.
    """
    ends = interval(row.get("ci_low"), row.get("ci_high"))
    p = probability(row.get("p_adjusted"))
    behind = [f"adjusted p {p}" if p else "", f"n = {text(row['n'])}" if not missing(row.get("n")) else ""]
    known = ", ".join(filter(None, behind))
    return f"{' ' + ends if ends else ''}{f' ({known})' if known else ''}"


def strongest_sentence(row: Row | None, *, where: str, quantity: str, measured: str, on: str, count: int) -> str:
    """Which trial is the strongest, and how strong.

    Args:
        row: Its row of the summary; None where no trial has a number.
        where: What the trial is called.
        quantity: The row's column.
        measured: That column in words.
        on: The metric.
        count: Trials there are.
    """
    if row is None:
        return "No trial has a number: every effect is undefined, or known to be 0."
    among = f"The strongest of {count:,} trials is {where}" if count > 1 else f"The one trial is {where}"
    return f"{among}: {measured} on {on} {figure(row[quantity], sign=True)}{certainty(row)}."


def named_tables(
    rows: Iterable[Mapping[str, Any]], titles: Mapping[str, str]
) -> Sequence[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Rows of several tables, told apart by their `table`, under the tables' titles.

    Args:
        rows: With a key `table`.
        titles: By table; one without a title is called what it is called.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(str(row["table"]), []).append(row)
    return [(titles.get(name, name), part) for name, part in found.items()]
