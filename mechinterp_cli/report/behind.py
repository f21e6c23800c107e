"""What stands behind a number: the fields that every chart tells of a mark that is pointed at."""

from collections.abc import Mapping
from typing import TypeAlias

from mechinterp_cli.report.cells import interval, missing, probability, text
from mechinterp_cli.report.rows import Row

Behind: TypeAlias = Mapping[str, str]
"""Field to text; empty texts are told nowhere. `p` is the adjusted one."""
INTERVAL = ("ci_low", "ci_high")
"""Columns of the interval in most tables."""
ALONE = "p, not corrected"


def behind(row: Row, ends: tuple[str, str] = INTERVAL) -> dict[str, str]:
    """Interval, adjusted p and n of a row, as far as its table has them; of a table that corrects none, its own p.

    Args:
        row: Of any table.
        ends: Columns of the interval.
    """
    low, high = ends
    told = {"interval": interval(row.get(low), row.get(high)), "p": probability(row.get("p_adjusted"))}
    if "p_adjusted" not in row and not missing(row.get("p")):
        told[ALONE] = probability(row["p"])
    return {**told, "n": text(row.get("n"))}


def behind_random(row: Row) -> dict[str, str]:
    """What stands behind the mean of random draws: the middle of them, and how many there are.

    Args:
        row: With `random_low`, `random_high` and `draws`.
    """
    return {"middle 95 %": interval(row.get("random_low"), row.get("random_high")), "draws": text(row.get("draws"))}
