"""Progress reports, and stopping: long work calls ``stop_point`` where its state is whole."""

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

ROUND_SECONDS: Final = 0.1  # the longest that a stop waits for
asked: Final = threading.Event()
_Answer = TypeVar("_Answer")


class Stopped(Exception):  # noqa: N818  # no error: the caller that asked for it knows why
    """The work of this thread was asked to stop."""


class NoAnswerError(TimeoutError):
    """A call did not end in the time that it was given."""


class _Own(threading.local):
    stop: Callable[[], bool] | None = None


_own = _Own()


def stop_point() -> None:
    """Raise KeyboardInterrupt if a signal asked the process to stop, Stopped if this thread was asked to."""
    if asked.is_set():
        raise KeyboardInterrupt
    if _own.stop and _own.stop():
        raise Stopped


@contextmanager
def stopping(stop: Callable[[], bool]) -> Iterator[None]:
    """Let every ``stop_point`` of this thread ask ``stop``, too."""
    before, _own.stop = _own.stop, stop
    try:
        yield
    finally:
        _own.stop = before


def pause(seconds: float) -> None:
    """Sleep; a stop ends it at once."""
    end = time.monotonic() + seconds
    stop_point()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, ROUND_SECONDS))
        stop_point()


def bounded(action: Callable[[], _Answer], seconds: float) -> _Answer:
    """Return what ``action`` returns within so many seconds.

    It runs in a thread of its own, which is left alone after a stop or when the time is over: a call into a library that
    waits for a server cannot be ended otherwise.

    Raises:
        NoAnswerError: it did not end in time.
    """
    from concurrent.futures import Future  # which readers of local files need not load

    answer: Future[_Answer] = Future()
    ended = threading.Event()

    def work() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:  # noqa: BLE001  # raised again below
            answer.set_exception(error)
        ended.set()

    end = time.monotonic() + seconds
    threading.Thread(target=work, name="lsmix-bounded", daemon=True).start()
    while not ended.wait(max(0.0, min(ROUND_SECONDS, end - time.monotonic()))):
        stop_point()
        if time.monotonic() >= end and not ended.is_set():
            raise NoAnswerError("timed out")
    return answer.result()


class Progress(Protocol):
    """What a run reports while it works; calls come from one thread."""

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
        """Note what logs and trackers want, as facts that are ready for JSON.

        Each kind has a ``label``: ``step`` of a flow's training and ``epoch`` of a classifier's with their measures,
        ``shard`` and ``artifact`` when one is done.
        """


class NullProgress:
    """Reports nothing."""

    def _ignore(self, *_: Any, **__: Any) -> None: ...

    info = debug = warning = start = advance = finish = event = _ignore


@contextmanager
def graceful_signals(on_request: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a request that ``stop_point`` honours, the second into KeyboardInterrupt.

    ``on_request`` is called at once when a request comes, to say so.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        with suppress(RuntimeError):  # of Python's streams, where the signal came in the middle of a write
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
