"""Tables on stdout: fitted to the window where a person looks at it, whole and aligned in a pipe."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from mechinterp_cli.cli.console import Console
from mechinterp_cli.cli.fitted import aligned, fitted
from mechinterp_cli.cli.main import main
from tests.page_runs import reference

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
WIDTHS = (60, 80, 200)
RANKS = {"name": 0, "status": 0, "note": 1, "seconds": 2, "model": 3}
ROWS: list[dict[str, Any]] = [
    {"name": "2026-11-27T172747Z-probe-truth-e9de14", "status": "complete", "model": "smollm2-135m-instruct",
     "seconds": 31.25, "empty": None, "note": ""},
    {"name": "2026-11-27T180434Z-attribute-ioi-afd604", "status": "failed", "model": "toy", "seconds": None,
     "empty": None, "note": "ValueError: the weights of layer 3 are not finite, which no estimator can be asked of"},
]  # fmt: skip


class Window(io.TextIOWrapper):
    """A terminal."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding, newline="")

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError("a terminal of no size of its own")

    def text(self) -> str:
        self.flush()
        buffer = self.buffer
        assert isinstance(buffer, io.BytesIO)
        return buffer.getvalue().decode(self.encoding)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What is written to a terminal of so many columns."""

    def shown(width: int, write: Callable[[], object], stream: str = "stdout", **settings: str) -> str:
        window = Window(settings.pop("encoding", "utf-8"))
        with monkeypatch.context() as patch:
            for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
                patch.delenv(name, raising=False)
            for name, value in {"TERM": "xterm-256color", "COLUMNS": str(width), **settings}.items():
                patch.setenv(name, value)
            patch.setattr(f"sys.{stream}", window)
            write()
        return window.text()

    return shown


def lines(text: str) -> list[str]:
    return [ESCAPE.sub("", line).rstrip() for line in text.splitlines()]


def check_fits(text: str, width: int) -> None:
    assert max(map(cell_len, lines(text))) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("settings", [{}, {"NO_COLOR": "1"}, {"encoding": "ascii"}])
def test_a_table_fits_the_window_and_says_what_has_no_room(
    width: int, settings: dict[str, str], shown: Callable[..., str]
) -> None:
    text = shown(width, lambda: Console().listing(ROWS, RANKS), **settings)
    check_fits(text, width)
    assert ("\x1b[" in text) is (not settings)
    assert text.isascii() is bool(settings)
    told = " ".join(lines(text))
    for name in ("name", "status", "note", "seconds", "model"):
        assert name in told, "in the head, or below the table"
    assert "empty" not in told
    assert ("no room for" in told) is (width < 200)
    for row in ROWS:
        assert row["status"] in told


def test_names_are_whole_where_they_can_be(shown: Callable[..., str]) -> None:
    for width in WIDTHS:
        text = shown(width, lambda: Console().listing(ROWS, RANKS))
        assert all(str(row["name"]) in text for row in ROWS)
    long = [{**row, "name": f"{row['name']}-{'x' * 60}"} for row in ROWS]
    text = shown(80, lambda: Console().listing(long, RANKS))
    check_fits(text, 80)
    assert "seconds" not in "".join(lines(text)[:3])
    assert "no room for" in text


def test_wider_windows_show_no_less(shown: Callable[..., str]) -> None:
    heads = [shown(width, lambda: Console().listing(ROWS, RANKS)).splitlines()[0] for width in range(60, 200, 10)]
    counts = [len(ESCAPE.sub("", head).split()) for head in heads]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 5


def test_a_pipe_gets_everything_aligned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    Console().listing(ROWS, RANKS)
    piped = capsys.readouterr().out
    assert piped == aligned(ROWS)
    head, *rows = piped.splitlines()
    assert head.split() == list(ROWS[0])
    assert str(ROWS[1]["note"]) in rows[1]
    Console(as_json=True).listing(ROWS, RANKS)
    assert '"empty": null' in capsys.readouterr().out


def test_a_dumb_terminal_and_tables_without_ranks_are_whole(shown: Callable[..., str]) -> None:
    assert shown(60, lambda: Console().listing(ROWS, RANKS), TERM="dumb") == aligned(ROWS)
    assert shown(60, lambda: Console().listing(ROWS)) == aligned(ROWS)
    assert shown(60, lambda: Console().listing([], RANKS)) == aligned([])


def test_text_cannot_act(shown: Callable[..., str]) -> None:
    text = fitted([{"name": "a\x1b[2J[bold]b", "n": 1}], {"name": 0}, width=60, plain=True)
    assert "\x1b" not in text
    assert r"a\x1b[2J[bold]b" in text


@pytest.mark.parametrize("width", WIDTHS)
def test_runs_and_compare_fit_their_window(
    width: int, shown: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("patch-induction-toy", "heads-toy"):
        (tmp_path / f"2026-11-27T172747Z-{name}-e9de14").symlink_to(reference(name))
    text = shown(width, lambda: main(["runs", str(tmp_path)]))
    check_fits(text, width)
    assert "complete" in text
    same = str(reference("patch-induction-toy"))
    agreed = shown(width, lambda: main(["compare", same, same]))
    check_fits(agreed, width)
    assert "max_diff" in agreed
    capfd.readouterr()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_worst_rows_fit_the_window_of_stderr(width: int, shown: Callable[..., str]) -> None:
    worst: list[dict[str, Any]] = [
        {"metric": "logit_diff", "where": "resid_pre, layer 11, position 20, estimator atp_star, checkpoint step1500",
         "column": "normalized", "a": -3.199e-08, "b": 4.16e-11, "difference": 3.195e-08},
    ]  # fmt: skip
    ranks = {"where": 0, "difference": 0, "metric": 1, "a": 2, "b": 2, "column": 3}
    text = shown(width, lambda: Console("human").table(worst, ranks), stream="stderr")
    check_fits(text, width)
    assert "3.195e-08" in text
