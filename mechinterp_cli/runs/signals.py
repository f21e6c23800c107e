"""Turning a request to stop into an exception, so that `finally` runs and the manifest says `interrupted`."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mechinterp_cli.errors import ExitCode

_NAMES = ("SIGTERM", "SIGHUP")


class Terminated(BaseException):
    """The system asked the process to end (SIGTERM from a scheduler, SIGHUP from a lost terminal): exit 143."""

    exit_code = ExitCode.TERMINATED

    def __init__(self, signal_name: str) -> None:
        """Keep which signal it was, for the manifest."""
        super().__init__(f"stopped by {signal_name}")


def _stop(number: int, frame: FrameType | None) -> None:
    raise Terminated(signal.Signals(number).name)


@contextlib.contextmanager
def stop_requests() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM and SIGHUP while the block runs; afterwards the old handlers stand again.

    A signal that the parent had ignored (`nohup`) stays ignored. Outside the main thread Python allows no handlers:
    nothing is changed there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {}
    for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
