"""Estimators and ablations in tables: which tell a sign, and how rows of one stand beside rows of none."""

from collections.abc import Sequence

import pandas as pd

ESTIMATOR = "estimator"
ABLATION = "ablation"
"""What an ablated part is replaced by, where a run tries several."""
SIZED, SIGNED_KINDS = "atp_star", ("q", "k")
"""GradDrop is a mean of magnitudes: this estimator has a sign for these kinds of sites alone."""


def signed(estimator: str | None, site: str, kinds: Sequence[str] = ()) -> bool:
    """Whether an estimator tells the sign of effects; what is measured (no estimator) does.

    Args:
        estimator: Which.
        site: The kind of site, or `all`.
        kinds: What `all` are.
    """
    chosen = kinds if site == "all" else (site,)
    return estimator != SIZED or all(kind in SIGNED_KINDS for kind in chosen)


def beside_each(a: pd.DataFrame, b: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Where the rows of one side alone are estimates, the other's stand beside each estimator; of ablations likewise.

    Args:
        a: Rows of a run.
        b: Rows of another.
    """
    for name in (ESTIMATOR, ABLATION):
        if name in a and name not in b:
            b = _repeated(b, a, name)
        elif name in b and name not in a:
            a = _repeated(a, b, name)
    return a, b


def _repeated(rows: pd.DataFrame, like: pd.DataFrame, name: str) -> pd.DataFrame:
    return rows.merge(like[[name]].drop_duplicates(), how="cross")
