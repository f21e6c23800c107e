"""Every kind of view in windows of 60, 80 and 200 columns, with colour, without, and in a pipe."""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from mechinterp_cli.cli.console import Console
from mechinterp_cli.report.view import VIEWS, View, view_of
from mechinterp_cli.runs.manifest import Manifest
from tests import ablate_frames, attribute_frames, heads_frames, probe_frames
from tests.test_report_view import patch_manifest, patch_tables

WIDTHS = (60, 80, 200)
TRAINED = tuple((f"step{at}", at * 1000) for at in (0, 200, 400, 600, 1500))
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def circuit_manifest() -> Manifest:
    made = Manifest(
        "circuit",
        "fake",
        {"circuit": {"rank": "signed", "granularity": "edges"}, "metrics": ["logit_diff"]},
        "0",
        status="complete",
    )
    made.config["output"] = {"top": 10}
    made.model = {"id": "toy", "anatomy": {"first_layer": {"heads": {"query": 4, "key_value": 4}}}}
    made.task = {"name": "ioi"}
    return made


def circuit_tables() -> dict[str, pd.DataFrame]:
    """Circuits of two rankings, which get better with their size."""
    rows = [
        {
            "score": score, "rank": rank, "size": size, "threshold": None, "kept": int(110 * size), "nodes": 9,
            "metric": "logit_diff", "value": 1.0, "full": 3.0, "empty": -1.0, "faithfulness": size**power,
            "ci_low": size**power - 0.1, "ci_high": size**power + 0.1, "random_mean": size**3, "random_low": 0.0,
            "random_high": size, "draws": 20, "n": 24, "clusters": 24, "checkpoint": None, "tokens_seen": None,
        }
        for score, power in (("eap_ig_inputs", 0.5), ("exact", 0.3))
        for rank in ("signed", "absolute")
        for size in (0.01, 0.1, 0.2, 0.5, 1.0)
    ]  # fmt: skip
    return {"faithfulness": pd.DataFrame(rows)}


def fakes() -> Iterator[tuple[str, Manifest, Mapping[str, pd.DataFrame]]]:
    """One run of every kind, with everything that its terminal view can show."""
    yield "patch", patch_manifest(), patch_tables(*TRAINED)
    yield "circuit", circuit_manifest(), circuit_tables()
    heads = heads_frames.Fake(checkpoints=TRAINED, draws=199)
    yield "heads", heads.manifest, heads.tables()
    for kind, fake in (
        ("ablate", ablate_frames.Fake()),
        ("attribute", attribute_frames.Fake()),
        ("probe", probe_frames.Fake()),
    ):
        yield kind, fake.manifest, fake.tables()


@cache
def view(kind: str) -> View:
    return next(view_of(manifest, tables) for name, manifest, tables in fakes() if name == kind)


@cache
def parts(kind: str, width: int, plain: bool) -> tuple[Any, ...]:
    """What is drawn of a view for a window."""
    return tuple(view(kind).draw(width, plain))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the command line writes of a view to stderr."""

    def drawn(kind: str, width: int, *, mode: Any = "human", encoding: str = "utf-8", **settings: str) -> str:
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", newline="")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stderr", file)
            for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
                patch.delenv(name, raising=False)
            for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **settings}.items():
                patch.setenv(name, value)
            Console(mode).draw(lambda width, plain: parts(kind, width, plain))
        file.seek(0)
        return file.read()

    return drawn


def test_every_kind_of_view_is_here() -> None:
    assert {kind for kind, *_ in fakes()} == set(VIEWS)


def widest(text: str) -> int:
    return max(cell_len(ESCAPE.sub("", line).rstrip()) for line in text.splitlines())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", VIEWS)
def test_no_line_is_wider_than_the_window(kind: str, width: int, drawn: Callable[..., str]) -> None:
    shown = {
        "colour": drawn(kind, width),
        "no colour": drawn(kind, width, NO_COLOR="1"),
        "pipe": drawn(kind, width, mode="plain"),
        "ascii": drawn(kind, width, encoding="ascii"),
    }
    for name, text in shown.items():
        assert len(text.splitlines()) > 3, name
        assert widest(text) <= width, name
        # Rich ends what it cuts with an ellipsis: numbers of tables are left out whole, not cut.
        assert text.isascii() or name == "colour"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", VIEWS)
def test_rows_of_maps_and_curves_are_broken_nowhere(kind: str, width: int) -> None:
    """Drawn for a window and shown in one that breaks nothing, they still fit."""
    for plain in (True, False):
        file = io.StringIO()
        console = RichConsole(file=file, width=1000, color_system=None, markup=False, emoji=False, highlight=False)
        for part in parts(kind, width, plain):
            console.print(part)
        rows = [line for line in file.getvalue().splitlines() if re.match(r" *\d+ +[-.\d]", line) or "█" in line]
        assert max(map(cell_len, map(str.rstrip, rows)), default=0) <= width


@pytest.mark.parametrize("kind", VIEWS)
def test_a_pipe_and_a_poor_terminal_get_ascii_without_escapes(kind: str, drawn: Callable[..., str]) -> None:
    piped = drawn(kind, 80, mode="plain")
    assert piped.isascii()
    assert "\x1b" not in piped
    poor = drawn(kind, 80, encoding="ascii")
    assert ESCAPE.sub("", poor) == piped
    assert ESCAPE.sub("", drawn(kind, 80, NO_COLOR="1")) == piped


@pytest.mark.parametrize("kind", VIEWS)
def test_a_terminal_gets_blocks_or_colours(kind: str, drawn: Callable[..., str]) -> None:
    shown = drawn(kind, 80)
    assert "\x1b[" in shown
    assert not shown.isascii()


@pytest.mark.parametrize("kind", ["patch", "heads", "circuit", "probe"])
def test_curves_are_drawn_where_there_are_some(kind: str, drawn: Callable[..., str]) -> None:
    assert "█" in drawn(kind, 80)
    assert re.search(r" [0-9]*9  -?\d+\.\d{3} (at|throughout)", drawn(kind, 80, mode="plain"))


@pytest.mark.parametrize("kind", VIEWS)
def test_wider_windows_show_no_less(kind: str, drawn: Callable[..., str]) -> None:
    numbers = [len(re.findall(r"\d\.\d{2}", drawn(kind, width, mode="plain"))) for width in WIDTHS]
    assert numbers == sorted(numbers)
