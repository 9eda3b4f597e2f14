"""Waiting for servers, pauses and locks such that a stop counts at once and nothing waits without end.

Code that waits calls ``stop_point`` or one of the functions here; ``asked`` is set by the first Ctrl-C or SIGTERM.
"""

import fcntl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import IO, Final, TypeVar

__all__ = ["ROUND_SECONDS", "Stopped", "asked", "bounded", "lock_file", "pause", "stop_point", "stopping"]

ROUND_SECONDS: Final = 0.1  # the longest that a stop waits for
asked: Final = threading.Event()
_Answer = TypeVar("_Answer")


class Stopped(Exception):  # noqa: N818  # no error: the caller that asked for it knows why
    """The work of this thread was asked to stop."""


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
        TimeoutError: it did not end in time.
    """
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
            raise TimeoutError("timed out")
    return answer.result()


def lock_file(file: IO[bytes], operation: int) -> None:
    """Lock an open file as ``fcntl.flock`` does; a stop ends the wait."""
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            pause(ROUND_SECONDS)
        else:
            return
