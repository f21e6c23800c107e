"""Bad labelled texts, from the command line to the message: which file and row or key, and what to do."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mechinterp_cli.cli.main import main

CONFIG = """\
name: bad
model: {id: toy-induction}
task: {name: labelled, path: a.csv}
probe:
  sites: [{layers: [0]}]
  baselines: []
  permutations: 0
output: {figures: []}
"""
GOOD = [(f"k{i} k{i + 1} k{i + 2}", "ab"[i % 2]) for i in range(3, 13)]
Refused = Callable[..., None]


def csv(rows: Sequence[tuple[str, ...]], head: str = "text,label") -> str:
    return "\n".join([head, *(",".join(row) for row in rows)]) + "\n"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, so that paths in messages are short."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs the config on a file and checks how it ends: cause, remedy, exit 2, no run directory."""

    def check(data: str, cause: str, remedy: str, *settings: str, name: str = "a.csv") -> None:
        Path("bad.yaml").write_text(CONFIG)
        Path(name).write_text(data)
        settings = (f"task.path={name}", *settings)
        code = main(["probe", "bad.yaml", *(part for one in settings for part in ("--set", one))])
        printed = capfd.readouterr()
        assert (code, printed.out) == (2, "")
        assert cause in printed.err
        assert remedy in printed.err
        assert not Path("runs").exists() or not list(Path("runs").iterdir())

    return check


def test_the_good_file_runs(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(CONFIG)
    Path("a.csv").write_text(csv(GOOD))
    assert main(["probe", "bad.yaml", "--quiet"]) == 0
    assert (Path(capfd.readouterr().out.strip()) / "probes.parquet").exists()


def test_one_class_only(refused: Refused) -> None:
    refused(csv([(text, "a") for text, _ in GOOD]), "a.csv: every label is 'a'", "needs two different labels")


def test_fewer_samples_than_folds(refused: Refused) -> None:
    cause = "bad.yaml:4: probe.folds: 5 folds of 4 samples; every fold needs one to test"
    refused(csv(GOOD[:4]), cause, "Give at most 4 folds")
    few = csv([(text, "b" if i > 7 else "a") for i, (text, _) in enumerate(GOOD)])
    refused(few, "probe.folds: class 'b' has 2 samples, fewer than the 5 folds", "Give at most 2 folds")
    refused(csv(GOOD), "probe.inner_folds: 9 folds of 8 samples", "Give at most 8 folds", "probe.inner_folds=9")


def test_fewer_groups_than_folds(refused: Refused) -> None:
    grouped = csv([(*row, f"g{i // 5}") for i, row in enumerate(GOOD)], "text,label,group")
    refused(grouped, "probe.folds: 5 folds of 2 groups; a group is never split", "leave `group` out")


def test_labels_that_are_the_text_or_all_different(refused: Refused) -> None:
    same = csv([(text, text) for text, _ in GOOD])
    refused(same, "a.csv line 2: the label is the text itself, in every row", "Give labels of their own")
    different = csv([(text, f"x{i}") for i, (text, _) in enumerate(GOOD)])
    refused(different, "a.csv: its 10 rows have 10 different labels, such as 'x0'", "must occur more than once")


@pytest.mark.parametrize(
    ("name", "data", "where"),
    [
        ("a.csv", "text,label,target\nk3 k4,a,k3\nk4 k5,b,k9\n", "a.csv line 3"),
        (
            "a.jsonl",
            '{"text": "k3 k4", "label": "a", "target": "k3"}\n{"text": "k4 k5", "label": "b", "target": "k9"}\n',
            "a.jsonl line 2",
        ),
    ],
)
def test_a_span_that_is_not_in_the_text(name: str, data: str, where: str, refused: Refused) -> None:
    refused(data, f"{where}: target: 'k9' occurs 0 times in 'k4 k5'", "Give a text that occurs once", name=name)


def test_a_span_that_is_in_the_text_twice(refused: Refused) -> None:
    data = "text,label,target\nk3 k4,a,k3\nk5 k5,b,k5\n"
    refused(data, "a.csv line 3: target: 'k5' occurs 2 times in 'k5 k5'", "the characters as [start, end]")


def test_labels_that_do_not_match_the_words(refused: Refused) -> None:
    data = "text,labels\nk3 k4,a b\nk4 k5,b\n"
    refused(data, "a.csv line 3: 1 label for 2 words: k4 | k5", "give one label for each")


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("a.csv", "text,label\nk3 k4,1.5\nk4 k5,nan\n", "a.csv line 3: label 'nan' is not a number"),
        ("a.csv", "text,label\nk3 k4,1.5\nk4 k5,\n", "a.csv line 3: the label is empty"),
        (
            "a.jsonl",
            '{"text": "k3 k4", "label": 1.5}\n{"text": "k4 k5", "label": NaN}\n',
            "a.jsonl line 2: label nan is not a number",
        ),
    ],
)
def test_nan_labels(name: str, data: str, cause: str, refused: Refused) -> None:
    refused(data, cause, "Give one, or take the row out", name=name)


def test_a_target_cut_off(refused: Refused) -> None:
    data = "text,label,target\nk3 k4 k5,a,k3\nk4 k5 k6,b,k6\n"
    cause = "a.csv line 3: target 'k6' (characters 6 to 8) is cut off: the text is kept up to character 5"
    refused(data, cause, "Raise task.length", "task.length=2")


@pytest.mark.parametrize("key", ["permutations=-1", "learning_curve=7", "predictions=some"])
def test_options_that_cannot_be(key: str, refused: Refused) -> None:
    name = key.split("=")[0]
    refused(csv(GOOD), f"probe.{name}: ", "fix: ", f"probe.{key}")
