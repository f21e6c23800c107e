"""`circuit` with `granularity: neurons`: its tables, its circuits against plain hooks, and what is refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.circuit_items import Items
from mechinterp_cli.methods.circuit.neurons import ItemTopology
from mechinterp_cli.methods.run import dry_run
from mechinterp_cli.models.load import load_model
from mechinterp_cli.report.cells import number
from mechinterp_cli.tasks.draw import Draw
from tests.experiments import Run, config_of, run_method
from tests.oracle import Oracle
from tests.refusing import changed, check_refused

NEURONS = 128
"""Of each of the toy's two MLPs; with eight heads 264 items, and the embedding."""
ITEMS = 2 * NEURONS + 8
SIZES = [0.01, 0.1, 1.0]
TASK = {"name": "induction", "n": 10, "block": 6, "prefix": 2}
SMALL: dict[str, Any] = {
    "granularity": "neurons",
    "scores": ["eap", "exact", "random"],
    "sizes": SIZES,
    "random": {"draws": 2},
    "reference": {"heads": ["0.3", "1.0"], "mlps": ["m1.n54", "m0"]},
    "tests": {"size": 0.1, "edges": 3, "inflated": 4, "subsets": 2, "permutations": 99},
    "stability": {"size": 0.1, "draws": 5},
}
BARE: dict[str, Any] = {
    "granularity": "neurons",
    "scores": ["eap"],
    "sizes": [0.1, 1.0],
    "random": {"draws": 0},
    "tests": None,
    "stability": None,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_method(tmp_path_factory.mktemp("neurons"), "circuit", SMALL, task=TASK)


def bare(folder: Path, section: dict[str, Any]) -> Run:
    folder.mkdir(exist_ok=True)
    return run_method(folder, "circuit", BARE | section, task=TASK)


def topology() -> ItemTopology:
    anatomy = load_model(ModelOptions(id="toy-induction")).anatomy
    return ItemTopology.over(Items.of(anatomy, Graph.of(anatomy)))


# --- tables


def test_every_head_and_neuron_has_a_row_for_each_score(small: Run) -> None:
    rows = small.table("edges")
    assert len(rows) == 3 * (ITEMS + 1)
    own = rows[rows["score"] == "eap"].set_index("source")
    assert {"embed", "a1.h3", "m0.n0", f"m1.n{NEURONS - 1}"} <= set(own.index)
    assert set(rows["target"]) == {"all"}
    assert own.loc["m1.n7", "source_layer"] == 1
    assert own["source_head"].notna().sum() == 8
    assert own["source_layer"].isna().sum() == 1, "of the embedding alone"


def test_the_neurons_of_an_mlp_add_up_to_what_edges_say_of_it(small: Run, tmp_path: Path) -> None:
    rows = small.table("edges")
    own = rows[rows["score"] == "eap"]
    edges = bare(tmp_path, {"granularity": "edges"}).table("edges")
    nodes = edges.groupby("source")["value"].sum()
    sums = own.groupby(own["source"].str.replace(r"\.n\d+", "", regex=True))["value"].sum()
    assert (sums - nodes).abs().max() <= 1e-5 * nodes.abs().max()
    summary = small.table("summary").set_index("label")["effect"]
    assert summary["mlp_out, layer 1"] == pytest.approx(-nodes["m1"], rel=1e-4)
    values = own.set_index("source")["value"]
    assert summary["neuron, layer 1, neuron 54"] == pytest.approx(-values["m1.n54"], rel=1e-5)
    assert small.table("summary")["neuron"].notna().sum() == 2 * NEURONS


def test_members_are_the_best_of_a_ranking_and_the_embedding_is_not_among_them(small: Run) -> None:
    edges, members = small.table("edges"), small.table("members")
    found = small.table("faithfulness")
    keys = zip(found["score"], found["rank"], found["size"], strict=True)
    counted = dict(zip(keys, zip(found["asked"], found["kept"], strict=True), strict=True))
    for score in ("eap", "exact", "random"):
        chosen = edges[(edges["score"] == score) & (edges["source"] != "embed")]
        for rank in ("signed", "absolute"):
            order = chosen.sort_values(rank)["source"].tolist()
            for size in SIZES:
                own = members[(members["score"] == score) & (members["rank"] == rank) & (members["size"] <= size)]
                assert set(own["source"]) == set(order[: int(size * ITEMS)])
                assert counted[score, rank, size] == (int(size * ITEMS),) * 2
    assert not (members["source"] == "embed").any()


def _where(kept: torch.Tensor, other: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    return torch.where(kept, own, other)


def test_a_circuit_is_what_ordinary_hooks_make_of_it(small: Run) -> None:
    evaluate, members = small.manifest["task"]["evaluate"], small.table("members")
    clean, corrupt = (small.tokens(stream)[evaluate] for stream in ("clean", "corrupt"))
    loaded = load_model(ModelOptions(id="toy-induction", attn_implementation="eager"))
    oracle = Oracle("llama", loaded.model)
    _, there = oracle.run(corrupt)
    own = members[(members["score"] == "exact") & (members["rank"] == "signed") & (members["size"] <= 0.1)]
    kept = set(own["source"])
    changes: dict[tuple[str, int], Callable[[torch.Tensor], torch.Tensor]] = {}
    for layer in range(2):
        heads = torch.tensor([f"a{layer}.h{i}" in kept for i in range(4)])[:, None]
        neurons = torch.tensor([f"m{layer}.n{i}" in kept for i in range(NEURONS)])
        assert heads.any()
        changes["z", layer] = partial(_where, heads, there["z", layer])
        changes["neuron", layer] = partial(_where, neurons, there["neuron", layer])
    logits = oracle.run(clean, changes)[0][:, -1]
    answers, wrong = (small.answers(name)[evaluate] for name in ("answer_ids", "wrong_answer_ids"))
    rows = torch.arange(len(evaluate))
    want = (logits[rows, answers] - logits[rows, wrong]).numpy()
    table = small.table("evaluations")
    mine = table[(table["score"] == "exact") & (table["rank"] == "signed") & (table["size"] == 0.1)]
    got = mine.set_index("prompt").loc[evaluate, "value"].to_numpy(dtype=float)
    assert np.abs(got - want).max() <= 1e-4 * float(logits.abs().max())
    assert np.ptp(want) > 0.1


def test_the_whole_and_nothing_are_the_native_streams(small: Run) -> None:
    (part,) = small.manifest["engine"]["parts"]
    assert max(part["ends_deviation"].values()) <= 1e-3
    assert part["neuron_sum"] <= 1e-4
    full = small.table("faithfulness").set_index(["score", "rank", "size"])["faithfulness"]
    assert number(full[("eap", "signed", 1.0)]) == pytest.approx(1, abs=1e-5)


def test_a_reference_of_heads_an_mlp_and_a_neuron_has_just_these(small: Run) -> None:
    members = small.table("members")
    own = set(members[members["score"] == "reference"]["source"])
    assert own == {"a0.h3", "a1.h0", "m1.n54", *(f"m0.n{i}" for i in range(NEURONS))}
    quality = small.table("quality")
    assert set(quality["level"].dropna()) == {"neurons", "nodes"}
    whole = quality[(quality["measure"] == "recall") & (quality["level"] == "neurons") & (quality["size"] == 1.0)]
    assert (whole["value"] == 1.0).all()


def test_parts_of_the_circuit_that_are_taken_out_are_heads_and_neurons(small: Run) -> None:
    rows = small.table("minimality")
    assert len(rows) == 3
    assert "embed" not in set(rows["source"])
    removed = small.table("completeness").set_index("draw")["removed"]
    assert removed[0] == int(0.1 * ITEMS), "the whole circuit, and not the embedding"


def test_estimates_rank_neurons_as_patching_each_alone_does(small: Run) -> None:
    rows = small.table("edges")
    values = rows[rows["source"] != "embed"].pivot(index="source", columns="score", values="value")
    assert values["eap"].corr(values["exact"]) > 0.5
    assert abs(values["random"].corr(values["exact"])) < 0.3


# --- choosing


def test_a_circuit_without_the_embedding_is_not_connected() -> None:
    of = topology()
    kept = np.zeros(len(of), dtype=bool)
    kept[of.items.named("m1.n3")] = True
    assert not of.connected(kept).any()
    whole = kept | of.fixed
    assert (of.connected(whole) == whole).all()
    assert of.fixed.sum() == 1
    assert of.nodes_of(whole).nonzero()[0].tolist() == [0, of.items.graph.source_index[of.items.graph.sources[-1]]]
    (path,) = of.path(Draw(0))
    assert not of.fixed[path]


def test_neurons_are_told_apart_by_spans_and_sum_to_those_that_are_not(tmp_path: Path) -> None:
    whole = bare(tmp_path / "whole", {}).table("edges")
    run = bare(tmp_path / "parts", {"spans": ["copied", "end"]})
    parts = run.table("edges")
    assert len(parts) == 3 * len(whole)
    sums, own = parts.groupby("source")["value"].sum(), whole.set_index("source")["value"]
    assert (sums - own).abs().max() <= 1e-5 * own.abs().max()
    rows = run.table("faithfulness")
    row = rows[(rows["rank"] == "signed") & (rows["size"] == 0.1)].iloc[0]
    assert row["asked"] == row["kept"] == int(0.1 * 3 * ITEMS)
    assert 0 < number(row["faithfulness"]) < 2


def test_the_dry_run_tells_neurons_and_bytes(tmp_path: Path) -> None:
    plan = dry_run(config_of(tmp_path, SMALL, method="circuit", task=TASK))
    assert (plan["nodes"], plan["neurons"], plan["items"]) == (12, 2 * NEURONS, ITEMS + 1)
    assert plan["passes"] == {"eap": 4, "exact": ITEMS + 1, "random": 0}
    assert plan["score_bytes"] == 3 * (ITEMS + 1) * (4 * plan["train"] + 8)
    assert plan["edge_rows"] == 3 * (ITEMS + 1)


# --- refusing

GOOD = """\
name: bad
model: {id: toy-induction}
task: {name: induction, n: 6, block: 6, prefix: 2}
circuit:
  granularity: neurons
  scores: [eap]
  sizes: [0.1, 1.0]
  random: {draws: 0}
  tests: null
  stability: null
metrics: [logit_diff]
output: {figures: []}
"""
Refused = Callable[..., None]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Runs a config and checks how it ends."""
    monkeypatch.chdir(tmp_path)
    return partial(check_refused, capfd, "circuit")


@pytest.mark.parametrize(
    ("old", "new", "cause", "remedy"),
    [
        ("[eap]", "[eap, acdc]", "c.yaml:6: circuit.scores[1]: acdc goes from edge to edge", "granularity: edges"),
        ("  tests: null", "  tests: null\n  select: greedy", "greedy goes from edge to edge", "select: top"),
        (
            "  tests: null",
            "  tests: null\n  given: {edges: [embed->m0]}",
            "circuit.given.edges: a circuit of edges, and granularity is neurons",
            "m3.n17 under mlps",
        ),
        ("  tests: null", "  tests: null\n  given: x.json", "x.json: files hold circuits of edges", "Give heads"),
        (
            "  tests: null",
            "  tests: null\n  given: {mlps: [0, m1.n999]}",
            "circuit.given.mlps[1]: there is no m1.n999: neurons of layer 1 are 0..127",
            "m3.n17",
        ),
        ("  tests: null", "  tests: null\n  given: {mlps: [m7]}", "given.mlps[0]: layer 7 has no MLP", "0..1"),
        ("  tests: null", "  tests: null\n  given: {mlps: [first]}", "given.mlps[0]: 'first' names no MLP", "m3.n17"),
        (
            "granularity: neurons",
            "granularity: nodes\n  given: {mlps: [m1.n3]}",
            "given.mlps[0]: 'm1.n3' is a single neuron, and granularity is not neurons",
            "granularity: neurons",
        ),
    ],
)
def test_what_cannot_be_with_neurons(refused: Refused, old: str, new: str, cause: str, remedy: str) -> None:
    refused(changed(GOOD, old, new), cause, remedy)


def test_a_model_without_neurons_is_refused(refused: Refused, tmp_path: Path) -> None:
    from tests.families import build

    build("mixtral").save_pretrained(tmp_path / "experts")
    tokenizer = load_model(ModelOptions(id="toy-induction")).tokenizer
    tokenizer.save_pretrained(tmp_path / "experts")
    config = changed(GOOD, "id: toy-induction", "id: ./experts")
    refused(config, "c.yaml:5: circuit.granularity: layer 0 has no neuron", "granularity: nodes")


def test_circuits_are_not_written_for_other_tools_and_the_run_says_so(small: Run) -> None:
    assert not (small.path / "circuits").exists()
    assert any("features of the residual stream" in warning for warning in small.manifest["warnings"])
