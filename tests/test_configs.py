"""Every shipped config runs, and every config and command that the documents show is a good one."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
import yaml
from jsonschema import Draft202012Validator
from typer.exceptions import TyperException

from mechinterp_cli.cli import experiments as commands_of
from mechinterp_cli.cli.init import SCHEMA_FILE
from mechinterp_cli.cli.main import app, main
from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.config.yaml_reader import parse as read_yaml
from mechinterp_cli.methods import run as methods_run
from mechinterp_cli.models import zoo
from mechinterp_cli.models.load import load_model
from mechinterp_cli.models.loaded import LoadedModel
from mechinterp_cli.runs.atomic import file_info
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.schema import PARQUET_ONLY

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "benchmarks" / "README.md", ROOT / "runs" / "README.md"]
QUICK = ["--set", "stats.bootstrap=100", "--set", "stats.flips=99"]
TABLES = {"prompts.parquet", "trials.parquet", "baselines.parquet", "results.parquet", "summary.parquet"}
SCORED = {"prompts.parquet", "scores.parquet", "sequences.parquet", "patterns.parquet"}
SCORED_AND_ABLATED = TABLES | SCORED | {"causal.parquet", "compositions.parquet"}
PNG = b"\x89PNG\r\n\x1a\n"

Main = Callable[..., str]


def by_name(path: Path) -> str:
    return path.stem


def load(path: Path, *overrides: str) -> LoadedConfig:
    """Load a config for the subcommand that its file is named after."""
    register_all()
    return load_config(path, overrides, method=path.stem.split("-")[0])


@pytest.fixture(scope="module")
def fetched() -> None:
    """The real model is at hand; fetched where it is not."""
    zoo.fetch("smollm2-135m-instruct")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Main:
    """Runs a command that must succeed; gives its stdout."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capfd.readouterr().out

    return run


def run_config(run: Main, path: Path, out: Path, *arguments: str) -> Path:
    """The run directory of a config; its subcommand is what the file is named after."""
    kind = path.stem.split("-")[0] if path.parent == ROOT / "configs" else "patch"
    return Path(run(kind, path, "--out", out, "--quiet", *QUICK, *arguments).removesuffix("\n"))


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_config_loads(path: Path) -> None:
    loaded = load(path)
    assert path.stem == f"{loaded.config.method_name}-{loaded.config.name}"
    assert loaded.config.output.dir == "runs"


@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_editors_find_the_schema_beside_a_config_and_no_fault_in_it(path: Path) -> None:
    text = path.read_text()
    assert text.startswith(f"# yaml-language-server: $schema={SCHEMA_FILE}\n#")
    validator = Draft202012Validator(json.loads((path.parent / SCHEMA_FILE).read_text()))
    document: Any = read_yaml(text, path.name).value
    assert [error.message for error in validator.iter_errors(document)] == []
    method = path.stem.split("-")[0]
    assert list(validator.iter_errors({**document, method: {**document[method], "sitse": []}}))


def test_the_schema_beside_the_configs_is_the_one_that_is_printed(run: Main) -> None:
    committed = (ROOT / "configs" / SCHEMA_FILE).read_text()
    assert committed == run("schema"), f"an option has changed: mechinterp schema > configs/{SCHEMA_FILE}"


@pytest.fixture(scope="module")
def planned_on() -> Callable[[ModelOptions], LoadedModel]:
    """Loads a model once for all plans, which only look at it."""
    models: dict[str, LoadedModel] = {}

    def load_once(options: ModelOptions) -> LoadedModel:
        wanted = options.model_dump_json()
        if wanted not in models:
            models[wanted] = load_model(options)
        return models[wanted]

    return load_once


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize("path", CONFIGS, ids=by_name)
def test_config_has_a_plan(
    path: Path, run: Main, planned_on: Callable[[ModelOptions], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods_run, "load_model", planned_on)
    kind = path.stem.split("-")[0]
    plan = json.loads(run(kind, path, "--dry-run"))
    task = load(path).config.resolved()["task"]
    texts = task["texts"] if "texts" in task else (path.parent / "previous-symbol.csv").read_text().splitlines()[1:]
    assert plan["prompts"] == (task["n"] or len(texts))
    if kind == "ablate":
        plan = plan["values"][load(path).config.resolved()["ablate"]["values"][0]]
    elif kind == "heads":
        assert plan["heads"] > 0
        plan = plan.get("ablations", {"trials": 1, "computed": 1, "units": 1})
    elif kind == "attribute":
        parts = ("sites", "direct", "lens", "inputs")
        assert plan["asked"] == [part for part in parts if f"\n  {part}:" in path.read_text()]
        plan = plan.get("exact", plan.get("inputs", {}).get("occlusion", {"trials": 1, "computed": 1, "units": 1}))
    elif kind == "probe":
        assert plan["probes"] > 0
        plan = {"trials": plan["samples"], "computed": plan["activation_bytes"], "units": 1}
    assert plan["trials"] > 0
    assert plan["computed"] > 0
    assert plan["units"] > 0


def check_files(
    folder: Path,
    source: Path,
    pictures_expected: int,
    tables: set[str] = TABLES,
    pages: int = 0,
    others: frozenset[str] = frozenset(),
) -> Manifest:
    """A complete run directory: what the README names, whole, as the manifest says, and so many pictures and pages."""
    manifest = Manifest.read(folder)
    assert (manifest.status, manifest.error) == ("complete", None)
    assert manifest.units_done == manifest.units_total
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {name for name in files if name.startswith("figures/")}
    readable = {
        name.replace(".parquet", ".csv") for name in tables if name.removesuffix(".parquet") not in PARQUET_ONLY
    }
    written = {"config.yaml", "config.resolved.yaml", "log.jsonl", "report.html"} | tables | readable | others
    circuits = {name for name in files if name.startswith("circuits/")}
    assert files - pictures - circuits == written | {"manifest.json"}
    assert set(manifest.outputs) == written | pictures | circuits
    assert all(file_info(folder / name, info.rows) == info for name, info in manifest.outputs.items())
    drawn = {name for name in pictures if not name.endswith(".html")}
    assert (len(drawn), len(pictures - drawn)) == (pictures_expected, pages)
    assert all((folder / name).read_bytes().startswith(PNG) for name in drawn)
    assert all(pq.read_metadata(folder / name).num_rows > 0 for name in tables)
    assert (folder / "config.yaml").read_bytes() == source.read_bytes()
    for line in (folder / "log.jsonl").read_text().splitlines():
        assert {"time", "level", "message"} <= json.loads(line).keys()
    return manifest


def test_the_toy_config_leaves_a_whole_run_directory_and_runs_again_from_it(tmp_path: Path, run: Main) -> None:
    source = ROOT / "configs" / "patch-induction-toy.yaml"
    first = run_config(run, source, tmp_path / "runs")
    manifest = check_files(first, source, pictures_expected=2)
    assert manifest.config == load(source, *QUICK[1::2]).config.resolved()
    readme = (ROOT / "README.md").read_text()
    named = {name for name in manifest.outputs if not name.endswith((".png", ".csv"))}
    assert {name for name in named if f"`{name}`" not in readme} == set()

    second = run_config(run, first / "config.resolved.yaml", tmp_path / "again")
    again = check_files(second, first / "config.resolved.yaml", pictures_expected=2)
    assert again.config_sha256 == manifest.config_sha256
    for name in (*TABLES, "results.csv", "summary.csv"):
        assert again.outputs[name].sha256 == manifest.outputs[name].sha256, name

    other = run_config(run, first / "config.resolved.yaml", tmp_path / "other", "--set", "task.seed=1")
    assert Manifest.read(other).outputs["results.parquet"].sha256 != manifest.outputs["results.parquet"].sha256


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("name", "blocks", "overrides"),
    [
        ("patch-ioi", 1, ["task.n=3"]),
        pytest.param("patch-ioi-heads", 1, ["task.n=2"], marks=pytest.mark.slow),
        pytest.param("patch-facts-tracing", 3, ["task.n=3", "patch.tracing.draws=2"], marks=pytest.mark.slow),
    ],
)
def test_the_configs_of_the_real_model_run(
    tmp_path: Path, run: Main, name: str, blocks: int, overrides: list[str]
) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    arguments = [part for override in overrides for part in ("--set", override)]
    manifest = check_files(run_config(run, source, tmp_path / "runs", *arguments), source, blocks)
    assert manifest.overrides[2:] == overrides
    assert manifest.model["id"] == "smollm2-135m-instruct"
    assert manifest.engine["parts"][0]["proof"]["executor"] == "packed"


def test_the_toy_config_of_heads_leaves_a_whole_run_directory(tmp_path: Path, run: Main) -> None:
    source = ROOT / "configs" / "heads-toy.yaml"
    quick = ["--set", "model.checkpoints=[step0, step1500]", "--set", "heads.causal.random=3", "--set", "heads.show=1"]
    folder = run_config(run, source, tmp_path / "runs", *quick)
    # Seven maps, attention for the five scores of attention, ablations, training.
    manifest = check_files(folder, source, 7 + 5 + 2, SCORED_AND_ABLATED)
    readme = (ROOT / "README.md").read_text()
    assert {name for name in SCORED_AND_ABLATED if f"`{name.removesuffix('.parquet')}" not in readme} == set()
    assert [part["checkpoint"] for part in manifest.model["checkpoints"]] == ["step0", "step1500"]


@pytest.mark.slow
@pytest.mark.usefixtures("fetched")
def test_the_configs_of_heads_of_the_real_model_run(tmp_path: Path, run: Main) -> None:
    few = ["task.n=6", "heads.layers=[17, 18]", "heads.show=1", "heads.tokens=50"]
    source = ROOT / "configs" / "heads-smollm2.yaml"
    ablations = ["heads.causal.random=1", "heads.causal.k=[1]", "heads.causal.prompts=2"]
    arguments = [part for override in (*few, *ablations) for part in ("--set", override)]
    folder = run_config(run, source, tmp_path / "runs", *arguments)
    check_files(folder, source, 8 + 5 + 1, SCORED_AND_ABLATED)
    scores = pq.read_table(folder / "scores.parquet").to_pandas()
    induction = scores[scores["score"] == "induction"].set_index(["layer", "head"])["value"]
    assert induction[18, 6] > 0.4
    assert induction[17, 7] < 0.1

    source = ROOT / "configs" / "heads-ioi.yaml"
    folder = run_config(run, source, tmp_path / "runs", *[part for item in few for part in ("--set", item)])
    check_files(folder, source, 5 + 4, SCORED)


@pytest.mark.parametrize(
    ("name", "pictures", "tables", "overrides"),
    [
        # A map for each value, and the loss by position.
        ("ablate-toy", 2 + 1, {"positions"}, ["task.n=4"]),
        # A curve for each metric, and the loss by position.
        ("ablate-induction-heads-toy", 4 + 1, {"curve", "positions"}, ["task.n=4"]),
        ("ablate-planted", 1, {"circuits"}, ["task.n=4"]),
    ],
)
def test_the_configs_of_ablate_on_the_toys_leave_whole_run_directories(
    tmp_path: Path, run: Main, name: str, pictures: int, tables: set[str], overrides: list[str]
) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    arguments = [part for override in overrides for part in ("--set", override)]
    folder = run_config(run, source, tmp_path / "runs", *arguments)
    whole = TABLES | {f"{table}.parquet" for table in tables}
    check_files(folder, source, pictures, whole)
    readme = (ROOT / "README.md").read_text()
    assert {table for table in tables if f"`{table}" not in readme} == set()
    if name == "ablate-planted":
        circuits = pq.read_table(folder / "circuits.parquet").to_pandas().set_index(["ablation", "set"])["faithfulness"]
        for value in ("zero", "mean"):
            assert circuits[value, "planted"] == pytest.approx(1, abs=1e-5)
            assert circuits[value, "planted and two more"] == pytest.approx(1, abs=1e-5)
            assert circuits[value, "induction head"] < 0.5
            assert circuits[value, "previous-token head"] < 0.5


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("name", "pictures", "tables", "overrides"),
    [
        (
            "ablate-induction-heads",
            4 + 1,
            {"curve", "positions"},
            ["task.n=3", "ablate.cumulative.random=1", "ablate.cumulative.k=[1, 4]"],
        ),
        pytest.param(
            "ablate-ioi-heads",
            2,
            set(),
            ["task.n=3", "ablate.units=[{kind: head, layers: [23], heads: each}]"],
            marks=pytest.mark.slow,
        ),
        pytest.param("ablate-pairs", 1, {"interactions"}, ["task.n=3"], marks=pytest.mark.slow),
        # A map for each block of edges, and the two groups side by side; the loss by position for each length of text.
        pytest.param("ablate-shortcut", 2 + 1, {"contrasts"}, ["task.n=8"], marks=pytest.mark.slow),
        pytest.param(
            "ablate-text",
            4,
            {"positions", "words"},
            ["ablate.generate=2", "ablate.generate_prompts=1"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_configs_of_ablate_on_the_real_model_run(
    tmp_path: Path, run: Main, name: str, pictures: int, tables: set[str], overrides: list[str]
) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    arguments = [part for override in overrides for part in ("--set", override)]
    folder = run_config(run, source, tmp_path / "runs", *arguments)
    check_files(folder, source, pictures, TABLES | {f"{table}.parquet" for table in tables})


VERIFIED = {"trials", "baselines", "summary", "verification", "missed"}
FEW = ["task.n=2", "attribute.verify.top=2", "attribute.verify.random=6"]


def test_the_toy_config_of_attribute_leaves_a_whole_run_directory(tmp_path: Path, run: Main) -> None:
    source = ROOT / "configs" / "attribute-toy.yaml"
    folder = run_config(run, source, tmp_path / "runs", "--set", "task.n=4", "--set", "attribute.steps=2")
    # A map for each of three blocks and four estimators, and estimates against exact effects.
    check_files(folder, source, 3 * 4 + 1, {f"{name}.parquet" for name in VERIFIED | {"prompts", "results"}})


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("name", "pictures", "pages", "tables", "overrides"),
    [
        ("attribute-ioi", 3 + 1, 0, VERIFIED | {"results"}, FEW),
        pytest.param(
            "attribute-estimators", 8 * 5 + 1, 0, VERIFIED, [*FEW, "attribute.steps=1"], marks=pytest.mark.slow
        ),
        pytest.param("attribute-relp", 6 * 2 + 1, 0, VERIFIED, FEW, marks=pytest.mark.slow),
        ("attribute-direct", 2, 0, {"direct", "components", "sources"}, ["task.n=2"]),
        ("attribute-lens", 2, 0, {"lens"}, ["task.n=2"]),
        pytest.param("attribute-tokens", 2, 1, {"inputs", "input_spans"}, ["task.n=2"], marks=pytest.mark.slow),
        pytest.param(
            "attribute-tokens-corrupt",
            2,
            1,
            {"inputs", "input_spans", "input_completeness"},
            ["task.n=2", "attribute.inputs.steps=4"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_configs_of_attribute_on_the_real_model_run(
    tmp_path: Path, run: Main, name: str, pictures: int, pages: int, tables: set[str], overrides: list[str]
) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    arguments = [part for override in overrides for part in ("--set", override)]
    folder = run_config(run, source, tmp_path / "runs", *arguments)
    check_files(folder, source, pictures, {f"{table}.parquet" for table in tables | {"prompts"}}, pages)
    readme = (ROOT / "README.md").read_text()
    assert {table for table in tables if f"`{table}" not in readme} == set()


CAUSAL = {"causal_effects", "causal_verdicts", "causal_prompts", "causal_downstream"}


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("name", "pictures", "tables"),
    # Scores of every kind of site, a map of heads, code length, projections.
    [
        ("probe-toy", 5, {"code", "projections", "predictions"}),
        pytest.param("probe-number", 2, {"projections", "predictions"}, marks=pytest.mark.slow),
        pytest.param("probe-truth", 5, CAUSAL | {"projections", "predictions"}, marks=pytest.mark.slow),
    ],
)
def test_the_configs_of_probe_leave_whole_run_directories(
    tmp_path: Path, run: Main, name: str, pictures: int, tables: set[str]
) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    few = ["--set", "probe.folds=2", "--set", "probe.inner_folds=2", "--set", "probe.penalties=[0.01, 1.0]"]
    if tables >= CAUSAL:
        few += ["--set", "probe.causal.random=9", "--set", "probe.causal.hold_out=0.5"]
    folder = run_config(run, source, tmp_path / "runs", *few, "--set", "task.n=24")
    written = {f"{table}.parquet" for table in tables | {"prompts", "probes", "labels"}}
    check_files(folder, source, pictures, written, others=frozenset({"directions.safetensors"}))
    readme = (ROOT / "README.md").read_text()
    assert {table for table in tables | {"probes", "labels"} if f"`{table}" not in readme} == set()


CIRCUIT = {"edges", "members", "faithfulness", "evaluations", "quality"}


def test_the_planted_config_of_circuit_leaves_a_whole_run_directory(tmp_path: Path, run: Main) -> None:
    source = ROOT / "configs" / "circuit-planted.yaml"
    few = ["task.n=8", "circuit.random.draws=2", "circuit.tests.inflated=3", "circuit.stability.draws=5"]
    folder = run_config(run, source, tmp_path / "runs", *[part for item in few for part in ("--set", item)])
    tables = CIRCUIT | {"summary", "baselines", "stability", "tests", "minimality", "completeness"}
    # Graphs of four rankings, two thresholds and the reference; the curves; edges taken out.
    check_files(folder, source, 4 + 2 + 1 + 1 + 1, {f"{table}.parquet" for table in tables | {"prompts"}})
    readme = (ROOT / "README.md").read_text()
    assert {table for table in tables if f"`{table}" not in readme} == set()
    assert len(list((folder / "circuits").iterdir())) > 0


def test_the_config_of_circuits_of_neurons_leaves_a_whole_run_directory(tmp_path: Path, run: Main) -> None:
    source = ROOT / "configs" / "circuit-neurons-toy.yaml"
    few = ["task.n=6", "circuit.random.draws=1", "circuit.tests.inflated=2", "circuit.stability.draws=5"]
    folder = run_config(run, source, tmp_path / "runs", *[part for item in few for part in ("--set", item)])
    tables = CIRCUIT | {"summary", "baselines", "stability", "tests", "minimality", "completeness", "prompts"}
    # Graphs of three rankings and the reference; the curves; heads and neurons taken out. No JSON.
    check_files(folder, source, 3 + 1 + 1 + 1, {f"{table}.parquet" for table in tables})
    assert not (folder / "circuits").exists()


@pytest.mark.usefixtures("fetched")
@pytest.mark.parametrize(
    ("name", "scores"),
    [
        pytest.param("circuit-ioi", 3, marks=pytest.mark.slow),
        pytest.param("circuit-greater-than", 2, marks=pytest.mark.slow),
    ],
)
def test_the_configs_of_circuit_on_the_real_model_run(tmp_path: Path, run: Main, name: str, scores: int) -> None:
    source = ROOT / "configs" / f"{name}.yaml"
    few = ["task.n=4", "circuit.sizes=[0.005, 0.1]", "circuit.random.draws=0", "circuit.stability.draws=2"]
    arguments = [*few, "circuit.steps=1", "output.rows=summary"]
    folder = run_config(run, source, tmp_path / "runs", *[part for item in arguments for part in ("--set", item)])
    tables = CIRCUIT - {"edges", "evaluations"} | {"summary", "baselines", "stability", "prompts"}
    # A ranking that has no edge at the smaller size is drawn at the larger one, if it has any there.
    drawn = len([path for path in (folder / "figures").iterdir() if path.name.startswith("graph")])
    assert scores - 1 <= drawn <= scores
    check_files(folder, source, drawn + 1, {f"{table}.parquet" for table in tables})


def test_every_config_is_run_here_and_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {path.stem for path in CONFIGS} == {
        "ablate-induction-heads", "ablate-induction-heads-toy", "ablate-ioi-heads", "ablate-pairs", "ablate-planted",
        "ablate-shortcut", "ablate-text", "ablate-toy",
        "attribute-direct", "attribute-estimators", "attribute-ioi", "attribute-lens", "attribute-relp",
        "attribute-tokens", "attribute-tokens-corrupt", "attribute-toy",
        "circuit-greater-than", "circuit-ioi", "circuit-neurons-toy", "circuit-planted",
        "heads-ioi", "heads-smollm2", "heads-toy",
        "probe-number", "probe-toy", "probe-truth",
        "patch-facts-tracing", "patch-induction-toy", "patch-ioi", "patch-ioi-heads", "patch-paths-toy",
    }  # fmt: skip
    assert all(f"(configs/{path.name})" in readme for path in CONFIGS)
    assert f"--array=0-{len(CONFIGS) - 1}\n" in readme, "a job of the cluster for each"


# --- the documents


def code_blocks(text: str) -> Iterator[str]:
    """The fenced and the indented code blocks of a Markdown text."""
    fence = re.compile(r"^( *)(```+|~~~+)[^\n]*\n(.*?)^\1\2", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        yield re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE)
    for match in re.finditer(r"(?:(?<=\n\n)|\A)(?:(?: {4}[^\n]*)?\n)+", fence.sub("\n", text)):
        if match[0].strip():
            yield re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)


def experiments(text: str) -> Iterator[str]:
    """The code blocks that are whole experiments: they have a model and a task."""
    for block in code_blocks(text):
        try:
            found: Any = yaml.safe_load(block)
        except yaml.YAMLError:
            continue
        if isinstance(found, dict) and {"model", "task"} <= found.keys():
            yield block


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `mechinterp ...` line in a text's code blocks, but for those with shell variables."""
    for block in code_blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|[\s/(])mechinterp( [^)]*)", line)
            if match and "$" not in match[1]:
                yield shlex.split(match[1], comments=True)


SAMPLE = """
# A document

    mechinterp patch a.yaml --set task.n=8   # a comment
    python -m mechinterp_cli.models.toy

Words: `mechinterp patch CONFIG`.

```yaml
name: x
model: {id: toy-induction}
task: {name: induction}
patch: {sites: [{kind: z}]}
```

1. In a list:

   ```sh
   RUN=$(.venv/bin/mechinterp patch b.yaml \\
     --out "my runs")
   ```

```yaml
task: {name: ioi}
```
"""


def test_documents_are_read_as_they_are_meant() -> None:
    assert list(commands(SAMPLE)) == [
        ["patch", "b.yaml", "--out", "my runs"],
        ["patch", "a.yaml", "--set", "task.n=8"],
    ]
    assert [yaml.safe_load(text)["name"] for text in experiments(SAMPLE)] == ["x"]
    assert [block.strip() for block in code_blocks("    a\n\n    b\n\nc\n")] == ["a\n\nb"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_experiments_in_documents_load(document: Path, tmp_path: Path) -> None:
    register_all()
    for number, text in enumerate(experiments(document.read_text())):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        load_config(path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands are parsed and their configs loaded, and nothing is run or fetched; gives what they asked for."""
    seen: list[str] = []

    def execute(method: str, config: Path, overrides: list[str] | None, *_: object) -> None:
        register_all()
        load_config(ROOT / config, overrides or (), method=method)
        seen.append(config.name)

    def fetch(name: str, *_: object) -> zoo.ZooStatus:
        entry = zoo.find_entry(name)
        assert entry is not None
        seen.append(name)
        return zoo.ZooStatus(entry, at_hand=True, folder=None)

    monkeypatch.setattr(commands_of, "execute", execute)
    monkeypatch.setattr(zoo, "fetch", fetch)
    return seen


def parse(arguments: list[str]) -> None:
    """Parse a command line without running it.

    Raises:
        TyperException: It is not one.
    """
    group: Any = typer.main.get_command(app)
    context = group.make_context("mechinterp", list(arguments))
    _, command, rest = group.resolve_command(context, list(arguments))
    command.make_context(arguments[0], rest, parent=context)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_parse(document: Path, asked: list[str]) -> None:
    found = list(commands(document.read_text()))
    for arguments in found:
        if arguments[0] in ("patch", "heads", "ablate", "attribute", "probe", "models", "schema"):
            assert main(arguments) == 0, arguments
        else:
            parse(arguments)
    methods = ("patch", "heads", "ablate", "attribute", "probe")
    assert len(asked) == sum(arguments[0] in methods or "fetch" in arguments for arguments in found)
    assert document.name != "README.md" or document.parent != ROOT or "patch-ioi.yaml" in asked


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "arguments",
    [
        ["patch", "configs/none.yaml"],
        ["patch", "configs/patch-ioi.yaml", "--sett", "task.n=8"],
        ["patch", "configs/patch-ioi.yaml", "--set", "task.m=8"],
        ["pach", "configs/patch-ioi.yaml"],
    ],
)
def test_commands_that_do_not_parse_are_told_from_those_that_do(arguments: list[str]) -> None:
    assert main(arguments) == 2


@pytest.mark.parametrize("arguments", [["resume"], ["reproduce", "a", "--exakt"], ["reproduc", "a"]])
def test_commands_that_are_not_run_are_parsed_too(arguments: list[str]) -> None:
    with pytest.raises(TyperException):
        parse(arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
