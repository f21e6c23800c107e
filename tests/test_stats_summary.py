"""Normalised effects and the summary: by hand, and what must be null, counted or said."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mechinterp_cli.errors import UserError
from mechinterp_cli.stats import Observations, StatsOptions, Status, Summary, observe, summarise

OK, TRIVIAL, ABSENT = Status.OK, Status.TRIVIAL, Status.ABSENT


def state(rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.array(rows, dtype=np.int8)


def oks(values: np.ndarray) -> np.ndarray:
    return np.zeros(values.shape, dtype=np.int8)


def row(summary: Summary, trial: int, aggregate: str, group: str = "all") -> dict[str, Any]:
    columns = summary.columns
    keep = (columns["trial"] == trial) & (columns["aggregate"] == aggregate) & (columns["group"] == group)
    (at,) = np.flatnonzero(keep)
    return {name: values[at] for name, values in columns.items()}


def spread(trials: int = 6, prompts: int = 48, effect: float = 0.5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, base and other of trials with a true normalised effect."""
    rng = np.random.default_rng(0)
    base, other = rng.normal(-1, 0.5, prompts), rng.normal(3, 0.5, prompts)
    noise = rng.normal(0, 0.3, (trials, prompts))
    return base + effect * (other - base) + noise, base, other


def summary_of(
    seen: Observations, base: np.ndarray, other: np.ndarray | None, clusters: int = 12, **options: Any
) -> Summary:
    labels = [f"c{i % clusters}" for i in range(len(base))]
    families = ["logit_diff z"] * len(seen.value)
    return summarise(seen, base, other, clusters=labels, families=families, options=StatsOptions(**options))


def test_both_directions_follow_their_formulas() -> None:
    clean, corrupt = np.array([4.0, 3.0]), np.array([-2.0, 1.0])
    patched = np.array([[1.0, 2.5]])
    denoise = observe(patched, oks(patched), corrupt, clean)
    noise = observe(patched, oks(patched), clean, corrupt)
    np.testing.assert_allclose(denoise.normalized, (patched - corrupt) / (clean - corrupt))
    np.testing.assert_allclose(noise.normalized, (clean - patched) / (clean - corrupt))
    np.testing.assert_allclose(denoise.effect, patched - corrupt)
    np.testing.assert_allclose(noise.effect, patched - clean)


def test_the_two_aggregates_differ_and_are_what_they_say() -> None:
    base, other = np.array([0.0, 0.0]), np.array([1.0, 9.0])
    values = np.array([[1.0, 0.0]])
    summary = summary_of(observe(values, oks(values), base, other, floor=0.1, share=0), base, other)
    assert row(summary, 0, "ratio_of_means")["normalized"] == pytest.approx(0.1)
    assert row(summary, 0, "mean_of_ratios")["normalized"] == pytest.approx(0.5)
    assert row(summary, 0, "ratio_of_means")["effect"] == pytest.approx(0.5)


def test_small_denominators_are_undefined_and_counted_never_huge() -> None:
    values, base, other = spread()
    other[:3] = base[:3] + 1e-6
    seen = observe(values, oks(values), base, other)
    assert (seen.status[:, :3] == Status.UNDEFINED).all()
    assert (seen.status[:, 3:] == OK).all()
    summary = summary_of(seen, base, other)
    ratios = row(summary, 0, "mean_of_ratios")
    assert (ratios["n"], ratios["n_dropped"]) == (45, 3)
    assert ratios["normalized"] == pytest.approx(np.nanmean(seen.normalized[0]))
    assert abs(ratios["normalized"]) < 1
    means = row(summary, 0, "ratio_of_means")
    assert (means["n"], means["n_dropped"]) == (48, 0)


def test_the_threshold_follows_the_metrics_spread() -> None:
    values, base, other = spread()
    spread_of = np.sqrt((base.var() + other.var()) / 2)
    assert observe(values, oks(values), base, other).threshold == pytest.approx(0.05 * spread_of)
    flat = np.zeros(48)
    assert observe(values, oks(values), flat, flat + 2).threshold == 1e-3


def test_streams_that_do_not_differ_give_null_not_infinity() -> None:
    values, base, _ = spread()
    summary = summary_of(observe(values, oks(values), base, base.copy()), base, base.copy())
    for aggregate in ("ratio_of_means", "mean_of_ratios"):
        found = row(summary, 0, aggregate)
        assert found["status"] == "undefined"
        assert found["normalized"] is np.ma.masked
        assert found["ci_low"] is np.ma.masked
        assert np.isfinite(found["effect"])
        assert found["verdict"] == "inconclusive"
    assert row(summary, 0, "mean_of_ratios")["n_dropped"] == 48


def test_trivial_trials_are_zero_and_in_no_family() -> None:
    values, base, other = spread()
    status = oks(values)
    status[0], values[0] = TRIVIAL, np.nan
    with_trivial = summary_of(observe(values, status, base, other), base, other)
    found = row(with_trivial, 0, "ratio_of_means")
    assert (found["effect"], found["normalized"], found["ci_low"], found["ci_high"]) == (0, 0, 0, 0)
    assert found["value"] == pytest.approx(base.mean())
    assert (found["status"], found["ci_method"], found["verdict"], found["family"]) == ("trivial", "exact", "no", None)
    assert found["p"] is np.ma.masked
    # The others' adjusted p is what they have without it.
    without = summary_of(observe(values[1:], oks(values[1:]), base, other), base, other)
    for trial in range(5):
        assert (
            row(with_trivial, trial + 1, "ratio_of_means")["p_adjusted"]
            == row(without, trial, "ratio_of_means")["p_adjusted"]
        )


def test_prompts_that_are_trivial_count_as_zero() -> None:
    base, other = np.zeros(24), np.full(24, 2.0)
    values = np.full((1, 24), np.nan)
    values[0, 12:] = 1.0
    status = state([[TRIVIAL] * 12 + [OK] * 12])
    found = row(summary_of(observe(values, status, base, other), base, other), 0, "ratio_of_means")
    assert (found["n"], found["status"]) == (24, "ok")
    assert found["normalized"] == pytest.approx(0.25)


@pytest.mark.parametrize("where", ["trial", "base", "other"])
def test_nan_is_never_averaged_away(where: str) -> None:
    values, base, other = spread(trials=2)
    {"trial": values[0], "base": base, "other": other}[where][5] = np.nan
    summary = summary_of(observe(values, oks(values), base, other), base, other)
    found = row(summary, 0, "ratio_of_means")
    assert found["status"] == "nan"
    assert np.isnan(found["normalized"])
    assert found["normalized"] is not np.ma.masked
    assert (found["n"], found["n_dropped"]) == (47, 1)
    assert found["p"] is np.ma.masked
    other_trial = row(summary, 1, "ratio_of_means")
    assert other_trial["status"] == ("ok" if where == "trial" else "nan")


def test_null_and_nan_stay_apart_in_arrow() -> None:
    values, base, other = spread(trials=2)
    values[0, 5] = np.nan
    columns = summary_of(observe(values, oks(values), base, other), base, other).columns
    assert pa.array(columns["normalized"]).null_count == 0
    assert np.isnan(pa.array(columns["normalized"]).to_pylist()[0])
    assert pa.array(columns["p"]).to_pylist()[0] is None


def test_absent_prompts_are_counted_nowhere() -> None:
    values, base, other = spread()
    status = oks(values)
    status[0, 24:], values[0, 24:] = ABSENT, np.nan
    status[1], values[1] = ABSENT, np.nan
    summary = summary_of(observe(values, status, base, other), base, other)
    found = row(summary, 0, "ratio_of_means")
    assert (found["n"], found["n_dropped"]) == (24, 0)
    alone = summary_of(observe(values[:1, :24], oks(values[:1, :24]), base[:24], other[:24]), base[:24], other[:24])
    wanted = row(alone, 0, "ratio_of_means")
    for name in ("value", "effect", "normalized", "ci_low", "ci_high", "p", "clusters"):
        assert found[name] == pytest.approx(wanted[name]), name
    assert 1 not in summary.columns["trial"]


def test_groups_are_summarised_beside_all() -> None:
    values, base, other = spread()
    groups = ["even" if i % 2 == 0 else "odd" for i in range(48)]
    args: dict[str, Any] = {"clusters": [f"c{i // 4}" for i in range(48)], "families": ["f"] * 6}
    summary = summarise(observe(values, oks(values), base, other), base, other, groups=groups, **args)
    assert set(summary.columns["group"]) == {"all", "even", "odd"}
    assert row(summary, 2, "mean_of_ratios", "odd")["effect"] == pytest.approx((values - base)[2, 1::2].mean())
    single = summarise(observe(values, oks(values), base, other), base, other, groups=["x"] * 48, **args)
    assert set(single.columns["group"]) == {"all"}
    with pytest.raises(UserError, match="a group is called 'all'"):
        summarise(observe(values, oks(values), base, other), base, other, groups=["all"] * 48, **args)


def test_families_are_corrected_apart() -> None:
    values, base, other = spread(trials=40, effect=0.02)
    args: dict[str, Any] = {"clusters": [f"c{i % 12}" for i in range(48)]}
    seen = observe(values, oks(values), base, other)
    one = summarise(seen, base, other, families=["f"] * 40, **args)
    each = summarise(seen, base, other, families=[f"f{i}" for i in range(40)], **args)
    assert (each.columns["p_adjusted"] == each.columns["p"]).all()
    assert (one.columns["p_adjusted"] >= each.columns["p_adjusted"]).all()
    assert (one.columns["p_adjusted"] > each.columns["p_adjusted"]).any()
    assert set(one.columns["family"]) == {"f"}


def test_no_correction_leaves_the_adjusted_p_value_out() -> None:
    values, base, other = spread()
    plain, corrected = (
        summary_of(observe(values, oks(values), base, other), base, other, correction=name)
        for name in ("none", "max_t")
    )
    assert np.ma.getmaskarray(plain.columns["p_adjusted"]).all()
    assert not np.ma.getmaskarray(corrected.columns["p_adjusted"]).any()
    np.testing.assert_array_equal(plain.columns["p"], corrected.columns["p"])


def test_few_clusters_are_said_and_their_range_shown() -> None:
    values, base, other = spread()
    few = summary_of(observe(values, oks(values), base, other), base, other, clusters=2)
    found = row(few, 0, "ratio_of_means")
    assert "conditional on these templates" in found["ci_method"]
    assert found["p_method"].startswith("sign flips by prompt")
    assert any("2 clusters are fewer than 10" in text for text in few.warnings)
    within = [(values - base)[0, i::2].sum() / (other - base)[i::2].sum() for i in range(2)]
    assert (found["cluster_low"], found["cluster_high"]) == pytest.approx((min(within), max(within)))
    many = summary_of(observe(values, oks(values), base, other), base, other, clusters=12)
    found = row(many, 0, "ratio_of_means")
    assert (found["ci_method"], found["clusters"]) == ("studentized", 12)
    assert found["p_method"] == "sign flips by cluster, exact, max_t"
    assert many.warnings == ()


def test_one_cluster_can_still_show_an_effect() -> None:
    values, base, other = spread()
    found = row(summary_of(observe(values, oks(values), base, other), base, other, clusters=1), 0, "ratio_of_means")
    assert found["p_adjusted"] < 0.01
    assert found["verdict"] == "yes"


def test_few_prompts_are_warned_of() -> None:
    values, base, other = spread(prompts=19)
    few = summary_of(observe(values, oks(values), base, other), base, other, clusters=19)
    assert few.warnings == ("group all: 19 prompts are fewer than 20; intervals and p-values are rough",)
    one = summary_of(observe(values[:, :1], oks(values[:, :1]), base[:1], other[:1]), base[:1], other[:1], clusters=1)
    assert one.warnings == ("group all: 1 prompt is fewer than 20; intervals and p-values are rough",)


def test_without_another_stream_the_interval_is_of_the_raw_effect() -> None:
    values, base, _ = spread()
    summary = summary_of(observe(values, oks(values), base), base, None, raw_margin=0.1)
    found = row(summary, 0, "mean")
    assert found["normalized"] is np.ma.masked
    assert found["ci_low"] < found["effect"] < found["ci_high"]
    assert found["verdict"] == "yes"
    with pytest.raises(ValueError, match="normalise"):
        summarise(
            observe(values, oks(values), base),
            base,
            None,
            clusters=["c"] * 48,
            families=["f"] * 6,
            aggregates=["mean_of_ratios"],
        )


def test_mean_of_ratios_is_refused_for_rank_and_accuracy() -> None:
    values, base, other = spread()
    args: dict[str, Any] = {"clusters": ["c"] * 48, "families": ["f"] * 6}
    seen = observe(values, oks(values), base, other)
    usual = summarise(seen, base, other, ratio_of_means_only=True, **args)
    assert set(usual.columns["aggregate"]) == {"ratio_of_means"}
    assert set(summarise(seen, base, other, **args).columns["aggregate"]) == {"ratio_of_means", "mean_of_ratios"}
    with pytest.raises(UserError, match="mean_of_ratios is refused for rank and accuracy"):
        summarise(seen, base, other, ratio_of_means_only=True, aggregates=["mean_of_ratios"], **args)


def test_the_seed_decides_every_number() -> None:
    values, base, other = spread()
    seen = observe(values, oks(values), base, other)
    first, again, moved = (summary_of(seen, base, other, clusters=48, seed=seed) for seed in (1, 1, 2))
    for name, column in first.columns.items():
        assert (column == again.columns[name]).all(), name
    assert (first.columns["ci_low"] != moved.columns["ci_low"]).any()


def test_no_prompt_and_one_prompt() -> None:
    values, base, other = spread(prompts=1)
    found = row(summary_of(observe(values, oks(values), base, other), base, other), 0, "ratio_of_means")
    assert found["ci_low"] is np.ma.masked
    assert (found["p"], found["verdict"]) == (1.0, "inconclusive")
    none = summary_of(observe(values, state([[ABSENT]] * 6), base, other), base, other)
    assert none.rows == 0
