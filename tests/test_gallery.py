"""The gallery: every config has its pictures in the README, small and true to the charts, drawn without computing."""

import re
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import numpy as np
import pytest

from benchmarks import gallery
from benchmarks.small_png import SIGNATURE, decoded, palette, shrunk, size
from mechinterp_cli.report.picture import COLOURS, SERIES_COLOURS, Drawing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST = 100_000
"""Bytes of a picture."""
CONFIG = "patch-induction-toy"
SHOWN = gallery.configs()
RUN = f"2026-01-31T120000Z-{CONFIG}-0a1b2c"


def wanted() -> set[str]:
    return {name for config in SHOWN for name in gallery.files(config)}


@pytest.mark.parametrize("config", SHOWN)
def test_a_config_has_small_pictures_that_the_readme_shows(config: str) -> None:
    for name in gallery.files(config):
        png = (gallery.PICTURES / name).read_bytes()
        assert png.startswith(SIGNATURE)
        assert len(png) < MOST
        assert f"docs/figures/{name}" in README
    assert f"configs/{config}.yaml" in README


def test_no_picture_is_without_a_config_and_no_two_configs_share_one() -> None:
    assert {path.name for path in gallery.PICTURES.iterdir()} == wanted()
    assert len(wanted()) == sum(len(gallery.files(config)) for config in SHOWN)
    assert set(gallery.FIGURES) <= set(gallery.configs())
    assert list((ROOT / "docs").glob("*.png")) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_pictures_in_documents_are_there_and_say_what_is_seen(document: Path) -> None:
    text = document.read_text()
    tags = [dict(re.findall(r'(\w+)="([^"]*)"', tag)) for tag in re.findall(r"<img ([^>]*)>", text)]
    shown = [(tag["src"], tag["alt"]) for tag in tags] + [
        (to, said) for said, to in re.findall(r"!\[(.*)\]\((.*)\)", text)
    ]
    for to, said in shown:
        assert (document.parent / to).is_file(), to
        assert len(said.split()) >= 4, to
    assert document.name != "README.md" or {Path(to).name for to, _ in shown} == wanted()


# --- drawing


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run of the toy's config, as it would be called."""
    shutil.copytree(ROOT / "runs" / "reference" / CONFIG, tmp_path / "runs" / RUN)
    return tmp_path / "runs"


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Nothing is run; gives what would have been."""
    asked: list[str] = []

    def run(config: str, folder: Path) -> Path:
        asked.append(config)
        return next(folder.iterdir())

    monkeypatch.setattr(gallery, "run", run)
    return asked


def test_pictures_are_drawn_from_a_run_and_those_of_no_config_removed(
    runs: Path, unable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("gone-config.png", "patch-ioi.png", "notes.txt"):
        (pictures / name).write_bytes(b"")
    assert gallery.main([CONFIG, "--runs", str(runs), "--pictures", str(pictures)]) == 0
    drawn = set(gallery.files(CONFIG))
    assert {path.name for path in pictures.iterdir()} == drawn | {"patch-ioi.png", "notes.txt"}
    assert all((pictures / name).read_bytes().startswith(SIGNATURE) for name in drawn)
    assert unable == []
    out = capsys.readouterr().out
    assert f"of {RUN}" in out
    assert "gone-config.png: removed" in out


def test_a_run_of_another_experiment_is_not_taken(runs: Path) -> None:
    assert gallery.found(CONFIG, runs) == runs / RUN
    assert gallery.found("patch-ioi", runs) is None
    for file, old, new in (
        ("config.yaml", "n: 32", "n: 33"),
        ("manifest.json", '"complete"', '"interrupted"'),
        ("manifest.json", '"output.figures=[]"', '"task.n=8"'),
    ):
        path = runs / RUN / file
        good = path.read_text()
        assert old in good
        path.write_text(good.replace(old, new))
        assert gallery.found(CONFIG, runs) is None, new
        path.write_text(good)
    assert gallery.found(CONFIG, runs) == runs / RUN


def test_where_there_is_no_run_the_config_is_run(runs: Path, unable: list[str], tmp_path: Path) -> None:
    (runs / RUN).rename(runs / "other")
    assert gallery.main([CONFIG, "--runs", str(runs), "--pictures", str(tmp_path / "new")]) == 0
    assert unable == [CONFIG]
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(gallery.files(CONFIG))


def test_a_figure_that_a_run_has_not_is_named(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gallery, "FIGURES", {CONFIG: ["lens"]})
    assert gallery.main([CONFIG, "--runs", str(runs), "--pictures", str(tmp_path / "new")]) == 1
    assert f"{CONFIG}: {RUN} has no figure lens; there are 00-resid_pre-logit_diff, 01-z-" in capsys.readouterr().err


def test_an_unknown_config_is_told_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gallery.main(["patch-oi"])
    assert "no config is called patch-oi; there are ablate-" in capsys.readouterr().err


# --- small files


def unpacked(png: bytes) -> np.ndarray:
    """The pixels of a PNG with a palette and unfiltered rows, read part by part with checksums."""
    parts, at = {}, len(SIGNATURE)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        data = png[at + 4 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length])[0] == zlib.crc32(data)
        parts[data[:4]] = data[4:]
        at += 12 + length
    assert list(parts) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height = size(png)
    rows = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + width)
    assert not rows[:, 0].any()
    return np.frombuffer(parts[b"PLTE"], np.uint8).reshape(-1, 3)[rows[:, 1:]]


def chart(colours: Sequence[str]) -> bytes:
    """A heat map with a legend, as vl-convert draws it."""
    rows = [{"x": x, "y": y, "value": x * y} for x in range(20) for y in range(20)]
    made = alt.Chart(alt.InlineData(values=rows)).mark_rect()
    shown = made.encode(x="x:O", y="y:O", color=alt.Color("value:Q", scale=alt.Scale(range=list(colours))))
    return Drawing(lambda: alt.concat(shown)).png(scale=1.0)


@pytest.mark.parametrize("colours", [COLOURS, SERIES_COLOURS])
def test_a_small_file_shows_the_same_picture(colours: Sequence[str]) -> None:
    png = chart(colours)
    small, pixels = shrunk(png), decoded(png)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 256
    # Of 256 levels of each colour: a difference that no eye sees beside the original.
    assert np.abs(unpacked(small).astype(int) - pixels.astype(int)).max() <= 16
    assert len(small) < len(png) / 3


def test_colours_that_all_have_room_are_kept_exactly_and_rare_ones_are_not_lost() -> None:
    few = np.array([[0, 0, 0], [0, 0, 1], [255, 0, 0]])
    kept, instead = palette(few, np.array([9, 1, 1]))
    assert (kept[instead] == few).all()
    greys = np.repeat(np.arange(256)[:, None], 3, axis=1)
    colours = np.concatenate([greys, [[255, 0, 0], [254, 0, 0]]])
    kept, instead = palette(colours, np.array([1000] * 256 + [2, 1]))
    assert len(kept) <= 256
    assert np.abs(kept[instead] - colours).max() <= 1
    assert (kept[instead[-2:]] == [255, 0, 0]).all()  # the more frequent of the two


def test_another_kind_of_png_is_refused() -> None:
    small = shrunk(chart(COLOURS))
    with pytest.raises(ValueError, match="8-bit RGBA is expected"):
        shrunk(small)
    with pytest.raises(ValueError, match="no PNG"):
        shrunk(b"GIF89a")
