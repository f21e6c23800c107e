"""`log.jsonl`: what happened, one JSON object a line, with times."""

import contextlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

PACKAGE = "mechinterp_cli"


class JsonLinesHandler(logging.Handler):
    """Appends each record as one line and flushes it, so that a killed run keeps what it logged."""

    def __init__(self, path: Path) -> None:
        """Open the file for appending."""
        super().__init__(logging.INFO)
        self.path = path
        self.failure: OSError | None = None
        """The first error met while writing; the run's end reports it."""
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            self._file.write(json.dumps(_entry(record), ensure_ascii=False, default=str) + "\n")
            self._file.flush()
        except OSError as error:
            self.failure = self.failure or error

    def close(self) -> None:
        """Close the file; what could not be flushed counts as a failure."""
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error
        super().close()


def _entry(record: logging.LogRecord) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "logger": record.name,
        "message": record.getMessage(),
    }
    if record.exc_info:
        entry["traceback"] = logging.Formatter().formatException(record.exc_info)
    return entry


class _Collector(logging.Handler):
    """Hands the text of every warning on, once for each text."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self._sink(record.getMessage())


@contextlib.contextmanager
def logging_to(path: Path, warn: Callable[[str], None]) -> Iterator[JsonLinesHandler]:
    """Log this package's records and Python's warnings to a file while the block runs.

    Args:
        path: `log.jsonl`.
        warn: Is given the text of each warning.

    Yields:
        The handler; its `failure` tells whether a line could not be written.
    """
    logger = logging.getLogger(PACKAGE)
    handler, level = JsonLinesHandler(path), logger.level
    collector = _Collector(warn)
    show = warnings.showwarning

    def log_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        logger.warning("%s: %s", category.__name__, message)

    logger.addHandler(handler)
    logger.addHandler(collector)
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    warnings.showwarning = log_warning
    try:
        yield handler
    finally:
        warnings.showwarning = show
        logger.setLevel(level)
        logger.removeHandler(collector)
        logger.removeHandler(handler)
        handler.close()
