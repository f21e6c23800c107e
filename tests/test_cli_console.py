import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechinterp_cli.cli.console import Console
from mechinterp_cli.runs.outcome import RunOutcome
from mechinterp_cli.text import visible

HOSTILE = "a\x1b[31mred\x1b]0;title\x07 [red]tok[/INST] \r\n\x9b2J \u202e \udc80 é"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def stderr_is(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> io.StringIO:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize(
    ("terminal", "term", "quiet", "mode"),
    [
        (True, "xterm", False, "human"),
        (True, "dumb", False, "plain"),
        (False, "xterm", False, "plain"),
        (True, "xterm", True, "quiet"),
    ],
)
def test_mode_follows_options_and_terminal(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, term: str, quiet: bool, mode: str
) -> None:
    stderr_is(monkeypatch, terminal)
    monkeypatch.setenv("TERM", term)
    assert Console.choose(quiet=quiet).mode == mode


def test_closed_stderr_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert Console.choose().mode == "plain"


def test_hostile_text_is_shown_and_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("plain")
    console.say(HOSTILE)
    console.error(HOSTILE, HOSTILE)
    console.table([{"token": HOSTILE}])
    shown = capsys.readouterr().err
    assert not any(ord(c) < 32 and c != "\n" for c in shown)
    assert not set("\x9b\u202e\x7f") & set(shown)
    assert "[red]tok[/INST]" in shown
    assert "\\x1b[31mred" in shown
    assert "é" in shown


def test_ordinary_text_is_left_alone() -> None:
    text = "Mary gave 日本 😀 [a] <b> \\n"
    assert visible(text) == text
    assert visible("a\nb", lines=True) == "a\nb"
    assert visible("a\nb") == "a\\nb"


def test_markup_in_tokens_is_text_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stderr_is(monkeypatch, True)
    monkeypatch.setenv("TERM", "xterm")
    with Console("human").progress() as progress:
        progress.stage("sweeping [/INST] [red]x")
        progress.advance(1, 4)
        progress.message("tok: [/INST] \x1b[2J")
        progress.stage("proving")
    assert "tok: [/INST] \\x1b[2J" in stream.getvalue()
    assert "[/INST] [red]x" in stream.getvalue()


def test_colours_are_off_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown() -> str:
        stream = stderr_is(monkeypatch, True)
        with Console("human").progress() as progress:
            progress.stage("sweeping")
            progress.advance(1, 2)
        return stream.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[38;" in shown() or "\x1b[3" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[38;" not in shown()


def test_without_a_terminal_one_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    console = Console("plain", _clock=lambda: now[0])
    with console.progress() as progress:
        progress.stage("sweeping")
        for second in range(1, 181):
            now[0] = float(second)
            progress.advance(second, 180)
    assert capsys.readouterr().err.splitlines() == [
        "sweeping",
        "sweeping: 60 of 180, 1/s, 2 min left",
        "sweeping: 120 of 180, 1/s, 1 min left",
        "sweeping: 180 of 180, 1/s",
    ]


def told(capsys: pytest.CaptureFixture[str], *moments: tuple[float, int], total: int = 100) -> list[str]:
    """What a log says of a stage that at these times has done so many units."""
    now = [0.0]
    with Console("plain", _clock=lambda: now[0]).progress() as progress:
        progress.stage("sweeping")
        for second, done in moments:
            now[0] = second
            progress.advance(done, total)
    return [line.removeprefix("sweeping: ") for line in capsys.readouterr().err.splitlines()[1:]]


def test_units_of_an_earlier_run_do_not_count_as_fast(capsys: pytest.CaptureFixture[str]) -> None:
    assert told(capsys, (60.0, 80), (180.0, 82)) == ["80 of 100", "82 of 100, 1/min, 18 min left"]


def test_a_stage_that_begins_again_is_timed_again(capsys: pytest.CaptureFixture[str]) -> None:
    moments = ((1.0, 0), (61.0, 60), (70.0, 0), (130.0, 6))
    assert told(capsys, *moments) == ["60 of 100, 1/s, 40 s left", "6 of 100, 6/min, 16 min left"]


@pytest.mark.parametrize(
    ("seconds", "done", "total", "said"),
    [
        (60, 18_000, 20_000, "18000 of 20000, 300/s, 7 s left"),
        (7200, 3, 100, "3 of 100, 1.5/h, 64 h 40 min left"),
        (60, 0, 100, "0 of 100"),
    ],
)
def test_rate_and_time_left_have_units_that_suit_them(
    capsys: pytest.CaptureFixture[str], seconds: float, done: int, total: int, said: str
) -> None:
    assert told(capsys, (0.0, 0), (float(seconds), done), total=total) == [said]


def test_a_share_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with Console("plain", _clock=lambda: now[0]).progress() as progress:
        progress.part("downloading", 0.0)
        now[0] = 60.0
        progress.part("downloading", 0.25)
    assert capsys.readouterr().err.splitlines() == ["downloading", "downloading: 25 %, 3 min left"]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_bar_is_no_wider_than_the_window(monkeypatch: pytest.MonkeyPatch, columns: int, encoding: str) -> None:
    stream = Terminal()
    monkeypatch.setattr(type(stream), "encoding", encoding, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    for name, value in (("TERM", "xterm"), ("COLUMNS", str(columns)), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    now = [0.0]
    with Console("human", _clock=lambda: now[0]).progress() as progress:
        progress.stage("step 3 of 4: sweeping every head, MLP and neuron of \u4e2d at every position")
        progress.advance(0, 3000)
        now[0] = 7.0
        progress.advance(1250, 3000)
        progress.bar.refresh()
    shown = stream.getvalue()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]", shown)]
    assert max(map(len, lines)) <= columns
    assert any("42%" in line and "179/s, 10 s left" in line for line in lines)
    assert encoding != "ascii" or shown.isascii()


WINDOW = """
import fcntl, os, pty, struct, subprocess, sys, termios
ours, theirs = pty.openpty()
fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
code = "from mechinterp_cli.cli.console import Console; Console.choose().draw(lambda *seen: [str(seen)])"
done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs)
print(done.stdout + os.read(ours, 999))
"""


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({}, "(60, False)"),
        ({"COLUMNS": "80"}, "(80, False)"),
        ({"NO_COLOR": "1"}, "(60, True)"),
        ({"PYTHONIOENCODING": "ascii"}, "(60, True)"),
        ({"TERM": "dumb"}, "(60, True)"),
    ],
)
def test_the_window_is_that_of_stderr_though_stdout_is_captured(settings: dict[str, str], seen: str) -> None:
    clean = {name: value for name, value in environment().items() if name not in ("COLUMNS", "NO_COLOR")}
    given = {**clean, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **settings}
    done = subprocess.run([sys.executable, "-c", WINDOW], capture_output=True, check=True, text=True, env=given)
    assert seen in done.stdout


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("0", 100), ("wide", 100), ("3", 20)])
def test_a_pipe_is_as_wide_as_columns_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    Console("plain").draw(lambda width, plain: [f"{width} {plain}"])
    assert capsys.readouterr().err.split() == [str(width), "True"]


def test_quiet_says_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console("quiet")
    console.say("x")
    console.table([{"a": 1}])
    with console.progress() as progress:
        progress.stage("x")
        progress.advance(1, 2)
        progress.message("x")
    assert capsys.readouterr() == ("", "")
    console.error("cause", "remedy")
    assert capsys.readouterr().err == "error: cause\nfix: remedy\n"


def test_every_line_of_a_cause_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error("a\nb", "c")
    assert capsys.readouterr().err == "error: a\nerror: b\nfix: c\n"


def test_path_alone_on_stdout_and_json_where_asked(capfd: pytest.CaptureFixture[str]) -> None:
    Console().result(Path("runs/x"), {"rows": 1})
    assert capfd.readouterr().out == "runs/x\n"
    Console(as_json=True).result(Path("runs/x"), {"value": math.nan, "low": -math.inf, "token": "\x1b[2J"})
    out = capfd.readouterr().out
    assert "\x1b" not in out
    assert json.loads(out) == {"run": "runs/x", "value": "NaN", "low": "-Infinity", "token": "\x1b[2J"}


def test_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(
        [{"site": "z", "effect": 0.123456, "layer": 3}, {"site": "resid_pre", "effect": -1.0, "layer": None}]
    )
    assert capsys.readouterr().err == "site       effect  layer\nz          0.1235      3\nresid_pre      -1\n"


SAY = "from mechinterp_cli.cli.console import Console; "


def python(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", SAY + code], capture_output=True, check=False, **options)


def test_poor_encoding_escapes_instead_of_failing() -> None:
    done = python("Console().say('tok \\u20ac')", env={"PYTHONIOENCODING": "ascii", **environment()})
    assert (done.returncode, done.stderr) == (0, b"tok \\u20ac\n")


def test_path_of_any_bytes_is_given_exactly() -> None:
    done = python("import os; from pathlib import Path; Console().result(Path(os.fsdecode(b'a\\xff b')))")
    assert done.stdout == b"a\xff b\n"


def test_reader_that_goes_away_is_no_error() -> None:
    code = SAY + "[Console().listing([{'a': 'x' * 1000}]) for _ in range(1000)]; Console().say('done')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"done\n"
        assert process.wait() == 0


def environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def test_console_needs_nothing_heavy() -> None:
    heavy = "{'torch', 'pandas', 'pydantic', 'transformers', 'pyarrow', 'numpy', 'rich', 'yaml'}"
    code = f"import sys, mechinterp_cli.cli.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout == "set()\n"


def test_outcome_is_shown_whole(capfd: pytest.CaptureFixture[str]) -> None:
    from mechinterp_cli.cli.options import show_outcome

    outcome = RunOutcome(Path("runs/x"), [{"layer": 3}], lambda width, plain: ["#", "##"], ["few prompts"])
    show_outcome(Console(), outcome)
    assert capfd.readouterr() == ("runs/x\n", "#\n\n##\n\nfew prompts\n")
    show_outcome(Console(), replace(outcome, draw=None))
    assert capfd.readouterr() == ("runs/x\n", "layer\n    3\nfew prompts\n")
