"""`attribute` from the YAML file to the tables: estimates against gradients by hand, exact effects against `patch`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from mechinterp_cli.engine import atp as engine
from mechinterp_cli.errors import RunError
from mechinterp_cli.methods.attribute import estimating
from mechinterp_cli.methods.resume import resume_experiment
from mechinterp_cli.methods.run import dry_run, run_experiment
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.outcome import SilentProgress
from tests.experiments import INDUCTION, Run, config_of, run_method, run_patch
from tests.models_fixtures import planted, toy

__all__ = ["planted", "toy"]

BLOCKS: list[dict[str, Any]] = [
    {"kind": "resid_pre", "layers": "all", "positions": "each"},
    {"kind": "z", "layers": "all", "heads": "each", "positions": "all"},
    {"kind": "z", "layers": [1], "heads": [[0, 2], [1, 3]], "positions": ["copied", ["matched", "end"]]},
    {"kind": "k", "layers": "all", "heads": "each", "positions": ["matched"]},
    {"kind": "neuron", "layers": [0], "neurons": [0, [1, 2, 3]], "positions": "all"},
    {"kind": "mlp_out", "layers": "all", "positions": "last"},
]
TABLES = ("trials", "results", "summary", "verification", "missed", "baselines")


def attribute(folder: Path, section: dict[str, Any], **sections: Any) -> Run:
    return run_method(folder, "attribute", section, **sections)


def everything(count: int) -> dict[str, Any]:
    """Verify all nodes that can have an effect."""
    return {"top": 0, "random": count}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Run:
    section = {"sites": BLOCKS, "estimators": ["atp", "conductance"], "steps": 2, "verify": everything(32)}
    return attribute(tmp_path_factory.mktemp("attribute"), section, metrics=["logit_diff", "prob"])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("source", ["pair", "other", "mean", "zero"])
def test_exact_effects_are_those_of_patch(direction: str, source: str, tmp_path: Path) -> None:
    where = {"direction": direction, "source": source, "sites": BLOCKS}
    ours = attribute(tmp_path, {**where, "verify": everything(32)})
    theirs = run_patch(tmp_path, where)
    wanted = theirs.table("results").set_index(["label", "prompt"])["effect"]
    rows = ours.table("results").dropna(subset=["exact"])
    assert len(rows) >= 4 * 32
    off = rows["exact"] - wanted.loc[list(zip(rows["label"], rows["prompt"], strict=True))].to_numpy()
    assert float(off.abs().max()) <= 1e-5
    assert float(rows["exact"].abs().max()) > 0.5


def test_normalised_exact_effects_are_those_of_patch(found: Run, tmp_path: Path) -> None:
    theirs = run_patch(tmp_path, {"sites": BLOCKS}, metrics=["logit_diff", "prob"]).table("summary")
    theirs = theirs[theirs["aggregate"] == "ratio_of_means"]
    rows = found.table("summary").dropna(subset=["exact_normalized"])
    both = rows.merge(theirs, on=["label", "metric", "group"], validate="many_to_one")
    assert len(both) == len(rows) >= 100
    assert np.abs((both["exact_normalized"] - both["normalized_y"]).astype(float)).max() <= 1e-5


def test_every_node_of_patch_is_estimated_once_per_estimator(found: Run, tmp_path: Path) -> None:
    theirs = run_patch(tmp_path, {"sites": BLOCKS}).table("trials")
    ours = found.table("trials")
    columns = ["op", "site", "layer", "head", "kv_head", "neuron", "position", "span", "source", "set", "template"]
    for number, (_, part) in enumerate(ours.groupby("estimator", sort=False)):
        assert part["trial"].tolist() == (theirs["trial"] + number * len(theirs)).tolist()
        pd.testing.assert_frame_equal(part[columns].reset_index(drop=True), theirs[columns], check_dtype=False)


@pytest.fixture
def gradient(toy: LoadedModel, found: Run) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Activation change and gradient of z of a layer by hand, [prompts, positions, heads, d_head]."""

    def by_hand(layer: int) -> tuple[Tensor, Tensor]:
        model: Any = toy.model
        module = model.model.layers[layer].self_attn.o_proj
        kept: list[Tensor] = []

        def keep(_module: Any, given: Any) -> None:
            kept.append(given[0])

        handle = module.register_forward_pre_hook(keep)
        try:
            with torch.enable_grad():
                model.requires_grad_(True)
                model(input_ids=found.tokens("clean"))
                logits = model(input_ids=found.tokens("corrupt")).logits[:, -1]
                at = torch.arange(len(logits))
                difference = logits[at, found.answers()] - logits[at, found.answers("wrong_answer_ids")]
                (gradient,) = torch.autograd.grad(difference.sum(), kept[1])
        finally:
            handle.remove()
            model.requires_grad_(False)
        heads = model.config.num_attention_heads
        change, slope = (torch.unflatten(x, -1, (heads, -1)) for x in ((kept[0] - kept[1]).detach(), gradient))
        return change, slope

    return by_hand


@pytest.mark.parametrize("layer", [0, 1])
def test_estimates_are_gradients_by_hand(
    layer: int, found: Run, gradient: Callable[[int], tuple[Tensor, Tensor]]
) -> None:
    change, slope = gradient(layer)
    wanted = (change * slope).sum((1, 3))
    rows = found.table("results")
    mine = rows[(rows["estimator"] == "atp") & (rows["metric"] == "logit_diff") & (rows["layer"] == layer)]
    mine = mine[(mine["site"] == "z") & mine["head"].notna() & mine["span"].isna()]
    values = mine.pivot(index="prompt", columns="head", values="estimate").to_numpy(dtype=float)
    assert np.abs(values - wanted.numpy()).max() <= 1e-5 * max(1, float(wanted.abs().max()))
    assert np.abs(values).max() > 0.1


def test_effect_and_value_say_what_the_estimate_says(found: Run) -> None:
    rows = found.table("results")
    base = rows.merge(found.table("baselines").query("stream == 'corrupt'"), on=["prompt", "metric"])
    assert rows["effect"].equals(rows["estimate"])
    assert np.abs((base["value_x"] - base["effect"] - base["value_y"]).astype(float)).max() <= 1e-9


def test_conductance_of_a_stream_sums_to_the_whole_change_as_noted(found: Run) -> None:
    rows = found.table("results")
    rows = rows[(rows["estimator"] == "conductance") & (rows["metric"] == "logit_diff") & (rows["site"] == "resid_pre")]
    sums = rows[rows["layer"] == 1].groupby("prompt")["estimate"].sum().to_numpy(dtype=float)
    change = (found.baseline("clean", "logit_diff") - found.baseline("corrupt", "logit_diff")).numpy()
    noted = next(part["completeness"] for part in found.manifest["engine"]["parts"] if "completeness" in part)
    missed = np.abs(sums - change).sum() / np.abs(change).sum()
    # Of two metrics the worse is noted; two steps are far too few.
    assert 0.01 < missed <= noted["conductance"]["resid_pre 1"] + 1e-4
    assert any("raise attribute.steps (now 2)" in text for text in found.manifest["warnings"])


def test_enough_steps_are_not_warned_of(tmp_path: Path) -> None:
    sites = [{"kind": "resid_pre", "layers": "all", "positions": "all"}]
    run = attribute(
        tmp_path, {"sites": sites, "estimators": ["conductance", "ig_inputs"], "steps": 200, "verify": None}
    )
    noted = next(part["completeness"] for part in run.manifest["engine"]["parts"] if "completeness" in part)
    assert max(noted["conductance"].values()) <= estimating.COMPLETE
    assert not [text for text in run.manifest["warnings"] if "miss" in text]


def test_bfloat16_estimates_and_their_exact_effects_are_near_those_of_float32(tmp_path: Path) -> None:
    sites = [
        {"kind": "resid_pre", "layers": "all", "positions": "each"},
        {"kind": "z", "layers": "all", "heads": "each", "positions": "all"},
    ]
    task = {"name": "induction", "n": 8, "block": 6, "prefix": 2}
    half, full = (
        attribute(tmp_path, {"sites": sites}, task=task, model={"id": "toy-induction", "dtype": dtype}).table("summary")
        for dtype in ("bfloat16", "float32")
    )
    for site in ("resid_pre", "z"):
        for column in ("normalized", "exact_normalized"):
            ours, theirs = (
                frame[(frame["site"] == site) & (frame["status"] == "ok")][column].to_numpy(dtype=float)
                for frame in (half, full)
            )
            assert len(ours) >= 8
            assert np.corrcoef(ours, theirs)[0, 1] > 0.999
            assert 0 < np.abs(ours - theirs).max() < 0.03


def test_few_prompts_are_warned_of(found: Run, tmp_path: Path) -> None:
    said = "fewer than 20; intervals of estimates are rough"
    assert [text for text in found.manifest["warnings"] if said in text] == [f"attribute: 4 prompts are {said}"]
    section = {"sites": [{"kind": "mlp_out", "positions": "last"}], "verify": None}
    enough = attribute(tmp_path, section, task={"name": "induction", "n": 20, "block": 6, "prefix": 2})
    assert not [text for text in enough.manifest["warnings"] if said in text]


def test_kl_can_be_estimated_where_its_gradient_is_not_zero(tmp_path: Path) -> None:
    sites = [{"kind": "z", "layers": "all", "heads": "each", "positions": "all"}]
    denoised = attribute(tmp_path, {"sites": sites, "estimators": ["atp"]}, metrics=["kl"]).table("summary")
    assert denoised["estimate"].abs().max() > 0.1
    section = {"sites": sites, "direction": "noise", "estimators": ["ig_inputs"], "steps": 4}
    noised = attribute(tmp_path, section, metrics=["kl"]).table("summary")
    assert noised["estimate"].abs().max() > 0.1


def test_a_saturated_key_is_missed_by_atp_found_by_kfix_and_verification_says_so(tmp_path: Path) -> None:
    sites = [{"kind": kind, "layers": "all", "heads": "each", "positions": "all"} for kind in ("q", "k")]
    section = {"direction": "noise", "sites": sites, "estimators": ["atp", "atp_star"], "verify": everything(16)}
    run = attribute(tmp_path, section, model={"id": "planted-induction"}, task=INDUCTION | {"n": 8})
    rows: Any = run.table("summary").set_index(["estimator", "label"])
    key = "k, layer 1, head 2"
    exact = float(rows.loc[("atp", key), "exact_normalized"])
    assert exact > 0.99
    assert abs(float(rows.loc[("atp", key), "normalized"])) < 1e-3
    assert float(rows.loc[("atp_star", key), "normalized"]) == pytest.approx(exact, abs=0.01)
    missed = run.table("missed").query("site == 'k' and stratum == 'all'").set_index("estimator")
    assert (missed.loc["atp", "missed"], missed.loc["atp", "upper_count"]) == (1, 1)
    assert (missed.loc["atp_star", "missed"], missed.loc["atp_star", "upper_count"]) == (0, 0)
    told = run.table("verification").query("site == 'k' and part == 'random'").set_index("estimator")
    assert told.loc["atp_star", "pearson"] == pytest.approx(1, abs=1e-4)


def test_sizes_are_compared_with_sizes(tmp_path: Path) -> None:
    sites = [{"kind": "z", "layers": "all", "heads": "each", "positions": "all"}]
    run = attribute(
        tmp_path, {"direction": "noise", "sites": sites, "estimators": ["atp_star"], "verify": everything(8)}
    )
    rows = run.table("summary")
    told = run.table("verification").query("part == 'random'").iloc[0]
    sizes = rows["exact_normalized"].abs().astype(float), rows["normalized"].abs().astype(float)
    assert told["pearson"] == pytest.approx(np.corrcoef(*sizes)[0, 1], abs=1e-9)
    assert pd.isna(told["sign_agreement"])


def test_sets_patched_together_stand_beside_the_sum_of_their_estimates(tmp_path: Path) -> None:
    # Heads of the last layer do not act through each other: together they do what they do one by one, but for the norm.
    sites = [{"kind": "z", "layers": [1], "heads": "each", "positions": "last"}]
    verify = {"top": 0, "random": 0, "subsets": 2, "subset_size": 4}
    run = attribute(tmp_path, {"sites": sites, "verify": verify})
    whole = run_patch(tmp_path, {"sites": [{"kind": "z", "layers": [1], "heads": "all", "positions": "last"}]})
    wanted = whole.table("summary").query("aggregate == 'ratio_of_means'")["normalized"].iloc[0]
    rows, estimates = run.table("subsets"), run.table("summary")["normalized"]
    assert rows["size"].tolist() == [4, 4]
    assert rows["exact"].tolist() == pytest.approx([wanted] * 2, abs=1e-5)
    assert rows["estimate"].tolist() == pytest.approx([estimates.sum()] * 2)


def test_numbers_do_not_depend_on_how_prompts_are_shared_out(found: Run, tmp_path: Path) -> None:
    section = {"sites": BLOCKS, "estimators": ["atp", "conductance"], "steps": 2, "verify": everything(32)}
    sections: dict[str, Any] = {"metrics": ["logit_diff", "prob"], "engine": {"rows_per_call": 20}}
    other = attribute(tmp_path, section, **sections)
    assert other.table("results")["estimate"].to_numpy() == pytest.approx(
        found.table("results")["estimate"].to_numpy(), abs=2e-6
    )
    parts = other.manifest["engine"]["parts"]
    assert next(part["batching"] for part in parts if "batching" in part) == {"tokens": 20, "checkpointing": False}


def test_little_memory_means_checkpointing_and_the_same_numbers(found: Run, tmp_path: Path) -> None:
    section = {"sites": BLOCKS, "estimators": ["atp", "conductance"], "steps": 2, "verify": None}
    sections: dict[str, Any] = {"metrics": ["logit_diff", "prob"], "engine": {"max_memory": 50_000}}
    other = attribute(tmp_path, section, **sections)
    assert other.table("results")["estimate"].to_numpy() == pytest.approx(
        found.table("results")["estimate"].to_numpy(), abs=2e-6
    )
    assert next(part["batching"] for part in other.manifest["engine"]["parts"] if "batching" in part)["checkpointing"]


def test_rows_summary_and_top(tmp_path: Path) -> None:
    section = {"sites": BLOCKS[:2], "verify": everything(5)}
    summary = attribute(tmp_path, section, output={"figures": [], "rows": "summary"})
    assert not (summary.path / "results.parquet").exists()
    top = attribute(tmp_path, section, output={"figures": [], "rows": "top", "top": 3})
    kept = top.table("results")["trial"].unique().tolist()
    strongest = top.table("summary").assign(size=lambda rows: rows["normalized"].abs()).nlargest(3, "size")
    assert sorted(kept) == sorted(strongest["trial"])


def broken(*_arguments: Any, **_options: Any) -> Any:
    raise RunError("stopped", "go on")


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """A whole run, and one of the same that was stopped between its two estimators."""
    section = {"sites": BLOCKS[:2], "estimators": ["atp", "ig_inputs"], "steps": 2, "verify": everything(5)}
    whole = attribute(tmp_path, section)
    with monkeypatch.context() as patch, pytest.raises(RunError):
        patch.setattr(estimating, "ig_inputs", broken)
        loaded = config_of(tmp_path, section, method="attribute")
        run_experiment(loaded, out=tmp_path / "stopped", progress=SilentProgress())
    (path,) = (tmp_path / "stopped").iterdir()
    assert len(list((path / "units").iterdir())) == 1
    return whole, path


def test_what_is_saved_is_not_estimated_again_and_the_tables_are_the_same(
    stopped: tuple[Run, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = stopped
    monkeypatch.setattr(engine, "atp", broken)  # would stop the run, were it asked again
    resume_experiment(path, progress=SilentProgress())
    for name in TABLES:
        assert (path / f"{name}.parquet").read_bytes() == (whole.path / f"{name}.parquet").read_bytes()


def test_a_damaged_unit_is_estimated_again(stopped: tuple[Run, Path]) -> None:
    whole, path = stopped
    (unit,) = (path / "units").iterdir()
    unit.write_bytes(unit.read_bytes()[:-40])
    resume_experiment(path, progress=SilentProgress())
    assert (path / "results.parquet").read_bytes() == (whole.path / "results.parquet").read_bytes()
    assert any("damaged" in text for text in Run(path, whole.outcome).manifest["warnings"])


def test_dry_run_tells_nodes_passes_and_what_exact_effects_cost(tmp_path: Path) -> None:
    section = {"sites": BLOCKS, "estimators": ["atp", "atp_star", "ig_inputs"], "steps": 4, "verify": everything(5)}
    plan = dry_run(config_of(tmp_path, section, method="attribute"))
    assert plan["nodes"] == 2 * 11 + 8 + 4 + 8 + 2 + 2
    assert plan["passes"] == {"atp": 3, "atp_star": 4, "ig_inputs": 3 + 2 * 4}
    assert (plan["exact"]["trials"], plan["flops"] > 0) == (5, True)


def test_only_what_is_asked_for_is_there(tmp_path: Path) -> None:
    run = attribute(tmp_path, {"lens": {}})
    tables = {path.stem for path in run.path.glob("*.parquet")}
    assert tables == {"prompts", "lens"}
