"""Making items in a background thread, ahead of whoever takes them.

The one rule: the thread ends with the iterator: when it is used up, closed, or dropped in the middle.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["read_ahead"]

_Item = TypeVar("_Item")


class _Shelf(Generic[_Item]):
    """Where the thread puts items and the consumer takes them from."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._items: deque[tuple[_Item, int]] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._stopped = False  # the consumer wants no more
        self._ended = False  # the thread has no more
        self._error: BaseException | None = None

    def put(self, item: _Item, size_bytes: int) -> bool:
        """Wait for room, put the item there, and tell whether more is wanted."""
        with self._changed:
            # An item larger than the limit goes through alone.
            while self._bytes and self._bytes + size_bytes > self._limit_bytes and not self._stopped:
                self._changed.wait()
            self._items.append((item, size_bytes))
            self._bytes += size_bytes
            if len(self._items) == 1:
                self._changed.notify()
            return not self._stopped

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify()

    def take(self) -> _Item:
        """Wait for the next item; raise what stopped the thread, or StopIteration at the end."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            if not self._items:
                raise self._error or StopIteration
            item, size_bytes = self._items.popleft()
            self._bytes -= size_bytes
            # Woken at half and not at each item: two threads that take turns for every batch halve the speed.
            if self._bytes <= self._limit_bytes // 2:
                self._changed.notify()
            return item

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify()


def read_ahead(items: Iterator[_Item], size_of: Callable[[_Item], int], limit_bytes: int) -> Iterator[_Item]:
    """Yield ``items``, which a background thread takes from their iterator ahead of time.

    Args:
        items: used by the thread alone from now on.
        size_of: an item's size in bytes.
        limit_bytes: how much may wait to be taken; at least one item always may.

    Raises:
        BaseException: whatever ``items`` raises, after the items before it.
    """
    shelf: _Shelf[_Item] = _Shelf(limit_bytes)
    thread = threading.Thread(target=_fill, args=(items, size_of, shelf), name="lsmix-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = shelf.take()
            except StopIteration:
                return
            yield item
    finally:
        shelf.stop()
        thread.join()


def _fill(items: Iterator[_Item], size_of: Callable[[_Item], int], shelf: _Shelf[_Item]) -> None:
    try:
        for item in items:
            if not shelf.put(item, size_of(item)):
                break
    except BaseException as error:  # noqa: BLE001 - handed to the consumer, whatever it is
        shelf.end(error)
    else:
        shelf.end(None)
