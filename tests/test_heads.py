"""`heads` from a config to its run directory: scores against plain computations, tables, files, the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from mechinterp_cli.cli.main import main
from mechinterp_cli.methods.heads.attention import ATTENTION_SCORES, Sequences
from mechinterp_cli.methods.heads.composition import compositions
from mechinterp_cli.methods.heads.direct import direct_effects
from mechinterp_cli.methods.heads.scoring import SHOWN_TOKENS
from mechinterp_cli.methods.heads.tables import few_sequences
from mechinterp_cli.methods.heads.weights import circuits, copying_scores, sample_tokens
from mechinterp_cli.methods.measure import build_prompts
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.schema import table_keys
from tests.experiments import INDUCTION, QUICK, Run, config_of, run_method
from tests.families import build
from tests.models_files import tiny_llama, write_folder
from tests.models_fixtures import options, toy
from tests.test_heads_attention import by_loops

__all__ = ["toy"]

TASK = {"name": "repeats", "n": 9, "block": [5, 7], "repeats": 2}
ATTENTION = list(ATTENTION_SCORES)
WEIGHTS = ["copying", "copying_eigenvalues", "k_composition"]
CAUSAL = {"scores": ["induction"], "k": [1, 2], "random": 3, "prompts": 3}
WHOLE = {"scores": [*ATTENTION, *WEIGHTS], "show": 2, "tokens": 20, "causal": CAUSAL}
SCORED = 6
"""Prompts that are left for scores."""
HEADS = [(layer, head) for layer in range(2) for head in range(4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All kinds of tables, and every picture."""
    output = {"figures": ["png", "svg"]}
    return run_method(tmp_path_factory.mktemp("heads"), "heads", WHOLE, task=TASK, output=output)


def clean(run: Run) -> list[dict[str, object]]:
    """The prompts' rows, in order, spans read."""
    rows = run.table("prompts").sort_values("prompt").to_dict("records")
    return [row | {"spans": json.loads(row["spans"]), "tokens": [int(t) for t in row["token_ids"]]} for row in rows]


def plain_scores(model: torch.nn.Module, run: Run, name: str) -> np.ndarray:
    """[prompts, layers, heads] from the model's own attentions, by loops over the definition; NaN where undefined."""
    found = []
    for row in clean(run):
        tokens = torch.tensor([row["tokens"]])
        with torch.no_grad():
            attentions = model(tokens, output_attentions=True).attentions
        sequences = Sequences(tokens, [row["spans"]])  # type: ignore[list-item]  # read from JSON
        found.append([by_loops(name, pattern, sequences)[0] for pattern in attentions])
    return np.array(found)


def grid(rows: pd.DataFrame, column: str = "value") -> np.ndarray:
    """[layers, heads] of a score's rows."""
    wide = rows.pivot(index="layer", columns="head", values=column)
    return wide.to_numpy(dtype=float, na_value=np.nan)


# --- numbers


@pytest.mark.parametrize("name", ATTENTION)
def test_scores_of_attention_are_means_of_what_the_model_says_itself(run: Run, toy: LoadedModel, name: str) -> None:
    wanted = plain_scores(toy.model, run, name)[:SCORED]
    assert np.isfinite(wanted).all()
    scores = run.table("scores")
    rows = scores[scores["score"] == name]
    np.testing.assert_allclose(grid(rows), wanted.mean(0), rtol=0, atol=1e-5)
    assert np.ptp(grid(rows)) > 0.1  # heads differ
    sequences = run.table("sequences")
    own = sequences[sequences["score"] == name].sort_values(["prompt", "layer", "head"])
    assert list(own["prompt"].unique()) == list(range(SCORED))
    np.testing.assert_allclose(own["value"].to_numpy(float).reshape(SCORED, 2, 4), wanted, rtol=0, atol=1e-5)
    assert (rows["n"] == SCORED).all()
    assert (rows["clusters"] == SCORED).all()


def test_a_prompt_that_was_kept_for_ablations_is_in_no_score(run: Run, toy: LoadedModel) -> None:
    everything = plain_scores(toy.model, run, "induction")
    scores = run.table("scores")
    rows = scores[scores["score"] == "induction"]
    assert np.abs(grid(rows) - everything.mean(0)).max() > 1e-4  # the last prompts would have moved it
    assert run.manifest["task"]["prompts_scored"] == SCORED
    assert run.manifest["task"]["prompts_ablated"] == 3
    assert set(run.table("results")["prompt"]) == {6, 7, 8}


@pytest.mark.parametrize("name", ATTENTION)
def test_chance_is_what_uniform_attention_scores_on_the_scored_prompts(run: Run, name: str) -> None:
    found = []
    for row in clean(run)[:SCORED]:
        tokens = torch.tensor([row["tokens"]])
        visible = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.float64).tril()
        uniform = (visible / visible.sum(-1, keepdim=True))[None, None]
        found.append(by_loops(name, uniform, Sequences(tokens, [row["spans"]]))[0, 0])  # type: ignore[list-item]  # JSON
    scores = run.table("scores")
    chance = scores[scores["score"] == name]["chance"].to_numpy(float)
    np.testing.assert_allclose(chance, np.mean(found), rtol=0, atol=1e-12)


def test_intervals_hold_the_value_and_widen_with_the_level(run: Run, tmp_path: Path) -> None:
    wide = run_method(tmp_path, "heads", {"scores": ["induction"]}, task=TASK, stats=QUICK | {"ci": 0.99})
    narrow = run_method(tmp_path, "heads", {"scores": ["induction"]}, task=TASK, stats=QUICK | {"ci": 0.5})
    for one in (run, wide, narrow):
        rows = one.table("scores").dropna(subset=["ci_low", "ci_high"])
        assert len(rows)
        assert (rows["ci_low"] <= rows["value"]).all()
        assert (rows["value"] <= rows["ci_high"]).all()
    width = [
        (t := one.table("scores"))["ci_high"].to_numpy(float) - t["ci_low"].to_numpy(float) for one in (wide, narrow)
    ]
    assert (width[0] > width[1]).all()


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"induction": 19, "copying": None}, ["scores: 19 sequences are fewer than 20; intervals are rough"]),
        ({"induction": 20, "first_token": 0, "copying": None}, []),
        ({"induction": 1, "first_token": 1}, ["scores: 1 sequence is fewer than 20; there is no interval"]),
        (
            {"induction": 1, "first_token": 40, "prefix_matching": 7},
            [
                "induction: 1 sequence is fewer than 20; there is no interval",
                "prefix_matching: 7 sequences are fewer than 20; intervals are rough",
            ],
        ),
    ],
)
def test_few_sequences_are_said(counts: dict[str, int | None], said: list[str]) -> None:
    rows = [
        {"score": score, "layer": layer, "head": 0, "n": n, "ci_low": 0.1 if layer and n and n > 1 else None}
        for score, n in counts.items()
        for layer in range(2)
    ]
    assert few_sequences(rows) == said


def test_few_sequences_are_said_once_for_all_checkpoints(tmp_path: Path) -> None:
    model = {"id": "toy-induction", "checkpoints": ["step0", "step1500"]}
    run = run_method(tmp_path, "heads", {"scores": ["first_token"], "show": 0}, model=model)
    assert run.manifest["warnings"] == ["scores: 8 sequences are fewer than 20; intervals are rough"]
    alone = run_method(tmp_path, "heads", {"scores": ["first_token"], "show": 0}, task={**TASK, "n": 1, "block": 5})
    assert alone.table("scores")["ci_low"].isna().all()
    assert alone.manifest["warnings"] == ["scores: 1 sequence is fewer than 20; there is no interval"]


def test_scores_of_weights_are_the_functions_own(run: Run) -> None:
    model = load_model(options("toy-induction"))
    scores = run.table("scores")
    with circuits(model) as shared:
        copying, eigenvalues = copying_scores(shared, (0, 1), sample_tokens(shared, 20, 0))
        pairs = compositions(shared, "k_composition", (0, 1))
    for result in (copying, eigenvalues):
        rows = scores[scores["score"] == result.score]
        np.testing.assert_allclose(grid(rows), result.values.numpy(), rtol=0, atol=1e-6)
        assert (rows["chance"] == result.chance).all()
        assert rows["n"].isna().all()
        assert rows["ci_low"].isna().all()
    rows = scores[scores["score"] == "k_composition"]
    assert (rows[rows["layer"] == 0]["status"] == "undefined").all()
    later = rows[rows["layer"] == 1]
    for row in later.to_dict("records"):
        own = pairs.values[row["layer"], row["head"]].nan_to_num(-1)
        assert row["value"] == pytest.approx(float(own.max()), abs=1e-6)
        assert (row["from_layer"], row["from_head"]) == divmod(int(own.argmax()), 4)
    every = run.table("compositions")
    assert len(every) == 16
    for row in every.to_dict("records"):
        place = (row["layer"], row["head"], row["from_layer"], row["from_head"])
        assert row["value"] == pytest.approx(float(pairs.values[place]), abs=1e-6)


def test_drawn_patterns_are_those_of_the_strongest_heads_on_the_shortest_prompt(run: Run, toy: LoadedModel) -> None:
    patterns, scores = run.table("patterns"), run.table("scores")
    shortest = min(clean(run)[:SCORED], key=lambda row: len(row["tokens"]))  # type: ignore[arg-type]  # a list
    assert set(patterns["prompt"]) == {shortest["prompt"]}
    with torch.no_grad():
        attentions = toy.model(torch.tensor([shortest["tokens"]]), output_attentions=True).attentions
    for name in ATTENTION:
        own = patterns[patterns["score"] == name]
        ranked = scores[scores["score"] == name].sort_values("value", ascending=False)
        strongest = list(zip(ranked["layer"], ranked["head"], strict=True))[:2]
        assert list(dict.fromkeys(zip(own["layer"], own["head"], strict=True))) == strongest
        for row in own.to_dict("records"):
            wanted = float(attentions[row["layer"]][0, row["head"], row["query"], row["key"]])
            assert row["value"] == pytest.approx(wanted, abs=1e-5)
        assert (own["key"] <= own["query"]).all()
        assert own.groupby(["layer", "head", "query"])["value"].sum().to_numpy(float) == pytest.approx(1, abs=1e-5)


def test_long_prompts_are_drawn_as_far_as_they_can_be_read(tmp_path: Path) -> None:
    task = {"name": "repeats", "n": 1, "block": 40, "repeats": 2}
    section = {"scores": ["induction"], "show": 1}
    run = run_method(tmp_path, "heads", section, model={"id": "planted-induction"}, task=task)
    patterns = run.table("patterns")
    assert patterns["query"].max() == patterns["key"].max() == SHOWN_TOKENS - 1 < 79


# --- tables and files


def test_every_table_is_there_and_its_keys_are_unique(run: Run) -> None:
    tables = sorted(path.stem for path in run.path.glob("*.parquet"))
    wanted = ["baselines", "causal", "compositions", "patterns", "prompts", "results", "scores", "sequences", "summary"]
    assert tables == [*wanted, "trials"]
    for name in tables:
        keys = [key for key in table_keys(name) if key in run.table(name)]
        assert keys, name
        assert not run.table(name).duplicated(keys).any(), name
    assert (run.path / "scores.csv").exists()
    assert not (run.path / "patterns.csv").exists()


def test_one_row_for_every_head_and_score(run: Run) -> None:
    scores = run.table("scores")
    places = list(zip(scores["score"], scores["layer"], scores["head"], strict=True))
    assert places == [(name, *place) for name in WHOLE["scores"] for place in HEADS]  # type: ignore[attr-defined]
    assert (scores["kv_head"] == scores["head"]).all()
    assert scores["checkpoint"].isna().all()
    assert set(scores["status"]) == {"ok", "undefined"}
    assert (scores["value"].isna() == (scores["status"] == "undefined")).all()


def test_scores_alone_leave_no_tables_of_trials(tmp_path: Path) -> None:
    run = run_method(tmp_path, "heads", {"show": 0})
    tables = sorted(path.stem for path in run.path.glob("*.parquet"))
    assert tables == ["prompts", "scores", "sequences"]
    assert list(dict.fromkeys(run.table("scores")["score"])) == [*ATTENTION, "copying"]
    assert len(run.table("prompts")) == run.manifest["task"]["prompts_scored"] == 8


def test_rows_summary_leaves_the_long_tables_out(tmp_path: Path) -> None:
    section = {"scores": ["induction"], "show": 0, "causal": CAUSAL}
    output = {"figures": [], "rows": "summary"}
    run = run_method(tmp_path, "heads", section, output=output)
    tables = {path.stem for path in run.path.glob("*.parquet")}
    assert tables == {"prompts", "scores", "baselines", "trials", "summary", "causal"}


def test_pictures_are_there_and_not_empty(run: Run) -> None:
    figures = {path.name for path in (run.path / "figures").iterdir()}
    names = [*(f"scores-{name}" for name in WHOLE["scores"]), *(f"attention-{name}" for name in ATTENTION), "causal"]  # type: ignore[attr-defined]
    assert figures == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    for path in (run.path / "figures").glob("*.png"):
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert int.from_bytes(data[16:20], "big") > 200
        assert len(data) > 5000


def test_the_manifest_says_what_was_done(run: Run) -> None:
    manifest = run.manifest
    assert (manifest["status"], manifest["subcommand"]) == ("complete", "heads")
    assert manifest["seeds"]["heads"] == 0
    (noted, swept) = manifest["engine"]["parts"]
    assert 0 <= noted["patterns"]["deviation"] < noted["patterns"]["tolerance"]
    assert swept["proof"]["executor"] == "packed"
    assert manifest["units_done"] == manifest["units_total"] == len(swept["plan"]["units"])


def test_layers_are_those_asked_for_in_order(tmp_path: Path) -> None:
    section = {"scores": ["first_token", "copying"], "layers": [1], "show": 1}
    run = run_method(tmp_path, "heads", section)
    assert set(run.table("scores")["layer"]) == set(run.table("sequences")["layer"]) == {1}
    turned = run_method(tmp_path, "heads", section | {"layers": [1, 0]})
    assert list(dict.fromkeys(turned.table("scores")["layer"])) == [0, 1]


# --- the command line

SMALL = {"scores": ["induction", "copying"], "causal": CAUSAL | {"k": [1]}}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the command line in a folder with a config; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    config_of(tmp_path, SMALL, method="heads")

    def run_main(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main(list(arguments))
        return code, *capfd.readouterr()

    return run_main


def test_stdout_is_the_path_and_verify_and_show_agree(call: Call) -> None:
    code, out, err = call("heads", "experiment.yaml")
    assert code == 0
    run = Path(out.removesuffix("\n"))
    assert (run / "manifest.json").exists()
    assert "strongest heads" in err
    assert "induction, zero ablation" in err
    assert "proved: executor packed" in err
    assert call("verify", out.strip())[0] == 0
    code, again, view = call("show", out.strip())
    assert (code, again) == (0, out)
    lines = view.splitlines()
    assert lines == err.splitlines()[-len(lines) :]
    assert len(lines) > 20


def test_json_carries_the_strongest_heads_and_the_ablations(call: Call) -> None:
    code, out, err = call("heads", "experiment.yaml", "--json", "--quiet")
    data = json.loads(out)
    assert (code, err) == (0, "")
    rows = data["headline"]
    best = next(row for row in rows if row["score"] == "induction")
    assert best["value"] > 0.7
    assert {row["ablation"] for row in rows} == {None, "zero", "mean"}
    assert json.loads(call("show", data["run"], "--json")[1])["headline"] == rows


def test_quiet_says_nothing_but_the_path(call: Call) -> None:
    code, out, err = call("heads", "experiment.yaml", "--quiet", "--set", "heads.show=0")
    assert (code, err) == (0, "")
    run = Path(out.strip())
    assert not (run / "patterns.parquet").exists()
    assert yaml.safe_load((run / "config.resolved.yaml").read_text())["heads"]["show"] == 0


def test_a_dry_run_tells_the_plan_and_leaves_nothing(call: Call) -> None:
    code, out, err = call("heads", "experiment.yaml", "--dry-run")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert not Path("runs").exists()
    assert plan["scores"] == ["induction", "copying"]
    assert (plan["layers"], plan["heads"]) == ([0, 1], 8)
    assert (plan["prompts"], plan["prompts_scored"], plan["prompts_ablated"]) == (8, 5, 3)
    # One head alone, and for both ablations the top set and three random ones.
    assert plan["ablations"]["trials"] == 1 + 2 * (1 + 3)


def test_a_score_alone_is_planned_without_ablations(call: Call) -> None:
    code, out, _ = call("heads", "experiment.yaml", "--dry-run", "--set", "heads.causal=null")
    assert code == 0
    assert "ablations" not in json.loads(out)


# --- other models and tasks


def test_grouped_queries_are_named_by_their_shared_head(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_llama(num_attention_heads=4, num_key_value_heads=2))
    causal = CAUSAL | {"scores": ["first_token"]}
    section = {"scores": ["first_token", "copying", "k_composition"], "causal": causal}
    run = run_method(tmp_path, "heads", section, model={"id": str(folder)})
    for name in ("scores", "trials", "results", "summary"):
        rows = run.table(name).dropna(subset=["head"])
        assert len(rows)
        assert (rows["kv_head"] == rows["head"] // 2).all(), name
        assert {0, 1} < {*rows["head"], 0, 1}, name
    several = run.table("summary")
    assert several[several["k"] > 1]["kv_head"].isna().all()


def test_layers_without_softmax_attention_are_left_out_and_said(tmp_path: Path, call: Call) -> None:
    folder = write_folder(tmp_path / "model", build("qwen3_next"))
    chosen = ("--set", f"model.id={folder}", "--set", "heads.causal=null", "--set", "heads.scores=[first_token]")
    code, out, err = call("heads", "experiment.yaml", *chosen)
    assert code == 0
    assert "layers without attention patterns are left out: 0, 2 (" in err
    scores = Run(Path(out.strip()), None).table("scores")  # type: ignore[arg-type]  # its tables are enough
    assert set(scores["layer"]) == {1}
    code, out, err = call("heads", "experiment.yaml", *chosen, "--set", "heads.layers=[1, 2]")
    assert (code, out) == (2, "")
    assert "heads.layers[1]: layer 2 has no attention pattern: " in err
    assert "fix: Layers that have one: 1." in err


def test_direct_effects_are_those_of_the_answers(tmp_path: Path) -> None:
    section = {"scores": ["direct_effect", "prefix_matching"], "show": 0}
    run = run_method(tmp_path, "heads", section, task=INDUCTION)
    loaded = config_of(tmp_path, section, method="heads", task=INDUCTION)
    model = load_model(loaded.config.model)
    with circuits(model) as shared:
        found = direct_effects(shared, build_prompts(loaded.config.task, model).prompts)
    assert not isinstance(found, str)
    scores = run.table("scores")
    rows = scores[scores["score"] == "direct_effect"]
    np.testing.assert_allclose(grid(rows), found.heads.mean(0).numpy(), rtol=0, atol=1e-5)
    assert np.abs(grid(rows)).max() > 0.5
    assert rows["chance"].isna().all()
    sequences = run.table("sequences")
    own = sequences[sequences["score"] == "direct_effect"].sort_values(["prompt", "layer", "head"])
    np.testing.assert_allclose(own["value"].to_numpy(float), found.heads.flatten().numpy(), rtol=0, atol=1e-5)


def test_a_users_text_is_scored_where_its_tokens_come_again(tmp_path: Path, toy: LoadedModel) -> None:
    texts = ["k1 k2 k3 k1 k2 k4 k1", "k5 k6 k7 k8 k9", "k1 k1 k1", "k1"]
    run = run_method(tmp_path, "heads", {"show": 1}, task={"name": "text", "texts": texts})
    scores = run.table("scores")
    # No block is repeated here, so there is no stripe; all other scores are taken.
    assert list(dict.fromkeys(scores["score"])) == [name for name in ATTENTION if name != "induction"] + ["copying"]
    for name, n in {"previous_token": 3, "prefix_matching": 2, "duplicate_token": 2}.items():
        wanted = plain_scores(toy.model, run, name)
        rows = scores[scores["score"] == name]
        np.testing.assert_allclose(grid(rows), np.nanmean(wanted, 0), rtol=0, atol=1e-5)
        assert set(rows["n"]) == {n}
    sequences = run.table("sequences")
    assert set(sequences[sequences["score"] == "prefix_matching"]["prompt"]) == {0, 2}
    assert run.manifest["warnings"] == [
        "1 prompt dropped: fewer than 2 tokens",
        "previous_token, first_token: 3 sequences are fewer than 20; intervals are rough",
        "duplicate_token, prefix_matching: 2 sequences are fewer than 20; intervals are rough",
    ]


def test_a_score_that_no_prompt_has_is_undefined(tmp_path: Path) -> None:
    section = {"scores": ["prefix_matching", "first_token"], "show": 2}
    run = run_method(tmp_path, "heads", section, task={"name": "text", "texts": ["k1 k2 k3", "k4 k5 k6 k7"]})
    scores = run.table("scores")
    rows = scores[scores["score"] == "prefix_matching"]
    assert set(rows["status"]) == {"undefined"}
    assert rows["value"].isna().all()
    assert (rows["n"] == 0).all()
    assert set(run.table("sequences")["score"]) == set(run.table("patterns")["score"]) == {"first_token"}
    said = "prefix_matching is undefined: no scored prompt has a position that counts"
    assert run.manifest["warnings"] == [said, "scores: 2 sequences are fewer than 20; intervals are rough"]
