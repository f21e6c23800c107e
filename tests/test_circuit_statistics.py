"""Faithfulness, its areas and intervals, and the tests of circuits: analytic cases and independent formulas."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats as scipy_stats

from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.circuit.faithfulness import Ends, band, trapezoid
from mechinterp_cli.methods.circuit.hypotheses import equivalence, holm, independence, minimality, within
from mechinterp_cli.methods.circuit.options import MIB_SIZES
from mechinterp_cli.methods.circuit.resampled import bca
from mechinterp_cli.methods.circuit.tables import Scored, mean_intervals
from mechinterp_cli.stats import choose_units, draw_weights

Floats = npt.NDArray[np.float64]
STATS = StatsOptions(bootstrap=1000)


def apart(count: int) -> list[str]:
    """Every prompt a cluster of its own."""
    return [f"prompt-{i}" for i in range(count)]


def ends(count: int = 40, seed: int = 0, clusters: Sequence[str] | None = None) -> Ends:
    rng = np.random.default_rng(seed)
    return Ends(rng.normal(3, 0.5, count), rng.normal(-2, 0.5, count), clusters or apart(count), STATS)


# --- faithfulness


def test_faithfulness_is_1_for_the_model_0_for_nothing_and_linear_between() -> None:
    own = ends()
    halfway = (own.full + 3 * own.empty) / 4
    values = np.stack([own.full, own.empty, halfway])
    assert own.faithfulness(values) == pytest.approx([1, 0, 0.25], abs=1e-12)
    for found, wanted in zip(own.curve(values), (1, 0, 0.25), strict=True):
        # The same share on every prompt: nothing is uncertain.
        assert (found.value, found.low, found.high) == pytest.approx((wanted,) * 3, abs=1e-9)


def test_where_nothing_lies_between_the_ends_there_is_no_faithfulness() -> None:
    own = Ends(np.ones(8), np.ones(8), apart(8), STATS)
    assert np.isnan(own.faithfulness(np.ones((1, 8)))).all()
    (found,) = own.curve(np.ones((1, 8)))
    assert found.columns("faithfulness") == {
        "faithfulness": None,
        "ci_low": None,
        "ci_high": None,
        "ci_method": "undefined",
    }
    assert np.isnan(own.cmd((0.1, 1.0), np.ones((2, 8))).value)


def test_cpr_and_cmd_are_the_areas_of_the_curve() -> None:
    own = ends()
    f = np.array([0.0, 0.1, -0.2, 0.5, 0.9, 1.3, 1.1, 0.8, 1.0, 1.0])
    values = own.empty + f[:, None] * (own.full - own.empty)
    assert own.cpr(MIB_SIZES, values).value == pytest.approx(np.trapezoid(f, MIB_SIZES), abs=1e-12)
    assert own.cmd(MIB_SIZES, values).value == pytest.approx(np.trapezoid(np.abs(1 - f), MIB_SIZES), abs=1e-12)
    # A perfect curve; nothing below the smallest size is counted.
    perfect = np.tile(own.full, (len(MIB_SIZES), 1))
    assert own.cpr(MIB_SIZES, perfect).value == pytest.approx(0.999, abs=1e-12)
    assert own.cmd(MIB_SIZES, perfect).value == pytest.approx(0, abs=1e-12)
    assert trapezoid((0.5,)).tolist() == [0]


def test_intervals_of_the_areas_hold_the_truth_as_often_as_they_say() -> None:
    sizes, f = (0.1, 0.5, 1.0), np.array([0.2, 0.7, 1.0])
    truths = {"cpr": np.trapezoid(f, sizes), "cmd": np.trapezoid(1 - f, sizes)}
    hits = dict.fromkeys(truths, 0)
    for seed in range(120):
        own = Ends(*ends(30, seed).__dict__.values())  # a fresh one: weights are cached
        rng = np.random.default_rng(1000 + seed)
        noise = rng.normal(0, 1.0, (3, 30)) * np.array([1, 1, 0])[:, None]
        values = own.empty + f[:, None] * (own.full - own.empty) + noise
        for name in truths:
            found = getattr(own, name)(sizes, values)
            hits[name] += found.low <= truths[name] <= found.high
    for name, count in hits.items():
        assert 0.88 <= count / 120 <= 0.99, name


def test_bca_is_scipys() -> None:
    x = np.random.default_rng(3).exponential(size=60)
    units = choose_units(np.array(apart(60)))
    weights = draw_weights(units, draws=20_000, seed=0)
    found = bca(lambda w: np.asarray((w @ x) / w.sum(1)) ** 2, units, weights, level=0.95)
    wanted = scipy_stats.bootstrap((x,), lambda v, axis: v.mean(axis) ** 2, n_resamples=20_000, method="BCa", rng=1)
    assert found.value == pytest.approx(x.mean() ** 2)
    ends_of = wanted.confidence_interval
    assert (found.low, found.high) == pytest.approx((ends_of.low, ends_of.high), rel=0.03)


def test_a_band_is_the_middle_of_the_draws() -> None:
    draws = np.append(np.arange(101.0), np.nan)
    assert band(draws) == {"random_mean": 50, "random_low": 2.5, "random_high": 97.5}
    assert band(np.array([np.nan])) == {}


def test_intervals_of_scores_are_students_over_prompts_and_wider_over_clusters() -> None:
    x = np.random.default_rng(4).normal(1, 2, (5, 24))
    score = Scored("eap", x.mean(1), x)
    low, high = mean_intervals(score, apart(24), 0.95)
    for edge in range(5):
        wanted = scipy_stats.t.interval(0.95, 23, x[edge].mean(), scipy_stats.sem(x[edge]))
        assert (low[edge], high[edge]) == pytest.approx(wanted)
    # Prompts of a cluster that say the same are one observation.
    doubled = np.repeat(x, 2, axis=1)
    names = [f"c{i // 2}" for i in range(48)]
    again = mean_intervals(Scored("eap", doubled.mean(1), doubled), names, 0.95)
    assert again[0] == pytest.approx(low)
    assert again[1] == pytest.approx(high)
    assert np.isnan(mean_intervals(Scored("acdc", x.mean(1)), apart(24), 0.95)[0]).all()


# --- tests of circuits


@pytest.mark.parametrize(("share", "verdict"), [(0.5, "yes"), (0.9, "no"), (0.1, "no"), (0.62, "inconclusive")])
def test_equivalence_has_three_outcomes(share: float, verdict: str) -> None:
    count = 400
    model = np.zeros(count)
    wins = np.arange(count) < share * count
    circuit = np.where(np.random.default_rng(0).permutation(wins), 1.0, -1.0)
    row = equivalence(circuit, model, apart(count), STATS, epsilon=0.1)
    assert row["statistic"] == pytest.approx(share)
    assert row["verdict"] == verdict


def test_the_p_value_of_equivalence_is_the_papers_sum() -> None:
    model, circuit = np.zeros(10), np.array([1.0] * 9 + [-1.0])
    row = equivalence(circuit, model, apart(10), STATS, epsilon=0.1)
    wanted = sum(scipy_stats.binom.pmf(k, 10, 0.6) for k in (0, 1, 9, 10))
    assert row["p"] == pytest.approx(wanted)


def test_a_circuit_that_is_the_model_but_for_rounding_is_equivalent() -> None:
    model = np.random.default_rng(0).normal(10, 1, 12)
    row = equivalence(model * (1 + 1e-7), model, apart(12), STATS, epsilon=0.1)
    assert (row["statistic"], row["verdict"]) == (0.5, "yes")
    assert row["p"] == pytest.approx(1)


def test_few_prompts_are_inconclusive() -> None:
    circuit = np.array([1.0, 1.0, -1.0, 1.0])
    assert equivalence(circuit, np.zeros(4), apart(4), STATS, epsilon=0.1)["verdict"] == "inconclusive"


def test_independence_tells_what_follows_the_model_and_does_not_prove_the_opposite() -> None:
    rng = np.random.default_rng(0)
    model = rng.normal(size=60)
    follows = model**2 + 0.1 * rng.normal(size=60)  # dependent, though hardly correlated
    kept = independence(follows, model, apart(60), permutations=499, level=0.05, seed=0)
    assert kept["verdict"] == "no"
    assert kept["p"] == pytest.approx(1 / 500)
    free = independence(rng.normal(size=60), model, apart(60), permutations=499, level=0.05, seed=0)
    assert free["p"] > 0.05
    assert free["verdict"] == "inconclusive"
    many = rng.normal(size=(2, 900))
    settled = independence(many[0], many[1], apart(900), permutations=99, level=0.05, seed=0)
    assert settled["verdict"] == "yes"
    assert independence(np.ones(8), model[:8], apart(8), permutations=99, level=0.05, seed=0)["verdict"] == "yes"


def test_hsic_is_its_definition() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=12), rng.normal(size=12)

    def kernel(values: Floats) -> Floats:
        distance = np.abs(np.subtract.outer(values, values))
        width = np.median([distance[i, j] for i in range(12) for j in range(i)])
        found: Floats = np.exp(-(distance**2) / (2 * width**2))
        return found

    centre = np.eye(12) - 1 / 12

    def hsic(a: Floats, b: Floats) -> float:
        return float(np.trace(kernel(a) @ centre @ kernel(b) @ centre))

    wanted = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    row = independence(x, y, apart(12), permutations=99, level=0.05, seed=0)
    assert row["statistic"] == pytest.approx(wanted)


def test_templates_alone_make_nothing_dependent() -> None:
    rng = np.random.default_rng(6)
    of = np.repeat(np.arange(6), 8)
    level = rng.normal(0, 5, 6)
    rest, model = level[of] + rng.normal(size=48), level[of] + rng.normal(size=48)
    clusters = [f"template-{i}" for i in of]
    assert independence(rest, model, apart(48), permutations=199, level=0.05, seed=0)["p"] <= 0.01
    assert independence(rest, model, clusters, permutations=199, level=0.05, seed=0)["p"] > 0.05


def test_minimality_tells_needed_edges_from_needless_ones() -> None:
    needless = np.abs(np.random.default_rng(0).normal(0, 0.01, 50))
    effects = np.array([0.5, 0.0, 0.03, -0.4])
    low, high = effects - np.array([0.1, 0.001, 0.02, 0.1]), effects + np.array([0.1, 0.001, 0.02, 0.1])
    found = minimality(effects, low, high, needless, quantile=0.9, margin=0.02, level=0.05)
    assert found.verdicts == ("yes", "no", "inconclusive", "yes")
    assert found.share.tolist() == [1, 0, 1, 1]
    beaten = int((needless < 0.03).sum())
    assert found.p[2] == pytest.approx(scipy_stats.binomtest(beaten, 50, 0.9, alternative="less").pvalue)
    assert (found.adjusted >= found.p).all()
    without = minimality(effects, low, high, np.zeros(0), quantile=0.9, margin=0.02, level=0.05)
    assert without.verdicts == ("yes", "inconclusive", "inconclusive", "yes")
    assert np.isnan(without.p).all()


def test_holms_adjustment() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1, 1]


def test_a_difference_matters_does_not_or_nobody_can_say() -> None:
    assert within(-0.01, 0.015, 0.02) == "yes"
    assert within(0.03, 0.5, 0.02) == within(-0.5, -0.03, 0.02) == "no"
    assert within(-0.5, 0.5, 0.02) == within(float("nan"), float("nan"), 0.02) == "inconclusive"
