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
from mechinterp_cli.models.zoo import models_folder
from tests.ablate_plain import ByHand, Stand, answer_metrics, experiment_of, folder_of, names_in, token_metrics
from tests.experiments import Run, config_of, run_method
from tests.models_fixtures import smollm2, toy
from tests.oracle import Oracle

__all__ = ["smollm2", "toy"]

TOLERANCE = 1e-4
VISIBLE = 1e-3
"""What an ablation must change at least: comparing nothing with nothing shows nothing."""
REAL = "smollm2"
SIX = ("gpt2", "llama", "gpt_neox", "gemma2", "qwen3", "granite")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in SIX if name != "llama"]
FAMILIES = ("toy", "llama", *SLOW)
IN_DESIGNS = (pytest.param("toy", marks=pytest.mark.slow), "llama", *SLOW)
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
Measure = Callable[[ByHand, int, Tensor], Mapping[str, float]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Activations are kept for one test; the real model, once it is there, for all."""
    (tmp_path / "cache").mkdir()
    if "real_model" in request.node.name:
        request.getfixturevalue(REAL)
        (tmp_path / "cache" / "models").symlink_to(models_folder())
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


class Case:
    """A run, and the same by hand."""

    def __init__(
        self, folder: Path, whole: LoadedModel | None, family: str, section: Mapping[str, Any], **sections: Any
    ) -> None:
        model = folder_of(family, folder) if whole is None else whole.source.id
        sections = {"task": TASK, "metrics": ["logit_diff", "kl"]} | sections
        given = {"model": {"id": model}, **sections}
        self.section = section
        self.run: Run = run_method(folder, "ablate", dict(section), **given)
        self.experiment: AblateExperiment = experiment_of(config_of(folder, dict(section), method="ablate", **given))
        oracle = Oracle(family) if whole is None else Oracle("llama", whole.model)
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


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Case]:
    """Runs a section on a family, on the toy, or on the real model."""

    def make(family: str, section: Mapping[str, Any], **sections: Any) -> Case:
        whole: LoadedModel | None = request.getfixturevalue(family) if family in ("toy", REAL) else None
        return Case(tmp_path, whole, family, section, **sections)

    return make


Make = Callable[..., Case]


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


ALL: list[str] = ["zero", "mean", "mean_of_prompt", "resample", "noise", "optimal"]
ALONG: list[str] = ["zero", "mean", "mean_of_prompt", "resample", "optimal"]
DRAWS: dict[str, Any] = {
    "resample": {"draws": 2},
    "noise": {"draws": 2, "seed": 3},
    "optimal": {"steps": 2, "share": 0.4},
}


def check_values(found: Case, values: Sequence[str]) -> None:
    """Each value of a run against what stands there by hand."""
    hand = found.hand
    plain = {"zero": hand.zero, "project": hand.zero, "mean": hand.mean, "mean_of_prompt": hand.mean_of_prompt}
    for value in values:
        if value in plain:
            found.check(value, plain[value])
        elif value == "resample":
            check_resample(found)
        else:
            stand = noise_stand(found) if value == "noise" else optimal_stand(found)
            found.check(value, stand, add=value == "noise")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name == "llama" else name for name in FAMILIES]
)
def test_every_unit_and_value_alone(case: Make, family: str) -> None:
    check_values(case(family, {"units": UNITS, "values": ALL, **DRAWS}), ALL)


REAL_UNITS: list[dict[str, Any]] = [
    {"kind": "head", "layers": [27], "heads": [0, 4]},
    {"kind": "kv_head", "layers": [28], "heads": [1, 2]},
    {"kind": "neuron", "layers": [28], "neurons": [3]},
    {"kind": "mlp", "layers": [27]},
]
REAL_BLOCKS: list[dict[str, Any]] = [{"kind": "attention", "layers": [28]}, {"kind": "layer", "layers": [27]}]


@pytest.mark.slow
def test_every_unit_and_value_of_the_real_model(case: Make) -> None:
    check_values(case(REAL, {"units": [*REAL_UNITS, *REAL_BLOCKS], "values": ALL, **DRAWS}), ALL)


@pytest.mark.slow
@pytest.mark.parametrize("design", ["cumulative", "set", "keep", "pairs"])
def test_every_design_of_the_real_model(case: Make, design: str) -> None:
    named = design_of(design, ("kv28.1", "27.4", "neuron28.3", "mlp27"))
    values = ["zero", "mean", "resample"]
    check_values(case(REAL, {"units": REAL_UNITS, "values": values, **DRAWS, **named}), values)


def directions(folder: Path, family: str, name: str = "d", seed: int = 1) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A block of units from a file of directions, and its rows by name of the tensor."""
    generator = torch.Generator().manual_seed(seed)
    d_model = {"toy": 64, REAL: 576}.get(family, 32)
    second = "resid_pre.1" if family == "gpt_neox" else "resid_mid.1"  # no resid_mid in parallel blocks
    found = {site: torch.randn(n, d_model, generator=generator) for site, n in (("resid_post.0", 2), (second, 1))}
    save_file(found, folder / f"{name}.safetensors")
    return {"kind": "direction", "file": str(folder / f"{name}.safetensors")}, found


@pytest.mark.parametrize("family", FAMILIES)
def test_directions(tmp_path: Path, case: Make, family: str) -> None:
    block, rows = directions(tmp_path, family)
    values = [*ALONG, "project"]
    found = case(family, {"units": [block], "values": values, "mean": {"per": "position"}, **DRAWS})
    found.hand.bases = rows
    found.check("mean", found.hand.mean_by_position)
    check_values(found, [value for value in values if value != "mean"])


EDGES: list[dict[str, Any]] = [
    {"kind": "edge", "positions": [["end", 6]], "keys": ["copied", 0], **more}
    for more in ({"layers": [1], "heads": "each"}, {"layers": [0]})
]


EDGE_NAMES = ("edge1.0", "edge1.1", "edge0", "mlp0")


def check_edges(found: Case) -> None:
    prompts = found.hand.prompts
    found.hand.at = {i: sorted({p.spans["end"][0], 6}) for i, p in enumerate(prompts)}
    found.hand.keys = {i: [0, p.spans["copied"][0]] for i, p in enumerate(prompts)}
    found.check("zero", found.hand.zero)


@pytest.mark.parametrize("family", FAMILIES)
def test_edges(case: Make, family: str) -> None:
    check_edges(case(family, {"units": EDGES, "values": ["zero"]}))


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


Names = tuple[str, str, str, str]


def design_of(name: str, units: Names) -> dict[str, Any]:
    """A design over four units; the first two of them are together in some trials."""
    a, b, c, d = units
    sections: dict[str, dict[str, Any]] = {
        "cumulative": {"cumulative": {"ranking": [a, b, c], "k": [1, 3], "random": 2}},
        "set": {"sets": {"one": [a], "mixed": [a, b, d], "rest": [c, d]}},
        "pairs": {"pairs": [[a, b], [c, d]]},
    }
    return {"design": name, **sections["set" if name == "keep" else name]}


PARTS: list[dict[str, Any]] = [
    {"kind": "head", "layers": [0]},
    {"kind": "kv_head", "layers": [1]},
    {"kind": "neuron", "layers": [1], "neurons": [3, 5]},
    {"kind": "mlp", "layers": [0]},
]
DESIGNS = ("cumulative", "set", "keep", "pairs")


@pytest.mark.parametrize("family", IN_DESIGNS)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_of_heads_neurons_and_blocks(case: Make, family: str, design: str) -> None:
    named = design_of(design, ("kv1.0", "0.1", "neuron1.3", "mlp0"))
    check_values(case(family, {"units": PARTS, "values": ALL, **DRAWS, **named}), ALL)


@pytest.mark.parametrize("family", IN_DESIGNS)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_of_blocks_and_directions(tmp_path: Path, case: Make, family: str, design: str) -> None:
    made = {name: directions(tmp_path, family, name, seed) for seed, name in enumerate("xy")}
    blocks = [block | {"layers": [0]} for block, _ in made.values()]
    blocks += [{"kind": "attention", "layers": [0]}, {"kind": "layer", "layers": [1]}]
    named = design_of(design, ("x:resid_post.0", "y:resid_post.0", "attention0", "layer1"))
    found = case(family, {"units": blocks, "values": ALONG, **DRAWS, **named})
    found.hand.bases = {f"{name}:resid_post.0": rows["resid_post.0"] for name, (_, rows) in made.items()}
    check_values(found, ALONG)


@pytest.mark.parametrize("family", IN_DESIGNS)
@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_of_edges(case: Make, family: str, design: str) -> None:
    units = [*EDGES, {"kind": "mlp", "layers": [0], "positions": [["end", 6]]}]
    check_edges(case(family, {"units": units, "values": ["zero"], **design_of(design, EDGE_NAMES)}))


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
