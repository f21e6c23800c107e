"""On planted-induction the true edges are known from the weights: what finds them, and what they alone do."""

from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from mechinterp_cli.engine.circuit_graph import Graph
from mechinterp_cli.engine.edge_patching import EdgePatching, Pairs
from mechinterp_cli.engine.wiring import wired
from mechinterp_cli.methods.circuit.choose import Topology
from mechinterp_cli.methods.measure import build_prompts
from mechinterp_cli.metrics import Measurer
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import EDGES
from mechinterp_cli.tasks.library.induction import InductionOptions
from tests.experiments import Run, run_method
from tests.models_fixtures import planted

__all__ = ["planted"]

TASK = {"name": "induction", "n": 12, "block": 6, "prefix": 2, "corruption": "all"}
FIVE = 0.046
"""Of 110 edges: int(0.046 · 110) = 5."""
SECTION = {
    "scores": ["eap_ig_inputs", "eap_ig_activations", "exact", "acdc", "eap"],
    "sizes": [0.01, FIVE, 0.5, 1.0],
    "acdc": {"thresholds": [0.1, 1.0]},
    "reference": {"edges": list(EDGES)},
    "random": {"draws": 2},
    "tests": {"size": FIVE, "inflated": 10, "subsets": 3, "permutations": 99},
    "stability": {"size": FIVE, "draws": 20},
}
FINDERS = ("eap_ig_inputs", "eap_ig_activations", "exact")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_method(
        tmp_path_factory.mktemp("planted"), "circuit", SECTION, model={"id": "planted-induction"}, task=TASK
    )


def members(
    run: Run, score: str, *, rank: str | None = None, size: float = 1.0, threshold: float | None = None
) -> set[str]:
    """Names of a circuit's edges."""
    rows = run.table("members")
    rows = rows[rows["score"] == score]
    rows = rows[rows["rank"].isna() if rank is None else (rows["rank"] == rank).fillna(False)]
    rows = rows[rows["threshold"] == threshold] if threshold is not None else rows[rows["size"].fillna(0.0) <= size]
    return set(rows["source"] + "->" + rows["target"])


@pytest.mark.parametrize("rank", ["signed", "absolute"])
@pytest.mark.parametrize("score", FINDERS)
def test_the_five_best_edges_are_the_true_ones(run: Run, score: str, rank: str) -> None:
    assert members(run, score, rank=rank, size=FIVE) == set(EDGES)


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_acdc_leaves_the_true_edges_alone(run: Run, threshold: float) -> None:
    assert members(run, "acdc", threshold=threshold) == set(EDGES)


def test_the_reference_is_what_was_given(run: Run) -> None:
    assert members(run, "reference") == set(EDGES)


def test_faithfulness_of_the_true_circuit_is_1(run: Run) -> None:
    rows = run.table("faithfulness")
    true = rows[
        (rows["size"] == FIVE).fillna(False) & rows["score"].isin(FINDERS) | rows["score"].isin(["acdc", "reference"])
    ]
    assert len(true) == 2 * len(FINDERS) + 3
    assert (true["faithfulness"] - 1).abs().max() <= 1e-5
    assert set(true["kept"]) == {5}


def test_auroc_is_1_where_the_true_edges_are_found_and_less_for_eap(run: Run) -> None:
    rows = run.table("quality")
    auroc = rows[(rows["measure"] == "auroc") & (rows["level"] == "edges")].set_index(["score", "rank"])["value"]
    for score in FINDERS:
        assert auroc[score, "signed"] == auroc[score, "absolute"] == 1
    # Attention is saturated at the clean prompt: its gradient there says next to nothing of queries and keys.
    assert auroc["eap", "signed"] < 0.95
    nearest = rows[(rows["measure"] == "jaccard") & (rows["level"] == "edges") & (rows["score"] == "acdc")]
    assert nearest["value"].tolist() == [1, 1]


def test_every_test_says_yes_of_the_true_circuit(run: Run) -> None:
    tests = run.table("tests").set_index("test")
    assert tests["verdict"].to_dict() == {"equivalence": "yes", "independence": "yes", "minimality": "yes"}
    edges = run.table("minimality")
    assert set(edges["source"] + "->" + edges["target"]) == set(EDGES)
    assert edges["effect"].min() > 0.5
    completeness = run.table("completeness")
    assert completeness["removed"].iloc[0] == 5
    assert set(completeness["verdict"]) == {"yes"}
    assert completeness["difference"].abs().max() <= 1e-5


def test_the_same_circuit_comes_of_other_prompts(run: Run) -> None:
    rows = run.table("stability")
    assert rows[(rows["measure"] == "jaccard") & rows["score"].isin(FINDERS)]["mean"].tolist() == [1] * 3


def test_nodes_outside_the_circuit_have_no_effect(run: Run) -> None:
    rows = run.table("summary")
    effects = rows[rows["estimator"] == "eap_ig_inputs"].set_index("label")["effect"]
    within = {"embed, layer 0", "z, layer 0, head 1", "z, layer 1, head 2"}
    assert effects[list(within)].max() < -1
    assert effects.drop(list(within)).abs().max() <= 1e-4


def test_any_strictly_smaller_circuit_has_less(planted: LoadedModel) -> None:
    graph = Graph.of(planted.anatomy)
    prompts = build_prompts(InductionOptions(n=6, block=6, prefix=2, corruption="all"), planted)
    clean, corrupt = (torch.tensor([getattr(p, f"{s}_tokens") for p in prompts.prompts]) for s in ("clean", "corrupt"))
    engine = EdgePatching(wired(planted.model, planted.anatomy, graph), Pairs.of(clean, corrupt))
    measurer = Measurer(("logit_diff",), prompts.prompts, None, device=torch.device("cpu"))
    edges = [graph.edge_named(name) for name in EDGES]

    def keep(chosen: tuple[int, ...]) -> npt.NDArray[np.bool_]:
        kept = np.zeros(graph.n_edges, dtype=bool)
        kept[list(chosen)] = True
        return kept

    smaller = [keep(part) for size in range(5) for part in combinations(edges, size)]
    masks = [keep(tuple(edges)), np.ones(graph.n_edges, dtype=bool), *smaller]
    values = engine.run(masks, lambda logits, prompt, read: measurer(logits, prompt))[..., 0].mean(1).numpy()
    whole, empty = values[1], values[2]
    share = (values - empty) / (whole - empty)
    assert share[0] == pytest.approx(1, abs=1e-5)
    assert len(smaller) == 31
    assert share[2:].max() < 0.5
    topology = Topology.of(graph)
    assert (topology.connected(masks[0]) == masks[0]).all()


def test_prompts_corrupted_at_every_token_repeat_nothing(planted: LoadedModel) -> None:
    prompts = build_prompts(InductionOptions(n=5, block=6, prefix=2, corruption="all"), planted).prompts
    for prompt in prompts:
        assert prompt.corrupt_tokens is not None
        assert len(set(prompt.corrupt_tokens)) == len(prompt.corrupt_tokens) == len(prompt.clean_tokens)
        assert not set(prompt.corrupt_tokens) & set(prompt.clean_tokens)
        assert prompt.clean_tokens[prompt.spans["copied"][0]] == prompt.answer[0]
        assert prompt.wrong_answer[0] in prompt.clean_tokens


def test_circuits_are_files_that_can_be_given(run: Run, tmp_path: Path) -> None:
    files = sorted(path.name for path in (run.path / "circuits").iterdir())
    assert f"circuit-exact-signed-{FIVE}.json" in files
    assert not any("signed-1.json" in name or "absolute" in name or "-0.01" in name for name in files)
    section = {
        "scores": ["random"],
        "sizes": [1.0],
        "random": {"draws": 0},
        "given": str(run.path / "circuits" / f"circuit-exact-signed-{FIVE}.json"),
        "tests": {"size": "given", "edges": 0, "subsets": 0, "permutations": 99},
        "stability": None,
        "files": False,
    }
    again = run_method(tmp_path, "circuit", section, model={"id": "planted-induction"}, task=TASK)
    assert members(again, "given") == set(EDGES)
    rows = again.table("faithfulness").set_index("score")
    assert rows.loc["given", "faithfulness"] == pytest.approx(1, abs=1e-5)
    assert again.table("tests")["verdict"].tolist() == ["yes", "yes"]
    assert not (again.path / "circuits").exists()
