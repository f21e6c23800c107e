"""Calling a function in a process of its own, so that a crash or a hang in it stays there."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")

PRELOADED = ("torch", "transformers", "benchmarks.tiny")
"""Modules that the process from which the others are forked has imported, so that each starts at once."""


@dataclass(frozen=True)
class Failure:
    """Why a call gave no result."""

    reason: str


@dataclass(frozen=True)
class Isolated(Generic[Argument, Result]):
    """A function that is called in a fresh process every time.

    Args:
        function: Importable by name; what it takes and returns is pickled. It must not raise.
        timeout: Seconds after which a call is ended.
    """

    function: Callable[[Argument], Result]
    timeout: float

    def __call__(self, argument: Argument) -> Result | Failure:
        """Call it once; a process that ends without an answer is a `Failure`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(self.function, argument, sender), daemon=True)
        process.start()
        sender.close()
        try:
            return self._wait(receiver, process.sentinel)
        except EOFError:
            process.join()
            return Failure(f"its process ended with code {process.exitcode}")
        finally:
            process.kill()
            process.join()
            receiver.close()

    def _wait(self, receiver: "Connection[Result, Result]", sentinel: int) -> Result | Failure:
        multiprocessing.connection.wait([receiver, sentinel], self.timeout)
        if receiver.poll():
            return receiver.recv()
        return Failure(f"took longer than {self.timeout:g} s")

    def over(self, arguments: Sequence[Argument], jobs: int) -> Iterator[tuple[Argument, Result | Failure]]:
        """Call it on each argument, `jobs` at a time, and give the results in order."""
        with ThreadPoolExecutor(jobs) as pool:
            yield from zip(arguments, pool.map(self, arguments), strict=True)


def _answer(function: Callable[[Argument], Result], argument: Argument, sender: "Connection[Result, Result]") -> None:
    """In the child: send the function's result back."""
    sender.send(function(argument))
    sender.close()
