"""Many small fits on a CPU: as many at once as torch has threads, each on one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """What some work gives of each item, in their order.

    A place's matrices are too small for threads to share: they wait for each other longer than they compute. And so no
    number depends on how many threads there are.

    Args:
        work: Does not change what other items use.
        items: At each of them work is begun as soon as a thread is free.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(threads)
