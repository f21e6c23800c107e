"""How far two lists of numbers agree: difference, correlation, overlap of the largest, signs.

What cannot be said is None, with a reason, and never NaN or 0: the correlation of constants, the overlap of "the ten
largest" of eight.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]

LEAST_ROWS = 3
"""Two points always lie on a line, so fewer rows than this have no correlation."""
_ROUNDING = 1e-13
"""Spread below this share of the largest magnitude is what rounding leaves of a constant."""


@dataclass(frozen=True)
class Agreement:
    """Two lists of numbers, row by row."""

    rows: int
    mean_difference: float | None
    """Mean of |b − a|; None without rows."""
    pearson: float | None
    spearman: float | None
    top_overlap: float | None
    """See `top_overlap`."""
    sign_agreement: float | None
    """Share of `sign_rows` whose signs are the same."""
    sign_rows: int
    """Rows beyond the floor in both."""
    undefined: tuple[str, ...] = ()
    """Why a number is None."""


def agree(a: Floats, b: Floats, *, top: int = 10, floor: float = 0.0) -> Agreement:
    """Compare two lists of numbers.

    Args:
        a: `[rows]`, finite.
        b: `[rows]`, finite, in the same order.
        top: How many of the largest magnitudes `top_overlap` is about.
        floor: Magnitude beyond which a sign counts, in the numbers' unit.
    """
    signs, beyond = sign_agreement(a, b, floor)
    overlap = top_overlap(a, b, top)
    reasons = [_no_correlation(a, b)]
    reasons.append(None if overlap is not None else f"top: no more than the {top} largest, or ties")
    reasons.append(None if signs is not None else f"sign: no row is beyond {floor:g} in both")
    return Agreement(
        rows=len(a),
        mean_difference=float(np.abs(b - a).mean()) if len(a) else None,
        pearson=pearson(a, b),
        spearman=spearman(a, b),
        top_overlap=overlap,
        sign_agreement=signs,
        sign_rows=beyond,
        undefined=tuple(reason for reason in reasons if reason is not None),
    )


def pearson(a: Floats, b: Floats) -> float | None:
    """Pearson's product-moment correlation; None for constants and for fewer than three rows."""
    x, y = _standardised(a), _standardised(b)
    return None if x is None or y is None else float(np.clip(x @ y, -1.0, 1.0))


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation, ties with their mean rank; None where `pearson` is None."""
    if _standardised(a) is None or _standardised(b) is None:
        return None
    return pearson(rankdata(a), rankdata(b))


def top_overlap(a: Floats, b: Floats, count: int) -> float | None:
    """Rows that are among the largest magnitudes of both, over rows that are among those of either (Jaccard).

    Rows that tie with the last one are among them, so the order of rows does not matter. None where that makes every
    row one of the largest in `a` or in `b`: the overlap would be 1, or nearly, whatever the numbers.

    Args:
        a: `[rows]`.
        b: `[rows]`.
        count: How many are the largest, at least 1.
    """
    if len(a) <= count:
        return None
    in_a, in_b = _largest(a, count), _largest(b, count)
    if in_a.all() or in_b.all():
        return None
    return float((in_a & in_b).sum() / (in_a | in_b).sum())


def sign_agreement(a: Floats, b: Floats, floor: float) -> tuple[float | None, int]:
    """Of the rows beyond a floor in both, the share with the same sign; and how many such rows there are."""
    beyond = (np.abs(a) > floor) & (np.abs(b) > floor)
    rows = int(beyond.sum())
    same = (np.sign(a) == np.sign(b)) & beyond
    return (float(same.sum() / rows) if rows else None), rows


def _largest(values: Floats, count: int) -> npt.NDArray[np.bool_]:
    sizes = np.abs(values)
    marks: npt.NDArray[np.bool_] = sizes >= np.partition(sizes, -count)[-count]
    return marks


def _standardised(values: Floats) -> Floats | None:
    """Centred, of length 1; None where there is no spread to speak of."""
    if len(values) < LEAST_ROWS:
        return None
    largest = float(np.abs(values).max())
    if largest == 0:
        return None
    # Scaled first: squares of very large and very small numbers leave float64's range.
    scaled = values / largest
    centred = scaled - scaled.mean()
    length = float(np.linalg.norm(centred))
    return None if length <= _ROUNDING * np.sqrt(len(values)) else centred / length


def _no_correlation(a: Floats, b: Floats) -> str | None:
    if len(a) < LEAST_ROWS:
        return f"correlation: fewer than {LEAST_ROWS} rows"
    flat = [name for name, values in (("A", a), ("B", b)) if _standardised(values) is None]
    return f"correlation: {' and '.join(flat)} constant" if flat else None
