"""The log of a run: JSON lines in ``<workspace>/.logs/``, one file for each run that makes anything.

A log only informs: if it cannot be written the work goes on, and a run that finds everything up to date writes none.
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

from lsmix.data.errors import format_duration
from lsmix.data.progress import Progress, graceful_signals
from lsmix.pipeline.engine.progress import Throughput

__all__ = ["LOG_FOLDER", "LoggedProgress", "logged"]

LOG_FOLDER = ".logs"
_MOST_LOGS = 100  # the oldest are removed
_SECONDS_BETWEEN = 5.0  # of lines on how far the work is


class LoggedProgress:
    """Reports everything to another progress, and writes it to a file, which is created when something is first counted."""

    def __init__(self, progress: Progress, workspace: Path) -> None:
        self._progress = progress
        self._folder = workspace / LOG_FOLDER
        self._kept: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._throughput: Throughput | None = None
        self._label = ""
        self._written_at = 0.0

    def info(self, message: str) -> None:
        """Report one line."""
        self._progress.info(message)
        self.write("say", text=message)

    def debug(self, message: str) -> None:
        """Report one line of detail."""
        self._progress.debug(message)
        self.write("detail", text=message)

    def warning(self, message: str) -> None:
        """Report that something deserves a look."""
        self._progress.warning(message)
        self.write("warn", text=message)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count."""
        self._progress.start(label, total, unit, done)
        self._label, self._throughput, self._written_at = label, Throughput(total, done), time.monotonic()
        self._open()
        self.write("start", label=label, total=total, unit=unit, done=done)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count finished units."""
        self._progress.advance(units, note)
        if self._throughput:
            self._throughput.advance(units)
            if time.monotonic() - self._written_at >= _SECONDS_BETWEEN:
                self._written_at = time.monotonic()
                self.write("progress", label=self._label, **self._throughput.to_dict(), note=note)

    def finish(self) -> None:
        """End the count."""
        self._progress.finish()
        if self._throughput:
            self.write("finish", label=self._label, **self._throughput.to_dict())
            self._throughput = None

    def event(self, kind: str, **facts: Any) -> None:
        """Write a fact down."""
        self._progress.event(kind, **facts)
        self.write(kind, **facts)

    def interrupted(self) -> None:
        """Say that an interrupt was seen, and how long the current batch may take."""
        seconds = self._throughput.step_seconds if self._throughput else None
        when = "at the next safe point" if seconds is None else f"after this batch, in about {format_duration(seconds)}"
        self.info(f"stopping {when}; what is done is kept. Press Ctrl-C again to stop now")

    def write(self, kind: str, **facts: Any) -> None:
        """Write a line, or keep it until the file is created."""
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
        """Close the file; later lines are not written."""
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
            self._file = path.open("ab", buffering=0)  # each line can be read at once
            self._file.write(b"".join(self._kept))
        except OSError:
            self.close()
        self._kept.clear()


@contextmanager
def logged(progress: Progress, workspace: Path, command: str, **asked: Any) -> Iterator[LoggedProgress]:
    """Log what happens in the block, from its command and arguments to how it ended.

    An interrupt stops the block at its next safe point.
    """
    log, begun = LoggedProgress(progress, workspace), time.monotonic()
    log.write("begin", command=command, host=socket.gethostname(), process=os.getpid(), **asked)
    outcome: dict[str, Any] = {"outcome": "done"}
    try:
        with graceful_signals(log.interrupted):
            yield log
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        outcome = {"outcome": "interrupted"} if interrupted else {"outcome": type(error).__name__, "error": str(error)}
        raise
    finally:
        log.write("end", **outcome, seconds=round(time.monotonic() - begun, 3))
        log.close()
