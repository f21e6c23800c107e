"""Random sets beside a chosen one, and effects beside those of random sets."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp_cli.config.schema import FEWEST_DRAWS, StatsOptions
from mechinterp_cli.methods.beside import beside_random, estimate
from mechinterp_cli.methods.matched import FEW_SETS, matched_sets, too_few

Floats = npt.NDArray[np.float64]
Item = tuple[int, int]
STATS = StatsOptions(bootstrap=400, interval="bca")


def items(sizes: Sequence[int]) -> dict[int, list[Item]]:
    """So many (group, number) of each group."""
    return {group: [(group, number) for number in range(size)] for group, size in enumerate(sizes)}


def every_set(wanted: dict[int, int], others: dict[int, list[Item]]) -> set[frozenset[Item]]:
    """All sets with as many of each group, found by trying every set of that size."""
    whole = list(chain.from_iterable(others.values()))
    tried = combinations(whole, sum(wanted.values()))
    return {frozenset(one) for one in tried if Counter(group for group, _ in one) == wanted}


# --- sets


@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 30), st.integers(0, 9))
def test_sets_are_all_that_there_are_or_so_many_of_them(
    data: st.DataObject, sizes: list[int], draws: int, seed: int
) -> None:
    others = items(sizes)
    wanted = {group: data.draw(st.integers(1, size)) for group, size in enumerate(sizes)}
    sets = matched_sets(wanted, others, draws=draws, seed=seed)
    possible = every_set(wanted, others)
    assert len(sets) == min(draws, len(possible))
    assert {frozenset(one) for one in sets} <= possible
    if len(possible) <= draws:
        assert {frozenset(one) for one in sets} == possible
    for one in sets:
        assert list(one) == sorted(set(one))


@pytest.mark.parametrize(("draws", "whole"), [(45, True), (44, False)])
def test_they_are_enumerated_where_draws_suffice(draws: int, whole: bool) -> None:
    others = items([10])
    sets = matched_sets({0: 2}, others, draws=draws, seed=0)
    assert len(sets) == draws
    assert (len(set(sets)) == draws) is whole  # of 44 draws of 45 some come twice
    assert (matched_sets({0: 2}, others, draws=draws, seed=1) == sets) is whole


def test_the_seed_decides_and_every_set_is_as_likely() -> None:
    others = items([3, 4])
    drawn = [matched_sets({0: 1, 1: 2}, others, draws=1, seed=seed)[0] for seed in range(1800)]
    assert matched_sets({0: 1, 1: 2}, others, draws=1, seed=7)[0] == drawn[7]
    counts = Counter(drawn)
    assert len(counts) == 3 * 6
    # 100 of each are expected; the 0.1 % tail of chi-squared with 17 degrees of freedom is 40.8.
    assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 40.8


def test_groups_may_hold_anything_in_the_order_given() -> None:
    others = {"b": ["z", "y", "x"], "a": ["q"]}
    assert matched_sets({"b": 2, "a": 1}, others, draws=5, seed=0) == [
        ("z", "y", "q"),
        ("z", "x", "q"),
        ("y", "x", "q"),
    ]
    drawn = matched_sets({"b": 2, "a": 1}, others, draws=2, seed=0)
    assert set(drawn) <= {("z", "y", "q"), ("z", "x", "q"), ("y", "x", "q")}


def test_a_group_with_too_few_has_no_sets() -> None:
    assert matched_sets({0: 1, 1: 3}, items([4, 2]), draws=9, seed=0) == []
    assert len(matched_sets({0: 1, 1: 2}, items([4, 2]), draws=9, seed=0)) == 4


@pytest.mark.parametrize(
    ("there", "draws", "said"),
    [
        (0, 199, "no random set beside the top 1: a layer has too few others"),
        (1, 199, "only 1 random set beside the top 1: there are no more"),
        (FEW_SETS - 1, 199, "only 19 random sets beside the top 1: there are no more"),
        (FEW_SETS, 199, None),
        (3, 20, "only 3 random sets beside the top 1: there are no more"),
        (3, 3, None),
        (2, 3, "only 2 random sets beside the top 1: there are no more"),
        (199, 199, None),
    ],
)
def test_few_sets_are_said(there: int, draws: int, said: str | None) -> None:
    assert too_few("the top 1", [()] * there, draws) == said


# --- effects beside random ones


def effects(rows: int, mean: float, prompts: int = 24) -> Floats:
    return mean + 0.1 * np.random.default_rng(rows).normal(size=(rows, prompts))


def beside(own: Floats, random: Floats, *, asked: int = FEWEST_DRAWS, margin: float = 0.05) -> dict[str, Any]:
    clusters = [str(i) for i in range(len(own))]
    return beside_random(own, random, clusters, STATS, margin=margin, draws=asked)


def test_the_row_is_what_numpy_says() -> None:
    own, random = effects(1, 2.0)[0], effects(199, 0.3)
    row = beside(own, random)
    means = random.mean(1)
    assert row["random_effect"] == pytest.approx(random.mean())
    assert (row["random_low"], row["random_high"]) == pytest.approx(
        (np.quantile(means, 0.025), np.quantile(means, 0.975))
    )
    assert row["difference"] == pytest.approx(own.mean() - random.mean())
    assert row["difference_low"] < row["difference"] < row["difference_high"]
    # The interval is over prompts: near the normal one of the difference of every prompt.
    each = own - random.mean(0)
    half = 1.96 * each.std(ddof=1) / np.sqrt(len(each))
    assert row["difference_high"] - row["difference_low"] == pytest.approx(2 * half, rel=0.2)
    assert (row["p"], row["verdict"]) == (1 / 200, "yes")


@pytest.mark.parametrize(
    ("sets", "p", "verdict"),
    [(1, 1 / 2, "inconclusive"), (3, 1 / 4, "inconclusive"), (18, 1 / 19, "inconclusive"), (19, 1 / 20, "yes")],
)
def test_of_few_sets_p_has_a_floor_and_yes_needs_twenty(sets: int, p: float, verdict: str) -> None:
    row = beside(effects(1, 2.0)[0], effects(sets, 0.0))
    assert row["difference_low"] > 0.05  # which alone would be a yes
    assert row["p"] == pytest.approx(p)
    assert row["verdict"] == verdict


@pytest.mark.parametrize("sets", [3, 198, 300])
def test_what_was_asked_for_decides_whether_there_is_a_verdict(sets: int) -> None:
    own, random = effects(1, 2.0)[0], effects(sets, 0.0)
    judged, band = beside(own, random, asked=FEWEST_DRAWS), beside(own, random, asked=FEWEST_DRAWS - 1)
    assert {"p", "verdict"} == set(judged) - set(band)
    assert {name: judged[name] for name in band} == band
    assert len(band) == 6


@pytest.mark.parametrize(
    ("own", "random", "p"),
    [
        (2.0, [1.0, -3.0, 2.0], 3 / 4),  # larger in magnitude, and equal
        (-2.0, [1.0, -1.0, 1.9], 1 / 4),
        (-2.0, [2.1, -1.0, 1.9], 2 / 4),
        (0.0, [0.0, 0.0, 0.0], 1.0),
    ],
)
def test_p_counts_sets_by_magnitude(own: float, random: list[float], p: float) -> None:
    rows = np.repeat(np.array(random)[:, None], 8, axis=1)
    assert beside(np.full(8, own), rows)["p"] == p


@pytest.mark.parametrize(
    ("own", "random", "margin", "verdict"),
    [
        (0.31, 0.3, 0.2, "no"),
        (0.31, 0.3, 0.0001, "inconclusive"),
        (2.0, 0.3, 0.2, "yes"),
        (-2.0, 0.3, 0.2, "yes"),
        (2.0, 0.3, 5.0, "no"),
        # Beyond the margin, and most random sets do more.
        (0.3, 2.0, 0.2, "inconclusive"),
    ],
)
def test_verdicts(own: float, random: float, margin: float, verdict: str) -> None:
    row = beside(effects(1, own)[0], effects(199, random), margin=margin)
    assert row["verdict"] == verdict
    if own < random and own > 0:
        assert row["difference_high"] < -margin
        assert row["p"] == 1.0


def test_one_prompt_has_no_interval_and_no_yes() -> None:
    row = beside(np.array([2.0]), np.zeros((199, 1)))
    assert (row["difference_low"], row["difference_high"]) == (None, None)
    assert row["p"] == 1 / 200
    assert row["verdict"] == "inconclusive"


# --- estimates


def test_means_and_ratios() -> None:
    rng = np.random.default_rng(0)
    above, below = rng.normal(3, 1, (4, 30)), rng.normal(2, 0.3, 30)
    clusters = [str(i) for i in range(30)]
    mean, ratio = estimate(above, None, clusters, STATS), estimate(above, below, clusters, STATS)
    np.testing.assert_allclose(mean.estimate, above.mean(1))
    np.testing.assert_allclose(ratio.estimate, above.sum(1) / below.sum())
    for found in (mean, ratio):
        assert (found.low < found.verdict_low).all()
        assert (found.verdict_low < found.estimate).all()
        assert (found.estimate < found.verdict_high).all()
        assert (found.verdict_high < found.high).all()
    assert mean.ends(2, "a", "b") == {"a": mean.low[2], "b": mean.high[2]}


def test_prompts_of_a_cluster_are_drawn_together() -> None:
    values = np.random.default_rng(1).normal(size=(2, 12))
    alone = estimate(values, None, [f"{i:02}" for i in range(12)], STATS)
    copied = np.repeat(values, 5, axis=1)
    together = estimate(copied, None, [f"{i // 5:02}" for i in range(60)], STATS)
    apart = estimate(copied, None, [f"{i:02}" for i in range(60)], STATS)
    # Rounding decides on which side of the estimate a draw falls that equals it.
    np.testing.assert_allclose(together.low, alone.low, atol=0.005)
    np.testing.assert_allclose(together.high, alone.high, atol=0.005)
    assert ((apart.high - apart.low) < 0.7 * (alone.high - alone.low)).all()


def test_a_share_of_next_to_nothing_has_no_interval() -> None:
    rng = np.random.default_rng(2)
    above, clusters = rng.normal(size=(1, 20)), [str(i) for i in range(20)]
    nothing = estimate(above, rng.normal(0, 1, 20), clusters, STATS)
    assert nothing.ends(0, "low", "high") == {"low": None, "high": None}
    assert estimate(above, rng.normal(5, 1, 20), clusters, STATS).ends(0, "low", "high")["low"] is not None
