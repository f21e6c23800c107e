"""A run over checkpoints is its models' own runs, one after the other: the same bits, resumed, repeated, refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from mechinterp_cli.cli.main import main
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.engine import plan
from mechinterp_cli.engine.execute import executor_named
from mechinterp_cli.errors import UserError
from mechinterp_cli.methods import bench
from mechinterp_cli.models import toy
from mechinterp_cli.models.checkpoints import moments_of
from mechinterp_cli.models.checksum import sha256_of
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.recorder import RunRecorder
from mechinterp_cli.runs.schema import table_keys
from mechinterp_cli.runs.tables import read_parquet
from tests.experiments import Run, run_method
from tests.models_files import tiny_llama, write_folder
from tests.test_resume import _Counting, only_run, saved_lines, stop_after

STEPS = ["step600", "step0", "step1500"]
"""Not in the order of training: a run keeps the order of its config."""
SEEN = {checkpoint.revision: checkpoint.tokens for checkpoint in toy.checkpoints()}
PATCH = {"sites": [{"kind": "resid_pre", "positions": "each"}, {"kind": "z", "heads": "each", "positions": "all"}]}
CAUSAL = {"scores": ["induction"], "k": [1], "random": 3, "prompts": 2, "checkpoints": "all"}
SECTIONS: dict[str, dict[str, Any]] = {
    "patch": PATCH,
    "heads": {"scores": ["induction", "copying", "k_composition"], "causal": CAUSAL},
}
METHODS = list(SECTIONS)


def toy_model(**options: Any) -> dict[str, Any]:
    return {"id": "toy-induction", **options}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, list[Run]]]:
    """Gives, of a method, the run over `STEPS` and the runs of each alone."""
    made: dict[str, tuple[Run, list[Run]]] = {}

    def run(method: str, model: dict[str, Any]) -> Run:
        output = {"figures": ["png"]}
        folder = tmp_path_factory.mktemp(method)
        return run_method(folder, method, SECTIONS[method], model=model, output=output)

    def give(method: str) -> tuple[Run, list[Run]]:
        if method not in made:
            alone = [run(method, toy_model(revision=step)) for step in STEPS]
            made[method] = run(method, toy_model(checkpoints=STEPS)), alone
        return made[method]

    return give


Runs = Callable[[str], tuple[Run, list[Run]]]


def tables(run: Path) -> dict[str, pa.Table]:
    return {path.stem: read_parquet(path) for path in sorted(run.glob("*.parquet"))}


def same(first: pa.Table, second: pa.Table) -> bool:
    """Bit for bit; NaN is NaN."""
    return bool(first.to_pandas(types_mapper=None).equals(second.to_pandas(types_mapper=None)))


# --- the same numbers


@pytest.mark.parametrize("method", METHODS)
def test_every_table_is_those_of_the_models_alone_one_after_the_other(runs: Runs, method: str) -> None:
    together, alone = runs(method)
    whole, parts = tables(together.path), [tables(run.path) for run in alone]
    # Alone, the unedited model's losses are of use to the ablations; along training, to every run of heads.
    assert set(whole) == set(parts[0])
    assert same(whole.pop("prompts"), parts[0]["prompts"])
    for name, table in whole.items():
        own = [column for column in table.column_names if column not in ("checkpoint", "tokens_seen")]
        assert same(table.select(own), pa.concat_tables([part[name].select(own) for part in parts]))
        lengths = [len(part[name]) for part in parts]
        named = [step for step, length in zip(STEPS, lengths, strict=True) for _ in range(length)]
        assert table["checkpoint"].to_pylist() == named
        assert table["tokens_seen"].to_pylist() == [SEEN[step] for step in named]
        assert min(lengths) > 0
        assert parts[0][name]["checkpoint"].null_count == lengths[0]
    values = "results" if method == "patch" else "scores"
    assert not same(parts[0][values], parts[1][values])


@pytest.mark.parametrize("method", METHODS)
def test_keys_with_the_checkpoint_name_every_row_once(runs: Runs, method: str) -> None:
    together, _ = runs(method)
    for name, table in tables(together.path).items():
        rows = table.select(list(table_keys(name))).to_pandas()
        assert not rows.duplicated().any(), name
        if name != "prompts":
            assert rows.drop(columns="checkpoint").duplicated().any()


@pytest.mark.parametrize("method", METHODS)
def test_the_manifest_lists_every_checkpoint_and_its_proof(runs: Runs, method: str) -> None:
    together, alone = runs(method)
    model, parts = together.manifest["model"], together.manifest["engine"]["parts"]
    assert [(part["checkpoint"], part["tokens_seen"]) for part in model["checkpoints"]] == [(s, SEEN[s]) for s in STEPS]
    for step, part in zip(STEPS, model["checkpoints"], strict=True):
        assert part["weight_files"] == {f"{step}.safetensors": sha256_of(toy.FOLDER / f"{step}.safetensors")}
        assert (part["revision"], part["dtype"]) == (step, "float32")
    jobs = [part for part in parts if part["job"] is not None]
    assert [part["checkpoint"] for part in jobs] == STEPS
    assert all(part["proof"]["deviation"] < part["proof"]["tolerance"] for part in jobs)
    patterns = [part["checkpoint"] for part in parts if "patterns" in part]
    assert patterns == (STEPS if method == "heads" else [])
    assert [part["plan"] for part in jobs] == [
        next(part["plan"] for part in run.manifest["engine"]["parts"] if part["job"] is not None) for run in alone
    ]
    assert together.manifest["units_done"] == together.manifest["units_total"] == 3 * alone[0].manifest["units_done"]


@pytest.mark.parametrize("method", METHODS)
def test_the_run_is_in_order_shown_listed_and_compared(
    runs: Runs, method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = runs(method)[0].path
    assert main(["verify", str(path), "--quiet"]) == 0
    assert main(["show", str(path)]) == 0
    shown = capfd.readouterr().err
    assert "checkpoint step1500, the last of 3" in shown
    assert main(["runs", str(path.parent)]) == 0
    assert "toy-induction" in capfd.readouterr().out
    assert main(["compare", str(path), str(path), "--fail-above", "0", "--json"]) == 0
    assert {row["checkpoint"] for row in json.loads(capfd.readouterr().out)} == set(STEPS)
    assert list(path.glob("figures/*training*.png"))


def test_all_checkpoints_of_the_toy(tmp_path: Path) -> None:
    run = run_method(tmp_path, "heads", {"scores": ["induction"], "show": 0}, model=toy_model(checkpoints="all"))
    rows = run.table("scores").drop_duplicates("checkpoint")
    assert dict(zip(rows["checkpoint"], rows["tokens_seen"], strict=True)) == SEEN
    assert list(rows["checkpoint"]) == [f"step{checkpoint.step}" for checkpoint in toy.checkpoints()]
    best = run.table("scores").groupby("checkpoint")["value"].max()
    assert best["step0"] < 0.2 < 0.8 < best["step1500"]


@pytest.mark.parametrize("method", METHODS)
def test_a_repetition_gives_the_same_bytes(
    runs: Runs, method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = runs(method)[0].path
    assert main(["reproduce", str(path), "--exact", "--out", str(tmp_path)]) == 0
    again = only_run(str(tmp_path))
    capfd.readouterr()
    assert {name: same(table, tables(path)[name]) for name, table in tables(again).items()} == dict.fromkeys(
        tables(path), True
    )
    assert Manifest.read(again).engine["parts"] == Manifest.read(path).engine["parts"]


@pytest.mark.parametrize("steps", [["step600", "step1500", "step0"], ["step0", "step600", "step1500"]])
def test_the_end_of_the_training_is_ablated_and_shown_wherever_it_is_listed(
    tmp_path: Path, steps: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    causal = {"k": [1], "random": 3, "prompts": 2}
    section = {"scores": ["induction"], "show": 0, "causal": causal}
    run = run_method(tmp_path, "heads", section, model=toy_model(checkpoints=steps))
    assert set(run.table("causal")["checkpoint"]) == set(run.table("trials")["checkpoint"]) == {"step1500"}
    assert main(["show", str(run.path)]) == 0
    assert "induction, zero ablation" in capfd.readouterr().err


# --- folders


def perturbed(model: LlamaForCausalLM, seed: int) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return model


def write_checkpoint(folder: Path, step: int, tokens: int | None = None) -> Path:
    """What transformers' Trainer leaves."""
    write_folder(folder, perturbed(tiny_llama(), step))
    seen = {} if tokens is None else {"num_input_tokens_seen": tokens}
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, **seen}))
    return folder


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of checkpoints, and the place to work in."""
    monkeypatch.chdir(tmp_path)
    for step in (100, 5, 10):
        write_checkpoint(Path("out") / f"checkpoint-{step}", step, 64 * step)
    (Path("out") / "logs").mkdir()
    return Path("out")


ONE_SITE = {"sites": [{"kind": "z", "heads": "each", "positions": "all"}]}
IN_ORDER = ["checkpoint-5", "checkpoint-10", "checkpoint-100"]


def test_folders_of_one_training(training: Path) -> None:
    everything = run_method(Path(), "patch", ONE_SITE, model={"id": "out", "checkpoints": "all"})
    rows = everything.table("summary").drop_duplicates("checkpoint")
    assert list(zip(rows["checkpoint"], rows["tokens_seen"], strict=True)) == list(
        zip(IN_ORDER, (320, 640, 6400), strict=True)
    )
    files = [part["weight_files"] for part in everything.manifest["model"]["checkpoints"]]
    assert files == [{"model.safetensors": sha256_of(training / name / "model.safetensors")} for name in IN_ORDER]
    full = [str(training.absolute() / name) for name in IN_ORDER]
    for names in (IN_ORDER, full, [IN_ORDER[0], full[1], str(training / IN_ORDER[2])]):
        other = run_method(Path(), "patch", ONE_SITE, model={"id": "out", "checkpoints": names})
        assert other.table("results")["value"].equals(everything.table("results")["value"])
        assert list(other.table("results")["checkpoint"].unique()) == names
    alone = run_method(Path(), "patch", ONE_SITE, model={"id": full[1]}).table("results")
    whole = everything.table("results")
    assert list(alone["value"]) == list(whole[whole["checkpoint"] == "checkpoint-10"]["value"])


def names_and_tokens(folder: Path, checkpoints: Any = "all") -> list[tuple[str | None, int | None]]:
    found = moments_of(ModelOptions(id=str(folder), checkpoints=checkpoints))
    return [(moment.name, moment.tokens_seen) for moment in found]


def test_tokens_in_the_names_of_folders_and_their_order(tmp_path: Path) -> None:
    names = ["stage1-step1000-tokens5B", "stage1-step500-tokens300M", "stage1-step9000-tokens2T", "step1-tokens7K"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    wanted = [(names[3], 7_000), (names[1], 300_000_000), (names[0], 5 * 10**9), (names[2], 2 * 10**12)]
    assert names_and_tokens(tmp_path) == wanted
    assert names_and_tokens(tmp_path, tuple(names[:2])) == [wanted[2], wanted[1]]


@pytest.mark.parametrize(
    ("state", "tokens"),
    [
        ('{"num_input_tokens_seen": 640}', 640),
        ('{"num_input_tokens_seen": 0}', None),
        ('{"global_step": 3}', None),
        ("[]", None),
        ("{", None),
        (None, None),
    ],
)
def test_tokens_are_known_where_the_trainer_counted_them(tmp_path: Path, state: str | None, tokens: int | None) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "config.json").write_text("{}")
    if state is not None:
        (tmp_path / "checkpoint-3" / "trainer_state.json").write_text(state)
    assert names_and_tokens(tmp_path) == [("checkpoint-3", tokens)]


def test_revisions_of_an_id_are_taken_as_they_are() -> None:
    names = ("step3-tokens1M", "main")
    found = moments_of(ModelOptions(id="some/model", checkpoints=names))
    assert [(m.name, m.tokens_seen, m.options.id, m.options.revision) for m in found] == [
        ("step3-tokens1M", 10**6, "some/model", "step3-tokens1M"),
        ("main", None, "some/model", "main"),
    ]
    assert all(moment.options.checkpoints is None for moment in found)


# --- stopped, and gone on with


def write_config(method: str, model: dict[str, Any]) -> None:
    task = {"name": "induction", "n": 4, "block": 6, "prefix": 2} if method == "patch" else {"name": "repeats", "n": 6}
    whole = {"name": "along", "model": model, "task": task, method: SECTIONS[method]}
    whole |= {"stats": {"bootstrap": 100, "flips": 99}, "output": {"figures": []}}
    Path("c.yaml").write_text(yaml.safe_dump(whole))


@pytest.fixture
def many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own, and units so small that there are many."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 64)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for form in ("parquet", "csv") for path in sorted(run.glob(f"*.{form}"))}


def whole_run(method: str, checkpoints: int = 3) -> tuple[dict[str, bytes], int]:
    """The tables of a run that nothing stopped, and the units of each checkpoint."""
    assert main([method, "c.yaml", "--out", "whole", "--quiet"]) == 0
    run = only_run("whole")
    units, rest = divmod(Manifest.read(run).units_done, checkpoints)
    assert rest == 0
    assert units > 3
    return files(run), units


@pytest.mark.usefixtures("many_units")
@pytest.mark.parametrize("method", METHODS)
def test_stopped_in_a_later_checkpoint_it_goes_on_there(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(method, toy_model(checkpoints=STEPS))
    undisturbed, units = whole_run(method)
    stop_after(monkeypatch, units + 2, KeyboardInterrupt())
    assert main([method, "c.yaml", "--quiet"]) == 130
    run = only_run()
    before = Manifest.read(run)
    assert (before.units_done, before.units_total) == (units + 2, 3 * units)
    assert [part["checkpoint"] for part in before.model["checkpoints"]] == STEPS
    assert ["weight_files" in part for part in before.model["checkpoints"]] == [True, True, False]
    assert len(list((run / "units").iterdir())) == units + 2

    # Stopped again before the second checkpoint is loaded: nothing of what was known of it is forgotten.
    with monkeypatch.context() as patch:
        patch.setattr("mechinterp_cli.methods.run._later", _interrupted)
        assert main(["resume", str(run), "--quiet"]) == 130
    again = Manifest.read(run)
    assert (again.units_done, again.units_total) == (units + 2, 3 * units)
    assert again.model == before.model
    assert [_plan(part) for part in again.engine["parts"]] == [_plan(part) for part in before.engine["parts"]]

    calls: list[int] = []
    told: list[tuple[int, int]] = []
    real = RunRecorder.units_done

    def noted(self: RunRecorder, done: int, total: int) -> None:
        told.append((done, total))
        real(self, done, total)

    monkeypatch.setattr(RunRecorder, "units_done", noted)
    monkeypatch.setattr(bench, "executor_named", lambda *a: _Counting(executor_named(*a), calls))
    assert main(["resume", str(run), "--quiet"]) == 0
    assert files(run) == undisturbed
    assert len(calls) == 2 * units - 2
    assert set(saved_lines(run).values()) == {1}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {3 * units}
    assert (told[0][0], told[-1][0]) == (units + 2, 3 * units)
    after, whole = Manifest.read(run), Manifest.read(only_run("whole"))
    assert after.model == whole.model
    assert [_plan(part) for part in after.engine["parts"]] == [_plan(part) for part in whole.engine["parts"]]


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _plan(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part.get(name) for name in ("checkpoint", "job", "plan", "halved")}


@pytest.mark.usefixtures("many_units")
def test_units_are_counted_up_and_never_beyond_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(RunRecorder, "units_done", lambda self, done, total: told.append((done, total)))
    write_config("patch", toy_model(checkpoints=STEPS))
    assert main(["patch", "c.yaml", "--quiet"]) == 0
    assert told[0][0] == 0
    assert {total for _, total in told} == {told[-1][0]}
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_changed_weights_of_a_later_checkpoint_are_refused(
    training: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "ROWS_PER_UNIT", 64)
    write_config("patch", {"id": "out", "checkpoints": "all"})
    undisturbed, units = whole_run("patch")
    stop_after(monkeypatch, units + 2, KeyboardInterrupt())
    assert main(["patch", "c.yaml", "--quiet"]) == 130
    run, kept = only_run(), Path("kept")
    shutil.move(training / "checkpoint-10", kept)
    write_checkpoint(training / "checkpoint-10", 11, 640)
    capfd.readouterr()
    for _ in range(2):  # what was recorded is not what was found
        assert main(["resume", str(run), "--quiet"]) == 2
        cause, fix = _error(capfd)
        assert f"{run}: cannot be resumed, checkpoint checkpoint-10 changed since it began: weight_files." in cause
        assert fix == "fix: Put back what it began with, or run the experiment anew."
    shutil.rmtree(training / "checkpoint-10")
    shutil.move(kept, training / "checkpoint-10")
    assert main(["resume", str(run), "--quiet"]) == 0
    assert files(run) == undisturbed


def test_changed_weights_of_the_first_checkpoint_are_refused_before_anything_is_touched(
    training: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config("patch", {"id": "out", "checkpoints": "all"})
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    assert main(["patch", "c.yaml", "--quiet"]) == 130
    run = only_run()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_checkpoint(training / "checkpoint-5", 6, 320)
    capfd.readouterr()
    assert main(["resume", str(run), "--quiet"]) == 2
    assert "cannot be resumed, model changed since it began: weight_files.model.safetensors" in _error(capfd)[0]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_checkpoint_that_came_since_is_refused(
    training: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_config("patch", {"id": "out", "checkpoints": "all"})
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    assert main(["patch", "c.yaml", "--quiet"]) == 130
    run = only_run()
    write_checkpoint(training / "checkpoint-200", 200, 12800)
    capfd.readouterr()
    assert main(["resume", str(run), "--quiet"]) == 2
    names = ", ".join(IN_ORDER)
    change = f"checkpoints changed since it began: model.checkpoints: {names} -> {names}, checkpoint-200"
    assert f"cannot be resumed, {change}" in _error(capfd)[0]
    shutil.rmtree(training / "checkpoint-200")
    assert main(["resume", str(run), "--quiet"]) == 0


# --- what is refused


def _error(capfd: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return [line for line in err.splitlines() if line.startswith(("error:", "fix:"))]


def refused(
    capfd: pytest.CaptureFixture[str], model: dict[str, Any], cause: str, remedy: str, *, method: str = "patch"
) -> None:
    """The run ends with 2, says what is wrong and what to do, and leaves nothing."""
    write_config(method, model)
    capfd.readouterr()
    assert main([method, "c.yaml"]) == 2
    found = _error(capfd)
    assert cause in found[0]
    assert remedy in found[1]
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("options", "cause", "remedy"),
    [
        (
            {"checkpoints": ["step0"], "revision": "step600"},
            "model.revision: is given together with model.checkpoints",
            "Keep one of the two.",
        ),
        (
            {"checkpoints": ["step0", "step7"]},
            "model.checkpoints[1]: toy-induction has no checkpoint 'step7'",
            "It has: step0, step50, ",
        ),
        (
            {"checkpoints": ["step0", "step600", "step0"]},
            'model.checkpoints: ["step0", "step600", "step0"] is not valid; listed twice: step0',
            "",
        ),
        ({"checkpoints": []}, "model.checkpoints", ""),
        (
            {"id": "some/model", "checkpoints": "all"},
            "model.checkpoints: all needs a local folder that holds folders of models, some/model is none",
            "List the checkpoints: their folders, or revisions of the Hugging Face id.",
        ),
        (
            {"id": "planted-induction", "checkpoints": ["step0"]},
            "model.checkpoints[0]: step0 is no folder, and planted-induction has no revisions",
            "Leave out model.checkpoints, or list folders of models.",
        ),
        (
            {"id": "empty", "checkpoints": "all"},
            "model.checkpoints: all needs a local folder that holds folders of models, empty is none",
            "List the checkpoints",
        ),
        (
            {"id": "empty", "checkpoints": ["checkpoint-5"]},
            "model.checkpoints[0]: there is no folder checkpoint-5, neither in empty nor by itself",
            "empty holds no folders of models.",
        ),
        (
            {"id": "out", "checkpoints": ["checkpoint-5", "checkpoint-7"]},
            "model.checkpoints[1]: there is no folder checkpoint-7, neither in out nor by itself",
            "out holds checkpoint-5, checkpoint-10, checkpoint-100.",
        ),
        ({"id": "out", "checkpoints": ["logs"]}, "out/logs", ""),
    ],
)
@pytest.mark.usefixtures("training")
def test_what_cannot_be_meant(
    capfd: pytest.CaptureFixture[str], options: dict[str, Any], cause: str, remedy: str
) -> None:
    Path("empty").mkdir()
    refused(capfd, toy_model() | options, cause, remedy)


@pytest.mark.parametrize(
    ("size", "value", "says"),
    [
        ("num_hidden_layers", 3, "num_hidden_layers 3"),
        ("hidden_size", 64, "hidden_size 64"),
        ("vocab_size", 70, "vocab_size 70"),
        ("num_attention_heads", 4, "num_attention_heads 4"),
    ],
)
def test_other_sizes_are_found_before_anything_is_computed(
    training: Path, capfd: pytest.CaptureFixture[str], size: str, value: int, says: str
) -> None:
    config = tiny_llama().config.to_dict() | {size: value, "head_dim": None}
    write_folder(training / "checkpoint-10", LlamaForCausalLM(LlamaConfig(**config)))
    has = tiny_llama().config.to_dict()[size]
    cause = f"model.checkpoints[1]: checkpoint-10 has {says}, and checkpoint-5 has {has}"
    remedy = "Checkpoints are moments of one training: list those of one model."
    for method in METHODS:
        refused(capfd, {"id": "out", "checkpoints": "all"}, cause, remedy, method=method)


def refused_at_load(capfd: pytest.CaptureFixture[str], model: dict[str, Any], cause: str) -> None:
    write_config("patch", model)
    capfd.readouterr()
    assert main(["patch", "c.yaml"]) == 2
    assert cause in _error(capfd)[0]
    assert Manifest.read(only_run()).status == "failed"


def test_another_tokenizer_is_found_when_it_is_loaded(training: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = training / "checkpoint-10" / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["k0"], vocabulary["k1"] = vocabulary["k1"], vocabulary["k0"]
    path.write_text(json.dumps(rules))
    cause = "model.checkpoints[1]: checkpoint-10 has another tokenizer, and checkpoint-5 has its own"
    refused_at_load(capfd, {"id": "out", "checkpoints": "all"}, cause)


def test_another_width_of_the_mlp_is_found_when_it_is_loaded(training: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(**tiny_llama().config.to_dict() | {"intermediate_size": 48})
    write_folder(training / "checkpoint-100", LlamaForCausalLM(config))
    cause = "model.checkpoints[2]: checkpoint-100 has MLP width [48, 48], and checkpoint-5 has [64, 64]"
    refused_at_load(capfd, {"id": "out", "checkpoints": "all"}, cause)


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"task": {"name": "induction", "n": 4, "keep": "correct"}}, "task.keep: correct drops the prompts that"),
        (
            {"task": {"name": "induction", "n": 4}, "patch": {**PATCH, "tracing": {"span": "end"}}},
            "patch.tracing: drops the prompts that",
        ),
    ],
)
def test_prompts_may_not_depend_on_the_checkpoint(tmp_path: Path, more: dict[str, Any], cause: str) -> None:
    section = more.pop("patch", PATCH) if "patch" in more else PATCH
    others = {name: value for name, value in more.items() if name != "patch"}
    with pytest.raises(UserError, match=cause) as caught:
        run_method(tmp_path, "patch", section, model=toy_model(checkpoints=STEPS), **others)
    assert caught.value.remedy == "Leave out model.checkpoints, or keep all prompts."
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_names_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], method: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(method, toy_model(checkpoints=STEPS))
    assert main([method, "c.yaml", "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out)["checkpoints"] == STEPS
    write_config(method, toy_model())
    assert main([method, "c.yaml", "--dry-run"]) == 0
    assert "checkpoints" not in json.loads(capfd.readouterr().out)
    assert not list(Path("runs").glob("*"))


def test_a_dry_run_refuses_what_a_run_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config("patch", toy_model(checkpoints=["step0", "step7"]))
    assert main(["patch", "c.yaml", "--dry-run"]) == 2
    assert "toy-induction has no checkpoint 'step7'" in _error(capfd)[0]
