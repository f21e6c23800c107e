"""A repeated run says whether a number moved, and which."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from mechinterp_cli.cli.main import main
from mechinterp_cli.runs import environment
from mechinterp_cli.runs.atomic import file_info
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.tables import read_parquet, write_parquet
from tests.experiments import config_of, run_patch

SITES = [
    {"kind": "resid_pre", "layers": "all", "positions": "each"},
    {"kind": "z", "layers": "all", "heads": "each", "positions": "all"},
]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_patch(tmp_path_factory.mktemp("made"), {"sites": SITES}, metrics=["logit_diff", "prob"]).path


@pytest.fixture
def recorded(made_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A complete run of one's own, and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made_once, tmp_path / "runs" / made_once.name)


Reproduce = Callable[..., tuple[int, str, list[str]]]


@pytest.fixture
def reproduce(recorded: Path, capfd: pytest.CaptureFixture[str]) -> Reproduce:
    """Repeats the run; gives exit code, stdout and the lines of stderr."""

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        capfd.readouterr()
        code = main(["reproduce", str(recorded), "--out", "again", *arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err.splitlines()

    return call


def tamper(run: Path, table: str, row: int, column: str, value: object) -> None:
    """Change one cell, and leave the manifest as it is."""
    path = run / f"{table}.parquet"
    data = read_parquet(path)
    cells = data[column].to_pylist()
    cells[row] = value
    place = data.schema.get_field_index(column)
    write_parquet(data.set_column(place, data.schema.field(column), pa.array(cells, data.schema.types[place])), path)


def test_the_same_machine_gives_the_same_bytes(recorded: Path, reproduce: Reproduce) -> None:
    code, out, err = reproduce("--exact")
    assert code == 0
    assert err[-1] == "reproduced: no number moved beyond atol 0.0001, rtol 0.001; same bytes"
    assert not [line for line in err if line.startswith("not as recorded")]
    again = Path(out.removesuffix("\n"))
    assert again.parent == Path("again")
    first, second = Manifest.read(recorded), Manifest.read(again)
    assert second.engine["parts"][0]["plan"] == first.engine["parts"][0]["plan"]
    assert (again / "results.parquet").read_bytes() == (recorded / "results.parquet").read_bytes()


def test_the_recorded_plan_is_used_again(recorded: Path, reproduce: Reproduce) -> None:
    manifest = Manifest.read(recorded)
    (unit, *_) = manifest.engine["parts"][0]["plan"]["units"]
    halves = [{"bucket": 0, "trials": unit["trials"][:5]}, {"bucket": 0, "trials": unit["trials"][5:]}]
    manifest.engine["parts"][0]["plan"] = {"executor": "resume", "rows_per_call": 7, "units": halves, "columns": None}
    manifest.write(recorded)
    code, out, err = reproduce()
    assert (code, [line for line in err if " was " in line]) == (0, [])
    again = Manifest.read(Path(out.strip()))
    assert again.engine["parts"][0]["plan"] == manifest.engine["parts"][0]["plan"]
    assert again.engine["parts"][0]["proof"]["executor"] == "resume"


@pytest.mark.parametrize(
    ("table", "row", "column", "value", "words"),
    [
        ("results", 200, "value", 77.0, "results: trial "),
        ("results", 200, "normalized", None, "results: trial "),
        ("results", 3, "status", "nan", "status was nan and is trivial"),
        ("baselines", 2, "value", -1.0, "baselines: prompt "),
        ("summary", 1, "effect", 0.5, "summary: trial "),
        ("trials", 4, "layer", 7, "trials: trial 4, edit 0: layer was 7 and is 0"),
        ("prompts", 1, "text", "k1 k2", "prompts: prompt 0, stream corrupt: text was k1 k2"),
    ],
)
def test_a_tampered_cell_is_named(
    recorded: Path, reproduce: Reproduce, table: str, row: int, column: str, value: object, words: str
) -> None:
    tamper(recorded, table, row, column, value)
    code, out, err = reproduce()
    assert code == 3
    assert f"{table}.parquet: changed since it was recorded" in err
    (cause,) = [line for line in err if line.startswith("error: ")]
    assert f"{recorded}: 1 cell moved; the furthest: " in cause
    assert words in cause
    assert f"{column} was " in cause
    assert err[-1] == f"fix: The repeated run is {out.strip()}."


def test_a_row_that_was_taken_out_is_named(recorded: Path, reproduce: Reproduce) -> None:
    path = recorded / "results.parquet"
    write_parquet(read_parquet(path).slice(1), path)
    code, _, err = reproduce()
    assert code == 3
    assert any("results: trial 0, (" in line and "row was missing and is there" in line for line in err)


def test_a_changed_table_whose_numbers_hold_is_found_too(recorded: Path, reproduce: Reproduce) -> None:
    value = read_parquet(recorded / "results.parquet")["value"][200].as_py()
    tamper(recorded, "results", 200, "value", value + 1e-7)
    code, _, err = reproduce()
    assert code == 3
    assert f"error: {recorded}: changed since it was recorded: results.parquet" in err


def test_exact_looks_at_bytes(recorded: Path, reproduce: Reproduce) -> None:
    manifest = Manifest.read(recorded)
    path = recorded / "results.parquet"
    rows = read_parquet(path)
    # One number in its last bit: within every tolerance.
    place = rows.schema.get_field_index("value")
    values = rows["value"].to_numpy().copy()
    values[-1] *= 1 + 1e-15
    manifest.outputs["results.parquet"] = write_parquet(rows.set_column(place, rows.field("value"), [values]), path)
    manifest.write(recorded)
    code, _, err = reproduce()
    assert (code, err[-1].split("; ")[1]) == (0, "other bytes in results.parquet")
    code, _, err = reproduce("--exact")
    assert code == 3
    assert any(line.startswith(f"error: {recorded}: other bytes in results.parquet") for line in err)


def test_tolerances_can_be_given(recorded: Path, reproduce: Reproduce) -> None:
    value = read_parquet(recorded / "results.parquet")["value"][200].as_py()
    tamper(recorded, "results", 200, "value", value + 0.5)
    manifest = Manifest.read(recorded)
    manifest.outputs["results.parquet"] = file_info(recorded / "results.parquet", 440)
    manifest.write(recorded)
    assert reproduce()[0] == 3
    code, _, err = reproduce("--atol", "0.6")
    assert (code, err[-1].split("; ")[0]) == (0, "reproduced: no number moved beyond atol 0.6, rtol 0.001")
    assert reproduce("--atol", "0", "--rtol", "0")[0] == 3
    assert reproduce("--atol", "-1")[0] == 2


def test_a_change_makes_it_a_study(recorded: Path, reproduce: Reproduce) -> None:
    code, out, err = reproduce("--set", "model.dtype=bfloat16", "--json")
    data = json.loads(out)
    assert "not as recorded: model.dtype: float32 -> bfloat16" in err
    assert Manifest.read(Path(data["run"])).model["dtype"] == "bfloat16"
    assert code == (3 if data["moved"] else 0)
    code, out, err = reproduce("--set", "model.dtype=bfloat16", "--atol", "1e-6", "--rtol", "0", "--json")
    data = json.loads(out)
    assert code == 3
    assert data["moved"] > 10
    assert {"table", "row", "column", "recorded", "repeated", "size"} <= data["worst"][0].keys()
    assert data["worst"][0]["size"] >= data["worst"][1]["size"]
    assert data["not_as_recorded"]
    code, _, err = reproduce("--set", "task.n=3")
    assert code == 3
    assert any("row was there and is missing" in line for line in err)


def test_other_surroundings_are_told_before_the_numbers(
    recorded: Path, reproduce: Reproduce, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = environment.package_versions()
    monkeypatch.setattr(environment, "package_versions", lambda: versions | {"torch": "9.9"})
    code, _, err = reproduce()
    assert code == 0
    told = [i for i, line in enumerate(err) if line == f"not as recorded: torch: {versions['torch']} -> 9.9"]
    assert told < [i for i, line in enumerate(err) if line.startswith("reproduced: ")]
    assert recorded.exists()


@pytest.mark.parametrize("damage", ["edited", "not complete", "damaged"])
def test_what_cannot_be_repeated_is_said(recorded: Path, reproduce: Reproduce, damage: str) -> None:
    if damage == "edited":
        config = recorded / "config.resolved.yaml"
        config.write_text(config.read_text().replace("n: 4", "n: 5"))
        wanted = (2, "config.resolved.yaml: is not the recorded config: task.n: 4 -> 5")
    elif damage == "not complete":
        manifest = Manifest.read(recorded)
        manifest.status = "interrupted"
        manifest.write(recorded)
        wanted = (2, "the run is interrupted, not complete")
    else:
        data = (recorded / "results.parquet").read_bytes()
        (recorded / "results.parquet").write_bytes(data[:-20])
        wanted = (1, "results.parquet: missing or damaged")
    code, out, err = reproduce()
    assert (code, out) == (wanted[0], "")
    assert wanted[1] in next(line for line in err if line.startswith("error: "))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads as another machine might use."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_one_thread_and_two_threads_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config_of(tmp_path, {"sites": SITES}, task={"name": "induction", "n": 64, "block": 12, "prefix": 4})
    with threads(1):
        assert main(["patch", "experiment.yaml", "--quiet"]) == 0
    one = Path(capfd.readouterr().out.strip())
    assert Manifest.read(one).hardware["threads"] == 1
    with threads(2):
        assert main(["reproduce", str(one), "--out", "two"]) == 0
    out, err = capfd.readouterr()
    two = Path(out.strip())
    assert "not as recorded: threads: 1 -> 2" in err
    assert "reproduced: no number moved beyond atol 0.0001" in err
    assert Manifest.read(two).hardware["threads"] == 2
    assert file_info(one / "prompts.parquet").sha256 == file_info(two / "prompts.parquet").sha256
