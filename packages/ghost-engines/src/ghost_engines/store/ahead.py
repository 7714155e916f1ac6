"""What is read while what was read before is in use."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ItemT = TypeVar("ItemT")


def ahead(items: Generator[ItemT, None, None]) -> Iterator[ItemT]:
    """Yield items, each of them made in another thread while the one before is in use.

    Args:
        items: Makes them. It is closed once this is left, by its end, an exception or `close`.

    Raises:
        Exception: What making an item raises, where that item would come.
    """
    with ThreadPoolExecutor(1, "ghost reader") as thread:
        try:
            coming = thread.submit(_next, items)
            while found := coming.result():
                coming = thread.submit(_next, items)
                yield found[0]
        finally:
            thread.submit(items.close).result()  # in its turn: a generator that runs has no end


def _next(items: Iterator[ItemT]) -> tuple[ItemT] | None:
    """Return the next item alone in a tuple, as items may be anything; None at the end."""
    for item in items:
        return (item,)
    return None
