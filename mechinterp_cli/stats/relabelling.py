"""Permutation tests of two groups: labels of whole units, drawn within strata and shared by all trials of a family."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod

import numpy as np
import numpy.typing as npt

from mechinterp_cli.stats.families import step_down
from mechinterp_cli.stats.observations import Floats
from mechinterp_cli.stats.resampling import Integers

Booleans = npt.NDArray[np.bool_]

ROUNDING = 1e-13
"""What float64 leaves of the difference of equal numbers, as a share of them."""


@dataclass(frozen=True)
class Relabelling:
    """Which units are in the first group, as it is and as it might have been."""

    labels: Booleans
    """`[draws, units]`; when exact, one of each pair that differs by swapping the groups, the one as it is (or its
    swap) among them."""
    strata: tuple[Integers, ...]
    """Units whose labels are exchanged among each other."""
    exact: bool

    @property
    def resolution(self) -> int:
        """One over the smallest p-value that these draws can give."""
        return len(self.labels) if self.exact else len(self.labels) + 1


def relabel(
    labels: Booleans, strata: Sequence[Integers], *, draws: int = 1999, exact_up_to: int = 4096, seed: int = 0
) -> Relabelling:
    """All ways of giving as many units of each stratum to the first group where they are few, else a seeded sample.

    Args:
        labels: `[units]`: the first group, as it is.
        strata: Units whose labels may be exchanged; they hold every unit once.
        draws: Sample size.
        exact_up_to: Enumerate where there are at most so many ways.
        seed: Of the sample.
    """
    ways = prod(comb(len(stratum), int(labels[stratum].sum())) for stratum in strata)
    # The statistic does not know which group is the first: where both are of one size, half the ways are enough.
    halved = all(2 * int(labels[stratum].sum()) == len(stratum) for stratum in strata)
    if ways // (2 if halved else 1) <= exact_up_to:
        return Relabelling(_every(labels, strata, halved), tuple(strata), exact=True)
    rng = np.random.default_rng(seed)
    drawn = np.zeros((draws, len(labels)), dtype=np.bool_)
    for stratum in strata:
        drawn[:, stratum] = rng.permuted(np.tile(labels[stratum], (draws, 1)), axis=1)
    return Relabelling(drawn, tuple(strata), exact=False)


def _every(labels: Booleans, strata: Sequence[Integers], halved: bool) -> Booleans:
    choices = [list(combinations(stratum.tolist(), int(labels[stratum].sum()))) for stratum in strata]
    if halved:
        choices[0] = [chosen for chosen in choices[0] if chosen[0] == strata[0][0]]
    found = np.zeros((prod(map(len, choices)), len(labels)), dtype=np.bool_)
    for row, chosen in zip(found, product(*choices), strict=True):
        row[np.concatenate([np.asarray(part, dtype=np.int64) for part in chosen])] = True
    return found


def permuted_max_t(values: Floats, labels: Booleans, relabelling: Relabelling) -> tuple[Floats, Floats]:
    """Step-down max-T of the difference between two groups of units, labels permuted.

    The statistic is Welch's t, with strata the mean of their differences over the root of their summed variances. So
    it is right in large samples also where the groups differ in spread (Janssen 1997; Chung & Romano 2013). Where a
    group has one unit in a stratum, there is no spread to be had and the difference itself is compared.

    Args:
        values: `[trials, units]`, finite.
        labels: `[units]`: the first group, as it is.
        relabelling: From `relabel`.

    Returns:
        Two-sided p-values and those adjusted for the family, `[trials]` each.
    """
    scaled = _standardised(values, relabelling.strata)
    observed = _statistics(scaled, labels[None], relabelling.strata)[:, 0]

    def drawn(rows: Integers) -> Floats:
        return _statistics(scaled[rows], relabelling.labels, relabelling.strata)

    return step_down(observed, drawn, len(relabelling.labels), exact=relabelling.exact)


def _standardised(values: Floats, strata: Sequence[Integers]) -> Floats:
    """Centred in each stratum, and of length 1 over all; 0 where only rounding is left."""
    centred = np.zeros_like(values)
    for stratum in strata:
        centred[:, stratum] = values[:, stratum] - values[:, stratum].mean(1, keepdims=True)
    centred[np.abs(centred) <= ROUNDING * np.abs(values).max(1, keepdims=True, initial=0)] = 0
    length = np.sqrt((centred**2).sum(1, keepdims=True))
    return np.asarray(centred / np.where(length > 0, length, 1.0))


def _statistics(scaled: Floats, labels: Booleans, strata: Sequence[Integers]) -> Floats:
    """Absolute Welch t, `[trials, draws]`."""
    difference = np.zeros((len(scaled), len(labels)))
    variance = np.zeros_like(difference)
    single = False
    for values, members, sign in _cells(scaled, labels, strata):
        size = members[0].sum()
        sums = values @ members.T
        difference += sign * sums / size
        single |= bool(size < 2)
        variance += np.maximum(values**2 @ members.T - sums**2 / size, 0) / (size * max(size - 1, 1))
    difference = np.abs(difference)
    if single:
        return difference
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = difference / np.sqrt(np.where(variance > ROUNDING, variance, 0))
    return np.where(difference > np.sqrt(ROUNDING), ratio, 0.0)


def _cells(scaled: Floats, labels: Booleans, strata: Sequence[Integers]) -> Iterator[tuple[Floats, Floats, int]]:
    for stratum in strata:
        yield scaled[:, stratum], labels[:, stratum].astype(np.float64), 1
        yield scaled[:, stratum], (~labels[:, stratum]).astype(np.float64), -1
