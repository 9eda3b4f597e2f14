"""Progress reports and interruption. Long-running code calls ``stop_point`` wherever its state is consistent."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final, Protocol, TypeVar

__all__ = [
    "ROUND_SECONDS",
    "NoAnswerError",
    "NullProgress",
    "Progress",
    "Stopped",
    "asked",
    "bounded",
    "graceful_signals",
    "pause",
    "stop_point",
    "stopping",
]

ROUND_SECONDS: Final = 0.1  # longest delay until an interrupt takes effect
asked: Final = threading.Event()  # set by the first SIGINT or SIGTERM
_Result = TypeVar("_Result")


class Stopped(Exception):  # noqa: N818  # not an error: the caller requested it
    """The work of this thread was stopped by request."""


class NoAnswerError(TimeoutError):
    """A call did not finish within its time limit."""


class _ThreadState(threading.local):
    stop: Callable[[], bool] | None = None


_thread = _ThreadState()


def stop_point() -> None:
    """Raise KeyboardInterrupt if a signal requested the process to stop, or Stopped if this thread must stop."""
    if asked.is_set():
        raise KeyboardInterrupt
    if _thread.stop and _thread.stop():
        raise Stopped


@contextmanager
def stopping(stop: Callable[[], bool]) -> Iterator[None]:
    """Within the context, make every ``stop_point`` of this thread raise Stopped if ``stop()`` is true."""
    before, _thread.stop = _thread.stop, stop
    try:
        yield
    finally:
        _thread.stop = before


def pause(seconds: float) -> None:
    """Sleep; an interrupt takes effect within ``ROUND_SECONDS``."""
    end = time.monotonic() + seconds
    stop_point()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, ROUND_SECONDS))
        stop_point()


def bounded(action: Callable[[], _Result], seconds: float) -> _Result:
    """Run ``action`` with a time limit in seconds, and return its result.

    The action runs in a separate thread, which is abandoned after an interrupt or a timeout: there is no other way to end
    a library call that waits for a server.

    Raises:
        NoAnswerError: The action did not finish in time.
    """
    from concurrent.futures import Future  # here because readers of local files do not need it

    result: Future[_Result] = Future()
    ended = threading.Event()

    def work() -> None:
        try:
            result.set_result(action())
        except BaseException as error:  # noqa: BLE001  # raised again by result() below
            result.set_exception(error)
        ended.set()

    end = time.monotonic() + seconds
    threading.Thread(target=work, name="lsmix-bounded", daemon=True).start()
    while not ended.wait(max(0.0, min(ROUND_SECONDS, end - time.monotonic()))):
        stop_point()
        if time.monotonic() >= end and not ended.is_set():
            raise NoAnswerError("timed out")
    return result.result()


class Progress(Protocol):
    """Receives the messages and progress of a run; all calls come from one thread."""

    def info(self, message: str) -> None:
        """Report a message, such as that a stage is up to date."""

    def debug(self, message: str) -> None:
        """Report a detail, such as the inputs of an artifact."""

    def warning(self, message: str) -> None:
        """Report something that the user should check, although the results are correct."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Start a count of ``total`` units of work, ``done`` of which are already complete."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Add completed units; ``note`` is a short figure to show next to the count."""

    def finish(self) -> None:
        """End the current count."""

    def event(self, kind: str, **facts: Any) -> None:
        """Record an event for logs and trackers, with values of JSON types.

        Every event has a ``label``. The kinds are ``step`` (training of a flow) and ``epoch`` (training of a classifier)
        with their metrics, and ``shard`` and ``artifact`` when one is complete.
        """


class NullProgress:
    """A ``Progress`` that discards everything."""

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    info = debug = warning = start = advance = finish = event = _ignore


@contextmanager
def graceful_signals(on_request: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM take effect at the next ``stop_point``; the second raises KeyboardInterrupt.

    ``on_request`` is called immediately at the first signal, to inform the user.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        with suppress(RuntimeError):  # raised by Python's streams if the signal interrupted a write
            on_request()

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    asked.clear()
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        asked.clear()
