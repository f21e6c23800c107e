"""Curves of circuits' faithfulness by size, and edges that were taken out one by one."""

from collections.abc import Iterator, Sequence

import pandas as pd

from mechinterp_cli.report.cells import missing, number, text
from mechinterp_cli.report.rows import Row, distinct, having, records
from mechinterp_cli.report.shapes import Curve, CurvePanel, Curves, Dot, DotPanel, Dots

RANDOM = "random rankings"
MAX_DOTS = 40
"""More edges are in the table alone."""
VERDICTS = {"yes": "needed", "no": "not needed", "inconclusive": "inconclusive"}


def circuit_name(row: Row) -> str:
    """A circuit in words: `eap, 0.01`, `acdc, above 0.1`, `given`."""
    size, threshold = row.get("size"), row.get("threshold")
    above = "" if missing(threshold) else f"above {number(threshold):g}"
    return ", ".join(filter(None, (text(row["score"]), above if missing(size) else f"{number(size):g}")))


def faithfulness_curves(rows: pd.DataFrame, about: Sequence[str]) -> Curves | None:
    """Faithfulness over size, a panel for each ranking.

    Args:
        rows: The faithfulness table's rows of one metric and checkpoint.
        about: What stands in the subtitle.

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
        f"{circuit_name(row)}: {number(row['faithfulness']):.3f} with {row['kept']} edges" for row in records(given)
    ]
    n, clusters = ranked["n"].iloc[0], ranked["clusters"].iloc[0]
    told = f"0: every edge patched, 1: the whole model. {n} evaluation prompts of {clusters} clusters."
    return Curves(
        title=f"Faithfulness of circuits, {metric}",
        lines=tuple(filter(None, (", ".join(about), told, "; ".join(others)))),
        x_title="share of all edges",
        panels=tuple(panels),
        across=2,
        one_legend=True,
        width=340,
    )


def _curve(rows: pd.DataFrame, name: str) -> Curve:
    columns = {
        key: tuple(number(value) for value in rows[key]) for key in ("size", "faithfulness", "ci_low", "ci_high")
    }
    return Curve(
        name=name, x=columns["size"], y=columns["faithfulness"], low=columns["ci_low"], high=columns["ci_high"]
    )


def _random(rows: pd.DataFrame) -> Iterator[Curve]:
    """Random rankings, their middle 95 % as the band."""
    first = having(rows, score=distinct(rows, "score")[0])
    names = ("size", "random_mean", "random_low", "random_high")
    if first["random_mean"].notna().any():
        x, y, low, high = (tuple(number(value) for value in first[name]) for name in names)
        yield Curve(name=RANDOM, x=x, y=y, low=low, high=high)


def edge_dots(rows: pd.DataFrame, about: Sequence[str]) -> Dots | None:
    """What each edge's going costs, largest first.

    Args:
        rows: The minimality table's rows of one metric and checkpoint.
        about: What stands in the subtitle.

    Returns:
        None where there are none.
    """
    if rows.empty:
        return None
    order = rows["effect"].abs().sort_values(ascending=False, kind="stable").index
    chosen = records(rows.loc[order[:MAX_DOTS]])
    dots = tuple(
        Dot(
            name=f"{text(row['source'])}->{text(row['target'])}",
            series=VERDICTS[text(row["verdict"])],
            value=number(row["effect"]),
            low=number(row["ci_low"]),
            high=number(row["ci_high"]),
        )
        for row in chosen
    )
    more = f"the first {len(chosen)} of {len(rows)} edges that were tried" if len(rows) > len(chosen) else ""
    which = f"{circuit_name(chosen[0])}: what is lost when one edge is taken out of the circuit"
    panel = DotPanel(title="", x_title="change of faithfulness", dots=dots)
    lines = tuple(filter(None, (", ".join((*about, text(chosen[0]["metric"]))), which, more)))
    return Dots(title="Edges taken out one by one", lines=lines, panels=(panel,))
