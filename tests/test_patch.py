"""`patch` from the YAML file to the tables: every number against hooks and formulas written out by hand."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.run import dry_run
from mechinterp_cli.models.load import load_model
from tests.experiments import INDUCTION, QUICK, Run, config_of, run_patch
from tests.oracle import Oracle

EACH = {"kind": "resid_pre", "layers": "all", "positions": "each"}
HEADS = {"kind": "z", "layers": "all", "heads": "each", "positions": "all"}
BLOCKS: dict[str, dict[str, Any]] = {
    "layers and positions": EACH,
    "heads": HEADS,
    "groups of heads": {"kind": "z", "layers": [1], "heads": [[0, 2], [1, 3]], "positions": ["copied", "end"]},
    "key heads": {"kind": "k", "layers": "all", "positions": [["matched", "copied"]]},
    "queries": {"kind": "q", "layers": "all", "positions": "last"},
    "windows": {"kind": "mlp_out", "layers": {"window": 2}, "positions": [3, "end"]},
    "attention outputs": {"kind": "attn_out", "layers": [0, 1], "positions": [[2, "copied", "end"]]},
    "neurons": {"kind": "neuron", "layers": [0], "neurons": [0, [1, 2, 3]], "positions": "all"},
    "streams between": {"kind": "resid_mid", "layers": "all", "positions": "each"},
    "streams after": {"kind": "resid_post", "layers": "all", "positions": ["copied"]},
    "embeddings": {"kind": "embed", "layers": [0], "positions": "each"},
}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    loaded = load_model(ModelOptions(id="toy-induction", device="cpu", attn_implementation="eager"))
    return Oracle("llama", loaded.model)


def places(run: Run, row: Mapping[str, Any]) -> list[list[int]]:
    """Positions of a trial in every prompt, from the tables alone."""
    prompts = run.table("prompts")
    clean = prompts[prompts["stream"] == "clean"]
    found = []
    for spans, tokens in zip(clean["spans"], clean["token_ids"], strict=True):
        if not pd.isna(row["position"]):
            found.append([int(row["position"])])
        elif pd.isna(row["span"]):
            found.append(list(range(len(tokens))))
        else:
            parts = str(row["span"]).split("+")
            found.append(
                sorted({p for part in parts for p in ([int(part)] if part.isdigit() else json.loads(spans)[part])})
            )
    return found


def edits_of(run: Run) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each trial with its edits, from the trials table."""
    table: Any = run.table("trials")
    for trial, edits in table.groupby("trial"):
        yield int(trial), edits.to_dict("records")


def units(row: Mapping[str, Any]) -> list[int] | None:
    """Heads or neurons of an edit, from the trials table."""
    if not pd.isna(row["set"]):
        return [int(unit) for unit in str(row["set"]).split("+")]
    name = "kv_head" if row["site"] in ("k", "v") else "head" if row["site"] in ("q", "z") else "neuron"
    return None if pd.isna(row[name]) else [int(row[name])]


def replacing(source: Tensor, positions: list[list[int]], chosen: list[int] | None) -> Callable[[Tensor], Tensor]:
    """A change that puts parts of `source` [prompts, positions, *features] in place."""

    def change(x: Tensor) -> Tensor:
        for prompt, at in enumerate(positions):
            for position in at:
                if chosen is None:
                    x[prompt, position] = source[prompt, position]
                else:
                    x[prompt, position, chosen] = source[prompt, position, chosen]
        return x

    return change


def by_hand(run: Run, oracle: Oracle, base: str, source_of: Callable[[str, int], Tensor]) -> dict[int, Tensor]:
    """Last logits [prompts, vocab] of every trial, by the oracle's hooks."""
    tokens, found = run.tokens(base), {}
    for trial, edits in edits_of(run):
        changes = {}
        for row in edits:
            source = source_of(row["site"], row["layer"])
            changes[row["site"], row["layer"]] = replacing(source, places(run, row), units(row))
        found[trial] = oracle.run(tokens, changes)[0][:, -1].double()
    return found


def logit_difference(run: Run, logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    return logits[rows, run.answers()] - logits[rows, run.answers("wrong_answer_ids")]


# The direction says which stream is edited, for all blocks alike.
BOTH_WAYS = [(name, "denoise") for name in BLOCKS] + [
    pytest.param(name, "noise", marks=() if name in ("layers and positions", "heads") else pytest.mark.slow)
    for name in BLOCKS
]


@pytest.mark.parametrize(("name", "direction"), BOTH_WAYS)
def test_values_are_those_of_plain_hooks(tmp_path: Path, oracle: Oracle, name: str, direction: str) -> None:
    run = run_patch(tmp_path, {"direction": direction, "sites": [BLOCKS[name]]}, metrics=["logit_diff", "prob"])
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    seen = oracle.run(run.tokens(source))[1]
    differences, probabilities = run.values("logit_diff"), run.values("prob")
    wanted = by_hand(run, oracle, base, lambda kind, layer: seen[kind, layer])
    assert len(wanted) == len(differences) > 0
    for trial, logits in wanted.items():
        np.testing.assert_allclose(differences.loc[trial], logit_difference(run, logits), atol=2e-4)
        answer = logits.softmax(-1).gather(1, run.answers()[:, None])[:, 0]
        np.testing.assert_allclose(probabilities.loc[trial], answer, atol=1e-5)


def test_effects_and_their_normalised_form(tmp_path: Path) -> None:
    for direction, base, other in (("denoise", "corrupt", "clean"), ("noise", "clean", "corrupt")):
        run = run_patch(tmp_path, {"direction": direction, "sites": [EACH]})
        start, end = (run.baseline(name, "logit_diff").numpy() for name in (base, other))
        values = run.values("logit_diff").to_numpy(dtype=float)
        effects = run.values("logit_diff", "effect").to_numpy(dtype=float)
        np.testing.assert_allclose(effects, values - start, atol=1e-9)
        shares = run.values("logit_diff", "normalized").to_numpy(dtype=float)
        np.testing.assert_allclose(shares, (values - start) / (end - start), atol=1e-9)
        summary = run.table("summary").set_index(["trial", "aggregate"])
        for trial in range(len(values)):
            ratio = (values[trial] - start).sum() / (end - start).sum()
            assert summary.loc[(trial, "ratio_of_means"), "normalized"] == pytest.approx(ratio, abs=1e-9)
            assert summary.loc[(trial, "mean_of_ratios"), "normalized"] == pytest.approx(shares[trial].mean(), abs=1e-9)


def test_replacing_everything_gives_the_other_run(tmp_path: Path) -> None:
    run = run_patch(tmp_path, {"sites": [{"kind": "resid_pre", "layers": "all", "positions": "all"}]})
    np.testing.assert_allclose(
        run.values("logit_diff").to_numpy(dtype=float).T,
        np.tile(run.baseline("clean", "logit_diff")[:, None], 2),
        atol=1e-5,
    )
    assert run.values("logit_diff", "normalized").to_numpy(dtype=float) == pytest.approx(1.0, abs=1e-5)


def test_trials_before_the_first_difference_are_written_not_computed(tmp_path: Path) -> None:
    run = run_patch(tmp_path, {"sites": [EACH]})
    results = run.table("results")
    (differs,) = set((run.tokens("clean") != run.tokens("corrupt")).int().argmax(1).tolist())
    before = results["position"] < differs
    # what enters the first layer at a later position differs nowhere, as the tokens are the same
    same = (results["layer"] == 0) & (results["position"] > differs)
    assert set(results[before | same]["status"]) == {"trivial"}
    assert set(results[~before & ~same]["status"]) == {"ok"}
    assert (results[before | same]["effect"] == 0).all()
    summary = run.table("summary")
    trivial = summary[summary["position"] < differs]
    assert set(trivial["status"]) == {"trivial"}
    assert trivial["p"].isna().all()


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_zero(tmp_path: Path, oracle: Oracle, direction: str) -> None:
    run = run_patch(tmp_path, {"source": "zero", "direction": direction, "sites": [HEADS]})
    base = "corrupt" if direction == "denoise" else "clean"
    nothing = {place: torch.zeros_like(x) for place, x in oracle.run(run.tokens(base))[1].items()}
    for trial, logits in by_hand(run, oracle, base, lambda kind, layer: nothing[kind, layer]).items():
        np.testing.assert_allclose(run.values("logit_diff").loc[trial], logit_difference(run, logits), atol=2e-4)


@pytest.mark.parametrize("block", ["heads", "windows", "neurons"])
def test_mean_is_that_of_the_source_stream_at_the_position(tmp_path: Path, oracle: Oracle, block: str) -> None:
    run = run_patch(tmp_path, {"source": "mean", "sites": [BLOCKS[block]]})
    seen = oracle.run(run.tokens("clean"))[1]
    means = {place: x.mean(0, keepdim=True).expand_as(x) for place, x in seen.items()}
    for trial, logits in by_hand(run, oracle, "corrupt", lambda kind, layer: means[kind, layer]).items():
        np.testing.assert_allclose(run.values("logit_diff").loc[trial], logit_difference(run, logits), atol=2e-4)


def test_other_is_one_other_prompt_for_all_trials_and_follows_the_seed(tmp_path: Path, oracle: Oracle) -> None:
    chosen = {}
    for seed in (0, 1, 2):
        run = run_patch(tmp_path, {"source": "other", "seed": seed, "sites": [HEADS]})
        seen, values = oracle.run(run.tokens("clean"))[1], run.values("logit_diff").to_numpy(dtype=float)
        fits = np.zeros((4, 4), dtype=bool)
        for shift in (1, 2, 3):
            turned = {place: x.roll(-shift, 0) for place, x in seen.items()}
            wanted = by_hand(run, oracle, "corrupt", lambda kind, layer: turned[kind, layer])  # noqa: B023 # used at once
            stacked = np.stack([logit_difference(run, logits).numpy() for logits in wanted.values()])
            for prompt in range(4):
                fits[prompt, (prompt + shift) % 4] = np.allclose(stacked[:, prompt], values[:, prompt], atol=2e-4)
        assert (fits.sum(1) == 1).all()
        assert (fits.sum(0) == 1).all()
        chosen[seed] = fits.argmax(1).tolist()
    assert len({tuple(order) for order in chosen.values()}) > 1


@pytest.mark.parametrize(
    ("corruption", "found"), [("matched", {(0, 1), (1, 2)}), ("copied", {(1, 2)})], ids=["matched", "copied"]
)
def test_the_planted_heads_are_found_and_no_others(
    tmp_path: Path, corruption: str, found: set[tuple[int, int]]
) -> None:
    task = {**INDUCTION, "n": 12, "corruption": corruption}
    run = run_patch(tmp_path, {"sites": [HEADS]}, model={"id": "planted-induction"}, task=task)
    summary = run.table("summary")
    summary = summary[summary["aggregate"] == "ratio_of_means"].set_index(["layer", "head"])
    assert len(summary) == 8
    for head, row in summary.iterrows():
        assert (row["normalized"] > 0.9) if head in found else (abs(row["normalized"]) < 1e-6), head
    decided = {head for head, row in summary.iterrows() if row["verdict"] == "yes"}
    assert decided == found
    strongest = [(row["label"]) for row in run.outcome.headline_rows[: len(found)]]
    assert set(strongest) == {f"z, layer {layer}, head {head}" for layer, head in found}


def test_causal_tracing(tmp_path: Path, oracle: Oracle) -> None:
    tracing = {"span": "copied", "scale": 3.0, "draws": 3, "seed": 5}
    sites = [
        {"kind": "resid_post", "layers": "all", "positions": "each"},
        {"kind": "attn_out", "layers": {"window": 2}},
    ]
    run = run_patch(tmp_path, {"tracing": tracing, "sites": sites}, metrics=["prob"], task={**INDUCTION, "n": 6})
    tokens, rows = run.tokens("clean"), torch.arange(len(run.tokens("clean")))
    logits, seen = oracle.run(tokens)
    assert torch.equal(logits[:, -1].argmax(-1), run.answers()), "only prompts whose answer comes first are traced"
    prompts = run.table("prompts")
    at = torch.tensor([json.loads(spans)["copied"][0] for spans in prompts[prompts["stream"] == "clean"]["spans"]])
    sigma = 3.0 * float(seen["embed", 0][rows, at].double().std(correction=0))
    assert run.manifest["task"]["noise_standard_deviation"] == pytest.approx(sigma, rel=1e-5)

    results, base = run.table("results"), run.table("baselines")
    noisy = (
        base[base["stream"] == "corrupt"].pivot(index="draw", columns="prompt", values="value").to_numpy(dtype=float)
    )
    clean = base[base["stream"] == "clean"].pivot(index="draw", columns="prompt", values="value").to_numpy(dtype=float)
    assert (np.abs(np.diff(noisy, axis=0)) > 0).all(), "draws are different noise"
    np.testing.assert_allclose(clean, np.tile(logits[:, -1].softmax(-1)[rows, run.answers()], (3, 1)), atol=1e-5)
    assert results.groupby("trial").size().eq(3 * len(tokens)).all()

    # the noise of each draw, found from what it does to the clean run; every trial must have used the same
    for draw in range(3):
        noise = torch.stack(
            [
                torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(5 * 1_000_003 + prompt))[draw, 0]
                for prompt in range(len(tokens))
            ]
        )

        def corrupted(x: Tensor, noise: Tensor = noise) -> Tensor:
            x[rows, at] += sigma * noise
            return x

        found = oracle.run(tokens, {("embed", 0): corrupted})[0][:, -1].softmax(-1)[rows, run.answers()]
        np.testing.assert_allclose(noisy[draw], found, atol=1e-5)
        mine = results[results["draw"] == draw]
        for trial, edits in edits_of(run):
            changes: dict[tuple[str, int], Callable[[Tensor], Tensor]] = {("embed", 0): corrupted}
            for row in edits:
                source = seen[row["site"], row["layer"]]
                changes[row["site"], row["layer"]] = replacing(source, places(run, row), None)
            found = oracle.run(tokens, changes)[0][:, -1].softmax(-1)[rows, run.answers()]
            values = mine[mine["trial"] == trial].sort_values("prompt")["value"]
            np.testing.assert_allclose(values.to_numpy(dtype=float), found, atol=1e-5)


SENTENCES = [
    ("k1 k2 k3 k4 k1", "k9 k2 k3 k4 k1", "k2", "k3"),
    ("k5 k6 k7 k5", "k5 k8 k7 k5", "k6", "k8"),
    ("k10 k11 k12 k13 k14 k15 k16 k12", "k10 k11 k30 k13 k14 k15 k16 k12", "k13", "k14"),
    ("k20 k21 k22 k21", "k20 k23 k22 k21", "k22", "k20"),
    ("k40 k41 k42 k43 k44 k40 k41", "k40 k50 k42 k43 k44 k40 k41", "k42", "k43"),
]


def test_prompts_alone_in_any_order_and_of_mixed_lengths_give_the_same_values(tmp_path: Path) -> None:
    names = ("clean", "corrupt", "answer", "wrong_answer")
    method = {
        "sites": [
            {**HEADS, "positions": ["all", "last"][:1][0]},
            {**EACH, "positions": "last"},
            {"kind": "neuron", "layers": "all", "positions": "all"},
        ]
    }

    def values(order: list[int]) -> np.ndarray:
        given = [dict(zip(names, SENTENCES[i], strict=True)) for i in order]
        run = run_patch(tmp_path, method, task={"prompts": given})
        return run.values("logit_diff").to_numpy(dtype=float)

    together = values([0, 1, 2, 3, 4])
    turned = values([3, 0, 4, 2, 1])
    np.testing.assert_allclose(turned, together[:, [3, 0, 4, 2, 1]], atol=1e-5)
    for i in range(5):
        np.testing.assert_allclose(values([i])[:, 0], together[:, i], atol=1e-5)


@pytest.mark.parametrize(
    "engine", [{"executor": "resume"}, {"executor": "hooks"}, {"rows_per_call": 3}, {"max_memory": "12MB"}]
)
def test_executor_and_sizes_change_no_number(tmp_path: Path, engine: dict[str, Any]) -> None:
    plain, other = (run_patch(tmp_path, {"sites": [EACH, HEADS]}, engine=options) for options in ({}, engine))
    assert plain.manifest["engine"]["parts"][0]["proof"]["executor"] == "packed"
    np.testing.assert_allclose(
        other.values("logit_diff").to_numpy(dtype=float), plain.values("logit_diff").to_numpy(dtype=float), atol=2e-5
    )


def test_the_same_run_twice_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = (run_patch(tmp_path, {"sites": [EACH, HEADS]}) for _ in range(2))
    for table in ("results", "summary", "baselines", "trials", "prompts"):
        pd.testing.assert_frame_equal(first.table(table), second.table(table))


def test_keep_correct_counts_what_it_drops(tmp_path: Path) -> None:
    model = {"id": "toy-induction", "revision": "step140"}
    every, kept = (
        run_patch(tmp_path, {"sites": [EACH]}, model=model, task={**INDUCTION, "n": 24, "keep": keep})
        for keep in ("all", "correct")
    )
    right = int((every.baseline("clean", "logit_diff") > 0).sum())
    assert 0 < right < 24
    assert len(kept.baseline("clean", "logit_diff")) == right
    assert (kept.baseline("clean", "logit_diff") > 0).all()
    assert len(kept.manifest["task"]["dropped"]) == 24 - right
    assert any(f"{24 - right} prompts dropped" in warning for warning in kept.manifest["warnings"])


def test_what_holds_for_every_metric_is_warned_of_once(tmp_path: Path) -> None:
    run = run_patch(tmp_path, {"sites": [EACH]}, metrics=["logit_diff", "prob"])
    rough = "group all: 4 prompts are fewer than 20; intervals and p-values are rough"
    assert run.manifest["warnings"] == [rough]


def test_dry_run_counts_what_a_run_does(tmp_path: Path) -> None:
    loaded = config_of(tmp_path, {"sites": [EACH, HEADS]}, metrics=["logit_diff", "rank"])
    plan = dry_run(loaded)
    run = run_patch(tmp_path, {"sites": [EACH, HEADS]}, metrics=["logit_diff", "rank"])
    results = run.table("results")
    assert plan["trials"] == results["trial"].nunique()
    assert plan["prompts"] == results["prompt"].nunique()
    assert plan["result_rows"] == len(results)
    assert plan["trivial"] == int((results["status"] == "trivial").sum()) / 2
    assert plan["computed"] == int((results["status"] == "ok").sum()) / 2
    assert plan["units"] == len(run.manifest["engine"]["parts"][0]["plan"]["units"])
    assert plan["flops"] > 0
    assert plan["bytes"] > 0
    first = run.table("prompts").iloc[0]
    assert all(token in plan["first_prompt"][0] for token in first["tokens"])


def test_manifest_says_what_ran(tmp_path: Path) -> None:
    run = run_patch(tmp_path, {"sites": [EACH]}, model={"id": "toy-induction", "attn_implementation": "eager"})
    manifest = run.manifest
    assert manifest["status"] == "complete"
    assert manifest["model"]["attn_implementation"] == "eager"
    assert manifest["model"]["anatomy"]["layers"] == 2
    assert manifest["task"]["add_bos"] is False
    assert manifest["task"]["chat_template"] is False
    assert manifest["seeds"] == {"task": 0, "stats": 0, "patch": 0}
    proof = manifest["engine"]["parts"][0]["proof"]
    assert proof["deviation"] <= proof["tolerance"]
    assert not any(str(tmp_path) in str(value) for value in manifest["command"])


def test_every_metric_has_its_rows(tmp_path: Path) -> None:
    names = ["logit_diff", "prob", "prob_diff", "logprob", "rank", "kl", "accuracy"]
    run = run_patch(tmp_path, {"sites": [EACH]}, metrics=names, task={**INDUCTION, "n": 3})
    results = run.table("results")
    assert set(results["metric"]) == set(names)
    assert set(results.groupby("metric").size()) == {2 * 11 * 3}
    everything = results[(results["layer"] == 0) & (results["position"] == results["position"].min())]
    assert not everything["value"].isna().any()


@pytest.mark.parametrize(
    ("method", "sections", "cause"),
    [
        ({"tracing": {"span": "copied"}, "direction": "noise"}, {}, "causal tracing restores clean"),
        ({"tracing": {"span": "subject"}}, {}, "subject"),
        ({"source": "other"}, {"task": {**INDUCTION, "n": 1}}, "other needs two prompts"),
        ({"source": "mean", "sites": [{"kind": "pattern", "keys": ["matched"]}]}, {}, "mean of chosen keys"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, method: dict[str, Any], sections: dict[str, Any], cause: str
) -> None:
    with pytest.raises(UserError, match=cause):
        run_patch(tmp_path, {"sites": [EACH], **method}, **sections)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_quick_statistics_are_those_asked_for(tmp_path: Path) -> None:
    run = run_patch(tmp_path, {"sites": [HEADS]}, stats={**QUICK, "correction": "none"}, task={**INDUCTION, "n": 12})
    summary = run.table("summary")
    assert summary["p_adjusted"].isna().all()
    assert summary[summary["status"] == "ok"]["p"].notna().all()
