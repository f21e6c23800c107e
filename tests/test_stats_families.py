"""Sign flips, max-T, Benjamini–Hochberg and verdicts: by hand, by enumeration, and under the null."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import false_discovery_control, permutation_test

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats import benjamini_hochberg, max_t, sign_flips, verdicts


def test_hand_computed_family() -> None:
    # Three units, four flips up to the common sign. Trial a: all of one sign, only the identity reaches it: 1/4.
    # Trial b: 1, 1, −1: every flip gives |1| or |3|, so none is smaller: 1.
    p, adjusted = max_t(np.array([[1.0, 1.0, 1.0], [1.0, 1.0, -1.0]]), sign_flips(3))
    assert p.tolist() == [0.25, 1.0]
    # The flip that turns b into 1, 1, 1 reaches a's statistic too: 2/4 after adjustment.
    assert adjusted.tolist() == [0.5, 1.0]


def test_enumeration_against_brute_force_and_scipy() -> None:
    sums = np.random.default_rng(0).normal(0.5, 1, (4, 8))
    p, adjusted = max_t(sums, sign_flips(8))
    scaled = sums / np.sqrt((sums**2).sum(1, keepdims=True))
    observed = np.abs(scaled.sum(1))
    flipped = np.abs(np.array(list(product([-1, 1], repeat=8))) @ scaled.T)
    np.testing.assert_allclose(p, (flipped >= observed * (1 - 1e-9)).mean(0))
    strongest = int(observed.argmax())
    assert adjusted[strongest] == (flipped.max(1) >= observed[strongest] * (1 - 1e-9)).mean()
    for row, found in zip(sums, p, strict=True):
        paired = permutation_test((row, np.zeros(8)), lambda a, b: (a - b).mean(), permutation_type="samples")
        assert found == pytest.approx(paired.pvalue)


def test_samples_agree_with_enumeration() -> None:
    sums = np.random.default_rng(1).normal(0.4, 1, (20, 12))
    exact = max_t(sums, sign_flips(12))
    drawn = max_t(sums, sign_flips(12, exact_up_to=0, flips=9999, seed=3))
    np.testing.assert_allclose(drawn[0], exact[0], atol=0.025)
    np.testing.assert_allclose(drawn[1], exact[1], atol=0.025)


def test_sampled_p_values_count_the_observed_one() -> None:
    p, adjusted = max_t(np.full((1, 30), 1.0), sign_flips(30, flips=99, seed=0))
    assert (p.tolist(), adjusted.tolist()) == ([0.01], [0.01])


def test_adjusted_is_never_less_and_never_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(2).normal(0.6, 1, (50, 16))
    flips = sign_flips(16, flips=299, seed=0)
    p, adjusted = max_t(sums, flips)
    assert (adjusted >= p).all()
    strength = np.abs(sums.sum(1)) / np.sqrt((sums**2).sum(1))
    assert (np.diff(adjusted[np.argsort(-strength)]) >= 0).all()
    monkeypatch.setattr("mechinterp_cli.stats.families.CHUNK_BYTES", 7 * 8 * 299)
    np.testing.assert_array_equal(max_t(sums, flips)[1], adjusted)


def error_rates(correlation: float, runs: int = 2000) -> tuple[float, float]:
    """Share of runs of 60 null trials with any p below .05: adjusted, and not."""
    rng = np.random.default_rng(4)
    any_adjusted, any_plain = [], []
    for seed in range(runs):
        shared = rng.standard_normal(14) * correlation**0.5
        sums = shared + rng.standard_normal((60, 14)) * (1 - correlation) ** 0.5
        p, adjusted = max_t(sums, sign_flips(14, flips=199, exact_up_to=0, seed=seed))
        any_adjusted.append(adjusted.min() <= 0.05)
        any_plain.append(p.min() <= 0.05)
    return float(np.mean(any_adjusted)), float(np.mean(any_plain))


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_family_wise_error_under_the_null(correlation: float) -> None:
    adjusted, plain = error_rates(correlation)
    assert adjusted <= 0.07
    assert plain > 0.15


def test_a_strong_trial_is_found_among_many_nulls() -> None:
    sums = np.random.default_rng(5).normal(0, 1, (400, 20))
    sums[7] += 3
    adjusted = max_t(sums, sign_flips(20, flips=999, seed=0))[1]
    assert adjusted[7] <= 0.01
    assert (np.delete(adjusted, 7) > 0.01).all()


def test_dependence_is_kept() -> None:
    row = np.random.default_rng(6).normal(0.6, 1, 12)
    p, copies = max_t(np.repeat(row[None], 500, axis=0), sign_flips(12))
    # Five hundred copies of one trial are one test; Bonferroni would multiply by 500.
    np.testing.assert_allclose(copies, p)


def test_trials_without_effect_have_p_one() -> None:
    p, adjusted = max_t(np.array([[0.0] * 6, [1.0] * 6]), sign_flips(6))
    assert p.tolist() == [1.0, 1 / 32]
    assert adjusted.tolist() == [1.0, 1 / 32]


def test_few_units_are_enumerated_and_one_unit_can_show_nothing() -> None:
    assert sign_flips(13).exact
    assert not sign_flips(14).exact
    assert sign_flips(14, flips=99).resolution == 100
    assert sign_flips(5).resolution == 16
    assert max_t(np.array([[9.0]]), sign_flips(1))[0].tolist() == [1.0]


def test_benjamini_hochberg_is_scipys() -> None:
    p = np.random.default_rng(0).uniform(0.001, 1, 40) ** 2
    np.testing.assert_allclose(benjamini_hochberg(p, q=0.05, resolution=10**6), false_discovery_control(p))


def test_benjamini_hochberg_is_refused_when_no_p_can_pass() -> None:
    p = np.full(420, 1 / 2000)
    assert (benjamini_hochberg(p, q=0.25, resolution=2000) < 0.05).all()
    with pytest.raises(
        UserError, match="over 420 trials needs 8400 sign flips, and the smallest p-value here is 1/2000"
    ):
        benjamini_hochberg(p, q=0.05, resolution=2000)


def test_verdicts_have_three_outcomes() -> None:
    low = np.array([0.03, -0.01, -0.5, 0.01, -0.9, np.nan, -0.02])
    high = np.array([0.90, 0.015, 0.5, 0.10, -0.3, np.nan, 0.02])
    wanted = ["yes", "no", "inconclusive", "inconclusive", "yes", "inconclusive", "no"]
    assert verdicts(low, high, 0.02).tolist() == wanted
