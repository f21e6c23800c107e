"""How many effects an estimate may have missed, by what a random sample of them shows."""

from scipy.stats import hypergeom


def missed_upper(population: int, sampled: int, missed: int, *, level: float = 0.95) -> int:
    """The largest number of missed effects in a population that a simple random sample does not rule out.

    One-sided and exact: the largest K with P(at most `missed` of `sampled` | K of `population`) ≥ 1 − level, the sample
    drawn without replacement (hypergeometric). At least as many as were seen; without a sample, all of them.

    Args:
        population: How many there are.
        sampled: How many of them were looked at.
        missed: How many of those were missed.
        level: How sure the bound is.

    Raises:
        ValueError: More were missed than sampled, or sampled than there are.
    """
    if not 0 <= missed <= sampled <= population:
        raise ValueError(f"{missed} missed of {sampled} sampled of {population}")
    low, high = missed, population - (sampled - missed)
    while low < high:  # the probability falls as K grows
        middle = (low + high + 1) // 2
        if hypergeom.cdf(missed, population, middle, sampled) >= 1 - level:
            low = middle
        else:
            high = middle - 1
    return low
