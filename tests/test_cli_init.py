"""`mechinterp init`: what it writes loads, plans and runs as it is, and tells of every key what the schema tells."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechinterp_cli.cli.experiments import EXPERIMENTS
from mechinterp_cli.cli.init import starter
from mechinterp_cli.cli.main import main
from mechinterp_cli.cli.registry import register_all
from mechinterp_cli.cli.starters import STARTERS
from mechinterp_cli.config.base import BaseConfig, MethodOptions
from mechinterp_cli.config.commented import WIDTH
from mechinterp_cli.config.jsonschema import experiment_schema
from mechinterp_cli.config.loader import load_config
from mechinterp_cli.config.schema import EngineOptions, ExperimentConfig, OutputOptions, StatsOptions, task_class
from mechinterp_cli.models.zoo import find_entry
from mechinterp_cli.runs.manifest import Manifest

KINDS = tuple(EXPERIMENTS)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_all()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(text: str) -> str:
    """Prose without comment marks and line breaks."""
    return " ".join(re.sub(r"^ *# ?", " ", text, flags=re.MULTILINE).split())


def test_there_is_a_starter_for_every_experiment() -> None:
    assert set(STARTERS) == set(EXPERIMENTS) == set(MethodOptions.registry)


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_is_set_and_nothing_else(kind: str) -> None:
    text = starter(kind, Path("c.yaml"))
    assert yaml.safe_load(text) == STARTERS[kind]
    assert text.startswith("# yaml-language-server: $schema=mechinterp.schema.json\n")
    assert max(map(len, text.splitlines())) <= WIDTH
    entry = find_entry(STARTERS[kind]["model"]["id"])
    assert entry is not None
    assert entry.kind == "bundled"


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_stands_there_with_what_its_docstring_says(kind: str) -> None:
    text = starter(kind, Path("c.yaml"))
    task = task_class(STARTERS[kind]["task"])
    assert task is not None
    told, keys = words(text), set(re.findall(r"^ *(?:#|- )?([a-z_0-9]+):", text, flags=re.MULTILINE))
    sections: list[type[BaseConfig]] = [StatsOptions, EngineOptions, OutputOptions, task, MethodOptions.registry[kind]]
    for section in sections:
        for name, field in section.model_fields.items():
            if name == "name":
                continue
            assert name in keys, name
            assert " ".join((field.description or "").split()) in told, name
    left_out = {"method", "metrics"} if MethodOptions.registry[kind].own_metrics else {"method"}
    assert keys >= set(ExperimentConfig.model_fields) - left_out


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_marks_defaults_are_the_schemas_own(kind: str) -> None:
    text = starter(kind, Path("c.yaml"))
    # Keys whose value is not a default but must be given, and the sections that hold them, stay commented out.
    whole = re.sub(r"^( *)#(?=[a-z_0-9]+:)", r"\1", text, flags=re.MULTILINE)
    found = yaml.safe_load(whole)
    assert found["stats"] == StatsOptions().model_dump(mode="json")
    assert found["engine"] == EngineOptions().model_dump(mode="json")
    assert found["output"] == OutputOptions().model_dump(mode="json")
    schema = experiment_schema()
    check_defaults(schema, schema["properties"][kind], found[kind], STARTERS[kind][kind])


def check_defaults(top: Mapping[str, Any], schema: Mapping[str, Any], found: Any, given: Any) -> None:
    """Compare every key that is not given with the default of the method's schema."""
    section = top["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    for key, about in section["properties"].items():
        if key not in given and about.get("default") is not None:
            assert found[key] == about["default"], key


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_a_plan(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", kind]) == 0
    out, err = capfd.readouterr()
    assert out == f"{kind}.yaml\n"
    assert f"mechinterp {kind} {kind}.yaml --dry-run" in err
    assert main([kind, out.strip(), "--dry-run"]) == 0
    assert isinstance(json.loads(capfd.readouterr().out), dict)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_it_is(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", kind, "--quiet"]) == 0
    assert capfd.readouterr().err == ""
    assert main([kind, f"{kind}.yaml", "--quiet"]) == 0
    run = capfd.readouterr().out.strip().splitlines()[-1]
    assert Manifest.read(Path(run)).status == "complete"


def test_a_file_that_is_there_stays(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("name: mine\n")
    Path("dangling.yaml").symlink_to("nowhere")
    for name in ("mine.yaml", "dangling.yaml"):
        assert main(["init", "patch", "-o", name]) == 2
        assert capfd.readouterr() == (
            "",
            f"error: {name}: there is such a file already\nfix: Name another one with -o FILE, or remove it.\n",
        )
    assert Path("mine.yaml").read_text() == "name: mine\n"
    assert sorted(path.name for path in here.iterdir()) == ["dangling.yaml", "mine.yaml"]


def test_a_folder_that_is_not_there_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "patch", "-o", "a b/c.yaml"]) == 2
    assert capfd.readouterr().err == "error: a b/c.yaml: there is no folder a b\nfix: mkdir -p 'a b'\n"


@pytest.mark.parametrize(
    ("kind", "fix"), [("pacth", "Did you mean 'patch'?"), ("zzz", "For example: mechinterp init patch")]
)
def test_a_kind_that_there_is_not_is_told_the_nearest(kind: str, fix: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", kind]) == 2
    known = "patch, ablate, heads, attribute, probe, circuit"
    expected = f"error: KIND: '{kind}' is no kind of experiment; there are {known}\nfix: {fix}\n"
    assert capfd.readouterr() == ("", expected)


def test_the_steps_can_be_copied_whatever_the_file_is_called(capfd: pytest.CaptureFixture[str]) -> None:
    Path("a b").mkdir()
    assert main(["init", "heads", "-o", "a b/it's.yaml"]) == 0
    out, err = capfd.readouterr()
    run = next(line for line in err.splitlines() if "run it" in line).split("#")[0]
    assert shlex.split(run) == ["mechinterp", "heads", "a b/it's.yaml"]
    assert load_config(Path(out.removesuffix("\n")), method="heads").config.name == "my-heads"


def test_a_name_cannot_leave_its_comment(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "patch", "-o", "x\nname: evil.yaml"]) == 0
    assert load_config(Path("x\nname: evil.yaml"), method="patch").config.name == "my-patch"
    capfd.readouterr()


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_the_first_steps_are_told_and_can_be_copied(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int
) -> None:
    assert main(arguments) == code
    told = "".join(capsys.readouterr())
    steps = [shlex.split(line, comments=True) for line in told.splitlines() if line.startswith("    mechinterp ")]
    assert steps[:2] == [["mechinterp", "init", "patch"], ["mechinterp", "patch", "patch.yaml"]]
    assert all("#" in line for line in told.splitlines() if line.startswith("    mechinterp "))
    assert main(steps[0][1:]) == 0
    capsys.readouterr()
    assert main([*steps[1][1:], "--dry-run"]) == 0
