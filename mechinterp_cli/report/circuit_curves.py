"""Curves of circuits' faithfulness by size, and edges that were taken out one by one."""

from collections.abc import Iterator, Sequence

import pandas as pd

from mechinterp_cli.report.behind import Behind, behind
from mechinterp_cli.report.cells import counted_between, figure, missing, number, text
from mechinterp_cli.report.circuit_words import EDGES, Words
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.series import curve_of, dot_of, random_curve
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, DotPanel, Dots

RANDOM = "random rankings"
MAX_DOTS = 40
"""More edges are in the table alone."""
VERDICTS = {"yes": "needed", "no": "not needed", "inconclusive": "inconclusive"}


def circuit_name(row: Row) -> str:
    """A circuit in words: `eap, 0.01`, `acdc, above 0.1`, `given`."""
    size, threshold = row.get("size"), row.get("threshold")
    above = "" if missing(threshold) else f"above {number(threshold):g}"
    return ", ".join(filter(None, (text(row["score"]), above if missing(size) else f"{number(size):g}")))


def faithfulness_curves(
    rows: pd.DataFrame, about: Sequence[str], level: str = "95", words: Words = EDGES
) -> Curves | None:
    """Faithfulness over size, a panel for each ranking.

    Args:
        rows: The faithfulness table's rows of one metric and checkpoint.
        about: What stands in the subtitle.
        level: Of intervals, in percent.
        words: What circuits are made of.

    Returns:
        None where no circuits are of a ranking.
    """
    ranked = rows[rows["size"].notna().to_numpy(dtype=bool)]
    if ranked.empty:
        return None
    metric, given = text(ranked["metric"].iloc[0]), rows[rows["size"].isna().to_numpy(dtype=bool)]
    panels = []
    for rank in distinct(ranked, "rank"):
        own = having(ranked, rank=rank)
        curves = [_curve(having(own, score=score), score) for score in distinct(own, "score")]
        panels.append(
            CurvePanel(title=f"ranked by {rank} score", y_title="faithfulness", curves=(*curves, *_random(own)))
        )
    others = [
        f"{circuit_name(row)}: {figure(row['faithfulness'])} with {words.counted(int(row['kept']))}"
        for row in records(given)
    ]
    told = f"0: every {words.one} patched, 1: the whole model. {_bands(ranked, level)}"
    return Curves(
        title=f"Faithfulness of circuits, {metric}",
        lines=tuple(filter(None, (", ".join(about), told, "; ".join(others)))),
        x_title=f"share of all {words.several}",
        panels=tuple(panels),
        across=2,
        one_legend=True,
        width=340,
    )


def _bands(rows: pd.DataFrame, level: str) -> str:
    """What bands are."""
    clusters = counted_between(rows["clusters"], "cluster")
    prompts = f"{counted_between(rows['n'], 'evaluation prompt')} of {clusters}"
    draws = counted_between((count for count in rows["draws"] if number(count) > 0), "random ranking")
    return f"Bands: {level} % intervals over {prompts}{f'; of {draws} the middle 95 %' if draws else ''}."


def _curve(rows: pd.DataFrame, name: str) -> Curve:
    return curve_of(name, records(rows), "size", "faithfulness", told=_behind)


def _behind(row: Row) -> Behind:
    """Interval and n of a circuit, and how many edges it has."""
    return {**behind(row), "edges": text(row["kept"])}


def _random(rows: pd.DataFrame) -> Iterator[Curve]:
    """Random rankings, their middle 95 % as the band."""
    first = having(rows, score=distinct(rows, "score")[0])
    if first["random_mean"].notna().any():
        yield random_curve(RANDOM, records(first), "size", y="random_mean")


def edge_dots(rows: pd.DataFrame, about: Sequence[str], over: str, words: Words = EDGES) -> Dots | None:
    """What each edge's going costs, largest first.

    Args:
        rows: The minimality table's rows of one metric and checkpoint.
        about: What stands in the subtitle.
        over: What bars are.
        words: What circuits are made of.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    order = rows["effect"].abs().sort_values(ascending=False, kind="stable").index
    chosen = records(rows.loc[order[:MAX_DOTS]])
    dots = tuple(dot_of(words.named(row), VERDICTS[text(row["verdict"])], row, "effect") for row in chosen)
    kinds = list(dict.fromkeys(dot.series for dot in dots))
    same = f"all that are shown are {kinds[0]}" if len(kinds) == 1 and len(dots) > 1 else ""
    more = f"the first {len(chosen)} of {words.counted(len(rows))} that were tried" if len(rows) > len(chosen) else ""
    which = f"{circuit_name(chosen[0])}: what is lost when one {words.one} is taken out of the circuit"
    panel = DotPanel(title="", x_title="faithfulness that is lost", dots=dots)
    told = "; ".join(filter(None, (which, more, same)))
    lines = tuple(filter(None, (", ".join((*about, text(chosen[0]["metric"]))), f"{told}. {over}")))
    return Dots(title=f"{words.several.capitalize()} taken out one by one", lines=lines, panels=(panel,))
