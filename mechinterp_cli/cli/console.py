"""One object that decides what is shown to whom: a person, a log, a program, nobody.

stdout carries the result alone (the run directory's path, or JSON). Everything else goes to stderr.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO

from mechinterp_cli.text import visible

Mode = Literal["human", "plain", "quiet"]
_PLAIN_SECONDS = 60.0
_DIGITS = 4
_PLAIN_WIDTH = 100
_LEAST_WIDTH = 20
_BAR, _NARROW_BAR, _WIDE = 40, 10, 110
_BESIDE_BAR = 38
"""Columns beside the bar: share, rate, time left and time passed."""


@dataclass
class Console:
    """Where messages go, and in which form."""

    mode: Mode = "plain"
    """`human`: a terminal, with colours and bars; `plain`: log lines; `quiet`: errors alone."""
    as_json: bool = False
    """Whether stdout carries JSON instead of a path."""
    _clock: Callable[[], float] = field(default=time.monotonic, repr=False)

    @classmethod
    def choose(cls, *, quiet: bool = False, as_json: bool = False) -> "Console":
        """Decide by the options and by what stderr is."""
        terminal = _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"
        return cls("quiet" if quiet else "human" if terminal else "plain", as_json)

    def say(self, text: str) -> None:
        """Tell something on stderr, unless quiet; line breaks stay, other control characters are escaped."""
        if self.mode != "quiet":
            _write(sys.stderr, visible(text, lines=True) + "\n")

    def draw(self, view: Callable[[int, bool], Iterable[Any]]) -> None:
        """Show pictures and tables on stderr, unless quiet, as wide as the terminal and as plain as it must be.

        Args:
            view: Given width and plainness, what rich prints; its texts carry no markup and no control characters.
        """
        if self.mode == "quiet":
            return
        from rich.console import Console as RichConsole

        human, width = self.mode == "human", _width(sys.stderr)
        # Without colour a number must stand where the colour told it.
        unicode = (sys.stderr.encoding or "").lower().replace("-", "") == "utf8" and not os.environ.get("NO_COLOR")
        buffer = io.StringIO()
        rich = RichConsole(file=buffer, width=width, force_terminal=human, markup=False, emoji=False, highlight=False)
        for part in view(width, not human or not unicode):
            rich.print(part)
            rich.print()
        _write(sys.stderr, buffer.getvalue())

    def error(self, cause: str, remedy: str = "") -> None:
        """Tell what is wrong and how to put it right, on stderr, whatever the mode."""
        lines = [f"error: {line}" for line in cause.splitlines()] or ["error: unknown"]
        lines += [f"fix: {line}" for line in remedy.splitlines()]
        _write(sys.stderr, "".join(f"{visible(line)}\n" for line in lines))

    def result(self, path: Path, data: Mapping[str, Any] | None = None) -> None:
        """Give the run directory's path, or JSON with what else is known, on stdout."""
        if self.as_json:
            self.data({"run": str(path), **(data or {})})
        else:
            _write_bytes(sys.stdout, os.fsencode(path) + b"\n")

    def data(self, value: Any) -> None:
        """Give JSON on stdout; NaN and infinities as the texts `"NaN"`, `"Infinity"`, `"-Infinity"`."""
        from mechinterp_cli.runs.manifest import json_ready

        text = json.dumps(json_ready(value), indent=2, ensure_ascii=True, allow_nan=False, default=str)
        _write(sys.stdout, text + "\n")

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell rows as an aligned table on stderr, unless quiet."""
        if rows and self.mode != "quiet":
            _write(sys.stderr, _aligned(rows))

    def listing(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Give rows as the command's result on stdout: a table, or JSON."""
        if self.as_json:
            self.data(list(rows))
        else:
            _write(sys.stdout, _aligned(rows))

    @contextlib.contextmanager
    def progress(self) -> Iterator["Reporter"]:
        """Show how far a run is: a bar on a terminal, a line a minute elsewhere."""
        with _bar(_width(sys.stderr)) if self.mode == "human" else contextlib.nullcontext() as bar:
            yield Reporter(self, bar)


@dataclass
class Reporter:
    """Tells a run's progress (a `runs.outcome.Progress`)."""

    console: Console
    bar: Any = None
    """A rich progress display, on a terminal."""
    _stage: str = ""
    _task: Any = None
    _told: float = float("-inf")
    _done: int = 0
    _first: tuple[float, int] | None = None
    """When the stage first said how far it is, and how far: units that an earlier run did take no time."""

    def stage(self, text: str) -> None:
        """A step begins."""
        self._stage, self._told, self._first = visible(text), float("-inf"), None
        if self.bar is None:
            self.console.say(text)
            self._told = self.console._clock()
            return
        if self._task is not None:
            self.bar.remove_task(self._task)
        self._task = self.bar.add_task(_shortened(self._stage, self.bar.console), total=None, pace="")

    def advance(self, done: int, total: int) -> None:
        """So many of all work units are done."""
        self._show(done, total, f"{done} of {total}", rated=True)

    def part(self, text: str, share: float | None) -> None:
        """A step goes on, and which share of it (0 to 1) is done, where that is known."""
        if visible(text) != self._stage:
            self.stage(text)
        if share is not None:
            percent = round(share * 100)
            self._show(percent, 100, f"{percent} %", rated=False)

    def _show(self, done: int, total: int, told: str, *, rated: bool) -> None:
        now = self.console._clock()
        if self._first is None or done < self._done:  # the stage begins, or begins again
            self._first = now, done
        self._done = done
        pace = _pace(done - self._first[1], total - done, now - self._first[0], rated=rated)
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=done, total=total, pace=", ".join(pace))
        elif self.bar is None and now - self._told >= _PLAIN_SECONDS:
            self._told = now
            self.console.say(f"{self._stage}: {', '.join([told, *pace])}")

    def message(self, text: str) -> None:
        """Something a person should know now."""
        if self.bar is not None:
            self.bar.console.print(visible(text, lines=True), markup=False, highlight=False, soft_wrap=True)
        else:
            self.console.say(text)


def _pace(done: int, left: int, seconds: float, *, rated: bool) -> list[str]:
    """Rate and time left in words; nothing before anything is known.

    Args:
        done: Units that were done.
        left: Units to come.
        seconds: In which time.
        rated: Whether the rate is told.
    """
    if done <= 0 or seconds <= 0:
        return []
    per_second = done / seconds
    unit, seconds_of = next(
        (pair for pair in (("s", 1), ("min", 60), ("h", 3600)) if per_second * pair[1] >= 1), ("h", 3600)
    )
    rate = f"{per_second * seconds_of:,.0f}" if per_second * seconds_of >= 100 else f"{per_second * seconds_of:.2g}"
    time_left = [f"{_duration(left / per_second)} left"] if left > 0 else []
    return [*([f"{rate}/{unit}"] if rated else []), *time_left]


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar_width(width: int) -> int:
    return _BAR if width >= _WIDE else _NARROW_BAR


def _shortened(stage: str, window: Any) -> str:
    """A stage's name in what the bar leaves of the window; what its encoding lacks is escaped."""
    shown, room = _encodable(stage, window.encoding), max(8, window.width - _bar_width(window.width) - _BESIDE_BAR)
    return shown if len(shown) <= room else f"{shown[: room - 3]}..."


def _bar(width: int) -> Any:
    """Build a progress display on stderr; token text in it is never read as markup. NO_COLOR is honoured by rich."""
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(_bar_width(width)),
        TaskProgressColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=RichConsole(stderr=True, width=width), transient=True)


def _aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out in columns: numbers to the right, text to the left, two blanks between."""
    names = list(rows[0]) if rows else []
    cells = [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    right = [all(isinstance(row.get(name), int | float | None) for row in rows) for name in names]
    lines = [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [names, *cells]
    ]
    return "".join(f"{line}\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{_DIGITS}g}"
    return visible({True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value))


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _width(stream: TextIO | None) -> int:
    """Columns of the window that a stream is shown in: what COLUMNS says, else what the terminal says."""
    chosen = os.environ.get("COLUMNS", "")
    if chosen.isdecimal() and int(chosen) > 0:
        return max(_LEAST_WIDTH, int(chosen))
    # stdout may be captured (`RUN=$(mechinterp ...)`), so its size is not asked for.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns = os.get_terminal_size(stream.fileno()).columns if stream is not None else 0
        if columns > 0:
            return max(_LEAST_WIDTH, columns)
    return _PLAIN_WIDTH


def _encodable(text: str, encoding: str | None) -> str:
    """Text in which what an encoding lacks is escaped."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _write(stream: TextIO, text: str) -> None:
    """Write text; what the stream's encoding lacks is escaped."""
    _send(stream, lambda: stream.write(_encodable(text, getattr(stream, "encoding", None))))


def _write_bytes(stream: TextIO, data: bytes) -> None:
    """Write bytes as they are: a path need not be valid text."""
    buffer = getattr(stream, "buffer", None)
    if buffer is None:
        _write(stream, os.fsdecode(data))
        return
    stream.flush()
    _send(stream, lambda: buffer.write(data))


def _send(stream: TextIO, write: Callable[[], object]) -> None:
    """Write and flush; a reader that went away (`| head -1`) is no error: the results are on disk."""
    try:
        write()
        stream.flush()
    except BrokenPipeError:
        # Later writes, and Python's own flush at exit, go nowhere instead of failing again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
