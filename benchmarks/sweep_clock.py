"""Best of several timings, and peak memory, of calls that take turns."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import psutil
import torch

Result = TypeVar("Result")

SAMPLE_SECONDS = 0.005
"""How often resident memory is read; a reading takes some ten microseconds."""


class Stopwatch:
    """The best time of each thing that was timed.

    Args:
        device: Waited for before and after every call.

    Attributes:
        best: The fewest seconds by the clock.
        least: The fewest seconds of all processors together, which a neighbour's job changes less.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.best: dict[str, float] = {}
        self.least: dict[str, float] = {}

    def time(self, name: str, call: Callable[[], Result], *, per: int = 1) -> Result:
        """Call it, note its seconds divided by `per` where they are the fewest yet, give back its result."""
        self._wait()
        begin, begin_processor = time.perf_counter(), time.process_time()
        result = call()
        self._wait()
        seconds, processor = (time.perf_counter() - begin) / per, (time.process_time() - begin_processor) / per
        self.best[name] = min(seconds, self.best.get(name, seconds))
        self.least[name] = min(processor, self.least.get(name, processor))
        return result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class PeakMemory:
    """Bytes that were in use beyond those at the start: resident memory, or the device's allocations on CUDA.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.above = 0
        self.absolute = 0

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Look while the body runs; the highest of all bodies is kept."""
        if self.device.type == "cuda":
            with self._watch_cuda():
                yield
            return
        process = psutil.Process()
        _give_back_freed()
        before = int(process.memory_info().rss)
        done = threading.Event()

        def look() -> None:
            while not done.wait(SAMPLE_SECONDS):
                self._note(before, int(process.memory_info().rss))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self._note(before, int(process.memory_info().rss))

    @contextmanager
    def _watch_cuda(self) -> Iterator[None]:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        try:
            yield
        finally:
            self._note(before, torch.cuda.max_memory_allocated(self.device))

    def _note(self, before: int, now: int) -> None:
        self.above = max(self.above, now - before)
        self.absolute = max(self.absolute, now)


def _give_back_freed() -> None:
    """Have glibc return what was freed, or earlier work would hide what the next takes."""
    gc.collect()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
