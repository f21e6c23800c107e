import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import yaml

from mechinterp_cli.cli.main import main
from mechinterp_cli.cli.starters import STARTERS
from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.errors import DifferenceError, ProofError, RunError, UserError
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.outcome import RunOutcome
from mechinterp_cli.runs.recorder import record

CONFIG = "name: demo\nmodel: {id: toy-induction}\ntask: {name: induction, n: 4}\n%s: {}\n"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """Stands in for the engine: records a run and gives two rows. Its method takes no options."""

    class Fake(MethodOptions):
        method_name = "fake"

    module = ModuleType("mechinterp_cli.methods.run")

    def run_experiment(loaded: Any, *, out: Path | None, progress: Any) -> RunOutcome:
        progress.stage("sweeping")
        progress.advance(1, 1)
        with record(loaded, out) as run:
            pass
        rows = [{"layer": 3, "effect": 0.5}, {"layer": 1, "effect": 0.25}]
        return RunOutcome(run.path, rows, lambda width, plain: ["#"], ["a note"])

    def dry_run(loaded: Any) -> dict[str, Any]:
        return {"trials": 7, "task": loaded.config.resolved()["task"]["n"]}

    module.__dict__.update(run_experiment=run_experiment, dry_run=dry_run)
    import mechinterp_cli.cli.experiments as command
    import mechinterp_cli.methods as package
    from mechinterp_cli.cli.options import execute

    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(package, "run", module, raising=False)
    monkeypatch.setattr(command, "execute", lambda method, *rest: execute("fake", *rest))
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(CONFIG % "fake")
    yield module
    MethodOptions.registry.pop("fake")


@pytest.mark.usefixtures("fake")
def test_patch_prints_the_run_directory_alone_on_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "c.yaml"]) == 0
    out, err = capfd.readouterr()
    path = Path(out.removesuffix("\n"))
    assert Manifest.read(path).status == "complete"
    assert path.parent == Path("runs")
    assert [line.split() for line in err.splitlines()][:4] == [["sweeping"], ["#"], [], ["a", "note"]]


@pytest.mark.usefixtures("fake")
def test_patch_options_reach_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "patch",
        "c.yaml",
        "--set",
        "task.n=8",
        "--set",
        "name=other",
        "--device",
        "cpu",
        "--out",
        "else where",
    ]
    assert main([*arguments, "--quiet", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["headline"][0] == {"layer": 3, "effect": 0.5}
    manifest = Manifest.read(Path(result["run"]))
    assert Path(result["run"]).parent == Path("else where")
    assert manifest.config["task"]["n"] == 8
    assert manifest.config["model"]["device"] == "cpu"
    assert manifest.name == "other"
    assert manifest.overrides == ["task.n=8", "name=other", "model.device=cpu"]


@pytest.mark.usefixtures("fake")
def test_dry_run_plans_and_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "c.yaml", "--dry-run"]) == 0
    assert json.loads(capfd.readouterr().out) == {"trials": 7, "task": 4}
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("cause", "remedy"), 2),
        (RunError("cause", "remedy"), 1),
        (DifferenceError("cause", "remedy"), 3),
        (ProofError("cause", "remedy"), 4),
    ],
)
def test_errors_are_two_lines_and_a_code(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(fake, "run_experiment", fail)
    assert main(["patch", "c.yaml"]) == code
    assert capfd.readouterr() == ("", "error: cause\nfix: remedy\n")


def test_unexpected_error_is_one_line_with_its_traceback_in_the_log(
    fake: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(loaded: Any, *, out: Path | None, progress: Any) -> None:
        with record(loaded, out):
            raise ZeroDivisionError("first\nsecond")

    monkeypatch.setattr(fake, "run_experiment", fail)
    assert main(["patch", "c.yaml"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "error: unexpected ZeroDivisionError: first"
    assert "Traceback" not in err
    (run,) = Path("runs").iterdir()
    assert "Traceback" in (run / "log.jsonl").read_text()
    assert Manifest.read(run).status == "failed"
    assert main(["--debug", "patch", "c.yaml"]) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("arguments", "cause", "fix"),
    [
        (
            ["probe"],
            "error: Missing argument 'CONFIG'.",
            "fix: mechinterp probe --help, or for a config to start from: mechinterp init probe",
        ),
        (
            ["init"],
            "error: Missing argument 'KIND'.",
            "fix: mechinterp init --help, for example: mechinterp init patch",
        ),
        (["show"], "error: Missing argument 'RUN'.", "fix: mechinterp show --help, and for the runs there are: mechi"),
        (["report"], "error: Missing argument 'RUN...'.", "fix: mechinterp report --help, and for the runs there are"),
        (["models", "fetch"], "error: Missing argument 'NAME'.", "fix: mechinterp models fetch --help, and for the na"),
        (["compare", "a"], "error: Missing argument 'B'.", "fix: mechinterp compare --help"),
        (["patch", "c.yaml", "--nope"], "error: No such option: --nope", "fix: mechinterp patch --help"),
        (["nope"], "error: No such command 'nope'.", "fix: mechinterp --help"),
        (["models", "nope"], "error: No such command 'nope'.", "fix: mechinterp models --help"),
        (["models", "fetch", "nope"], "error: models fetch: there is no model 'nope'", "fix: "),
        (["patch", "none.yaml"], "error: none.yaml: cannot be read: No such file", "fix: Give the path of a Y"),
        (["patch", "c.yaml", "--set", "task.m=1"], "error: --set task.m=1: task.m: unknown key", "fix: "),
        (["patch", "c.yaml", "--device", "tpu"], "error: --set model.device=tpu: model.device: 'tpu'", "fix: "),
        (["patch", "c.yaml", "--out", "c.yaml"], "error: c.yaml: the output folder is a file", "fix: "),
    ],
)
def test_bad_command_lines_end_with_code_2(
    capfd: pytest.CaptureFixture[str], arguments: list[str], cause: str, fix: str
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith(cause)
    assert lines[-1].startswith(fix)
    assert "Traceback" not in err


COMMANDS = [
    *(
        ["patch"],
        ["ablate"],
        ["attribute"],
        ["heads"],
        ["probe"],
        ["circuit"],
        ["resume"],
        ["reproduce"],
        ["show"],
        ["report"],
        ["compare"],
        ["runs"],
        ["verify"],
    ),
    *(["models"], ["models", "fetch"], ["schema"], ["init"]),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert main([*command, "-h"]) == 0
    assert f"Example: mechinterp {' '.join(command)}".rstrip() in capsys.readouterr().out


def test_help_lists_exactly_the_commands_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    lines = capsys.readouterr().out.split("Commands:\n")[1].split("\n\n")[0].splitlines()
    assert {line.split()[0] for line in lines} == {command[0] for command in COMMANDS}
    assert [line for line in lines if line.endswith("...")] == []  # what each does is told to the end


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mechinterp 0.")


TORCH = {"torch", "transformers", "sklearn", "safetensors", "tokenizers"}
HEAVY = {"torch", "transformers", "numpy", "pandas", "pyarrow", "scipy", "sklearn", "altair", "rich", "yaml"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [(["--help"], HEAVY | {"pydantic_core"}), (["patch", "--help"], HEAVY)],  # Typer reads options by pydantic
)
def test_help_is_there_at_once_as_nothing_heavy_is_imported(arguments: list[str], heavy: set[str]) -> None:
    code = f"import sys; from mechinterp_cli.cli.main import main; main({arguments}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "typer" in imported
    assert not imported & heavy


REFERENCE = Path(__file__).parent.parent / "runs" / "reference"
IN_TURN = """
import json, sys
from mechinterp_cli.cli.main import main
def run(arguments):
    return [main(arguments), sorted({name.partition(".")[0] for name in sys.modules})]
found = [run(arguments) for arguments in json.loads(sys.argv[1])]
open(sys.argv[2], "w").write(json.dumps(found))
"""


def _imported_after(commands: list[list[str]], folder: Path) -> list[tuple[int, set[str]]]:
    """Of commands that one process runs in turn: each one's exit code, and what is imported by then."""
    there = folder / "imported.json"
    arguments = [sys.executable, "-c", IN_TURN, json.dumps(commands), str(there)]
    subprocess.run(arguments, check=True, capture_output=True, cwd=folder)
    return [(code, set(names)) for code, names in json.loads(there.read_text())]


def test_what_needs_no_model_needs_no_torch(tmp_path: Path) -> None:
    patched, probed = (str(REFERENCE / name) for name in ("patch-induction-toy", "probe-toy"))
    done = [
        ["schema"], ["init", "patch"], ["runs", str(REFERENCE)], ["verify", patched], ["show", patched],
        ["compare", patched, patched], ["compare", probed, probed], ["report", patched, "-o", "page.html"],
    ]  # fmt: skip
    for (code, imported), command in zip(_imported_after(done, tmp_path), done, strict=True):
        assert code == 0, command
        assert not imported & TORCH, command
        if command[0] not in ("compare", "report"):
            assert not imported & {"scipy", "altair"}, command
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_a_config_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    for kind, starter in STARTERS.items():
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(dict(starter)))
    wrong = [
        [kind, f"{kind}.yaml", "--dry-run", "--set", change]
        for kind in STARTERS
        for change in (f"{kind}.nope=1", "task.n=many", "task.name=nope", "metrics=[nope]")
    ]
    wrong += [["resume", "nope"], ["reproduce", "nope"]]
    *found, (code, imported) = _imported_after([*wrong, ["patch", "patch.yaml", "--set", "model.id=./nope"]], tmp_path)
    # That it is seen when they are imported: what only the loader of models can tell is told after that.
    assert code == 2
    assert {"torch", "transformers"} <= imported
    for (code, imported), command in zip(found, wrong, strict=True):
        assert code == 2, command
        assert not imported & (TORCH | {"scipy", "altair"}), command


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    assert {"toy-induction", "smollm2-135m-instruct"} <= {row["name"] for row in json.loads(capsys.readouterr().out)}


@pytest.mark.usefixtures("fake")
def test_schema_accepts_a_good_config_and_refuses_a_bad_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = yaml.safe_load(CONFIG % "fake")
    assert validator.is_valid(good)
    for bad in ({**good, "nam": "x"}, {**good, "task": {"name": "none"}}, {**good, "stats": {"ci": 2}}):
        assert not validator.is_valid(bad)
    del good["fake"]
    assert not validator.is_valid(good)


STOPPED = """
import signal, sys, time, types
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
from mechinterp_cli.cli.main import main
import mechinterp_cli.cli.experiments as command
import mechinterp_cli.methods as package
from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.runs.recorder import record
class Fake(MethodOptions):
    method_name = "fake"
def run_experiment(loaded, *, out, progress):
    with record(loaded, out):
        sys.stderr.write("ready\\n"); sys.stderr.flush()
        time.sleep(60)
package.run = sys.modules["mechinterp_cli.methods.run"] = types.ModuleType("mechinterp_cli.methods.run")
package.run.run_experiment = run_experiment
execute = command.execute
command.execute = lambda method, *rest: execute("fake", *rest)
sys.exit(main(["patch", "c.yaml"]))
"""


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_stopped_command_ends_with_its_code_and_no_traceback(number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == code
    assert rest.startswith("error: stopped by ")
    assert "Traceback" not in rest
    (run,) = Path("runs").iterdir()
    assert Manifest.read(run).status == "interrupted"
