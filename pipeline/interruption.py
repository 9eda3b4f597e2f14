"""Ctrl-C at a safe point: the first signal asks the work to stop where nothing is half done, the second stops it at once.

The one rule: long loops call ``stop_point()`` where their state is whole.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lsmix.data.waiting import asked, stop_point

__all__ = ["graceful_signals", "stop_point"]


def _on_signal(number: int, frame: FrameType | None) -> None:
    if asked.is_set():
        raise KeyboardInterrupt
    asked.set()


@contextmanager
def graceful_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request that ``stop_point`` honours, the second into KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    asked.clear()
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        asked.clear()
