"""Compiles the programs of a format while the one before it is measured: XLA compiles on one core."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def one_ahead(items: Sequence[Item], prepare: Callable[[Item], None]) -> Iterator[Item]:
    """Yield items, each prepared; the next one is prepared in a thread while the caller works on this one.

    What ``prepare`` raises is left to the caller's own work, which comes to the same.
    """
    with ThreadPoolExecutor(1) as thread:
        futures: list[Future[None]] = []
        for item in items[:1]:
            futures.append(thread.submit(prepare, item))
        for index, item in enumerate(items):
            futures[index].exception()  # waits for it
            for next_item in items[index + 1 : index + 2]:
                futures.append(thread.submit(prepare, next_item))
            yield item
