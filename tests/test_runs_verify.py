import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp_cli.cli.main import main
from mechinterp_cli.config.base import MethodOptions
from mechinterp_cli.runs.atomic import FileInfo, file_info
from mechinterp_cli.runs.lock import hold
from mechinterp_cli.runs.manifest import Manifest
from mechinterp_cli.runs.manifest_schema import manifest_schema
from mechinterp_cli.runs.store import UnitStore
from mechinterp_cli.runs.tables import read_parquet, write_csv, write_parquet
from mechinterp_cli.runs.verify import verify_run
from mechinterp_cli.runs.verify_tables import _csv_shape
from tests.experiments import run_method, run_patch

TABLES = ("trials", "results", "baselines", "summary", "prompts")
PARQUET = [f"{table}.parquet" for table in TABLES]
FIGURE = "figures/00-resid_pre-logit_diff.png"
FILES = [*PARQUET, "results.csv", "summary.csv", "config.yaml", "config.resolved.yaml", "log.jsonl", FIGURE]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, which no test changes."""
    sites = [{"kind": "resid_pre", "layers": [0, 1], "positions": "each"}]
    folder = tmp_path_factory.mktemp("made")
    return run_patch(folder, {"sites": sites}, output={"figures": ["png"]}, metrics=["logit_diff", "prob"]).path


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def change(run: Path, **values: Any) -> None:
    """Change the manifest."""
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def note_down(run: Path, name: str, rows: int | None = None) -> None:
    """Write into the manifest what stands there now, as somebody who covers tracks would."""
    outputs = json.loads((run / "manifest.json").read_text())["outputs"]
    rows = outputs[name]["rows"] if rows is None else rows
    info = file_info(run / name, rows)
    change(run, outputs=outputs | {name: {"sha256": info.sha256, "bytes": info.bytes, "rows": info.rows}})


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_data(path: Path) -> None:
    """Change a value of a Parquet file: the end of its largest column's last page."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = max((group.column(i) for i in range(group.num_columns)), key=lambda column: column.total_compressed_size)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    flip(path, start + chunk.total_compressed_size - 2)


def to_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def problems(run: Path) -> list[str]:
    return [str(problem) for problem in verify_run(run).problems]


Ends = Callable[..., list[str]]


@pytest.fixture
def ends(capfd: pytest.CaptureFixture[str]) -> Ends:
    """Runs `verify`, checks its exit code, and that a refusal says nothing on stdout; gives the lines of stderr."""

    def check(run: Path, code: int) -> list[str]:
        assert main(["verify", str(run)]) == code
        out, err = capfd.readouterr()
        assert out == ("" if code else f"{run}\n")
        assert "Traceback" not in err
        return err.splitlines()

    return check


# --- a run that is in order


def test_a_good_run_is_verified_and_left_alone(run: Path, ends: Ends) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    size = sum((run / name).stat().st_size for name in FILES)
    assert ends(run, 0) == [f"verified: {len(FILES)} files, {size:,} bytes"]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before


def test_json(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(run), "--json", "--quiet"]) == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert err == ""
    assert (found["run"], found["status"], found["problems"]) == (str(run), "complete", [])
    (run / "trials.parquet").unlink()
    assert main(["verify", str(run), "--json"]) == 3
    found = json.loads(capfd.readouterr().out)
    assert found["problems"] == [{"file": "trials.parquet", "what": "missing"}]
    assert found["files"] == len(FILES) - 1


def test_the_cases_below_name_all_files_of_the_run(made: Path) -> None:
    assert set(FILES) == set(Manifest.read(made).outputs)


def test_a_run_reached_by_a_link_or_from_within_is_the_same_run(
    run: Path, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run.parent / "latest").symlink_to(run.name)
    ends(run.parent / "latest", 0)
    monkeypatch.chdir(run.parent)
    ends(Path(run.name), 0)


def test_other_files_are_a_note_and_no_error(run: Path, ends: Ends) -> None:
    (run / "figures" / "mine\x1b.svg").write_text("x")
    (run / "units").mkdir()
    (run / "units" / "left.parquet").write_text("x")
    (run / "away").symlink_to(run.parent)
    assert ends(run, 0)[:-1] == [
        "note: away is not in the manifest",
        "note: figures/mine\\x1b.svg is not in the manifest",
        "note: units/left.parquet is not in the manifest",
    ]


# --- changed bytes


@pytest.mark.parametrize("name", FILES)
def test_one_changed_bit_ends_with_3_and_names_the_file(run: Path, ends: Ends, name: str) -> None:
    flip(run / name, (run / name).stat().st_size // 2)
    lines = ends(run, 3)
    assert lines[0].startswith(f"error: {name}: changed: sha256 ")
    assert lines[1] == f"fix: Restore these files from a copy, or run it again: mechinterp reproduce {run}"
    assert len(lines) == 2


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99, 1.0])
def test_wherever_the_bit_is(run: Path, name: str, share: float) -> None:
    flip(run / name, round(share * ((run / name).stat().st_size - 1)))
    (problem,) = problems(run)
    assert problem.startswith(f"{name}: changed")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(b""), "changed: 0 bytes, recorded were "),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "changed: "),
        (lambda path: path.write_bytes(path.read_bytes() + b"\n"), "changed: "),
        (lambda path: (path.unlink(), path.mkdir()), "not an ordinary file"),
        (to_pipe, "not an ordinary file"),
    ],
    ids=["missing", "empty", "cut", "longer", "folder", "pipe"],
)
def test_lost_files(run: Path, name: str, damage: Callable[[Path], object], what: str) -> None:
    damage(run / name)
    (problem,) = problems(run)
    assert problem.startswith(f"{name}: {what}")


def test_all_that_is_wrong_is_told_at_once(run: Path, ends: Ends) -> None:
    flip(run / "results.csv", 100)
    (run / FIGURE).unlink()
    change(run, config_sha256="0" * 64)
    lines = ends(run, 3)
    assert [line.split(": ")[1] for line in lines[:-1]] == ["results.csv", FIGURE, "config.resolved.yaml"]


def test_changed_data_under_a_new_hash_fails_its_page_checksum(run: Path) -> None:
    """Nothing but the checksum can tell that these bytes are others."""
    for table in TABLES:
        name = f"{table}.parquet"
        flip_data(run / name)
        note_down(run, name)
    found = problems(run)
    assert sorted(problem.split(":")[0] for problem in found) == sorted(PARQUET)
    assert all(": does not read: " in problem for problem in found)


# --- names that lead elsewhere


@pytest.mark.parametrize("how", ["dots", "absolute", "link to a file", "link to a folder", "dots within"])
def test_nothing_outside_of_the_directory_is_read(run: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = run.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    inside = run / "inside.txt"
    names = {
        "dots": "../outside/secret.txt",
        "absolute": str(outside / "secret.txt"),
        "link to a file": "link.txt",
        "link to a folder": "linked/secret.txt",
        "dots within": "figures/../../outside/secret.txt",
    }
    (run / "link.txt").symlink_to(outside / "secret.txt")
    (run / "linked").symlink_to(outside)
    inside.write_text("secret")
    entry = {"sha256": hashlib.sha256(b"secret").hexdigest(), "bytes": 6, "rows": None}
    outputs = json.loads((run / "manifest.json").read_text())["outputs"]
    change(run, outputs=outputs | {"inside.txt": entry})
    assert problems(run) == []  # the same file inside is good
    change(run, outputs=outputs | {names[how]: entry})
    opened: list[Path] = []
    original = Path.open

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(path.resolve())
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert problems(run) == [f"{names[how]}: this name leads out of the run directory; it was not read"]
    assert opened
    assert all(path.is_relative_to(run) for path in opened)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "a\x00b", "a\\b", "C:a", "\ud800", "x" * 5000, "loop", "a\nerror: b"]
)
def test_names_that_are_none(run: Path, ends: Ends, name: str) -> None:
    (run / "loop").symlink_to("loop")
    outputs = json.loads((run / "manifest.json").read_text())["outputs"]
    change(run, outputs=outputs | {name: {"sha256": "0" * 64, "bytes": 0, "rows": None}})
    lines = ends(run, 3)
    assert len([line for line in lines if line.startswith("error")]) == 1


# --- tables


def rewrite(run: Path, name: str, table: pa.Table) -> None:
    """Put another table there, and cover it up."""
    write_parquet(table, run / name)
    note_down(run, name, table.num_rows)


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda table: table.drop_columns(["kv_head"]), "column kv_head is missing"),
        (lambda table: table.append_column("more", table["value"]), "column more is not in the schema"),
        (
            lambda table: table.set_column(
                table.schema.get_field_index("value"), "value", table["value"].cast(pa.float32())
            ),
            "column value is float, the schema says double",
        ),
        (lambda table: table.select(table.column_names[::-1]), "columns stand in another order than in the schema"),
        (
            lambda table: table.cast(pa.schema([field.with_nullable(True) for field in table.schema])),
            "column trial: null is allowed against the schema",
        ),
    ],
    ids=["missing", "more", "type", "order", "null"],
)
def test_a_table_of_another_form(run: Path, edit: Callable[[pa.Table], pa.Table], what: str) -> None:
    table = read_parquet(run / "summary.parquet")
    rewrite(run, "summary.parquet", table)
    assert problems(run) == []
    rewrite(run, "summary.parquet", edit(table))
    assert f"summary.parquet: {what}" in problems(run)


def test_rows_are_counted(run: Path) -> None:
    table = read_parquet(run / "results.parquet")
    write_parquet(table.slice(1), run / "results.parquet")
    note_down(run, "results.parquet")
    rows = table.num_rows
    assert problems(run) == [
        f"results.parquet: {rows - 1:,} rows, recorded were {rows:,}",
        f"results.csv: {rows:,} rows, results.parquet has {rows - 1:,}",
    ]


def test_csv_of_other_rows_or_columns(run: Path) -> None:
    table = read_parquet(run / "results.parquet")
    write_csv(table.slice(1), run / "results.csv")
    note_down(run, "results.csv", table.num_rows - 1)
    assert problems(run) == [f"results.csv: {table.num_rows - 1:,} rows, results.parquet has {table.num_rows:,}"]
    write_csv(table.drop_columns(["effect"]), run / "results.csv")
    note_down(run, "results.csv", table.num_rows)
    assert problems(run) == ["results.csv: the first line does not name the columns of the schema"]


@given(st.lists(st.text(alphabet='ab"\n\r,', max_size=6)), st.booleans())
def test_rows_of_a_csv_are_counted_whatever_its_texts(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], small: bool
) -> None:
    import mechinterp_cli.runs.verify_tables as module

    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write_csv(pa.table({"a": pa.array(texts, pa.string()), "b": pa.array(range(len(texts)), pa.int64())}), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", 8 if small else 1 << 20)
        assert _csv_shape(path) == (b'"a","b"', len(texts))


@pytest.mark.parametrize(
    ("name", "column", "value", "what"),
    [
        ("results.parquet", "status", "fine", "status: 'fine' is not one of ok, trivial, undefined, nan"),
        ("summary.parquet", "status", "", "status: '' is not one of ok, trivial, undefined, nan"),
        ("results.parquet", "trial", 99, "trial 99 is not in trials.parquet"),
        ("summary.parquet", "trial", -1, "trial -1 is not in trials.parquet"),
        ("baselines.parquet", "prompt", 4, "prompt 4 is not in prompts.parquet"),
    ],
)
def test_words_and_keys(run: Path, name: str, column: str, value: object, what: str) -> None:
    table = read_parquet(run / name)
    rewrite(run, name, with_column(table, column, [value, *table[column].to_pylist()[1:]]))
    assert problems(run) == [f"{name}: {what}"]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `heads` over two checkpoints, with every table that it can have; no test changes it."""
    section = {"scores": ["induction", "k_composition"], "causal": {"k": [1], "random": 3, "prompts": 2}}
    model = {"id": "toy-induction", "checkpoints": ["step0", "step600"]}
    return run_method(tmp_path_factory.mktemp("scored"), "heads", section, model=model).path


@pytest.fixture
def heads(scored: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(scored, tmp_path / scored.name))


def test_a_good_run_of_heads_is_verified(heads: Path, ends: Ends) -> None:
    assert ends(heads, 0)
    assert {"scores", "sequences", "compositions", "patterns", "causal"} <= {path.stem for path in heads.iterdir()}


@pytest.mark.parametrize("name", ["sequences.parquet", "patterns.parquet"])
def test_prompts_of_heads_are_looked_up(heads: Path, name: str) -> None:
    table = read_parquet(heads / name)
    rewrite(heads, name, with_column(table, "prompt", [99, *table["prompt"].to_pylist()[1:]]))
    assert f"{name}: prompt 99 is not in prompts.parquet" in problems(heads)


def test_words_of_scores(heads: Path) -> None:
    table = read_parquet(heads / "scores.parquet")
    rewrite(heads, "scores.parquet", with_column(table, "status", ["fine", *table["status"].to_pylist()[1:]]))
    assert "scores.parquet: status: 'fine' is not one of ok, trivial, undefined, nan" in problems(heads)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("scores", "checkpoint step0, score induction, layer 0, head 0"),
        ("compositions", "checkpoint step0, score k_composition, layer 1, head 0, from_layer 0, from_head 0"),
        ("patterns", "checkpoint step0, score induction, layer "),
        ("causal", "checkpoint step600, score induction, ablation zero, k 1, metric repeated_loss"),
        ("trials", "checkpoint step600, trial 0, edit 0"),
        ("summary", "checkpoint step600, trial 0, metric repeated_loss, group all, aggregate "),
        ("baselines", "checkpoint step0, prompt 0, stream clean, metric repeated_loss"),
        ("prompts", "prompt 0, stream clean"),
    ],
)
def test_a_row_that_stands_there_twice(heads: Path, name: str, row: str) -> None:
    table = read_parquet(heads / f"{name}.parquet")
    # The first row again, in place of the last.
    rewrite(heads, f"{name}.parquet", pa.concat_tables([table.slice(0, len(table) - 1), table.slice(0, 1)]))
    assert any(problem.startswith(f"{name}.parquet: this row stands there twice: {row}") for problem in problems(heads))


def test_a_table_that_the_method_does_not_have(run: Path) -> None:
    shutil.copy(run / "trials.parquet", run / "extra.parquet")
    outputs = json.loads((run / "manifest.json").read_text())["outputs"]
    change(run, outputs=outputs | {"extra.parquet": outputs["trials.parquet"]})
    assert problems(run) == ["extra.parquet: patch has no table of this name"]


def test_something_else_under_a_table_s_name(run: Path) -> None:
    for content in (b"", b"PAR1", b"PAR1" * 100, os.urandom(1000)):
        (run / "trials.parquet").write_bytes(content)
        note_down(run, "trials.parquet")
        (problem,) = problems(run)
        assert problem.startswith("trials.parquet: does not read: ")


# --- config and manifest


def test_config(run: Path) -> None:
    path = run / "config.resolved.yaml"
    text = path.read_text()
    path.write_text("# a remark changes no value\n" + text)
    note_down(run, path.name)
    assert problems(run) == []
    path.write_text(text.replace("block: 6", "block: 7"))
    note_down(run, path.name)
    (problem,) = problems(run)
    assert problem.startswith("config.resolved.yaml: hashes to ")
    path.write_text(text.replace("block: 6", "blok: 6"))
    note_down(run, path.name)
    (problem,) = problems(run)
    assert problem.startswith("config.resolved.yaml: does not load: ")


def test_config_within_the_manifest(run: Path) -> None:
    config = json.loads((run / "manifest.json").read_text())["config"]
    change(run, config=config | {"deterministic": False})
    assert problems(run) == ["config.resolved.yaml: differs from the config in the manifest"]


@pytest.mark.parametrize("name", ["config.yaml", "config.resolved.yaml", "log.jsonl"])
def test_what_a_complete_run_must_have(run: Path, name: str) -> None:
    outputs = json.loads((run / "manifest.json").read_text())["outputs"]
    change(run, outputs={key: value for key, value in outputs.items() if key != name})
    assert problems(run) == [f"{name}: a complete run has this file and the manifest does not name it"]


def test_unknown_subcommand(run: Path) -> None:
    change(run, subcommand="ptach")
    (problem,) = problems(run)
    known = sorted(MethodOptions.registry)
    assert {"heads", "patch"} <= set(known)
    assert problem == f"manifest.json: subcommand: 'ptach' is unknown; there are {', '.join(known)}"


def test_other_version_is_named_where_forms_differ(run: Path) -> None:
    change(run, mechinterp_version="0.0.1")
    assert problems(run) == []
    change(run, config_sha256="0" * 64)
    (problem,) = problems(run)
    assert "(the run is of mechinterp 0.0.1, this is " in problem


def test_broken_manifest(run: Path, ends: Ends) -> None:
    path = run / "manifest.json"
    whole = path.read_text()
    for text in ("", whole[:-100], "[]"):
        path.write_text(text)
        lines = ends(run, 3)
        assert lines[0].startswith("error: manifest.json: not a readable manifest: ")
        assert lines[1].startswith("fix: Restore manifest.json from a copy")
    path.unlink()
    assert ends(run, 3)[0] == "error: manifest.json: cannot be read: No such file or directory"
    path.write_text(whole)
    assert ends(run, 0)


def test_manifest_of_a_newer_version(run: Path, ends: Ends) -> None:
    change(run, schema_version=99)
    assert "written by a newer mechinterp" in ends(run, 2)[0]


@pytest.mark.parametrize("what", ["missing", "file", "folder"])
def test_what_is_no_run(tmp_path: Path, ends: Ends, what: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    problem = "no such folder" if what == "missing" else "this is no run directory"
    lines = ends(tmp_path / what, 2)
    assert lines == [
        f"error: {tmp_path / what}: {problem}",
        "fix: Give the path that a run printed; `mechinterp runs` lists them.",
    ]


# --- runs that did not come to their end


@pytest.mark.parametrize(
    ("status", "told"),
    [("interrupted", "interrupted"), ("failed", "failed"), ("running", "crashed")],
)
def test_unfinished_run_says_so_and_what_there_is_is_checked(run: Path, ends: Ends, status: str, told: str) -> None:
    change(run, status=status, units_done=3, units_total=8, error="no space")
    lines = ends(run, 3)
    assert lines == [
        f"error: manifest.json: the run is {told}, 3 of 8 units done: no space",
        f"fix: Go on with it: mechinterp resume {run}",
    ]
    flip(run / "prompts.parquet", 100)
    assert ends(run, 3)[1].startswith("error: prompts.parquet: changed")


def test_run_that_goes_on(run: Path, ends: Ends) -> None:
    change(run, status="running", units_done=0, units_total=None)
    with (run / "log.jsonl").open("a") as file:
        file.write("{}\n")
    with hold(run):
        assert ends(run, 3) == [
            "error: manifest.json: the run is running, 0 of an unknown number of units done",
            "fix: Wait until it is complete.",
        ]


def test_units_of_an_unfinished_run(run: Path) -> None:
    change(run, status="interrupted")
    store = UnitStore(run / "units")
    for unit in ("0000", "0001"):
        store.write(unit, pa.table({"value": pa.array([1.0, 2.0])}))
    assert len(problems(run)) == 1
    assert verify_run(run).unlisted == ()
    flip_data(store.path("0001"))
    assert [problem.split(":")[0] for problem in problems(run)] == ["manifest.json", "units/0001.parquet"]


# --- the published schema


def test_manifest_schema_fits_what_runs_write(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "manifest"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == manifest_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    manifest = json.loads((made / "manifest.json").read_text())
    assert validator.is_valid(manifest)
    assert validator.is_valid(manifest | {"key_of_a_later_version": 1})
    for bad in (
        {"status": "crashed"},
        {"started": 5},
        {"schema_version": 2},
        {"units_done": "3"},
        {"outputs": {"a": {"sha256": "0"}}},
        {"outputs": {"a": {"sha256": "0", "bytes": "1", "rows": None}}},
    ):
        assert not validator.is_valid(manifest | bad)
    for key in manifest:
        assert not validator.is_valid({name: value for name, value in manifest.items() if name != key})


def test_manifest_schema_says_what_keys_mean() -> None:
    schema = manifest_schema()
    assert schema["properties"]["status"]["enum"] == ["running", "complete", "interrupted", "failed"]
    assert schema["properties"]["units_total"]["anyOf"] == [{"type": "integer"}, {"type": "null"}]
    assert schema["properties"]["heartbeat"]["description"] == "When the run last gave a sign of life."
    assert schema["$defs"][FileInfo.__name__]["properties"]["rows"]["description"].startswith("Rows of a table")
    assert schema["properties"]["outputs"]["additionalProperties"] == {"$ref": f"#/$defs/{FileInfo.__name__}"}


def test_schema_without_a_word_is_that_of_configs(capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for arguments in (["schema"], ["schema", "config"]):
        assert main(arguments) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    assert outputs[0] == outputs[1]
    assert outputs[0]["title"] == "mechinterp experiment"
    assert main(["schema", "manifst"]) == 2
    assert "'manifst' is not one of 'config', 'manifest'" in capsys.readouterr().err
