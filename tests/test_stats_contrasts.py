"""Contrasts of two groups of prompts: against scipy, by enumeration, and on simulated prompts that are clustered."""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from itertools import combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import binom, permutation_test, ttest_ind, ttest_rel

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats import Contrast, StatsOptions, contrast
from mechinterp_cli.stats.relabelling import relabel

Floats = npt.NDArray[np.float64]
Layout = tuple[list[str], list[str]]
A, B = "aligned", "conflicting"
WIDE = StatsOptions(draws=4000)
ARRAYS = ("mean_a", "mean_b", "difference", "low", "high", "verdict_low", "verdict_high", "p", "p_adjusted")


def paired(clusters: int, of_a: int = 1, of_b: int = 1) -> Layout:
    """Every cluster holds prompts of both groups."""
    return ([A] * of_a + [B] * of_b) * clusters, np.repeat(np.arange(clusters), of_a + of_b).astype(str).tolist()


def apart(clusters_a: int, clusters_b: int, size: int = 1) -> Layout:
    """Every cluster holds prompts of one group."""
    groups = [A] * clusters_a * size + [B] * clusters_b * size
    return groups, np.repeat(np.arange(clusters_a + clusters_b), size).astype(str).tolist()


LAYOUTS = {
    "paired": paired(14, 2, 1),
    "paired within few clusters": paired(3, 4, 3),
    "apart": apart(12, 15, 2),
    "apart, few clusters": apart(3, 2, 4),
    "apart, a cluster of one prompt": ([A] * 6 + [B] * 12, [*"xxxyyz", *map(str, range(12))]),
    "each prompt its own": apart(9, 11),
    "partly shared": ([A, B] * 12 + [A, A, B], [*np.repeat(np.arange(12), 2).astype(str), "x", "x", "y"]),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def draw(
    seed: int, layout: Layout, trials: int, *, shared: float = 0.5, shift: float = 0.0, a_only: float = 1
) -> Floats:
    """Normal effects of variance 1, of which `shared` between clusters; group a is `shift` higher."""
    rng = np.random.default_rng(seed)
    groups, cluster = np.array(layout[0]), np.unique(layout[1], return_inverse=True)[1]
    between = rng.standard_normal((trials, cluster.max() + 1))[:, cluster] * shared**0.5
    effects = between + rng.standard_normal((trials, len(groups))) * (1 - shared) ** 0.5
    drawn: Floats = np.where(groups == A, effects * a_only + shift, effects)
    return drawn


def same(one: Contrast, other: Contrast, names: tuple[str, ...] = ARRAYS, *, atol: float = 1e-9) -> None:
    for name in names:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=atol, err_msg=name)


def test_paired_by_hand() -> None:
    # Two clusters: means of a 3 and 1, of b 1 and 0; differences 2 and 1.
    found = contrast(
        np.array([[2.0, 4, 1, 1, 0]]), [A, A, B, A, B], list("xxxyy"), A, B, StatsOptions(correction="none")
    )
    assert (found.mean_a[0], found.mean_b[0], found.difference[0]) == (2.0, 0.5, 1.5)
    assert (found.n_a, found.n_b, found.clusters_a, found.clusters_b, found.paired) == (3, 2, 2, 2, True)
    # Flips up to the common sign: 2 + 1 and 2 − 1; one of two reaches 3.
    assert found.p[0] == 0.5
    assert np.isnan(found.p_adjusted).all()


def test_unpaired_by_hand() -> None:
    # Clusters' means of a: 3, 1, of b: 0, 1 (two prompts each but one).
    found = contrast(np.array([[2.0, 4, 1, 0, 0, 1, 1]]), [A, A, A, B, B, B, B], list("vvwxxyy"), A, B)
    assert (found.mean_a[0], found.mean_b[0], found.difference[0]) == (2.0, 0.5, 1.5)
    assert (found.n_a, found.n_b, found.clusters_a, found.clusters_b, found.paired) == (3, 4, 2, 2, False)
    # Pairings of 3, 1, 0, 1: {3, 1} against {0, 1} (twice, the units of 1 being two) and {3, 0} against {1, 1}.
    # t is 1.5 / √(1 + ¼) = 1.34 twice and 0.5 / 1.5 once.
    assert found.p[0] == pytest.approx(2 / 3)


def test_large_paired_samples_agree_with_the_paired_t_test() -> None:
    groups, clusters = layout = paired(150)
    effects = draw(0, layout, 6, shift=0.15)
    found = contrast(effects, groups, clusters, A, B, WIDE)
    reference = ttest_rel(effects[:, ::2], effects[:, 1::2], axis=1)
    interval = reference.confidence_interval()
    width = interval.high - interval.low
    np.testing.assert_allclose(found.difference, effects[:, ::2].mean(1) - effects[:, 1::2].mean(1))
    np.testing.assert_allclose(found.low, interval.low, atol=0.05 * width.max())
    np.testing.assert_allclose(found.high, interval.high, atol=0.05 * width.max())
    np.testing.assert_allclose(found.p, reference.pvalue, atol=0.035)


@pytest.mark.parametrize("method", ["studentized", "bca"])
def test_large_unpaired_samples_agree_with_welch(method: Any) -> None:
    groups, clusters = layout = apart(80, 160)
    # Unlike spreads and sizes, where Student's test would be wrong.
    effects = draw(1, layout, 6, shared=0, shift=0.5, a_only=3)
    found = contrast(effects, groups, clusters, A, B, replace(WIDE, method=method))
    reference = ttest_ind(effects[:, :80], effects[:, 80:], axis=1, equal_var=False)
    interval = reference.confidence_interval()
    width = interval.high - interval.low
    np.testing.assert_allclose(found.low, interval.low, atol=0.06 * width.max())
    np.testing.assert_allclose(found.high, interval.high, atol=0.06 * width.max())
    np.testing.assert_allclose(found.p, reference.pvalue, atol=0.04)
    student = ttest_ind(effects[:, :80], effects[:, 80:], axis=1)
    assert np.abs(student.pvalue - found.p).max() > 0.04


@pytest.mark.parametrize("sizes", [(4, 4), (3, 6)])
def test_few_clusters_are_permuted_exactly_as_scipy_does(sizes: tuple[int, int]) -> None:
    groups, clusters = layout = apart(*sizes)
    effects = draw(2, layout, 5, shift=1.0, a_only=2)
    found = contrast(effects, groups, clusters, A, B)
    assert "exact" in found.method

    def welch(x: Floats, y: Floats, axis: int) -> Floats:
        statistic: Floats = ttest_ind(x, y, axis=axis, equal_var=False).statistic
        return np.abs(statistic)

    for row, p in zip(effects, found.p, strict=True):
        parts = (row[: sizes[0]], row[sizes[0] :])
        reference = permutation_test(parts, welch, vectorized=True, alternative="greater", n_resamples=np.inf)
        assert p == pytest.approx(reference.pvalue)


def relabelled(clusters: npt.NDArray[np.int64], first: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.bool_]]:
    members = [np.flatnonzero(clusters == i) for i in np.unique(clusters)]
    for parts in product(*(combinations(m.tolist(), int(first[m].sum())) for m in members)):
        yield np.isin(np.arange(len(first)), np.concatenate(parts))


@pytest.mark.parametrize("sizes", ["aabb aabb aabb", "aaabb aaabb aaabb", "aabb aabbb aabb"])
def test_labels_within_few_clusters_are_permuted_exactly(sizes: str) -> None:
    groups, clusters = layout = (
        [A if letter == "a" else B for letter in sizes.replace(" ", "")],
        [str(i) for i, part in enumerate(sizes.split()) for _ in part],
    )
    effects, first, where = draw(3, layout, 4, shift=0.8), np.array(groups) == A, np.array(clusters).astype(int)

    def statistic(row: Floats, labels: npt.NDArray[np.bool_]) -> float:
        cells = [(row[labels & (where == i)], row[~labels & (where == i)]) for i in range(3)]
        difference = sum(x.mean() - y.mean() for x, y in cells)
        return float(abs(difference) / sum(x.var(ddof=1) / len(x) + y.var(ddof=1) / len(y) for x, y in cells) ** 0.5)

    found = contrast(effects, groups, clusters, A, B)
    assert "permuted within clusters, exact" in found.method
    assert "conditional" in found.method
    for row, p in zip(effects, found.p, strict=True):
        all_ways = np.array([statistic(row, labels) for labels in relabelled(where, first)])
        assert p == pytest.approx((all_ways >= statistic(row, first) * (1 - 1e-9)).mean())


def test_paired_flips_are_enumerated_as_scipy_does() -> None:
    groups, clusters = layout = paired(10)
    effects = draw(4, layout, 5, shift=0.7)
    found = contrast(effects, groups, clusters, A, B)
    for row, p in zip(effects, found.p, strict=True):
        pairs = (row[::2], row[1::2])
        reference = permutation_test(
            pairs, lambda x, y: abs((x - y).mean()), alternative="greater", permutation_type="samples"
        )
        assert p == pytest.approx(reference.pvalue)


@pytest.mark.parametrize("name", ["few_paired", "apart"])
def test_sampled_permutations_agree_with_all_of_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, clusters = layout = paired(3, 3, 2) if name == "few_paired" else apart(7, 6)
    effects = draw(5, layout, 8, shift=0.6)
    exact = contrast(effects, groups, clusters, A, B)
    monkeypatch.setattr("mechinterp_cli.stats.contrasts.relabel", partial(relabel, exact_up_to=0))
    drawn = contrast(effects, groups, clusters, A, B, StatsOptions(flips=9999, seed=1))
    assert ("exact" in exact.method, "9999 draws" in drawn.method) == (True, True)
    np.testing.assert_allclose(drawn.p, exact.p, atol=0.02)
    np.testing.assert_allclose(drawn.p_adjusted, exact.p_adjusted, atol=0.02)


def coverage(layout: Layout, of_clusters: list[str], *, shared: float, fixed: bool = False, rounds: int = 4) -> float:
    """Share of nominal 95 % intervals that hold a true difference of 0.4."""
    groups, hits = layout[0], []
    for seed in range(rounds):
        effects = draw(100 + seed, layout, 150, shared=0.0 if fixed else shared, shift=0.4)
        if fixed:
            effects += np.random.default_rng(9).normal(0, 2, 100)[np.unique(layout[1], return_inverse=True)[1]]
        found = contrast(effects, groups, of_clusters, A, B, StatsOptions(draws=500, flips=19, seed=seed))
        hits.append((found.low <= 0.4) & (found.high >= 0.4))
    return float(np.mean(hits))


def test_intervals_cover_where_those_that_ignore_clusters_do_not() -> None:
    layout = apart(14, 14, 4)
    assert 0.92 <= coverage(layout, layout[1], shared=0.5) <= 0.98
    naive = np.arange(len(layout[1])).astype(str).tolist()
    assert coverage(layout, naive, shared=0.5) < 0.85


def test_paired_intervals_cover_and_are_narrower_than_unpaired_ones() -> None:
    layout = groups, clusters = paired(16, 2, 1)
    assert 0.92 <= coverage(layout, clusters, shared=0.7) <= 0.98
    effects = draw(6, layout, 50, shared=0.7)
    split = [f"{group} {cluster}" for group, cluster in zip(groups, clusters, strict=True)]
    one, other = (contrast(effects, groups, by, A, B) for by in (clusters, split))
    assert (one.paired, other.paired) == (True, False)
    assert (one.high - one.low).mean() < 0.8 * (other.high - other.low).mean()


@pytest.mark.parametrize("layout", [paired(3, 8, 6), apart(3, 2, 10)], ids=["paired", "apart"])
def test_conditional_intervals_cover_what_these_clusters_have(layout: Layout) -> None:
    # Clusters that differ much, and the same in every repetition: pairs do not see them, unpaired ones would.
    fixed = layout == paired(3, 8, 6)
    assert 0.92 <= coverage(layout, layout[1], shared=0, fixed=fixed) <= 0.98


def p_values(layout: Layout, of_clusters: list[str], **how: float) -> Floats:
    options = StatsOptions(draws=20, flips=999, correction="none")
    return contrast(draw(7, layout, 1500, **how), layout[0], of_clusters, A, B, options).p


NULLS: dict[str, tuple[Layout, float]] = {
    "paired": (paired(16, 2, 1), 1.0),
    "paired, of unlike spread": (paired(16, 2, 1), 3.0),
    "paired within few clusters": (paired(3, 6, 6), 1.0),
    "apart": (apart(10, 12, 3), 1.0),
    "apart, of unlike spread": (apart(20, 40), 3.0),
}


@pytest.mark.parametrize("name", NULLS)
def test_p_values_are_uniform_where_there_is_no_difference(name: str) -> None:
    layout, a_only = NULLS[name]
    p = p_values(layout, layout[1], a_only=a_only)
    for level in (0.05, 0.2, 0.5, 0.8):
        low, high = binom.ppf([0.0005, 0.9995], len(p), level) / len(p)
        assert low <= (p <= level).mean() <= high, level


def test_tests_that_ignore_clusters_find_differences_where_there_are_none() -> None:
    layout = apart(10, 12, 3)
    naive = np.arange(len(layout[1])).astype(str).tolist()
    assert (p_values(layout, naive) <= 0.05).mean() > 0.1


@pytest.mark.parametrize("name", NULLS)
def test_differences_are_found(name: str) -> None:
    layout, a_only = NULLS[name]
    p = p_values(layout, layout[1], a_only=a_only, shift=1.2 * a_only)
    assert (p <= 0.05).mean() > 0.6


@each_layout
def test_adjusted_p_values_hold_the_family_error(layout: Layout) -> None:
    wrong = []
    for seed in range(60):
        found = contrast(draw(200 + seed, layout, 12), *layout, A, B, StatsOptions(draws=20, flips=199))
        assert (found.p_adjusted >= found.p).all()
        wrong.append((found.p_adjusted <= 0.1).any())
    assert np.mean(wrong) <= binom.ppf(0.999, 60, 0.1) / 60


@each_layout
@pytest.mark.parametrize("method", ["studentized", "bca"])
def test_swapping_the_groups_changes_signs_only(layout: Layout, method: Any) -> None:
    effects = draw(8, layout, 5, shift=0.5)
    one, other = (
        contrast(effects, *layout, first, second, StatsOptions(method=method)) for first, second in ((A, B), (B, A))
    )
    turned = replace(
        other,
        mean_a=other.mean_b,
        mean_b=other.mean_a,
        difference=-other.difference,
        low=-other.high,
        high=-other.low,
        verdict_low=-other.verdict_high,
        verdict_high=-other.verdict_low,
    )
    same(one, turned, atol=1e-9)
    assert (one.n_a, one.clusters_a) == (other.n_b, other.clusters_b)
    assert one.verdict.tolist() == other.verdict.tolist()


@each_layout
def test_what_is_common_to_all_prompts_and_the_unit_do_not_matter(layout: Layout) -> None:
    effects = draw(9, layout, 5, shift=0.5)
    found, moved = contrast(effects, *layout, A, B), contrast(2 * (effects + 7), *layout, A, B)
    same(moved, found, ("p", "p_adjusted"))
    for name in ("difference", "low", "high", "verdict_low", "verdict_high"):
        np.testing.assert_allclose(getattr(moved, name), 2 * getattr(found, name), atol=1e-9)


@each_layout
def test_order_of_trials_and_prompts_does_not_matter(layout: Layout) -> None:
    effects = draw(10, layout, 6, shift=0.5)
    found = contrast(effects, *layout, A, B)
    turned = contrast(effects[::-1], *layout, A, B)
    same(found, replace(turned, **{name: getattr(turned, name)[::-1] for name in ARRAYS}))
    order = np.random.default_rng(0).permutation(len(layout[0]))
    groups, clusters = (np.array(labels)[order].tolist() for labels in layout)
    shuffled = contrast(effects[:, order], groups, clusters, A, B)
    same(found, shuffled, ("mean_a", "mean_b", "difference"))
    if "conditional" in found.method:
        scale = (found.high - found.low)[:, None].max()
        same(found, shuffled, ("low", "high", "verdict_low", "verdict_high"), atol=0.2 * scale)
        same(found, shuffled, ("p", "p_adjusted"), atol=0.05)
    else:
        same(found, shuffled)


@each_layout
def test_the_seed_decides_and_nothing_else_does(layout: Layout) -> None:
    effects = draw(11, layout, 3)
    one, again, other = (contrast(effects, *layout, A, B, StatsOptions(seed=seed)) for seed in (1, 1, 2))
    same(one, again, atol=0)
    assert (one.low != other.low).any()


@each_layout
def test_a_difference_without_spread_is_not_noise(layout: Layout) -> None:
    groups = np.array(layout[0])
    rows = np.stack([np.full(len(groups), 0.1 + 0.2), np.where(groups == A, 1.1, 0.3)])
    found = contrast(rows, *layout, A, B)
    assert (found.difference[0], found.low[0], found.high[0], found.p[0]) == (0, 0, 0, 1)
    np.testing.assert_allclose([found.low[1], found.high[1]], 0.8)
    assert found.p[1] < found.p[0]
    assert found.verdict.tolist() == ["no", "yes"]


@pytest.mark.parametrize("shared", [True, False])
def test_what_rounding_leaves_of_equal_means_is_no_difference(shared: bool) -> None:
    # The mean of three 0.1 is 0.1 and a bit: with every cluster in the same direction that would be significant.
    groups, clusters = paired(12, 3, 1)
    if not shared:
        clusters = [f"{group} {cluster}" for group, cluster in zip(groups, clusters, strict=True)]
    rows = np.full((2, 48), 0.1)
    rows[1, np.array(groups) == A] += 1e-9
    assert rows[0, :3].mean() != rows[0, 3]
    found = contrast(rows, groups, clusters, A, B)
    assert (found.paired, found.p[0], found.low[0], found.high[0]) == (shared, 1, 0, 0)
    assert found.p[1] < 0.01


def test_verdicts_have_three_outcomes_and_go_by_the_90_percent_interval() -> None:
    groups, clusters = layout = paired(40)
    noise = draw(12, layout, 1)[0]
    rows = np.stack([0.01 * noise, np.where(np.array(groups) == A, 1.0, 0.0) + 0.1 * noise, noise])
    found = contrast(rows, groups, clusters, A, B, StatsOptions(raw_margin=0.05))
    assert (found.verdict.tolist(), found.margin) == (["no", "yes", "inconclusive"], 0.05)
    assert (found.low < found.verdict_low).all()
    assert (found.verdict_high < found.high).all()
    # The normalised margin stands in where there is no other, and 0 is a margin.
    assert contrast(rows, groups, clusters, A, B, StatsOptions(margin=0.0001)).verdict.tolist()[0] == "inconclusive"
    assert contrast(rows, groups, clusters, A, B, StatsOptions(raw_margin=0.0)).margin == 0
    # A margin between the ends of the two intervals: the 90 % one decides.
    between = float(max(-found.verdict_low[2], found.verdict_high[2]) + 1e-6)
    assert between < max(-found.low[2], found.high[2])
    assert contrast(rows, groups, clusters, A, B, StatsOptions(raw_margin=between)).verdict[2] == "no"


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_one_broken_prompt_breaks_its_trial_and_no_other(broken: float) -> None:
    groups, clusters = layout = LAYOUTS["partly shared"]
    effects = draw(13, layout, 3, shift=1)
    for prompt in (0, len(groups) - 1):
        spoilt = effects.copy()
        spoilt[1, prompt] = broken
        found, alone = contrast(spoilt, groups, clusters, A, B), contrast(effects[[0, 2]], groups, clusters, A, B)
        for name in ARRAYS:
            assert np.isnan(getattr(found, name)[1]), name
            np.testing.assert_allclose(getattr(found, name)[[0, 2]], getattr(alone, name), atol=1e-12)
        assert found.verdict[1] == "inconclusive"


def test_broken_prompts_of_other_groups_do_not_matter() -> None:
    groups, clusters = layout = paired(12)
    effects = draw(14, layout, 2)
    more = np.concatenate([effects, np.full((2, 3), np.nan)], axis=1)
    same(contrast(more, [*groups, *"ooo"], [*clusters, *"012"], A, B), contrast(effects, groups, clusters, A, B))


def test_trials_that_do_nothing_are_the_same_in_both_and_not_tested() -> None:
    groups, clusters = layout = paired(12)
    effects = draw(15, layout, 3)
    effects[1] = 0
    found = contrast(effects, groups, clusters, A, B, StatsOptions(correction="bh"))
    assert (found.low[1], found.high[1], found.verdict[1]) == (0, 0, "no")
    assert np.isnan([found.p[1], found.p_adjusted[1]]).all()
    alone = contrast(effects[[0, 2]], groups, clusters, A, B, StatsOptions(correction="bh"))
    np.testing.assert_array_equal(found.p_adjusted[[0, 2]], alone.p_adjusted)


def test_no_trials_give_empty_arrays() -> None:
    for groups, clusters in LAYOUTS.values():
        found = contrast(np.empty((0, len(groups))), groups, clusters, A, B)
        assert all(len(getattr(found, name)) == 0 for name in (*ARRAYS, "verdict"))


def test_prompts_of_clusters_with_one_group_are_left_out_and_counted() -> None:
    groups, clusters = layout = LAYOUTS["partly shared"]
    found = contrast(draw(16, layout, 2), groups, clusters, A, B)
    assert (found.paired, found.n_a, found.n_b, found.clusters_a, found.clusters_b) == (True, 12, 12, 12, 12)
    assert "3 prompts are left out: their clusters have no prompt of the other group" in found.warnings
    assert not any("left out" in text for text in contrast(draw(16, paired(12), 2), *paired(12), A, B).warnings)


def test_a_few_shared_clusters_do_not_make_a_pair() -> None:
    groups, clusters = [*apart(12, 12)[0], A, B], [*apart(12, 12)[1], "x", "x"]
    found = contrast(draw(17, (groups, clusters), 2), groups, clusters, A, B)
    assert (found.paired, found.n_a, found.n_b) == (False, 13, 13)
    assert any(text.startswith("1 cluster has prompts of both groups, too few to pair by") for text in found.warnings)


def test_a_single_pair_is_not_a_paired_contrast() -> None:
    found = contrast(np.array([[1.0, 2, 5, 7]]), [A, A, B, B], ["x", "y", "x", "z"], A, B)
    assert (found.paired, found.n_a, found.n_b, found.difference[0]) == (False, 2, 2, -4.5)
    again = contrast(np.array([[1.0, 2, 5, 7]]), [A, A, B, B], ["x", "y", "x", "y"], A, B)
    assert (again.paired, again.clusters_a) == (True, 2)


def test_one_cluster_of_all_prompts_is_a_comparison_of_prompts() -> None:
    groups = apart(9, 11)[0]
    effects = draw(18, apart(9, 11), 4, shift=1)
    one, own = contrast(effects, groups, ["x"] * 20, A, B), contrast(effects, groups, apart(9, 11)[1], A, B)
    np.testing.assert_allclose(one.difference, own.difference)
    np.testing.assert_allclose(one.p, own.p, atol=0.03)
    np.testing.assert_allclose(one.low, own.low, atol=0.15)
    assert any("1 cluster has prompts of both groups" in text for text in one.warnings)
    assert own.warnings == tuple(
        f"group {g}: {n} prompts are fewer than 20; intervals and p-values are rough" for g, n in ((A, 9), (B, 11))
    )


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (paired(19), f"group {A}: 19 prompts are fewer than 20"),
        (paired(4, 10, 10), "4 clusters have prompts of both groups, fewer than 10; intervals and p-values are cond"),
        (paired(4, 1, 10), "4 clusters have prompts of both groups, fewer than 10; intervals are rough"),
        (apart(3, 30, 10), f"group {A}: 3 clusters are fewer than 10; intervals are conditional on them"),
        (apart(1, 1, 30), "p-values cannot be below 1: too few clusters to exchange"),
    ],
)
def test_what_is_rough_is_said(layout: Layout, said: str) -> None:
    found = contrast(draw(19, layout, 2), *layout, A, B)
    assert any(text.startswith(said) for text in found.warnings), found.warnings


def test_what_is_fine_gives_no_warning() -> None:
    for layout in (paired(20), apart(20, 20), apart(10, 10, 2)):
        assert contrast(draw(20, layout, 2), *layout, A, B).warnings == ()


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown": (
        lambda: contrast(np.ones((1, 4)), [A, A, B, B], [*"wxyz"], A, "neither"),
        f"no prompt is in group 'neither'; the groups are '{A}', '{B}'",
    ),
    "one prompt": (lambda: contrast(np.ones((1, 3)), [A, A, B], [*"xyz"], A, B), f"group '{B}' has 1 prompt"),
    "itself": (lambda: contrast(np.ones((1, 4)), [A, A, B, B], [*"wxyz"], A, A), f"'{A}' is compared with itself"),
    "coarse": (
        lambda: contrast(np.ones((30, 4)), [A, A, B, B], [*"wxyz"], A, B, StatsOptions(correction="bh")),
        "Benjamini–Hochberg at q",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_groups_are_named(name: str) -> None:
    call, said = BAD[name]
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        call()
    assert caught.value.remedy


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="do not agree"):
        contrast(np.ones((1, 5)), [A, A, B, B], [*"wxyz"], A, B)
    contrast(np.ones((1, 4)), [A, A, B, B], [*"wxyz"], A, B)


def test_every_field_is_as_long_as_the_trials() -> None:
    found = contrast(draw(21, paired(12), 7), *paired(12), A, B)
    arrays = [getattr(found, f.name) for f in fields(found)]
    assert {len(array) for array in arrays if isinstance(array, np.ndarray)} == {7}
