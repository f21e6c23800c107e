"""Intervals against scipy, and their coverage on prompts that are not independent."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from mechinterp_cli.stats import choose_units, draw_weights, ratio_intervals
from mechinterp_cli.stats.intervals import IntervalMethod


def covered(rng: np.random.Generator, clusters: int, size: int, *, naive: bool, conditional: bool = False) -> float:
    """Share of nominal 95 % intervals that hold the true ratio of .3, intraclass correlation .3 or 0."""
    label = np.repeat(np.arange(clusters), size)
    units = choose_units(np.arange(len(label)) if naive else label)
    assert units.conditional == conditional
    hits = []
    for seed in range(8):
        denominator = 2 + 0.5 * rng.standard_normal(clusters)[label] + 0.7 * rng.standard_normal(len(label))
        shared = rng.standard_normal((50, clusters))[:, label] * (0.0 if conditional else 0.3**0.5)
        effect = 0.3 * denominator + shared + rng.standard_normal((50, len(label))) * 0.7**0.5
        weights = draw_weights(units, draws=400, seed=seed)
        found = ratio_intervals(
            units.sums(effect), units.sums(denominator[None])[0], units, weights, method="studentized"
        )
        hits.append((found.low[0] <= 0.3) & (found.high[0] >= 0.3))
    return float(np.mean(hits))


def test_intervals_of_clustered_prompts_cover_where_naive_ones_do_not() -> None:
    assert covered(np.random.default_rng(0), 16, 6, naive=False) >= 0.90
    assert covered(np.random.default_rng(0), 16, 6, naive=True) < 0.85


@pytest.mark.parametrize("clusters", [1, 3])
def test_conditional_intervals_cover_what_the_same_templates_would_give(clusters: int) -> None:
    assert covered(np.random.default_rng(1), clusters, 48 // clusters, naive=False, conditional=True) >= 0.90


@pytest.mark.parametrize("skewed", [False, True])
def test_bca_is_scipys_on_independent_prompts(skewed: bool) -> None:
    rng = np.random.default_rng(3)
    denominator = rng.normal(3, 0.5, 40)
    effect = denominator * 0.4 + (rng.exponential(1, 40) if skewed else rng.normal(0, 1, 40))
    reference = bootstrap(
        (effect, denominator),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=40_000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    units = choose_units(np.arange(40))
    weights = draw_weights(units, draws=40_000, seed=1)
    found = ratio_intervals(effect[None], denominator, units, weights, method="bca")
    width = reference.high - reference.low
    assert found.estimate[0] == pytest.approx(effect.sum() / denominator.sum())
    assert found.low[0, 0] == pytest.approx(reference.low, abs=0.03 * width)
    assert found.high[0, 0] == pytest.approx(reference.high, abs=0.03 * width)


def test_bca_moves_away_from_the_percentile_interval_when_effects_are_skewed() -> None:
    effect = np.random.default_rng(3).exponential(1, 30) ** 2
    units = choose_units(np.arange(30))
    weights = draw_weights(units, draws=4000, seed=1)
    found = ratio_intervals(effect[None], np.ones(30), units, weights, method="bca")
    percentile = np.quantile(weights @ effect / 30, [0.025, 0.975])
    width = percentile[1] - percentile[0]
    assert found.high[0, 0] > percentile[1] + 0.05 * width
    assert found.low[0, 0] > percentile[0]


@pytest.mark.parametrize("method", ["bca", "studentized"])
def test_many_trials_give_what_each_gives_alone(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    effects, units = rng.normal(1, 1, (23, 12)), choose_units(np.arange(12))
    weights = draw_weights(units, draws=200, seed=5)
    monkeypatch.setattr("mechinterp_cli.stats.intervals.CHUNK_BYTES", 5 * 8 * 200)
    args = (np.ones(12), units, weights)
    together = ratio_intervals(effects, *args, levels=(0.95, 0.9), method=method)  # type: ignore[arg-type] # a parameter
    for i in range(23):
        alone = ratio_intervals(effects[i : i + 1], *args, levels=(0.95, 0.9), method=method)  # type: ignore[arg-type] # as above
        np.testing.assert_allclose(together.low[:, i], alone.low[:, 0], rtol=1e-12)
        np.testing.assert_allclose(together.high[:, i], alone.high[:, 0], rtol=1e-12)
    assert (together.low[0] < together.low[1]).all()
    assert (together.high[0] > together.high[1]).all()


@pytest.mark.parametrize("method", ["bca", "studentized"])
def test_effects_without_spread_have_intervals_without_width(method: str) -> None:
    units = choose_units(np.arange(12))
    denominator = np.linspace(1, 2, 12)
    rows = np.stack([np.zeros(12), 0.25 * denominator])
    weights = draw_weights(units, draws=200, seed=0)
    found = ratio_intervals(rows, denominator, units, weights, method=method)  # type: ignore[arg-type] # a parameter
    np.testing.assert_allclose(found.low[0], [0, 0.25], atol=1e-6)
    np.testing.assert_allclose(found.high[0], [0, 0.25], atol=1e-6)


def test_a_denominator_that_may_be_zero_gives_no_interval() -> None:
    units = choose_units(np.arange(12))
    weights = draw_weights(units, draws=500, seed=0)
    effects = np.ones((1, 12))
    shaky, firm = np.resize([1.0, -0.9], 12), np.resize([1.0, 0.9], 12)
    assert np.isnan(ratio_intervals(effects, shaky, units, weights).low).all()
    assert np.isfinite(ratio_intervals(effects, firm, units, weights).low).all()


def test_which_prompts_are_drawn_together() -> None:
    many = choose_units(np.repeat(np.arange(10), 2))
    assert (many.count, many.conditional, many.clusters) == (10, False, 10)
    few = choose_units(np.repeat(np.arange(9), 2))
    assert (few.count, few.conditional, few.clusters) == (18, True, 9)
    assert [len(stratum) for stratum in few.strata] == [2] * 9
    own = choose_units(np.arange(5))
    assert (own.count, own.conditional) == (5, False)


@pytest.mark.parametrize(("labels", "sizes"), [("aaab", [4]), ("aaabbc", [3, 3]), ("aaabc", [2, 3])])
def test_clusters_of_one_prompt_are_never_drawn_alone(labels: str, sizes: list[int]) -> None:
    units = choose_units(np.array(list(labels)))
    assert sorted(len(stratum) for stratum in units.strata) == sizes
    assert sorted(np.concatenate(units.strata).tolist()) == list(range(len(labels)))


def test_draws_keep_the_size_of_every_stratum_and_the_seed_decides() -> None:
    units = choose_units(np.array(list("aaabbbbb")))
    weights = draw_weights(units, draws=50, seed=1)
    assert (weights[:, :3].sum(1) == 3).all()
    assert (weights[:, 3:].sum(1) == 5).all()
    assert (weights == draw_weights(units, draws=50, seed=1)).all()
    assert (weights != draw_weights(units, draws=50, seed=2)).any()


def test_an_interval_that_reaches_draws_of_one_unit_over_and_over_has_no_end() -> None:
    effects = np.random.default_rng(2).normal(1e-8, 1e-8, (1, 12))
    for count, bounded in ((3, False), (12, True)):
        units = choose_units(np.arange(count))
        weights = draw_weights(units, draws=2000, seed=0)
        found = ratio_intervals(effects[:, :count], np.ones(count), units, weights, method="studentized")
        assert np.isfinite(found.low[0, 0]) == np.isfinite(found.high[0, 0]) == bounded
        assert not bounded or abs(found.high[0, 0]) < 1e-6


@pytest.mark.parametrize("method", ["bca", "studentized"])
def test_values_that_differ_by_the_rounding_of_float32_have_an_interval_of_no_width(method: IntervalMethod) -> None:
    units = choose_units(np.arange(6))
    weights = draw_weights(units, draws=400, seed=0)

    def width(step: float) -> float:
        values = np.full((1, 6), 3.44)
        values[0, 0] += step
        found = ratio_intervals(values, np.ones(6), units, weights, method=method)
        return float(found.high[0, 0] - found.low[0, 0])

    assert 0 <= width(6e-7) < 1e-6
    # One of six that differs by more: most draws that lack it have no error of their own, and no bound.
    assert np.isnan(width(6e-3)) == (method == "studentized")
