"""The log of a run: JSON lines in ``<workspace>/.logs/``, one file for each run that makes anything.

A log informs; whatever happens to it, the work goes on, and a run that finds all up to date writes none.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import msgspec

from lsmix.data.progress import Progress
from lsmix.pipeline.engine.progress import Throughput

__all__ = ["LOG_FOLDER", "LoggedProgress", "logged"]

LOG_FOLDER = ".logs"
_MOST_LOGS = 100  # the oldest go
_SECONDS_BETWEEN = 5.0  # of lines that tell how far the work is


class LoggedProgress:
    """Tells another progress all that it is told, and writes it down.

    Lines are kept until something is begun; then the file is made.

    Args:
        progress: is told everything.
        workspace: the folder of the artifacts here.
    """

    def __init__(self, progress: Progress, workspace: Path) -> None:
        self._progress = progress
        self._folder = workspace / LOG_FOLDER
        self._kept: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._pace: Throughput | None = None
        self._label = ""
        self._told_at = 0.0

    def info(self, message: str) -> None:
        """Tell one line."""
        self._progress.info(message)
        self.write("say", text=message)

    def debug(self, message: str) -> None:
        """Tell one line that only the curious want."""
        self._progress.debug(message)
        self.write("detail", text=message)

    def warning(self, message: str) -> None:
        """Tell that something deserves a look."""
        self._progress.warning(message)
        self.write("warn", text=message)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count."""
        self._progress.start(label, total, unit, done)
        self._label, self._pace, self._told_at = label, Throughput(total, done), time.monotonic()
        self._open()
        self.write("start", label=label, total=total, unit=unit, done=done)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._progress.advance(units, note)
        if self._pace:
            self._pace.advance(units)
            if time.monotonic() - self._told_at >= _SECONDS_BETWEEN:
                self._told_at = time.monotonic()
                self.write("progress", label=self._label, **self._pace.facts(), note=note)

    def finish(self) -> None:
        """End the count."""
        self._progress.finish()
        if self._pace:
            self.write("finish", label=self._label, **self._pace.facts())
            self._pace = None

    def event(self, kind: str, **facts: Any) -> None:
        """Write a fact down."""
        self._progress.event(kind, **facts)
        self.write(kind, **facts)

    def write(self, kind: str, **facts: Any) -> None:
        """Write a line, or keep it until the first is written."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = msgspec.json.encode({"at": at, "event": kind, **facts}) + b"\n"
        if self._file is None:
            self._kept.append(line)
            return
        try:
            self._file.write(line)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file; what comes later is not written."""
        if self._file:
            with suppress(OSError):
                self._file.close()
            self._file = None
        self._kept.clear()

    def _open(self) -> None:
        if self._file:
            return
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            logs = sorted(self._folder.glob("*.jsonl"))
            for old in logs[: max(0, len(logs) - _MOST_LOGS + 1)]:
                old.unlink(missing_ok=True)
            path = self._folder / f"{now}-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._file = path.open("ab", buffering=0)  # a line is there when it was written, for whoever follows it
            self._file.write(b"".join(self._kept))
        except OSError:
            self.close()
        self._kept.clear()


@contextmanager
def logged(progress: Progress, workspace: Path, command: str, **asked: Any) -> Iterator[LoggedProgress]:
    """Log what happens in the block, from what was asked for to how it ended.

    Args:
        progress: is told everything, too.
        workspace: the folder of the artifacts here.
        command: "run", "array-task", "finalize" or "rebuild".
        **asked: what for, ready for JSON.
    """
    log, begun = LoggedProgress(progress, workspace), time.monotonic()
    log.write("begin", command=command, host=socket.gethostname(), process=os.getpid(), **asked)
    outcome: dict[str, Any] = {"outcome": "done"}
    try:
        yield log
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        outcome = {"outcome": "interrupted"} if interrupted else {"outcome": type(error).__name__, "error": str(error)}
        raise
    finally:
        log.write("end", **outcome, seconds=round(time.monotonic() - begun, 3))
        log.close()
