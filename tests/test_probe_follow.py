"""The causal follow-up from the YAML file to the tables: planted truths, plain hooks, who is fitted on and measured."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mechinterp_cli.cli.main import main
from mechinterp_cli.engine import plan
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods.probe.causal_options import CausalOptions
from mechinterp_cli.methods.probe.causal_split import chosen, hold_out
from mechinterp_cli.methods.run import dry_run
from mechinterp_cli.runs.store import UnitStore
from mechinterp_cli.tasks.prompts import PromptSet
from tests.experiments import Run, config_of, run_method
from tests.probe_cases import planted_prompts
from tests.probe_folder import UNUSED, USED, planted_folder, planted_task
from tests.probe_hooks import Model, erased, moved, swapped

TOLERANCE = 1e-4
QUICKLY: dict[str, Any] = {
    "penalties": [0.01, 1.0],
    "folds": 2,
    "inner_folds": 2,
    "baselines": ["majority"],
    "permutations": 0,
}
FEW = {"random": 3, "measure": 8, "strengths": [-2.0, 0.0, 4.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted_folder(tmp_path_factory.mktemp("planted") / "model")


@pytest.fixture
def follow(folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """A run on the planted model, labelled with one of both labels."""

    def run(which: int = USED, causal: dict[str, Any] | None = None, **section: Any) -> Run:
        task = section.pop("task", None) or planted_task(tmp_path / "prompts.csv", which)
        whole = QUICKLY | {"causal": FEW | (causal or {})} | section
        return run_method(tmp_path, "probe", whole, task=task, model={"id": str(folder)})

    return run


def of_all(run: Run, table: str) -> pd.DataFrame:
    rows = run.table(table)
    return rows[rows["group"] == "all"]


@pytest.mark.parametrize(("which", "used"), [(UNUSED, "no"), (USED, "yes")])
def test_a_direction_that_is_readable_but_unused_is_told_from_one_that_is_used(
    follow: Callable[..., Run], tmp_path: Path, which: int, used: str
) -> None:
    asked = {"interventions": ["erase", "leace", "swap", "steer"], "random": 199, "measure": 32, "margin": 1.0}
    run = follow(causal=asked, permutations=19, task=planted_task(tmp_path / "many.csv", which, count=200))
    rows = of_all(run, "causal_verdicts")
    assert set(rows["readable"]) == {"yes"}
    assert rows["score"].min() > 0.95
    assert rows["chance"].max() < 0.6
    assert rows["score_p"].tolist() == pytest.approx([0.05] * len(rows))
    fixed = rows[rows["intervention"] != "steer"]
    assert len(fixed) == 2 * 3
    assert fixed["used"].tolist() == [used] * len(fixed)
    # the norm before the logits makes every answer less sure that anything large is added to
    assert set(rows[rows["intervention"] == "steer"]["used"]) == ({"yes"} if used == "yes" else {"inconclusive"})
    sizes = fixed["size"]
    assert sizes.min() > 5 if used == "yes" else sizes.max() < 1.0


def test_nothing_of_what_is_erased_comes_back_where_no_copy_was_left(follow: Callable[..., Run]) -> None:
    (row,) = follow().table("causal_downstream").to_dict("records")
    assert (row["erased_layer"], row["layer"]) == (0, 1)
    assert row["score_before"] > 0.95
    assert abs(row["score_after"] - row["chance"]) < 0.2


def test_effects_are_those_of_plain_hooks_and_directions_those_of_scikit_learn(
    follow: Callable[..., Run], folder: Path
) -> None:
    run = follow(USED, {"interventions": ["erase", "steer", "swap"], "into": ["clean", "corrupt"]})
    hand, split = Model(folder, run), run.manifest["task"]["causal"]
    rows = run.table("causal_prompts")
    own = rows[rows["direction"] == "probe"]
    saved = load_file(run.path / "directions.safetensors")
    assert sorted(saved) == ["resid_post.0", "resid_post.1"]
    for layer in (0, 1):
        x, twin = hand.seen(layer, hand.clean), hand.seen(layer, hand.corrupt)
        fitted, u = x[split["fitted"]], saved[f"resid_post.{layer}"][0]
        assert float(u @ by_scikit_learn(run, layer, fitted)) == pytest.approx(1, abs=1e-5)
        mean, spread = fitted.mean(0), float((fitted @ u).std(correction=0))
        onto = torch.outer(u, u)
        wanted: dict[tuple[str, float | None, str], Tensor] = {
            ("erase", None, "clean"): hand.effect(layer, erased(u, mean)),
            ("swap", None, "clean"): hand.effect(layer, swapped(onto, twin)),
            ("swap", None, "corrupt"): hand.effect(layer, swapped(onto, x), corrupt=True),
        }
        for strength in (-2.0, 0.0, 4.0):
            wanted["steer", strength, "clean"] = hand.effect(layer, moved(strength * spread * u))
        for (name, size, stream), effect in wanted.items():
            mine = own[(own["intervention"] == name) & (own["layer"] == layer) & (own["stream"] == stream)]
            mine = mine if size is None else mine[mine["strength"] == size]
            assert mine["prompt"].tolist() == split["measured"]
            found = torch.tensor(mine["effect"].tolist())
            torch.testing.assert_close(found, effect[split["measured"]], atol=TOLERANCE, rtol=0)
            assert float(found.abs().max()) > 1 or size == 0
    assert (own[own["strength"] == 0]["effect"].abs() < 1e-6).all()


def by_scikit_learn(run: Run, layer: int, x: Tensor) -> Tensor:
    """The direction of a logistic probe of some activations at the penalty that most folds of the run chose."""
    rows = run.table("probes")
    rows = rows[(rows["layer"] == layer) & rows["fold"].notna() & (rows["split"] == "test")]
    (usual, *_) = sorted(rows["penalty"].astype(float).mode())
    labels = run.table("labels")["target"].to_numpy(dtype=float)[run.manifest["task"]["causal"]["fitted"]]
    scaler = StandardScaler().fit(x.double().numpy())
    fitted = LogisticRegression(C=usual, tol=1e-10, max_iter=10_000).fit(scaler.transform(x.double().numpy()), labels)
    return torch.nn.functional.normalize(torch.from_numpy(fitted.coef_[0] / scaler.scale_), dim=0).float()


def test_nothing_is_fitted_on_what_is_measured_or_on_its_cluster(follow: Callable[..., Run], tmp_path: Path) -> None:
    task = planted_task(tmp_path / "few.csv", USED, count=60)
    table = pd.read_csv(task["file"])
    table["cluster"] = [f"of {i // 4}" for i in range(len(table))]
    table.to_csv(task["file"], index=False)
    run = follow(task=task, causal={"hold_out": 0.4, "measure": 6})
    prompts, split = run.table("prompts"), run.manifest["task"]["causal"]
    clean = prompts[prompts["stream"] == "clean"].set_index("prompt")
    clusters = {name: set(clean.loc[numbers, "cluster"]) for name, numbers in split.items()}
    assert len(clusters["fitted"]) == 15 - 6
    assert len(clusters["measured"]) == len(split["measured"]) == 6, "a prompt of each cluster"
    assert not clusters["fitted"] & clusters["measured"]
    texts = {name: set(clean.loc[numbers, "text"]) for name, numbers in split.items()}
    assert not texts["fitted"] & texts["measured"]
    assert clean.loc[split["measured"], "group"].value_counts().tolist() == [3, 3]
    assert sorted(set(run.table("causal_prompts")["prompt"])) == split["measured"]


def test_a_seed_holds_out_others_of_every_kind() -> None:
    prompts = planted_prompts(80, seed=1)
    kinds = PromptSet("made", tuple(replace(p, cluster=f"{p.group} {i // 8}") for i, p in enumerate(prompts.prompts)))
    first, again, other = (hold_out(kinds, CausalOptions(seed=seed, hold_out=0.3)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted((*first[0], *first[1])) == list(range(80))
    held = {kinds.prompts[i].cluster for i in first[1]}
    assert Counter(name[:6] for name in held) == {"used 0": 3, "used 1": 3}
    measured = chosen(kinds, first[1], CausalOptions(measure=4))
    assert len({kinds.prompts[i].cluster for i in measured}) == 4
    assert chosen(kinds, first[1], CausalOptions(measure=1000)) == first[1]


def test_control_labels_are_tried_beside(follow: Callable[..., Run]) -> None:
    rows = of_all(follow(causal={"controls": 2, "interventions": ["erase"]}), "causal_effects")
    assert sorted(rows[rows["layer"] == 0]["direction"]) == ["control 0", "control 1", "probe"]
    own = rows[rows["direction"] == "probe"]
    assert (own["control_difference"] < -5).all()
    assert own["removed"].min() > 0.02


def test_sites_of_heads_and_several_positions_have_names_of_their_own(follow: Callable[..., Run]) -> None:
    sites = [
        {"kind": "z", "layers": [0], "heads": "each"},
        {"kind": "attn_out", "layers": [1], "positions": [3, 4]},
    ]
    run = follow(causal={"strengths": [2.0], "controls": 0}, sites=sites)
    names = sorted(load_file(run.path / "directions.safetensors"))
    assert names == [
        *("attn_out.1@position 3", "attn_out.1@position 4"),
        *("z.0.0@last", "z.0.1@last"),
    ]
    rows = of_all(run, "causal_effects")
    assert set(rows["probe"]) == {"logistic, last", "logistic, position 3", "logistic, position 4"}
    assert rows[rows["site"] == "attn_out"]["position"].unique().tolist() == [3, 4]
    assert not rows.duplicated(["probe", "layer", "site", "head", "intervention", "strength"]).any()


def test_all_heads_together_are_steered(follow: Callable[..., Run]) -> None:
    run = follow(causal={"strengths": [0.0, 4.0]}, sites=[{"kind": "z", "layers": [0], "heads": "all"}])
    rows = of_all(run, "causal_effects")
    steered = rows[(rows["direction"] == "probe") & (rows["intervention"] == "steer")].set_index("strength")["effect"]
    assert steered.abs()[0.0] < 1e-6 < steered.abs()[4.0]


def test_several_classes_have_a_subspace_and_numbers_a_direction(follow: Callable[..., Run], tmp_path: Path) -> None:
    task = planted_task(tmp_path / "a.csv", USED, count=120)
    table = pd.read_csv(task["file"])
    last = table["clean"].str.extract(r"k(\d+)$")[0].astype(int)
    for column, rank in (((last % 4).map("abcd".__getitem__), 2), (last % 4 / 2 + 0.25, 1)):
        path = tmp_path / "b.jsonl"
        rows = table.assign(label=column).to_dict("records")
        path.write_text("\n".join(map(json.dumps, rows)))
        probes = {"probes": ["ridge"]} if rank == 1 else {"probes": ["mass_mean"]}
        asked = {"interventions": ["erase", "leace", "steer"]}
        run = follow(task={"name": "file", "file": str(path)}, causal=asked, **probes)
        basis = load_file(run.path / "directions.safetensors")["resid_post.0"]
        assert len(basis) == (1 if rank == 1 else 3)
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
        effects = of_all(run, "causal_effects")
        assert (effects["status"] == "ok").all()
        assert set(effects[effects["intervention"] == "erase"]["rank"]) == {len(basis)}


def test_places_that_are_all_alike_are_left_out_and_told(follow: Callable[..., Run], tmp_path: Path) -> None:
    task = planted_task(tmp_path / "a.csv", USED, count=60)
    table = pd.read_csv(task["file"])
    table[["clean", "corrupt"]] = table[["clean", "corrupt"]] + " k5"
    table.to_csv(task["file"], index=False)
    run = follow(task=task, sites=[{"kind": "embed", "layers": [0]}, {"kind": "resid_post"}])
    assert any("embed, layer 0, last: no direction" in warning for warning in run.manifest["warnings"])
    assert set(run.table("causal_effects")["site"]) == {"resid_post"}


def test_a_model_that_cannot_do_the_task_is_told_of(follow: Callable[..., Run], tmp_path: Path) -> None:
    task = planted_task(tmp_path / "a.csv", USED, count=60)
    table = pd.read_csv(task["file"])
    table[["answer", "wrong_answer"]] = [[" k6", " k7"]] * len(table)
    table.to_csv(task["file"], index=False)
    for asked, told in ((task, True), (None, False)):
        warnings = follow(task=asked).manifest["warnings"]
        assert any("prefers the right answer on" in warning for warning in warnings) == told


def test_directions_are_saved_without_a_follow_up_too(folder: Path, tmp_path: Path) -> None:
    task = planted_task(tmp_path / "a.csv", USED, count=60)
    run = run_method(tmp_path, "probe", QUICKLY, task=task, model={"id": str(folder)})
    (row,) = load_file(run.path / "directions.safetensors")["resid_post.1"]
    assert float(row.norm()) == pytest.approx(1)
    assert int(row.abs().argmax()) == USED
    assert float(row[USED]) > 0.5
    assert "directions.safetensors" in run.manifest["outputs"]
    assert not (run.path / "causal_effects.parquet").exists()


def test_ablate_takes_the_directions_as_they_are(follow: Callable[..., Run], folder: Path, tmp_path: Path) -> None:
    probed = follow()
    file = str(probed.path / "directions.safetensors")
    units = [{"kind": "direction", "file": file, "positions": "last"}]
    task = planted_task(tmp_path / "prompts.csv", USED)
    run = run_method(tmp_path, "ablate", {"units": units, "values": ["project"]}, task=task, model={"id": str(folder)})
    hand, effects = Model(folder, run), run.values("logit_diff", "effect")
    for trial, layer in enumerate((0, 1)):
        u = load_file(file)[f"resid_post.{layer}"][0]
        wanted = hand.effect(layer, erased(u, torch.zeros(len(u))))
        found = torch.tensor(effects.loc[trial].to_numpy(dtype=np.float64)).float()
        torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)
        assert float(found.mean()) < -5


@pytest.mark.parametrize("units", [0, 3])
def test_going_on_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int
) -> None:
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 64)
    section = QUICKLY | {"causal": FEW | {"random": 9}}
    loaded = config_of(
        tmp_path,
        section,
        method="probe",
        task=planted_task(tmp_path / "a.csv", USED, count=60),
        model={"id": str(folder)},
    )
    outputs = []
    for root, stop in (("whole", None), ("stopped", units)):
        if stop is not None:
            stop_after(monkeypatch, stop)
        code = main(["probe", str(loaded.path), "--out", str(tmp_path / root), "--quiet"])
        (run,) = (tmp_path / root).iterdir()
        assert code == (0 if stop is None else 130)
        if stop is not None:
            assert len(list((run / "units").glob("*"))) == stop
            assert main(["resume", str(run), "--quiet"]) == 0
        names = [*run.glob("*.parquet"), run / "directions.safetensors"]
        outputs.append({path.name: path.read_bytes() for path in names})
    assert outputs[0] == outputs[1]
    assert {"causal_effects.parquet", "causal_verdicts.parquet"} <= set(outputs[0])


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """The next run is interrupted after it has saved so many units."""
    real, saved = UnitStore.write, list[str]()

    def write(self: UnitStore, unit: str, table: Any) -> object:
        if len(saved) == units:
            monkeypatch.setattr(UnitStore, "write", real)
            raise KeyboardInterrupt
        saved.append(unit)
        return real(self, unit, table)

    monkeypatch.setattr(UnitStore, "write", write)


def test_a_plan_counts_the_trials_and_computes_nothing(folder: Path, tmp_path: Path) -> None:
    section = QUICKLY | {"causal": FEW | {"random": 199, "measure": 10, "controls": 2}}
    task = planted_task(tmp_path / "a.csv", USED, count=60)
    found = dry_run(config_of(tmp_path, section, method="probe", task=task, model={"id": str(folder)}))["causal"]
    assert found["trials"] == 2 * ((1 + 2 + 199) + (3 * (1 + 2) + 199))
    assert (found["fitted"], found["measured"], found["probe"]) == (30, 10, "logistic")
    assert found["computed"] == 10 * found["trials"]
    assert found["flops"] > 0


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"probes": ["mlp"]}, {}, "probe.causal: directions need a linear probe, and probes are mlp"),
    ({}, {"probe": "lda"}, "probe.causal.probe: lda is not among probe.probes, which are logistic"),
    ({"sites": [{"positions": "mean"}]}, {}, "probe.causal: every site block averages several positions"),
    ({}, {"positions": ["subject"]}, "probe.causal.positions[0]"),
    ({}, {"downstream": [0, 7]}, "probe.causal.downstream[1]: 7: no probe reads this layer"),
    ({}, {"hold_out": 1.5}, "probe.causal.hold_out"),
    ({}, {"probe": "mlp"}, "probe.causal.probe"),
]


@pytest.mark.parametrize(("section", "causal", "text"), REFUSED)
def test_what_cannot_be_is_refused_with_the_key(
    follow: Callable[..., Run], section: dict[str, Any], causal: dict[str, Any], text: str
) -> None:
    with pytest.raises(UserError) as caught:
        follow(causal=causal, **section)
    assert text in caught.value.cause
    assert caught.value.remedy


def changed(tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> dict[str, Any]:
    """The task with another file."""
    task = planted_task(tmp_path / "other.csv", USED, count=40)
    change(pd.read_csv(task["file"])).to_csv(task["file"], index=False)
    return task


@pytest.mark.parametrize(
    ("change", "causal", "text"),
    [
        (lambda t: t.drop(columns="corrupt"), {"interventions": ["swap"]}, "swap needs a corrupted twin"),
        (lambda t: t.drop(columns="wrong_answer"), {}, "logit_diff needs a wrong answer"),
        (lambda t: t.drop(columns="label"), {}, "has no labels"),
        (lambda t: t.assign(cluster=t["label"]), {}, "occurs in group"),
        (
            lambda t: t.assign(cluster=[f"of {i % 8}" for i in range(40)], label=["no", "yes"] * 20),
            {"hold_out": 0.9},
            "5 samples that are left to fit directions on, 1 class is all there is",
        ),
        (
            lambda t: pd.concat([t, t.head(30).assign(label="other")]).assign(cluster=lambda x: range(len(x))),
            {},
            "measured prompts were fitted on",
        ),
    ],
)
def test_prompts_that_cannot_serve_are_refused(
    follow: Callable[..., Run],
    tmp_path: Path,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    causal: dict[str, Any],
    text: str,
) -> None:
    with pytest.raises(UserError) as caught:
        follow(task=changed(tmp_path, change), causal=causal)
    assert text in caught.value.cause
    assert caught.value.remedy


def test_a_task_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run_method(tmp_path, "probe", QUICKLY | {"causal": FEW}, task={"name": "induction_labels", "n": 6})
    assert "probe.causal: what is done must move an answer; metrics: logit_diff needs an answer" in caught.value.cause
    assert "task with answers" in caught.value.remedy


def test_only_prompts_that_the_model_gets_right_are_measured_where_that_is_asked(
    follow: Callable[..., Run], tmp_path: Path
) -> None:
    def spoilt(table: pd.DataFrame) -> pd.DataFrame:
        """Every other prompt's answers are exchanged."""
        odd = np.arange(len(table)) % 3 == 0
        table.loc[odd, ["answer", "wrong_answer"]] = table.loc[odd, ["wrong_answer", "answer"]].to_numpy()
        return table

    run = follow(task=changed(tmp_path, spoilt) | {"keep": "correct"}, causal={"measure": 20})
    measured = run.manifest["task"]["causal"]["measured"]
    assert measured
    assert all(number % 3 for number in measured)
