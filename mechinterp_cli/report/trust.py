"""How far estimates can be trusted: each estimator beside exact effects, by kind of site, and what that means."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd
from rich.console import Group

from mechinterp_cli.report.cells import counted_between, figure, missing, number, text
from mechinterp_cli.report.estimates import Estimates
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.tables import Column, line, text_table
from mechinterp_cli.runs.estimators import signed
from mechinterp_cli.text import counted

GOOD = 0.9
"""Pearson, and the share of signs that agree, from which on estimates are said to be in proportion to exact effects."""
ORDER = 0.7
"""Spearman from which on estimates are said to give the order."""
LEAST = 10
"""Random nodes from which on anything is said."""
YES, ORDERED, NO, FEW, UNKNOWN = "yes", "order alone", "no", "too few", "unknown"
MEANINGS = {
    YES: "are in proportion to exact effects",
    ORDERED: "give the order of effects, not their sizes",
    NO: "do not follow exact effects: check what you use",
    FEW: f"fewer than {LEAST} random nodes: nothing can be said",
    UNKNOWN: "no correlation is defined",
}
_COLUMNS = {
    "site": Column(left=True),
    "trust": Column(left=True),
    "random": Column(1),
    "Pearson": Column(),
    "Spearman": Column(3),
    "signs": Column(2),
    "|difference|": Column(6),
    "top": Column(5, together=True),
    "top matter": Column(5, together=True),
    "missed at most": Column(1),
}


def verdict(row: Row, *, with_sign: bool) -> str:
    """What one row of the random part says of estimates.

    Args:
        row: Of `verification`.
        with_sign: Whether the estimates have signs.
    """
    if number(row["rows"]) < LEAST:
        return FEW
    pearson, spearman = number(row["pearson"]), number(row["spearman"])
    if not math.isfinite(pearson):
        return UNKNOWN
    signs = number(row["sign_agreement"]) if with_sign else math.nan
    # No sign that counts is no sign that is wrong.
    signs_hold = not math.isfinite(signs) or signs >= GOOD
    if pearson >= GOOD and signs_hold:
        return YES
    return ORDERED if spearman >= ORDER and signs_hold else NO


def trust_tables(
    estimates: Estimates, verification: pd.DataFrame, missed: pd.DataFrame, *, width: int, plain: bool
) -> Iterator[Group]:
    """A table per estimator, and below it what it means.

    Args:
        estimates: The estimates, of one metric.
        verification: Of the same metric and checkpoint.
        missed: Of the same metric and checkpoint; may be empty.
        width: Columns of the terminal.
        plain: ASCII only, no colour.
    """
    if verification.empty:
        return
    for estimator in distinct(verification, "estimator"):
        random = records(having(verification, estimator=estimator, part="random"))
        top = {text(row["site"]): row for row in records(having(verification, estimator=estimator, part="top"))}
        bounds = _bounds(missed, estimator)
        cells = [_cells(estimates, estimator, row, top, bounds) for row in random]
        title = f"can estimates by {estimates.called(estimator)} be trusted? Beside exact effects on {estimates.metric}"
        yield text_table(cells, _COLUMNS, lines=(title,), width=width, plain=plain)
        sentences = list(trust_sentences(estimates, estimator, random, top, bounds))
        yield Group(*[line(sentence, plain) for sentence in sentences])


def _bounds(missed: pd.DataFrame, estimator: str) -> dict[str, Row]:
    rows = having(missed, estimator=estimator, stratum="all") if len(missed) else missed
    return {text(row["site"]): row for row in records(rows)}


def _cells(
    estimates: Estimates, estimator: str, row: Row, top: Mapping[str, Row], bounds: Mapping[str, Row]
) -> dict[str, str]:
    site = text(row["site"])
    with_sign, strongest = signed(estimator, site, estimates.kinds), top.get(site, {})
    return {
        "site": site,
        "trust": verdict(row, with_sign=with_sign),
        "random": f"{int(number(row['rows']))} of {int(number(row['nodes']))}",
        "Pearson": figure(row["pearson"], 2) or "-",
        "Spearman": figure(row["spearman"], 2) or "-",
        "signs": _percent(row["sign_agreement"]) if with_sign else "-",
        "|difference|": figure(row["mean_difference"]),
        "top": str(int(number(strongest["rows"]))) if strongest else "",
        "top matter": _percent(strongest.get("above")),
        "missed at most": _bound(bounds[site]) if site in bounds else "",
    }


def _percent(value: object) -> str:
    return "" if missing(value) else f"{100 * number(value):.0f} %"


def _bound(row: Row) -> str:
    share = "" if missing(row["upper_fraction"]) else f" ({100 * number(row['upper_fraction']):.1f} %)"
    return f"{int(number(row['upper_count'])):,} of {int(number(row['nodes'])):,}{share}"


def trust_sentences(
    estimates: Estimates,
    estimator: str,
    random: Sequence[Row],
    top: Mapping[str, Row],
    bounds: Mapping[str, Row],
) -> Iterator[str]:
    """What the table means, in words.

    Args:
        estimates: The estimates.
        estimator: Which.
        random: Rows of the random part.
        top: Rows of the top, by kind of site.
        bounds: Bounds on what is missed, by kind of site.
    """
    found: dict[str, list[str]] = {}
    for row in random:
        site = text(row["site"])
        found.setdefault(verdict(row, with_sign=signed(estimator, site, estimates.kinds)), []).append(site)
    for said, meaning in MEANINGS.items():
        if said in found:
            yield (
                f"trust {said} ({', '.join(found[said])}): estimates {meaning}."
                if said in (YES, ORDERED, NO)
                else (f"trust {said} ({', '.join(found[said])}): {meaning}.")
            )
    for reason, sites in _reasons(random).items():
        yield f"{', '.join(sites)}: {reason}."
    # A correlation does not see that all estimates are half of what they should be.
    if random and not missing(random[0]["mean_difference"]):
        off, count = figure(random[0]["mean_difference"]), int(number(random[0]["rows"]))
        yield f"On the {counted(count, 'random node')} estimates are {off} off on average ({estimates.unit})."
    whole = "all" if "all" in top else next(iter(top), "")
    if whole and not missing(top[whole].get("above")):
        share, rows, limit = top[whole]["above"], int(number(top[whole]["rows"])), number(top[whole]["threshold"])
        strongest = counted(rows, "strongest estimate")
        yield f"Of the {strongest} {_percent(share)} have an exact effect of {limit:g} or more."
    bound = bounds.get("all") or next(iter(bounds.values()), None)
    if bound is not None:
        limit, level = number(bound["threshold"]), 100 * number(bound["level"])
        yield (
            f"Of the nodes estimated below {limit:g}, at most {_bound(bound)} have an exact effect of {limit:g} or "
            f"more, {level:g} % sure."
        )
    if not signed(estimator, "all", estimates.kinds):
        yield "GradDrop estimates are sizes without sign (but for q and k): signs are not compared."


def _reasons(random: Sequence[Row]) -> dict[str, list[str]]:
    """Why correlations are not defined, and for which kinds of sites."""
    found: dict[str, list[str]] = {}
    for row in random:
        if missing(row["pearson"]):
            found.setdefault(text(row["reason"]) or "undefined", []).append(text(row["site"]))
    return found


def subset_lines(estimates: Estimates, subsets: pd.DataFrame) -> Iterator[str]:
    """What patching random subsets together says, a sentence per estimator.

    Args:
        estimates: The estimates.
        subsets: Of the same metric and checkpoint; may be empty.
    """
    for estimator in distinct(subsets, "estimator"):
        rows = records(having(subsets, estimator=estimator))
        pairs = [(number(row["estimate"]), number(row["exact"])) for row in rows]
        pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
        if not pairs:
            continue
        nodes = counted_between((row["size"] for row in rows), "node that was", "nodes that were")
        apart = sum(abs(exact - estimate) for estimate, exact in pairs) / len(pairs)
        largest = max(abs(exact) for _, exact in pairs)
        yield (
            f"{estimates.called(estimator)}: {counted(len(pairs), 'random subset')} of {nodes} not verified, "
            f"patched together: sums of estimates are {apart:.3f} off on average; the largest exact effect is "
            f"{largest:.3f}."
        )
