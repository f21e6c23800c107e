"""The ablations of `heads`: numbers against plain hooks and torch's own losses; the verdict on the planted heads."""

import json
import shutil
from collections import Counter
from collections.abc import Hashable, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mechinterp_cli.cli.main import main
from mechinterp_cli.engine import plan
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import INDUCTION_HEAD, PREVIOUS_TOKEN_HEAD
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.store import UnitStore
from tests.experiments import Run, config_of, run_method
from tests.models_files import tiny_llama, write_folder
from tests.models_fixtures import planted, toy
from tests.test_heads_attention import planted_pattern
from tests.test_reproduce import tamper

__all__ = ["planted", "toy"]

TASK = {"name": "repeats", "n": 12, "block": [5, 7], "repeats": 2}
SCORED, ABLATED, D_HEAD = 7, 5, 16
DRAWS = 199
METRICS = ("loss_gap", "repeated_loss", "first_loss")
CAUSAL: dict[str, Any] = {"scores": ["induction", "previous_token"], "k": [1, 2], "random": DRAWS, "prompts": ABLATED}
SECTION = {"scores": ["induction", "previous_token"], "show": 0, "causal": CAUSAL}
Head = tuple[int, int]
HEADS = [(layer, head) for layer in range(2) for head in range(4)]
"""Of both toys."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_method(tmp_path_factory.mktemp("causal"), "heads", SECTION, task=TASK)


# --- a plain computation


def tokens_of(run: Run) -> list[list[int]]:
    rows = run.table("prompts").sort_values("prompt")
    return [[int(token) for token in ids] for ids in rows["token_ids"]]


def output_projection(model: Any, layer: int) -> torch.nn.Module:
    projection: torch.nn.Module = model.model.layers[layer].self_attn.o_proj
    return projection


def mean_z(model: Any, prompts: list[list[int]]) -> dict[int, Tensor]:
    """Layer to the mean [heads × d_head] of what enters the output projection, over every token of every prompt."""
    seen: dict[int, list[Tensor]] = {0: [], 1: []}
    with ExitStack() as stack:
        for layer in seen:

            def keep(_: object, inputs: tuple[Tensor, ...], layer: int = layer) -> None:
                seen[layer].append(inputs[0][0].double())

            stack.callback(output_projection(model, layer).register_forward_pre_hook(keep).remove)
        with torch.no_grad():
            for tokens in prompts:
                model(torch.tensor([tokens]))
    return {layer: torch.cat(found).mean(0).float() for layer, found in seen.items()}


def ablated_logits(model: Any, tokens: list[int], heads: list[Head], values: dict[int, Tensor]) -> Tensor:
    """[positions, vocabulary] of one prompt, heads replaced at every position."""
    with ExitStack() as stack:
        for layer in {layer for layer, _ in heads}:

            def edit(_: object, inputs: tuple[Tensor, ...], layer: int = layer) -> tuple[Tensor, ...]:
                z = inputs[0].clone()
                for head in [head for other, head in heads if other == layer]:
                    own = slice(head * D_HEAD, (head + 1) * D_HEAD)
                    z[..., own] = values[layer][own]
                return (z,)

            stack.callback(output_projection(model, layer).register_forward_pre_hook(edit).remove)
        with torch.no_grad():
            logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def plain_losses(logits: Tensor, tokens: list[int]) -> list[float]:
    """The three metrics of one prompt, from their definitions."""
    losses = cross_entropy(logits[:-1].double(), torch.tensor(tokens[1:]), reduction="none").tolist()
    repeated, first = [], []
    for i in range(len(tokens) - 1):
        if (tokens[i], tokens[i + 1]) in [(tokens[j], tokens[j + 1]) for j in range(i)]:
            repeated.append(losses[i])
        if tokens[i + 1] not in tokens[: i + 1]:
            first.append(losses[i])
    return [float(np.mean(repeated) - np.mean(first)), float(np.mean(repeated)), float(np.mean(first))]


def heads_of(text: str) -> list[Head]:
    """`0.1+1.2` as (layer, head)."""
    return [(int(layer), int(head)) for layer, head in (part.split(".") for part in text.split("+"))]


def other_sets(top: set[Head], heads: list[Head] = HEADS) -> set[frozenset[Head]]:
    """Every set with as many heads of each layer and none of these, found by trying all sets."""
    layers = Counter(layer for layer, _ in top)
    every = combinations([head for head in heads if head not in top], len(top))
    return {frozenset(chosen) for chosen in every if Counter(layer for layer, _ in chosen) == layers}


class Plain:
    """The metrics of prompts under ablations, from hooks alone.

    Args:
        model: The toy.
        prompts: All prompts.
        averaged: Those whose tokens make the means.
    """

    def __init__(self, model: Any, prompts: list[list[int]], averaged: list[list[int]]) -> None:
        self.model, self.prompts = model, prompts
        nothing = {layer: torch.zeros(4 * D_HEAD) for layer in (0, 1)}
        self.values = {"zero": nothing, "mean": mean_z(model, averaged)}
        self.known: dict[object, list[float]] = {}

    def __call__(self, ablation: str, heads: str, prompt: int) -> list[float]:
        key = (ablation, tuple(sorted(heads_of(heads))), prompt)
        if key not in self.known:
            logits = ablated_logits(self.model, self.prompts[prompt], heads_of(heads), self.values[ablation])
            self.known[key] = plain_losses(logits, self.prompts[prompt])
        return self.known[key]


@pytest.fixture(scope="module")
def values(run: Run) -> pd.DataFrame:
    """A row per trial and prompt, a column per metric."""
    results = run.table("results")
    return results.pivot(index=["trial", "ablation", "set", "prompt"], columns="metric", values="value")


def deviation(values: pd.DataFrame, plain: Plain) -> float:
    """The largest difference of the values from the plain computation's."""
    wanted = [plain(ablation, heads, prompt) for _, ablation, heads, prompt in values.index]
    return float(np.abs(values[list(METRICS)].to_numpy(float) - wanted).max())


def test_every_value_is_what_hooks_give(run: Run, values: pd.DataFrame, toy: LoadedModel) -> None:
    prompts = tokens_of(run)
    assert len(values) == ABLATED * len(run.table("summary")["trial"].unique())
    assert deviation(values, Plain(toy.model, prompts, prompts[:SCORED])) < 2e-5
    means = values[values.index.get_level_values("ablation") == "mean"]
    # Over all prompts, or over another one, the means would be others.
    assert deviation(means, Plain(toy.model, prompts, prompts)) > 1e-3
    assert deviation(means, Plain(toy.model, prompts, prompts[:1])) > 1e-3


def test_baselines_are_the_models_own_losses(run: Run, toy: LoadedModel) -> None:
    rows = run.table("baselines")
    assert set(rows["stream"]) == {"clean"}
    for prompt, tokens in enumerate(tokens_of(run)):
        with torch.no_grad():
            wanted = plain_losses(toy.model(torch.tensor([tokens])).logits[0], tokens)
        own = rows[rows["prompt"] == prompt].set_index("metric")["value"]
        assert [own[name] for name in METRICS] == pytest.approx(wanted, abs=2e-5)


# --- from results to the causal table


def effects(run: Run, design: str, row: Mapping[Hashable, Any]) -> npt.NDArray[np.float64]:
    """[trials, prompts] of the effects that a row of the causal table is made of, from the tables alone."""
    results, baselines = run.table("results"), run.table("baselines")
    base = baselines[baselines["metric"] == row["metric"]].set_index("prompt")["value"]
    chosen = (results["design"] == design) & (results["metric"] == row["metric"])
    for name in ("score", "ablation", "k"):
        chosen &= results[name] == row[name]
    wide = results[chosen].pivot(index="trial", columns="prompt", values="value")
    found: npt.NDArray[np.float64] = (wide - base.loc[wide.columns]).to_numpy(float)
    return found


def run_wide(folder: Path, **section: Any) -> Run:
    """A random model with so many heads that hardly two random sets are the same."""
    model = write_folder(folder / "model", tiny_llama(num_attention_heads=16, num_key_value_heads=4))
    causal = CAUSAL | {"scores": ["first_token"], "k": [3], "values": ["mean"]}
    whole = {"scores": ["first_token"], "show": 0, "causal": causal} | section
    return run_method(folder, "heads", whole, task=TASK, model={"id": str(model)})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_wide(tmp_path_factory.mktemp("wide"))


@pytest.mark.parametrize(("which", "count"), [("run", 2 * 2 * 2 * 3), ("wide", 3)])
def test_the_causal_table_is_what_the_results_say(request: pytest.FixtureRequest, which: str, count: int) -> None:
    run: Run = request.getfixturevalue(which)
    rows = run.table("causal").to_dict("records")
    assert len(rows) == count
    for row in rows:
        own, random = effects(run, "top", row)[0], effects(run, "random", row)
        sets = len(other_sets(set(heads_of(row["heads"])))) if which == "run" else DRAWS
        assert len(random) == row["draws"] == sets
        assert len(own) == row["n"] == ABLATED
        means = random.mean(1)
        wanted = {"effect": own.mean(), "random_effect": means.mean(), "difference": own.mean() - means.mean()}
        wanted |= {"random_low": np.quantile(means, 0.025), "random_high": np.quantile(means, 0.975)}
        for name, value in wanted.items():
            assert row[name] == pytest.approx(value, abs=2e-5 if which == "run" else 2e-6), name
        # Rounding decides between equal sets, which are computed in different units.
        least, most = ((np.abs(means) >= abs(own.mean()) + shift).sum() for shift in (1e-6, -1e-6))
        assert (1 + least) / (sets + 1) <= row["p"] <= (1 + most) / (sets + 1)
        for low, value, high in (("ci_low", "effect", "ci_high"), ("difference_low", "difference", "difference_high")):
            assert row[low] - 1e-9 <= row[value] <= row[high] + 1e-9
        assert row["verdict"] in ("yes", "no", "inconclusive")
        if row["p"] > 0.05:
            assert row["verdict"] != "yes"


def test_effects_and_baselines_are_those_of_the_summary(run: Run) -> None:
    causal, summary = run.table("causal"), run.table("summary")
    baselines = run.table("baselines")
    last = baselines[baselines["prompt"] >= SCORED].groupby("metric")["value"].mean()
    for row in causal.to_dict("records"):
        assert row["baseline"] == pytest.approx(last[row["metric"]], abs=2e-5)
        chosen = (summary["design"] == "top") & (summary["set"] == row["heads"]) & (summary["score"] == row["score"])
        chosen &= (summary["ablation"] == row["ablation"]) & (summary["metric"] == row["metric"])
        (twin,) = summary[chosen].to_dict("records")
        assert [twin[name] for name in ("effect", "ci_low", "ci_high")] == [
            row[name] for name in ("effect", "ci_low", "ci_high")
        ]
    unjudged = summary[summary["design"] == "random"]
    assert unjudged["p"].isna().all()
    assert unjudged["verdict"].isna().all()
    assert summary[summary["design"] != "random"]["verdict"].notna().all()


def test_what_a_reader_must_know_is_said(run: Run, tmp_path: Path) -> None:
    rough = "prompts are fewer than 20; intervals and p-values are rough"
    causal = run.table("causal")
    tops = causal[(causal["ablation"] == "zero") & (causal["metric"] == "loss_gap")].to_dict("records")
    counts = [(len(other_sets(set(heads_of(row["heads"])))), row) for row in tops]
    assert run.manifest["warnings"] == [
        "scores: 7 sequences are fewer than 20; intervals are rough",
        *(
            f"causal: only {n} random {'set' if n == 1 else 'sets'} beside the top {row['k']} by {row['score']}: "
            "there are no more"
            for n, row in counts
        ),
        f"causal: 5 {rough}",
    ]
    section = SECTION | {"causal": CAUSAL | {"random": 4, "k": [1, 9], "prompts": 2}}
    few = run_method(tmp_path, "heads", section, task=TASK)
    assert few.table("causal")["ci_low"].isna().all()
    assert few.manifest["warnings"] == [
        "scores: 10 sequences are fewer than 20; intervals are rough",
        "causal: induction is defined for 8 heads; larger k are left out",
        "causal: only 3 random sets beside the top 1 by induction: there are no more",
        "causal: previous_token is defined for 8 heads; larger k are left out",
        "causal: only 3 random sets beside the top 1 by previous_token: there are no more",
        "causal: no effect has an interval with 2 prompts; raise heads.causal.prompts",
        f"causal: 2 {rough}",
    ]


def test_enough_sequences_and_sets_need_no_warning(tmp_path: Path) -> None:
    section = SECTION | {"causal": CAUSAL | {"random": 3, "k": [1], "prompts": 20}}
    assert run_method(tmp_path, "heads", section, task=TASK | {"n": 40}).manifest["warnings"] == []


def test_a_score_that_no_head_has_ablates_nothing(tmp_path: Path) -> None:
    causal = CAUSAL | {"scores": ["successor"], "random": 2}
    run = run_method(tmp_path, "heads", {"scores": ["successor"], "causal": causal}, task=TASK)
    assert set(run.table("scores")["status"]) == {"undefined"}
    assert not (run.path / "causal.parquet").exists()
    assert "causal: successor is defined for no head; nothing is ablated by it" in run.manifest["warnings"]
    assert len(run.table("baselines")) == 12 * 3


@pytest.mark.parametrize("asked", [DRAWS, DRAWS - 1])
def test_a_verdict_needs_so_many_draws_asked_for_however_few_sets_there_are(tmp_path: Path, asked: int) -> None:
    causal = CAUSAL | {"random": asked, "scores": ["induction"], "k": [1], "values": ["zero"]}
    rows = run_method(tmp_path, "heads", SECTION | {"causal": causal}, task=TASK).table("causal")
    assert (rows["draws"] == 3).all()
    assert rows[["random_low", "random_high", "difference"]].notna().all(axis=None)
    assert rows["p"].notna().all() == rows["verdict"].notna().all() == (asked >= 199)
    assert rows["p"].isna().all() == (asked < 199)
    assert asked < 199 or (rows["p"] >= 0.25).all()


# --- which heads


def test_the_strongest_heads_are_those_of_the_scores(run: Run) -> None:
    scores, causal = run.table("scores"), run.table("causal")
    for row in causal.to_dict("records"):
        ranked = scores[scores["score"] == row["score"]].sort_values("value", ascending=False).head(row["k"])
        wanted = "+".join(f"{layer}.{head}" for layer, head in zip(ranked["layer"], ranked["head"], strict=True))
        assert row["heads"] == wanted


def test_random_sets_have_as_many_heads_in_each_layer_and_none_of_the_strongest(run: Run) -> None:
    trials = run.table("trials")
    assert set(trials["op"]) == {"zero", "mean"}
    assert set(trials["site"]) == {"z"}
    keys = ["reference", "op", "k"]
    for (score, op, k), part in trials[trials["design"] != "single"].groupby(keys):
        top = part[part["design"] == "top"]
        strongest = set(zip(top["layer"], top["head"], strict=True))
        assert len(strongest) == k
        drawn = part[part["design"] == "random"]
        sets = [frozenset(zip(one["layer"], one["head"], strict=True)) for _, one in drawn.groupby("trial")]
        assert sorted(drawn["draw"].unique()) == list(range(len(sets))), (score, op)
        # Fewer sets than draws asked for: all of them, each once.
        assert len(sets) == len(set(sets))
        assert set(sets) == other_sets(strongest)
        assert len(sets) == {1: 3, 2: 9 if len(set(top["layer"])) == 2 else 1}[k]


def test_where_there_are_more_sets_so_many_are_drawn(wide: Run) -> None:
    trials = wide.table("trials")
    top, drawn = (trials[trials["design"] == design] for design in ("top", "random"))
    strongest = set(zip(top["layer"], top["head"], strict=True))
    sets = [frozenset(zip(one["layer"], one["head"], strict=True)) for _, one in drawn.groupby("trial")]
    possible = other_sets(strongest, [(layer, head) for layer in range(2) for head in range(16)])
    assert len(sets) == DRAWS < len(possible)
    assert set(sets) <= possible
    assert len(set(sets)) > DRAWS / 2
    assert {head for one in sets for _, head in one} == set(range(16)) or len(set(top["layer"])) == 1


def test_both_ablations_have_the_same_draws_and_heads_are_ablated_alone_once(run: Run) -> None:
    trials = run.table("trials")
    drawn = trials[trials["design"] == "random"].groupby("op")[["reference", "k", "draw", "layer", "head"]]
    zero, mean = (drawn.get_group(op).reset_index(drop=True) for op in ("zero", "mean"))
    pd.testing.assert_frame_equal(zero, mean)
    single = trials[trials["design"] == "single"]
    assert set(single["op"]) == {"zero"}
    assert len(single) == 2 * 2  # the largest k, for two scores


def test_seeds_decide(run: Run, tmp_path: Path) -> None:
    def again(**section: Any) -> Run:
        return run_method(tmp_path, "heads", SECTION | section, task=TASK)

    same, other = again(), again(seed=1)
    for name in ("trials", "results", "summary", "causal", "scores", "sequences", "baselines"):
        assert (same.path / f"{name}.parquet").read_bytes() == (run.path / f"{name}.parquet").read_bytes(), name
    # All sets that there are need no seed.
    for name in ("scores", "trials", "causal"):
        pd.testing.assert_frame_equal(run.table(name), other.table(name))


def test_seeds_decide_which_sets_are_drawn(wide: Run, tmp_path: Path) -> None:
    tables = [one.table("trials") for one in (wide, run_wide(tmp_path / "same"), run_wide(tmp_path / "other", seed=1))]
    top, random = (
        [table[table["design"] == design]["set"].tolist() for table in tables] for design in ("top", "random")
    )
    assert top[0] == top[1] == top[2]
    assert random[0] == random[1]
    assert random[0] != random[2]


# --- the planted circuit

PLANTED = {"name": "repeats", "n": 12, "block": [6, 7, 8, 9, 10, 11], "repeats": 2}
ALIKE = PLANTED | {"block": 8}
"""Blocks of one length: all effects are the same but for rounding."""
PROVED = 6


def run_planted(folder: Path, task: dict[str, Any], random: int) -> Run:
    """Every head of the planted model ablated alone, for either score."""
    causal = {"scores": ["previous_token", "induction"], "k": [1, 2, 8], "random": random, "prompts": PROVED}
    section = {"scores": ["previous_token", "induction"], "causal": causal}
    return run_method(folder, "heads", section, model={"id": "planted-induction"}, task=task)


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_planted(tmp_path_factory.mktemp("planted"), PLANTED, 3)


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_planted(tmp_path_factory.mktemp("alike"), ALIKE, DRAWS)


def test_planted_heads_stand_out_and_all_others_are_at_their_closed_form(proof: Run) -> None:
    scores = proof.table("scores")
    prompts = tokens_of(proof)[:PROVED]
    planted_heads = {"previous_token": PREVIOUS_TOKEN_HEAD, "induction": INDUCTION_HEAD}
    for row in scores.to_dict("records"):
        head = (row["layer"], row["head"])
        ideal = []
        for tokens in prompts:
            pattern = planted_pattern(head, tokens)
            block = len(tokens) // 2
            stripe = [(block + i, i + 1) for i in range(block)]
            cells = stripe if row["score"] == "induction" else [(i, i - 1) for i in range(1, 2 * block)]
            ideal.append(np.mean([float(pattern[query, key]) for query, key in cells]))
        if head == planted_heads[row["score"]]:
            assert row["value"] > 0.95
        else:
            assert row["value"] == pytest.approx(np.mean(ideal), abs=0.01), (row["score"], head)
            assert row["value"] < 0.2


@pytest.mark.parametrize("metric", ["repeated_loss", "loss_gap"])
@pytest.mark.parametrize("score", ["previous_token", "induction"])
@pytest.mark.parametrize("which", ["proof", "alike"])
def test_the_verdict_names_exactly_the_planted_heads(
    request: pytest.FixtureRequest, which: str, metric: str, score: str
) -> None:
    summary = request.getfixturevalue(which).table("summary")
    rows = summary[(summary["design"] == "single") & (summary["metric"] == metric) & (summary["score"] == score)]
    verdicts = {(row["layer"], row["head"]): row["verdict"] for row in rows.to_dict("records")}
    assert len(verdicts) == len(rows) == 8
    assert {head for head, verdict in verdicts.items() if verdict == "yes"} == {PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD}
    others = rows[rows["verdict"] != "yes"]
    assert set(others["verdict"]) == {"no"}
    assert others["effect"].abs().max() < 1e-6
    assert rows[rows["verdict"] == "yes"]["effect"].min() > 1
    assert rows[["ci_low", "ci_high"]].notna().all(axis=None)


def test_effects_that_differ_by_rounding_alone_have_intervals(proof: Run, alike: Run) -> None:
    def spread(run: Run) -> float:
        results = run.table("results")
        rows = results[(results["ablation"] == "zero") & (results["metric"] == "repeated_loss")]
        return float(rows.groupby("trial")["effect"].agg(np.ptp).max())

    assert 0 < spread(alike) < 1e-4 < spread(proof)
    rows = alike.table("causal")
    rows = rows[(rows["k"] < 8) & (rows["metric"] == "repeated_loss") & (rows["ablation"] == "zero")]
    assert len(rows) == 4
    assert rows[["ci_low", "ci_high", "difference_low", "difference_high"]].notna().all(axis=None)
    assert ((rows["ci_high"] - rows["ci_low"]).abs() < 1e-4).all()


def test_one_of_few_sets_is_no_proof_however_large_its_effect(alike: Run) -> None:
    rows = alike.table("causal")
    rows = rows[(rows["score"] == "induction") & (rows["k"] == 1) & (rows["metric"] == "repeated_loss")]
    assert len(rows) == 2
    assert (rows["draws"] == 3).all()
    assert (rows["p"] == 0.25).all()
    assert (rows["difference_low"] > 1).all()
    assert (rows["verdict"] == "inconclusive").all()


def test_random_sets_may_hold_what_another_score_finds(alike: Run) -> None:
    causal = alike.table("causal")
    (row,) = causal[
        (causal["score"] == "previous_token") & (causal["k"] == 2)
        & (causal["metric"] == "repeated_loss") & (causal["ablation"] == "zero")
    ].to_dict("records")  # fmt: skip
    sets = other_sets(set(heads_of(row["heads"])))
    with_induction = sum(INDUCTION_HEAD in one for one in sets)
    assert with_induction > 0
    assert row["draws"] == len(sets)
    # Without the induction head the loss rises by more than without the previous-token head.
    assert row["p"] == (1 + with_induction) / (len(sets) + 1)
    assert row["verdict"] == "inconclusive"
    assert row["random_high"] > row["effect"] > 1


def test_the_margin_says_what_matters(tmp_path: Path) -> None:
    causal = {"scores": ["previous_token"], "k": [3], "random": 1, "prompts": PROVED, "values": ["zero"], "margin": 5.0}
    section = {"scores": ["previous_token"], "show": 0, "causal": causal}
    summary = run_method(tmp_path, "heads", section, model={"id": "planted-induction"}, task=PLANTED).table("summary")
    rows = summary[(summary["design"] == "single") & (summary["metric"] == "loss_gap")]
    # Without the previous-token head the gap changes by less than 5 nats, without the induction head by more.
    assert rows.set_index("set")["verdict"].to_dict() == {"0.1": "no", "1.0": "no", "1.2": "yes"}


@pytest.mark.parametrize("score", ["direct_effect", "copying", "prefix_matching"])
def test_only_heads_of_the_layers_that_are_asked_for_are_ablated(tmp_path: Path, score: str) -> None:
    causal = {"scores": [score], "k": [1, 4], "random": 2, "prompts": 2}
    task = {"name": "induction", "n": 4, "block": 6, "prefix": 2}
    run = run_method(tmp_path, "heads", {"scores": [score], "layers": [0], "causal": causal}, task=task)
    assert set(run.table("trials")["layer"]) == {0}
    assert (run.table("causal")["k"].unique() == [1, 4]).all()


def test_without_others_in_a_layer_there_are_no_random_sets(proof: Run) -> None:
    causal = proof.table("causal")
    rows = causal[causal["k"] == 8]
    assert (rows["draws"] == 0).all()
    assert rows[["random_effect", "difference", "p", "verdict"]].isna().all(axis=None)
    assert rows["effect"].notna().all()
    said = "causal: no random set beside the top 8 by induction: a layer has too few others"
    assert said in proof.manifest["warnings"]


# --- stopped, resumed, repeated

TABLES = ("prompts", "scores", "sequences", "patterns", "trials", "baselines", "results", "summary", "causal")
SMALL = {"scores": ["induction", "copying"], "causal": CAUSAL | {"scores": ["induction"], "random": 5}}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with a config, and units so small that there are many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 128)
    config_of(tmp_path, SMALL, method="heads", task=TASK)
    return tmp_path


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for name in TABLES for path in sorted(run.glob(f"{name}.*"))}


def path_of(capfd: pytest.CaptureFixture[str]) -> Path:
    return Path(capfd.readouterr().out.removesuffix("\n"))


@pytest.mark.parametrize("units", [0, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], units: int
) -> None:
    assert main(["heads", "experiment.yaml", "--out", "whole", "--quiet"]) == 0
    whole = path_of(capfd)
    assert Manifest.read(whole).units_done > 6
    real, saved = UnitStore.write, list[str]()

    def write(self: UnitStore, unit: str, table: Any) -> Any:
        if len(saved) == units:
            raise KeyboardInterrupt
        saved.append(unit)
        return real(self, unit, table)

    monkeypatch.setattr(UnitStore, "write", write)
    assert main(["heads", "experiment.yaml", "--quiet"]) == 130
    monkeypatch.setattr(UnitStore, "write", real)
    (run,) = (place / "runs").iterdir()
    assert Manifest.read(run).status == "interrupted"
    assert not (run / "scores.parquet").exists()
    capfd.readouterr()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert capfd.readouterr() == (f"{run}\n", "")
    assert files(run) == files(whole)
    assert set(files(run)) >= {f"{name}.parquet" for name in TABLES}
    lines = [json.loads(line)["message"] for line in (run / "log.jsonl").read_text().splitlines()]
    again = [line for line in lines if line.endswith(" is saved")]
    assert len(again) == len(set(again)) == Manifest.read(run).units_total
    assert len([part for part in Manifest.read(run).engine["parts"] if part["job"] is None]) == 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, not to be changed."""
    return run_method(tmp_path_factory.mktemp("recorded"), "heads", SMALL, task=TASK).path


def test_a_repeated_run_moves_no_number(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", str(recorded), "--exact", "--out", "again"]) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[-1].endswith("; same bytes")
    assert files(Path(out.strip())) == files(recorded)


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("scores", "value", "scores: "),
        ("causal", "random_effect", "causal: "),
        ("patterns", "value", "patterns: "),
        ("results", "value", "results: trial 0, "),
    ],
)
def test_a_changed_cell_is_found_by_verify_and_by_reproduce(
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    table: str,
    column: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, "run")
    assert main(["verify", "run"]) == 0
    tamper(Path("run"), table, 0, column, 77.0)
    assert main(["verify", "run"]) == 3
    assert f"{table}.parquet" in capfd.readouterr().err
    assert main(["reproduce", "run", "--out", "again"]) == 3
    (cause,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "1 cell moved; the furthest: " in cause
    assert words in cause
    assert f"{column} was 77" in cause
