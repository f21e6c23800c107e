"""Agreement against scipy and pandas, and against cases that can be worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mechinterp_cli.stats.agreement import Floats, agree, pearson, sign_agreement, spearman, top_overlap

WHOLE = st.integers(-5, 5).map(float)


def drawn(seed: int = 0, rows: int = 40) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    a = random.normal(size=rows)
    return a, a + random.normal(size=rows)


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy_and_pandas(seed: int) -> None:
    a, b = drawn(seed)
    b = b.round(1)  # ties
    assert pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-12)
    assert pearson(a, b) == pytest.approx(pd.Series(a).corr(pd.Series(b)), abs=1e-12)
    assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)
    assert spearman(a, b) == pytest.approx(pd.Series(a).corr(pd.Series(b), method="spearman"), abs=1e-12)


@given(arrays(np.float64, 6, elements=WHOLE), arrays(np.float64, 6, elements=WHOLE))
def test_ties_and_constants(a: Floats, b: Floats) -> None:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert pearson(a, b) is None
        assert spearman(a, b) is None
    else:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_a_list_with_itself_and_with_its_opposite() -> None:
    a, _ = drawn()
    same, opposite = agree(a, a, top=5), agree(a, -a, top=5)
    assert (same.mean_difference, same.top_overlap, same.sign_agreement, same.sign_rows) == (0, 1, 1, 40)
    assert same.pearson == pytest.approx(1, abs=1e-12)
    assert same.spearman == pytest.approx(1, abs=1e-12)
    assert opposite.pearson == pytest.approx(-1, abs=1e-12)
    assert (opposite.top_overlap, opposite.sign_agreement) == (1, 0)
    assert opposite.mean_difference == pytest.approx(2 * np.abs(a).mean())
    assert same.undefined == opposite.undefined == ()


def test_monotone_but_not_linear() -> None:
    a = np.arange(1.0, 9.0)
    assert spearman(a, np.exp(a)) == pytest.approx(1)
    found = pearson(a, np.exp(a))
    assert found is not None
    assert found < 0.9


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_correlation_does_not_depend_on_the_unit(scale: float) -> None:
    a, b = drawn()
    assert pearson(a * scale, b) == pytest.approx(pearson(a, b), abs=1e-12)


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_too_few_rows_have_no_correlation(rows: int) -> None:
    a, b = (values[:rows] for values in drawn())
    found = agree(a, b)
    assert (found.pearson, found.spearman, found.top_overlap) == (None, None, None)
    assert found.undefined[0] == "correlation: fewer than 3 rows"
    assert (found.mean_difference is None) == (rows == 0)


def test_a_constant_is_named_also_when_rounding_moved_it() -> None:
    a, _ = drawn()
    rounded = np.full(40, 0.1) + np.where(np.arange(40) % 2, 0.0, 1.4e-17)
    for flat in (np.full(40, 0.1), rounded, np.zeros(40)):
        assert agree(a, flat).undefined[0] == "correlation: B constant"
        assert agree(flat, a).undefined[0] == "correlation: A constant"
        assert agree(flat, flat).pearson is None
    assert agree(a, 0.1 + 1e-9 * a).pearson == pytest.approx(1)


def test_top_overlap_by_hand() -> None:
    a = np.array([9.0, -8, 7, 1, 0.5, 0.1])
    b = np.array([-9.0, 0.2, 7, 8, 0.5, 0.1])
    assert top_overlap(a, b, 3) == 2 / 4  # {0, 1, 2} and {0, 2, 3}
    assert top_overlap(a, b, 1) == 1
    assert top_overlap(a, b[::-1], 2) == 0  # {0, 1} and {2, 5}


def test_top_overlap_takes_ties_in_whatever_the_order() -> None:
    a, b = np.array([3.0, 2, 2, 1]), np.array([3.0, 1, 2, 0])
    order = [3, 2, 1, 0]
    assert top_overlap(a, b, 2) == top_overlap(a[order], b[order], 2) == 2 / 3


def test_top_overlap_of_everything_is_not_defined() -> None:
    a, b = drawn(rows=8)
    assert top_overlap(a, b, 7) is not None
    assert top_overlap(a, b, 8) is None
    assert top_overlap(np.ones(8), b, 2) is None
    assert "top: no more than the 10 largest, or ties" in agree(a, b, top=10).undefined


def test_signs_count_beyond_the_floor_alone() -> None:
    a, b = np.array([1.0, -1, 0.01, 1, 0]), np.array([2.0, 1, -5, 0.02, 0])
    assert sign_agreement(a, b, 0.02) == (0.5, 2)
    assert sign_agreement(a, b, 0.0) == (0.5, 4)
    assert sign_agreement(a, b, 10) == (None, 0)
    assert agree(a, b, floor=10).undefined[-1] == "sign: no row is beyond 10 in both"
