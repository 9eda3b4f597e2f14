"""Where the pipeline tells what it does: a protocol that the command line draws as bars, and a silent one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

__all__ = ["NullProgress", "Progress", "graceful_signals", "stop_point"]


class Progress(Protocol):
    """What a run tells while it works. Calls come from one thread."""

    def info(self, message: str) -> None:
        """Tell one line, such as that a stage is up to date."""

    def debug(self, message: str) -> None:
        """Tell one line that only the curious want, such as what an artifact is made from."""

    def warning(self, message: str) -> None:
        """Tell that something deserves a look, though the work goes on correctly."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count ``total`` units of work, of which ``done`` were done before."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units; ``note`` is a short figure to show beside them."""

    def finish(self) -> None:
        """End the count that was begun last."""

    def event(self, kind: str, **facts: Any) -> None:
        """Note what only a log wants, such as that a shard is done; facts are ready for JSON."""


class NullProgress:
    """Tells nothing."""

    def info(self, message: str) -> None:
        """Tell nothing."""

    def debug(self, message: str) -> None:
        """Tell nothing."""

    def warning(self, message: str) -> None:
        """Tell nothing."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Tell nothing."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Tell nothing."""

    def finish(self) -> None:
        """Tell nothing."""

    def event(self, kind: str, **facts: Any) -> None:
        """Tell nothing."""


_asked = threading.Event()


def stop_point() -> None:
    """Raise KeyboardInterrupt if a signal asked the work to stop."""
    if _asked.is_set():
        raise KeyboardInterrupt


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _asked.is_set():
        raise KeyboardInterrupt
    _asked.set()


@contextmanager
def graceful_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request that ``stop_point`` honours, the second into KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    _asked.clear()
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()
