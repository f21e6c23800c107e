"""Which nodes are computed exactly, and what that says of the others."""

from collections import Counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from mechinterp_cli.config.schema import StatsOptions
from mechinterp_cli.methods.attribute.effects import Effects, Scale
from mechinterp_cli.methods.attribute.exact import draw_subsets
from mechinterp_cli.methods.attribute.nodes import Nodes
from mechinterp_cli.methods.attribute.options import VerifyOptions
from mechinterp_cli.methods.attribute.verify import Choice, Verified, choose, draw_evenly
from mechinterp_cli.stats import Status
from mechinterp_cli.stats.missed import missed_upper

Floats = npt.NDArray[np.float64]


class Laid:
    """Nodes of two kinds in three layers: what a choice looks at."""

    def __init__(self, few: int, many: int) -> None:
        self.kinds = np.array(["z"] * 3 * few + ["neuron"] * 3 * many, dtype=object)
        self.layers = np.array([*np.repeat(range(3), few), *np.repeat(range(3), many)])

    def __len__(self) -> int:
        return len(self.kinds)


def laid(few: int = 4, many: int = 200) -> Nodes:
    return cast(Nodes, Laid(few, many))


def everyone(nodes: Nodes) -> npt.NDArray[np.bool_]:
    return np.ones(len(nodes), dtype=np.bool_)


def test_the_random_part_has_as_many_of_each_kind_and_of_each_layer_in_it() -> None:
    nodes = laid()
    drawn = draw_evenly(nodes.kinds, nodes.layers, np.arange(len(nodes)), 18, seed=0)
    assert Counter(nodes.kinds[drawn]) == {"z": 9, "neuron": 9}
    assert Counter(zip(nodes.kinds[drawn], nodes.layers[drawn].tolist(), strict=True)) == dict.fromkeys(
        [(kind, layer) for kind in ("z", "neuron") for layer in range(3)], 3
    )


def test_where_a_kind_runs_out_the_others_fill_up() -> None:
    nodes = laid(few=1)
    drawn = draw_evenly(nodes.kinds, nodes.layers, np.arange(len(nodes)), 20, seed=0)
    assert Counter(nodes.kinds[drawn]) == {"z": 3, "neuron": 17}


def test_every_node_of_a_kind_is_drawn_as_often_as_another() -> None:
    nodes = laid(few=4, many=10)
    seen = Counter(
        int(node)
        for seed in range(3000)
        for node in draw_evenly(nodes.kinds, nodes.layers, np.arange(len(nodes)), 12, seed=seed)
    )
    for kind, expected in (("z", 3000 * 6 / 12), ("neuron", 3000 * 6 / 30)):
        counts = np.array([seen[node] for node in np.flatnonzero(nodes.kinds == kind).tolist()])
        # Five standard deviations of a binomial count.
        assert np.abs(counts - expected).max() <= 5 * np.sqrt(expected)


def test_seeds_draw_other_nodes_and_the_same_seed_the_same() -> None:
    nodes = laid()
    draws = [draw_evenly(nodes.kinds, nodes.layers, np.arange(len(nodes)), 20, seed=s).tolist() for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_the_strongest_of_each_estimator_are_chosen_and_the_random_part_is_shared() -> None:
    nodes = laid()
    sizes = np.zeros((2, len(nodes)))
    sizes[0, [3, 50]], sizes[1, [3, 99]] = (2, 1), (1, 2)
    found = choose(VerifyOptions(top=2, random=0), nodes, everyone(nodes), {"a": sizes[0], "b": sizes[1]})
    assert found.nodes.tolist() == [3, 50, 99]
    assert found.part("a") == ["top", "top", None]
    assert found.part("b") == ["top", None, "top"]
    both = choose(VerifyOptions(top=1, random=len(nodes)), nodes, everyone(nodes), {"a": sizes[0]})
    assert both.part("a")[3] == "top, random"
    assert len(both.nodes) == len(nodes)


def test_nodes_that_do_nothing_are_not_chosen() -> None:
    nodes, usable = laid(), np.zeros(len(laid()), dtype=np.bool_)
    usable[[5, 6]] = True
    sizes = np.arange(len(nodes), dtype=float)
    found = choose(VerifyOptions(top=4, random=4), nodes, usable, {"a": sizes})
    assert found.nodes.tolist() == [5, 6]


def test_subsets_are_drawn_from_what_is_not_computed_one_by_one() -> None:
    nodes = laid(few=2, many=4)
    chosen = choose(VerifyOptions(top=0, random=10), nodes, everyone(nodes), {})
    left = set(range(len(nodes))) - set(chosen.nodes.tolist())
    drawn = draw_subsets(VerifyOptions(subsets=20, subset_size=5), chosen, everyone(nodes))
    assert [len(set(subset.tolist())) for subset in drawn] == [5] * 20
    assert set(np.concatenate(drawn).tolist()) == left
    small = draw_subsets(VerifyOptions(subsets=1, subset_size=50), chosen, everyone(nodes))
    assert set(small[0].tolist()) == left


def effects(values: Floats) -> Effects:
    """One prompt whose streams differ by 1, so that effects are normalised already."""
    status = np.full((len(values), 1), Status.OK, dtype=np.int8)
    return Effects(values[:, None], status, Scale(np.zeros(1), np.ones(1), StatsOptions()))


def verified(estimates: Floats, exact: Floats, random: list[int], top: list[int], **others: Any) -> Verified:
    """Nodes of one kind whose exact effects are known for some."""
    nodes = laid(few=len(estimates) // 3, many=0)
    chosen = np.array(sorted({*random, *top}))
    choice = Choice(chosen, {"atp": np.isin(chosen, top)}, np.isin(chosen, random))
    return Verified(
        {"estimator": "atp", "steps": None, "metric": "logit_diff"},
        nodes,
        everyone(nodes),
        choice,
        effects(estimates),
        effects(exact[chosen]),
        "atp",
        0.02,
        **others,
    )


@pytest.fixture
def numbers() -> tuple[Floats, Floats]:
    rng = np.random.default_rng(0)
    estimates = rng.normal(size=30) * 0.01
    exact = estimates + rng.normal(size=30) * 0.005
    estimates[:3], exact[:3] = (1.0, -0.5, 0.4), (0.9, -0.4, 0.001)
    return estimates, exact


def test_correlations_are_of_the_random_part_alone(numbers: tuple[Floats, Floats]) -> None:
    estimates, exact = numbers
    random = list(range(3, 15))
    rows = {row["part"]: row for row in verified(estimates, exact, random, [0, 1, 2]).verification()}
    assert rows["random"]["pearson"] == pytest.approx(np.corrcoef(estimates[random], exact[random])[0, 1])
    assert rows["random"]["rows"] == 12
    assert rows["top"]["above"] == pytest.approx(2 / 3)
    assert rows["top"]["sign_agreement"] == 1.0
    assert (rows["top"]["nodes"], rows["top"]["rows"]) == (30, 3)


def test_sizes_have_no_signs_to_agree(numbers: tuple[Floats, Floats]) -> None:
    estimates, exact = np.abs(numbers[0]), numbers[1]
    random = list(range(3, 15))
    (row, _) = verified(estimates, exact, random, [0, 1], signless=frozenset({"z"})).verification()
    assert row["pearson"] == pytest.approx(np.corrcoef(estimates[random], np.abs(exact[random]))[0, 1])
    assert row["sign_agreement"] is None


def test_missed_effects_are_bounded_by_the_sample_below_the_threshold() -> None:
    estimates, exact = np.zeros(30), np.zeros(30)
    estimates[20:] = 0.5  # beyond the threshold: nobody misses these
    exact[[2, 25]] = 0.3
    random = [0, 1, 2, 3, 4, 5, 25]
    row = next(row for row in verified(estimates, exact, random, []).missed() if row["stratum"] == "all")
    assert (row["nodes"], row["rows"], row["missed"]) == (20, 6, 1)
    assert row["upper_count"] == missed_upper(20, 6, 1)
    assert row["upper_fraction"] == row["upper_count"] / 20


def test_strata_part_the_nodes_by_size() -> None:
    estimates = np.linspace(0, 0.0199, 30)
    rows = {row["stratum"]: row for row in verified(estimates, estimates, list(range(30)), []).missed()}
    assert rows["below 0.005"]["nodes"] + rows["from 0.005"]["nodes"] == rows["all"]["nodes"] == 30
    assert rows["all"]["upper_count"] == 0  # all of them were looked at


def test_without_a_threshold_nothing_is_said_of_missed_effects(numbers: tuple[Floats, Floats]) -> None:
    known = verified(*numbers, list(range(12)), [0])
    unknown = Verified(
        known.about, known.nodes, known.usable, known.choice, known.estimates, known.exact, known.estimator, None
    )
    assert list(unknown.missed()) == []
    assert [row["above"] for row in unknown.verification()] == [None, None]


def test_intervals_are_made_of_the_wanted_nodes_alone() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(6, 12))
    status = np.full(values.shape, Status.OK, dtype=np.int8)
    found = Effects(values, status, Scale(np.zeros(12), None, StatsOptions(bootstrap=200)))
    wanted = found.strongest(2)
    low, high = found.intervals([str(i) for i in range(12)], wanted)
    assert np.isfinite(low).tolist() == np.isfinite(high).tolist() == wanted.tolist()
    assert sorted(np.flatnonzero(wanted)) == sorted(np.argsort(-np.abs(values.mean(1)))[:2])
    assert bool((low[wanted] < found.mean[wanted]).all() and (high[wanted] > found.mean[wanted]).all())
