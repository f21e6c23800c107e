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

from mechinterp_cli.cli.fitted import aligned, fitted
from mechinterp_cli.text import visible

Mode = Literal["human", "plain", "quiet"]
_PLAIN_SECONDS = 60.0
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
        return cls("quiet" if quiet else "human" if _is_window(sys.stderr) else "plain", as_json)

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
        buffer = io.StringIO()
        rich = RichConsole(file=buffer, width=width, force_terminal=human, markup=False, emoji=False, highlight=False)
        for part in view(width, not human or _is_poor(sys.stderr)):
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

    def table(self, rows: Sequence[Mapping[str, Any]], ranks: Mapping[str, int] | None = None) -> None:
        """Tell rows as a table on stderr, unless quiet.

        Args:
            rows: All with the same keys.
            ranks: Which columns a narrow window shows first, as for `fitted`; all are shown without.
        """
        if rows and self.mode != "quiet":
            _write(sys.stderr, _table(rows, ranks, sys.stderr))

    def listing(self, rows: Sequence[Mapping[str, Any]], ranks: Mapping[str, int] | None = None) -> None:
        """Give rows as the command's result on stdout: a table, which in a pipe is always whole, or JSON.

        Args:
            rows: All with the same keys.
            ranks: Which columns a narrow window shows first, as for `fitted`; all are shown without.
        """
        if self.as_json:
            self.data(list(rows))
        else:
            _write(sys.stdout, _table(rows, ranks, sys.stdout))

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


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _is_window(stream: TextIO | None) -> bool:
    """Whether a person looks at a stream, in a terminal that can do more than print lines."""
    return _is_terminal(stream) and os.environ.get("TERM") != "dumb"


def _is_poor(stream: TextIO) -> bool:
    """Whether a terminal gets ASCII without colours: without colour a number must stand where the colour told it."""
    return (stream.encoding or "").lower().replace("-", "") != "utf8" or bool(os.environ.get("NO_COLOR"))


def _table(rows: Sequence[Mapping[str, Any]], ranks: Mapping[str, int] | None, stream: TextIO) -> str:
    """Rows as a table: fitted to the window where a person looks at it, else whole."""
    if not rows or ranks is None or not _is_window(stream):
        return aligned(rows)
    return fitted(rows, ranks, width=_width(stream), plain=_is_poor(stream))


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
