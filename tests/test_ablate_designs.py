"""Every unit, value and design of `ablate` against plain hooks, prompt by prompt, through whole runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mechinterp_cli.engine.edits import RowValues, Site
from mechinterp_cli.methods.ablate.experiment import AblateExperiment
from mechinterp_cli.methods.ablate.optimal import Fit
from mechinterp_cli.methods.ablate.units import Merged, Part, merge
from mechinterp_cli.methods.ablate.values import values_of
from mechinterp_cli.methods.specs import Place
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.models.planted import HEADS, INDUCTION_HEAD, LAYERS, PREVIOUS_TOKEN_HEAD
from tests.ablate_plain import ByHand, Stand, answer_metrics, experiment_of, folder_of, names_in, token_metrics
from tests.experiments import Run, config_of, run_method
from tests.families import build
from tests.models_fixtures import toy
from tests.oracle import Oracle

__all__ = ["toy"]

TOLERANCE = 1e-4
VISIBLE = 1e-3
"""What an ablation must change at least: comparing nothing with nothing shows nothing."""
SIX = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "granite")
FAMILIES = ("toy", *(pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in SIX))
UNITS: list[dict[str, Any]] = [
    {"kind": "head", "layers": [0]},
    {"kind": "head", "layers": [1], "heads": [[1, 3], 2]},
    {"kind": "kv_head", "layers": [1]},
    {"kind": "neuron", "layers": [0], "neurons": [3, [0, 5]]},
    {"kind": "attention", "layers": [0]},
    {"kind": "mlp", "layers": {"window": 2}},
    {"kind": "layer", "layers": [1]},
]
TASK = {"name": "induction", "n": 3, "block": 5, "prefix": 2}
TEXTS = {"name": "repeats", "n": 5, "block": [4, 5], "repeats": 2}
SETS = {"one": ["1.2"], "mixed": ["1.2", "0.1", "mlp0"], "all": []}
Measure = Callable[[ByHand, int, Tensor], Mapping[str, float]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


class Case:
    """A run, and the same by hand."""

    def __init__(
        self, folder: Path, toy: LoadedModel, family: str, section: Mapping[str, Any], **sections: Any
    ) -> None:
        model = "toy-induction" if family == "toy" else folder_of(family, folder)
        sections = {"task": TASK, "metrics": ["logit_diff", "kl"]} | sections
        given = {"model": {"id": model}, **sections}
        self.section = section
        self.run: Run = run_method(folder, "ablate", dict(section), **given)
        self.experiment: AblateExperiment = experiment_of(config_of(folder, dict(section), method="ablate", **given))
        oracle = Oracle("llama", toy.model) if family == "toy" else Oracle(family)
        self.hand = ByHand(oracle, self.experiment.prompts.prompts)

    @property
    def asks(self) -> bool:
        return bool(self.hand.prompts[0].answer)

    def measured(self, prompt: int, logits: Tensor) -> Mapping[str, float]:
        return (answer_metrics if self.asks else token_metrics)(self.hand, prompt, logits)

    def rows(self, value: str) -> list[dict[str, Any]]:
        """Of every trial, prompt and draw: `names`, `prompt`, `draw` and the metrics."""
        table = self.run.table("results")
        table = table[table["ablation"] == value]
        every = [unit.name for unit in self.experiment.units]
        rows = []
        for (_, prompt, draw), part in table.groupby(["trial", "prompt", "draw"], dropna=False):
            names = names_in(part["label"].iloc[0], self.section.get("sets"), every)
            found = {"names": names, "prompt": int(str(prompt)), "draw": draw, "trial": int(part["trial"].iloc[0])}
            rows.append(found | dict(zip(part["metric"], part["value"], strict=True)))
        assert rows
        return rows

    def check(self, value: str, stand: Callable[[dict[str, Any]], Stand] | Stand, *, add: bool = False) -> None:
        """The run's numbers are those by hand, and the ablations do something."""
        changed = 0
        made: Any = stand
        for row in (rows := self.rows(value)):
            own = made(row) if add or value == "optimal" else stand
            logits = self.hand.ablated(row["prompt"], row["names"], own, add=add)  # type: ignore[arg-type]  # either kind
            changed += float((logits - self.hand.clean[row["prompt"]]).abs().max()) > VISIBLE
            self.agree(row, logits)
        assert changed > len(rows) / 2

    def agree(self, row: Mapping[str, Any], logits: Tensor) -> None:
        wanted = self.measured(row["prompt"], logits)
        for name in set(wanted) & set(row):
            assert row[name] == pytest.approx(wanted[name], abs=TOLERANCE), (row, name)


def every(experiment: AblateExperiment) -> Place:
    return Place(tuple(tuple(range(p.length)) for p in experiment.prompts.prompts))


def noise_stand(case: Case) -> Callable[[dict[str, Any]], Stand]:
    """The noise that the seed gives, which has its own tests."""
    experiment = case.experiment
    values = values_of("noise", experiment.options, experiment.setting, merge(experiment.units))

    def of(row: dict[str, Any]) -> Stand:
        def stand(place: tuple[str, int], prompt: int) -> Tensor:
            whole = Merged(Part(*place), every(experiment), None, None)
            (edit,) = values.edits(whole, [prompt])
            assert isinstance(edit.values, RowValues)
            positions = torch.arange(experiment.prompts.prompts[prompt].length)
            return edit.values.at(torch.full_like(positions, int(row["draw"])), positions, None)

        return stand

    return of


def optimal_stand(case: Case) -> Callable[[dict[str, Any]], Stand]:
    """The constants that are fitted, which have their own tests."""
    it = case.experiment
    fitted = Fit(it.model, it.prompts, it.units, it.trials, it.options.optimal, it.asks).run(lambda *_: None)
    first = min(row["trial"] for row in case.rows("optimal"))

    def of(row: dict[str, Any]) -> Stand:
        def stand(place: tuple[str, int], prompt: int) -> Tensor:
            constant = fitted.by_trial[row["trial"] - first].constants[Site(*place)]
            return constant.expand(it.prompts.prompts[prompt].length, *constant.shape)

        return stand

    return of


def check_resample(case: Case) -> None:
    """Every draw is another prompt's activations, the same prompt's in all trials, and never the prompt's own."""
    logits: dict[tuple[tuple[str, ...], int, int], Tensor] = {}
    near: dict[tuple[int, int], list[set[int]]] = {}
    count = len(case.hand.prompts)
    for row in case.rows("resample"):
        prompt = row["prompt"]
        key = (prompt, int(row["draw"]))
        possible = set()
        for donor in (i for i in range(count) if case.hand.prompts[i].length == case.hand.prompts[prompt].length):
            at = (tuple(row["names"]), prompt, donor)
            if at not in logits:
                logits[at] = case.hand.ablated(prompt, row["names"], case.hand.other(donor))
            wanted = case.measured(prompt, logits[at])
            if all(abs(row[name] - wanted[name]) < TOLERANCE for name in set(wanted) & set(row)):
                possible.add(donor)
        near.setdefault(key, []).append(possible)
    donors = {key: set.intersection(*found) for key, found in near.items()}
    assert {len(found) for found in donors.values()} == {1}
    chosen = {key: found.pop() for key, found in donors.items()}
    assert all(donor != prompt for (prompt, _), donor in chosen.items())
    for prompt in range(count):
        own = [donor for (i, _), donor in chosen.items() if i == prompt]
        assert len(set(own)) == len(own) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_unit_and_value_alone(tmp_path: Path, toy: LoadedModel, family: str) -> None:
    section = {
        "units": UNITS,
        "values": ["zero", "mean", "mean_of_prompt", "resample", "noise", "optimal"],
        "resample": {"draws": 2},
        "noise": {"draws": 2, "seed": 3},
        "optimal": {"steps": 2, "share": 0.4},
    }
    case = Case(tmp_path, toy, family, section)
    case.check("zero", case.hand.zero)
    case.check("mean", case.hand.mean)
    case.check("mean_of_prompt", case.hand.mean_of_prompt)
    case.check("noise", noise_stand(case), add=True)
    case.check("optimal", optimal_stand(case))
    check_resample(case)


def directions(folder: Path, d_model: int) -> dict[str, Tensor]:
    """A file of directions, and an orthonormal basis of each."""
    generator = torch.Generator().manual_seed(1)
    found = {
        name: torch.randn(n, d_model, generator=generator) for name, n in (("resid_post.0", 2), ("resid_mid.1", 1))
    }
    if d_model == build("gpt_neox").config.hidden_size:  # no resid_mid in parallel blocks
        found["resid_pre.1"] = found.pop("resid_mid.1")
    save_file(found, folder / "d.safetensors")
    return {name: torch.linalg.qr(rows.T)[0].T for name, rows in found.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_directions(tmp_path: Path, toy: LoadedModel, family: str) -> None:
    bases = directions(tmp_path, 64 if family == "toy" else 32)
    section = {
        "units": [{"kind": "direction", "file": str(tmp_path / "d.safetensors")}],
        "values": ["zero", "project", "mean", "mean_of_prompt", "resample"],
        "mean": {"per": "position"},
        "resample": {"draws": 2},
    }
    case = Case(tmp_path, toy, family, section)
    case.hand.bases = bases
    case.check("zero", case.hand.zero)
    case.check("project", case.hand.zero)
    case.check("mean", case.hand.mean_by_position)
    case.check("mean_of_prompt", case.hand.mean_of_prompt)
    check_resample(case)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges(tmp_path: Path, toy: LoadedModel, family: str) -> None:
    units = [
        {"kind": "edge", "positions": [["end", 6]], "keys": ["copied", 0], **more}
        for more in ({"layers": [1], "heads": "each"}, {"layers": [0]})
    ]
    case = Case(tmp_path, toy, family, {"units": units, "values": ["zero"]})
    prompts = case.hand.prompts
    case.hand.at = {i: sorted({p.spans["end"][0], 6}) for i, p in enumerate(prompts)}
    case.hand.keys = {i: [0, p.spans["copied"][0]] for i, p in enumerate(prompts)}
    case.check("zero", case.hand.zero)


@pytest.mark.parametrize("places", [["end"], ["matched", 1], [["copied", "end"]], "last"])
def test_positions(tmp_path: Path, toy: LoadedModel, places: Any) -> None:
    section = {"units": [{"kind": "head", "layers": [0], "positions": places}], "values": ["zero", "mean"]}
    case = Case(tmp_path, toy, "toy", section)
    table = case.run.table("results")
    groups = [group if isinstance(group, list) else [group] for group in (["end"] if places == "last" else places)]
    trials = {value: sorted(set(table[table["ablation"] == value]["trial"])) for value in ("zero", "mean")}
    for value, chosen in trials.items():
        assert len(chosen) == 4 * len(groups)
        for row in case.rows(value):
            # Heads outside, places inside.
            group = groups[chosen.index(row["trial"]) % len(groups)]
            spans = case.hand.prompts[row["prompt"]].spans
            case.hand.at = {
                row["prompt"]: sorted({at for g in group for at in ([g] if isinstance(g, int) else spans[g])})
            }
            stand = case.hand.zero if value == "zero" else case.hand.mean
            case.agree(row, case.hand.ablated(row["prompt"], row["names"], stand))


DESIGNS: dict[str, dict[str, Any]] = {
    "cumulative": {"cumulative": {"ranking": ["1.2", "0.1", "1.0"], "k": [1, 3], "random": 2}},
    "set": {"sets": SETS | {"all": ["0.0", "1.3", "mlp1"]}},
    "keep": {"sets": SETS | {"all": ["0.0", "1.3", "mlp1"]}},
    "pairs": {"pairs": [["1.2", "0.1"], ["mlp0", "0.1"]]},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design(tmp_path: Path, toy: LoadedModel, family: str, design: str) -> None:
    section = {
        "units": [{"kind": "head", "layers": [0, 1]}, {"kind": "mlp", "layers": [0, 1]}],
        "values": ["zero", "mean", "resample", "optimal"],
        "resample": {"draws": 2},
        "optimal": {"steps": 2, "share": 0.4},
        "design": design,
        **DESIGNS[design],
    }
    case = Case(tmp_path, toy, family, section)
    case.check("zero", case.hand.zero)
    case.check("mean", case.hand.mean)
    case.check("optimal", optimal_stand(case))
    check_resample(case)


def test_whole_texts_of_two_lengths(tmp_path: Path, toy: LoadedModel) -> None:
    metrics = ["loss", "kl", "repeated_loss", "first_loss"]
    section = {
        "units": [
            {"kind": "head", "layers": [1]},
            {"kind": "attention", "layers": [0]},
            {"kind": "mlp", "layers": [0]},
        ],
        "values": ["zero", "mean", "resample", "noise", "optimal"],
        "resample": {"draws": 1},
        "noise": {"draws": 2},
        "optimal": {"steps": 2, "share": 0.4},
    }
    case = Case(tmp_path, toy, "toy", section, task=TEXTS, metrics=metrics)
    case.check("zero", case.hand.zero)
    case.check("mean", case.hand.mean)
    case.check("noise", noise_stand(case), add=True)
    case.check("optimal", optimal_stand(case))
    check_positions(case, "zero", case.hand.zero)


def check_positions(case: Case, value: str, stand: Stand) -> None:
    """The table `positions` is the mean by hand over the prompts of each template."""
    table = case.run.table("positions")
    table = table[table["ablation"] == value]
    templates = {p.template for p in case.hand.prompts}
    assert len(templates) == 2
    for _, row in table.iterrows():
        members = [i for i, p in enumerate(case.hand.prompts) if p.template == row["template"]]
        assert row["n"] == len(members)
        name = f"{row['metric']}@{row['position']}"
        if row["metric"] not in ("loss", "kl"):
            continue
        names = [] if row["label"] == "unedited" else names_in(row["label"])
        plain = [token_metrics(case.hand, i, case.hand.clean[i])[name] for i in members]
        own = [token_metrics(case.hand, i, case.hand.ablated(i, names, stand))[name] for i in members]
        assert row["value"] == pytest.approx(sum(own) / len(own), abs=TOLERANCE)
        if names:
            assert row["effect"] == pytest.approx((sum(own) - sum(plain)) / len(own), abs=TOLERANCE)
    longest = max(p.length for p in case.hand.prompts)
    assert set(table["position"]) == set(range(1, longest))


# --- nothing and everything


def test_noise_of_next_to_nothing_leaves_the_stream(tmp_path: Path, toy: LoadedModel) -> None:
    section = {"units": [{"kind": "head"}, {"kind": "layer"}], "values": ["noise"], "noise": {"scale": 1e-12}}
    run = run_method(tmp_path, "ablate", section, task=TASK)
    assert float(run.table("results")["effect"].abs().max()) < 1e-5
    # A positive control: what the scale was that does something.
    loud = run_method(tmp_path, "ablate", section | {"noise": {"scale": 1.0}}, task=TASK)
    assert float(loud.table("results")["effect"].abs().max()) > 0.1


def test_keeping_everything_is_the_unedited_model(tmp_path: Path) -> None:
    heads = [f"{layer}.{head}" for layer in range(2) for head in range(4)]
    section = {"units": [{"kind": "head"}], "values": ["zero"], "design": "keep", "sets": {"all": heads}}
    run = run_method(tmp_path, "ablate", section, task=TASK)
    (row,) = run.table("circuits").to_dict("records")
    assert row["alone"] == row["full"]
    assert row["without"] == row["empty"]
    assert (row["faithfulness"], row["completeness"]) == (1.0, 1.0)
    results = run.table("results")
    kept = results[results["design"] == "keep"]
    assert set(kept["status"]) == {"trivial"}
    assert set(kept["effect"]) == {0.0}


@pytest.mark.parametrize("value", ["zero", "mean"])
def test_a_residual_direction_of_full_rank_leaves_the_constants_logits(
    tmp_path: Path, toy: LoadedModel, value: str
) -> None:
    save_file({"resid_post.1": torch.eye(64)}, tmp_path / "all.safetensors")
    section = {"units": [{"kind": "direction", "file": str(tmp_path / "all.safetensors")}], "values": [value]}
    case = Case(tmp_path, toy, "toy", section)
    over = torch.cat([seen["resid_post", 1] for seen in case.hand.seen]).mean(0)
    model: Any = toy.model
    with torch.no_grad():
        constant = model.lm_head(model.model.norm((over if value == "mean" else torch.zeros_like(over))[None, None]))[0]
    for row in case.rows(value):
        case.agree(row, constant)
    assert len({round(row["kl"], 3) for row in case.rows(value)}) > 1


def test_every_block_at_its_mean_leaves_the_embedding_and_constants(tmp_path: Path, toy: LoadedModel) -> None:
    units = [{"kind": "layer"}]
    section = {"units": units, "values": ["mean"], "design": "set", "sets": {"all": ["layer0", "layer1"]}}
    case = Case(tmp_path, toy, "toy", section)
    hand, model = case.hand, toy.model
    places = [(kind, layer) for layer in range(2) for kind in ("attn_out", "mlp_out")]
    constant = sum(torch.cat([seen[place] for seen in hand.seen]).mean(0) for place in places)
    for row in case.rows("mean"):
        with torch.no_grad():
            hidden = hand.seen[row["prompt"]]["embed", 0] + constant
            logits = model.lm_head(model.model.norm(hidden[None]))[0]
        case.agree(row, logits)


# --- the planted circuit


def planted_run(folder: Path, section: Mapping[str, Any], **more: Any) -> Run:
    return run_method(
        folder,
        "ablate",
        {"units": [{"kind": "head"}], "values": ["zero", "mean"], **section},
        model={"id": "planted-induction"},
        task={"name": "induction", "n": 12, "block": 8},
        **more,
    )


def others(planted_heads: Sequence[str]) -> list[str]:
    return [f"{i}.{j}" for i in range(LAYERS) for j in range(HEADS) if f"{i}.{j}" not in planted_heads]


def circuit() -> list[str]:
    return [f"{layer}.{head}" for layer, head in (PREVIOUS_TOKEN_HEAD, INDUCTION_HEAD)]


def test_the_curve_of_the_planted_circuit_falls_with_its_first_head(tmp_path: Path) -> None:
    rest = others(circuit())
    for number, ranking in enumerate((circuit() + rest, circuit()[::-1] + rest)):
        grid = [1, 2, len(ranking)]
        section = {"design": "cumulative", "cumulative": {"ranking": ranking, "k": grid, "random": 5}}
        (folder := tmp_path / str(number)).mkdir()
        run = planted_run(folder, section)
        curve: Any = run.table("curve").set_index(["ablation", "k"])
        for value in ("zero", "mean"):
            fall = [float(curve.loc[(value, k), "effect"]) for k in grid]
            full = float(curve.loc[(value, 1), "baseline"])
            assert full > 1
            assert fall[1] == pytest.approx(fall[0], rel=0.05)
            assert fall[2] == pytest.approx(fall[0], rel=0.05)
            assert abs(full + fall[0]) < 0.05 * full
            # As many other heads of the same layers do nothing.
            assert abs(float(curve.loc[(value, 1), "random_effect"])) < 1e-4 * full


def test_a_set_is_faithful_as_far_as_it_holds_the_planted_circuit(tmp_path: Path) -> None:
    both, rest = circuit(), others(circuit())
    sets = {
        "planted": both,
        "more": [*both, *rest[:3]],
        "all": [*both, *rest],
        "first": [both[0], *rest],
        "second": [both[1]],
        "none": rest,
    }
    table = planted_run(tmp_path, {"design": "keep", "sets": sets}).table("circuits")
    for value in ("zero", "mean"):
        found = table[table["ablation"] == value].set_index("set")["faithfulness"].to_dict()
        for name in ("planted", "more", "all"):
            assert found[name] == pytest.approx(1, abs=1e-5), (value, name)
        for name in ("first", "second", "none"):
            assert found[name] < 0.05, (value, name)
            assert math.isfinite(found[name])
