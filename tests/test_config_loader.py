import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from mechinterp_cli.config.base import BaseConfig, MethodOptions, TaskOptions
from mechinterp_cli.config.loader import LoadedConfig, load_config
from mechinterp_cli.errors import UserError

Write = Callable[[str], Path]

GOOD = """\
name: demo
model: {id: toy-induction}
task:
  name: dummy-task
  n: 4
dummy:
  direction: noise
  sites:
    - {kind: resid_pre, layers: all}
    - kind: z
      layers: [0, 3]
"""


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task and a method of our own, so that these tests know no real one."""
    monkeypatch.setattr(TaskOptions, "registry", {})
    monkeypatch.setattr(MethodOptions, "registry", {})

    class Site(BaseConfig):
        kind: Literal["resid_pre", "z"]
        layers: Literal["all"] | tuple[int, ...] = "all"

    class DummyTask(TaskOptions):
        task_name = "dummy-task"
        n: int = Field(8, strict=True, ge=1)
        keep: Literal["all", "correct"] = "all"
        shuffle: bool = Field(False, strict=True)
        text: str = "x"

    class OtherTask(TaskOptions):
        task_name = "prompts"
        prompts: tuple[str, ...] = Field(min_length=1)

    class Dummy(MethodOptions):
        method_name = "dummy"
        direction: Literal["denoise", "noise"] = "denoise"
        sites: tuple[Site, ...] = ()

    class Second(MethodOptions):
        method_name = "second"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write_text(text: str) -> Path:
        Path("c.yaml").write_text(text)
        return Path("c.yaml")

    return write_text


def refused(path: Path, *overrides: str, method: str | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, method=method)
    assert caught.value.cause
    assert caught.value.remedy, "an error always says how to put it right"
    return caught.value


def test_good_file_loads_with_every_default(write: Write) -> None:
    loaded = load_config(write(GOOD))
    assert loaded.config.method_name == "dummy"
    resolved = loaded.config.resolved()
    assert resolved["task"] == {"name": "dummy-task", "n": 4, "keep": "all", "shuffle": False, "text": "x"}
    assert resolved["dummy"]["sites"][1] == {"kind": "z", "layers": [0, 3]}
    assert resolved["stats"]["bootstrap"] == 1000
    assert "method" not in resolved
    assert loaded.source == GOOD.encode()


def test_resolved_yaml_loads_to_the_same_experiment(write: Write) -> None:
    first = load_config(write(GOOD), ["task.text='1e-3'", "stats.smallest_effect=1e-7"])
    second = load_config(write(first.resolved_yaml()))
    assert second.config == first.config
    assert second.config.sha256 == first.config.sha256
    assert load_config(write(GOOD)).config.sha256 != first.config.sha256


@pytest.mark.parametrize(
    ("old", "new", "cause", "remedy"),
    [
        ("  n: 4", "  num: 4", "c.yaml:5: task.num: unknown key", "allowed here: name, n, keep"),
        ("  n: 4", "  kep: all", "c.yaml:5: task.kep: unknown key", "Did you mean 'keep'?"),
        ("      layers:", "      layer:", "c.yaml:11: dummy.sites[1].layer: unknown key", "Did you mean 'layers'?"),
        ("name: demo", "nome: demo", "c.yaml:1: nome: unknown key", "Did you mean 'name'?"),
        ("  n: 4", '  n: "4"', "c.yaml:5: task.n: '4' is not valid; allowed: a whole number", "without quotes"),
        ("  n: 4", "  n: 4.0", "c.yaml:5: task.n: 4.0 is not valid; allowed: a whole number", ""),
        ("  n: 4", "  n: true", "c.yaml:5: task.n: true is not valid; allowed: a whole number", ""),
        ("  n: 4", "  n: 0", "c.yaml:5: task.n: 0 is not valid; allowed: at least 1", ""),
        ("  n: 4", "  shuffle: yes", "task.shuffle: 'yes' is not valid; allowed: true or false", "`true` or `false`"),
        ("  n: 4", "  text: 12", "task.text: 12 is not valid; allowed: text", "quotes around it"),
        ("noise", "nois", "c.yaml:7: dummy.direction: 'nois' is not valid; allowed: denoise or noise", "'noise'?"),
        ("[0, 3]", "most", "dummy.sites[1].layers: 'most' is not valid; allowed: all or a list", ""),
        ("[0, 3]", "[0, a]", "c.yaml:11: dummy.sites[1].layers[1]: 'a' is not valid; allowed: a whole number", ""),
        ("    - kind: z\n      layers", "    - layers", "c.yaml:10: dummy.sites[1].kind: is missing", ""),
        ("dummy-task", "dumy-task", "task.name: 'dumy-task' is not valid; allowed: dummy-task", "'dummy-task'?"),
        ("  name: dummy-task\n", "", "task.name: is missing; allowed: dummy-task", ""),
        ("name: demo\n", "", "c.yaml: name: is missing", ""),
        ("  n: 4", "  n: 4\nmethod: {}", "c.yaml:6: method: unknown key", "section is `dummy:`"),
        ("  n: 4", "  n: 4\nstats: {ci: .nan}", "c.yaml:6: stats.ci: NaN is not valid", ""),
        ("  n: 4", "  n: 4\nstats: {ci: 1}", "stats.ci: 1 is not valid; allowed: less than 1", ""),
        ("  n: 4", "  n: 4\nmetrics: [kl, kl]", 'metrics: ["kl", "kl"] is not valid; listed twice: kl', ""),
        ("  n: 4", "  n: 4\nengine: {max_memory: lots}", "engine.max_memory: 'lots' is not valid; allowed: '70%'", ""),
        ("  n: 4", "  n: 4\nmodel:", "c.yaml:6: the key 'model' stands twice (first at c.yaml:2)", "Remove"),
    ],
)
def test_bad_value_is_named_with_line_and_fix(write: Write, old: str, new: str, cause: str, remedy: str) -> None:
    assert old in GOOD
    error = refused(write(GOOD.replace(old, new)))
    assert cause in error.cause
    assert remedy in error.remedy
    assert "\n" not in error.cause


def test_one_mistake_is_told_once(write: Write) -> None:
    text = GOOD.replace("  name: dummy-task\n  n: 4\n", "  prompts: [1]\n")
    assert refused(write(text)).cause == "c.yaml:4: task.prompts[0]: 1 is not valid; allowed: text"
    empty = GOOD.replace("  name: dummy-task\n  n: 4\n", "  prompts: []\n")
    assert refused(write(empty)).cause == "c.yaml:4: task.prompts: [] is not valid; allowed: at least 1 item"
    scalar = refused(write(GOOD + "metrics: kl\n"))
    assert scalar.remedy == "Write it as a list: [kl]."


def test_all_problems_are_listed_in_the_order_of_the_file(write: Write) -> None:
    text = GOOD.replace("noise", "loud").replace("n: 4", "n: -4").replace("demo", "../demo")
    lines = refused(write(text)).cause.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["c.yaml:1", "c.yaml:5", "c.yaml:7"]


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/b",
        "~x",
        "a\\nb",
        "a\\0",
        "x" * 81,
        "a.",
        "a ",
        "CON",
        "nul.txt",
        "-a",
        "\U0001f600",
        "",
        "a..b",
    ],
)
def test_unsafe_run_name_is_refused(write: Write, name: str) -> None:
    assert "c.yaml:1: name: " in refused(write(GOOD.replace("name: demo", f'name: "{name}"', 1))).cause


@pytest.mark.parametrize("name", ["a", "ioi-resid_2.1", "X" * 80, "console"])
def test_safe_run_name_is_taken(write: Write, name: str) -> None:
    assert load_config(write(GOOD.replace("name: demo", f"name: {name}", 1))).config.name == name


def test_numeric_name_must_be_quoted(write: Write) -> None:
    assert "quotes around it" in refused(write(GOOD.replace("name: demo", "name: 12", 1))).remedy


def test_exactly_one_method_section(write: Write) -> None:
    assert (
        "more than one method section: dummy (c.yaml:6), second (c.yaml:12)" in refused(write(GOOD + "second:\n")).cause
    )
    without = GOOD[: GOOD.index("dummy:\n")]
    assert "no method section" in refused(write(without)).cause
    assert "'dummy'" in refused(write(without + "dumy: {}\n")).remedy
    assert load_config(write(without + "second:\n")).config.method_name == "second"


def test_config_for_another_subcommand_names_the_right_command(write: Write) -> None:
    error = refused(write(GOOD), method="second")
    assert error.cause == "c.yaml:6: this config is for `dummy`, not for `second`"
    assert error.remedy == "Run: mechinterp dummy c.yaml"
    assert load_config(write(GOOD), method="dummy").config.name == "demo"


def test_task_is_chosen_by_its_own_key(write: Write) -> None:
    text = GOOD.replace("  name: dummy-task\n  n: 4\n", "  prompts: [a, b]\n")
    assert load_config(write(text)).config.resolved()["task"] == {"name": "prompts", "prompts": ["a", "b"]}


def test_override_changes_one_value(write: Write) -> None:
    def loaded(*overrides: str) -> LoadedConfig:
        return load_config(write(GOOD), overrides)

    assert loaded("dummy.direction=denoise").config.resolved()["dummy"]["direction"] == "denoise"
    assert loaded("stats.ci=9e-1").config.stats.ci == 0.9
    assert loaded("dummy.sites[0].layers=[1, 2]").config.resolved()["dummy"]["sites"][0]["layers"] == [1, 2]
    assert loaded("output={dir: elsewhere}").config.output.dir == "elsewhere"
    assert loaded("task.text=a=b").config.resolved()["task"]["text"] == "a=b"
    assert loaded("task.text=no").config.resolved()["task"]["text"] == "no"
    assert loaded("stats.ci=0.5", "stats.ci=0.6").config.stats.ci == 0.6


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("dummy.direction", "--set dummy.direction: not of the form key=value"),
        ("=1", "--set =1: not of the form key=value"),
        ("a..b=1", "--set a..b=1: not of the form key=value"),
        ("dummy.directoin=noise", "--set dummy.directoin=noise: dummy.directoin: unknown key"),
        ("dummy.direction=loud", "--set dummy.direction=loud: dummy.direction: 'loud' is not valid"),
        (
            "dummy.sites[7].kind=z",
            "--set dummy.sites[7].kind=z: dummy.sites is a list of 2; 7 is not one of its places",
        ),
        ("name.x=1", "--set name.x=1: name has no place 'x'"),
        ("task.n=[1", "--set task.n=[1: not valid YAML"),
        ("task.n=*a", "--set task.n=*a: anchors and aliases are not allowed"),
        ("task={name: dummy-task, n: 0}", "--set task={name: dummy-task, n: 0}: task.n: 0 is not valid"),
    ],
)
def test_bad_override_is_named(write: Write, override: str, cause: str) -> None:
    assert refused(write(GOOD), override).cause.startswith(cause)


def test_paths_that_are_no_config_files(write: Write, tmp_path: Path) -> None:
    write(GOOD)
    assert "No such file" in refused(Path("missing.yaml")).cause
    assert "a folder" in refused(tmp_path).cause
    os.mkfifo("pipe")
    assert "not an ordinary file" in refused(Path("pipe")).cause
    assert "not an ordinary file" in refused(Path("/dev/zero")).cause
    Path("loop").symlink_to("loop")
    assert "cannot be read" in refused(Path("loop")).cause
    assert "cannot be read" in refused(Path("a\0b")).cause
    Path("link").symlink_to("c.yaml")
    assert load_config(Path("link")).config.name == "demo"


def test_later_errors_carry_the_line_too(write: Write) -> None:
    loaded = load_config(write(GOOD), ["dummy.sites[0].layers=[48]"])
    error = loaded.error(("dummy", "sites", 1, "layers"), "48 is outside 0..29", "Use a smaller layer.")
    assert error.cause == "c.yaml:11: dummy.sites[1].layers: 48 is outside 0..29"
    assert loaded.error(("dummy", "sites", 0, "layers", 0), "x").cause.startswith("--set dummy.sites[0].layers=[48]: ")
    assert loaded.error(("stats", "ci"), "x").cause == "c.yaml: stats.ci: x"


def test_config_is_frozen(write: Write) -> None:
    config = load_config(write(GOOD)).config
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]  # the point of the test
