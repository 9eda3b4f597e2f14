"""Run logs: JSON lines in ``<workspace>/.logs/``, one file for each run that makes an artifact.

A log is informative only: if it cannot be written, the run continues. If everything is up to date, no log is written.
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

from lsmix.data.errors import MissingError, RecipeError, format_duration
from lsmix.data.progress import Progress, graceful_signals
from lsmix.pipeline.engine.progress import Throughput
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["LOG_FOLDER", "LoggedProgress", "list_logs", "logged", "read_log"]

LOG_FOLDER = ".logs"
_MAX_LOGS = 100  # older logs are removed
_TAIL_BYTES = 1 << 16  # enough for the last line of a log
_SECONDS_BETWEEN = 5.0  # between progress lines


class LoggedProgress:
    """Forwards everything to another progress reporter and logs it to a file, created by the first ``start``."""

    def __init__(self, progress: Progress, workspace: Path) -> None:
        self._progress = progress
        self._folder = workspace / LOG_FOLDER
        self._kept: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._throughput: Throughput | None = None
        self._label = ""
        self._written_at = 0.0

    def info(self, message: str) -> None:
        """Report a line."""
        self._progress.info(message)
        self.write("info", text=message)

    def debug(self, message: str) -> None:
        """Report a line of detail."""
        self._progress.debug(message)
        self.write("debug", text=message)

    def warning(self, message: str) -> None:
        """Report a warning."""
        self._progress.warning(message)
        self.write("warning", text=message)

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Start counting."""
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
        """Stop counting."""
        self._progress.finish()
        if self._throughput:
            self.write("finish", label=self._label, **self._throughput.to_dict())
            self._throughput = None

    def event(self, kind: str, **facts: Any) -> None:
        """Log an event, except training steps, which are in the flow's own log."""
        self._progress.event(kind, **facts)
        if kind != "step":
            self.write(kind, **facts)

    def interrupted(self) -> None:
        """Report that an interrupt was received, and how long the current batch will take."""
        seconds = self._throughput.step_seconds if self._throughput else None
        when = "at the next safe point" if seconds is None else f"after this batch, in about {format_duration(seconds)}"
        self.info(f"stopping {when}; completed work is kept. Press Ctrl-C again to stop immediately")

    def write(self, kind: str, **facts: Any) -> None:
        """Write a line, or buffer it until the file is created."""
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
        """Close the file and drop buffered lines."""
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
            for old in logs[: max(0, len(logs) - _MAX_LOGS + 1)]:
                old.unlink(missing_ok=True)
            path = self._folder / f"{now}-{socket.gethostname()}-{os.getpid()}.jsonl"
            self._file = path.open("ab", buffering=0)  # unbuffered, so that each line is visible immediately
            self._file.write(b"".join(self._kept))
        except OSError:
            self.close()
        self._kept.clear()


@contextmanager
def logged(progress: Progress, workspace: Path, command: str, **arguments: Any) -> Iterator[LoggedProgress]:
    """Log the block: its command and arguments, all progress, and the outcome.

    An interrupt stops the block at its next safe point.
    """
    log, begun = LoggedProgress(progress, workspace), time.monotonic()
    log.write("begin", command=command, host=socket.gethostname(), process=os.getpid(), **arguments)
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


def list_logs(workspace: Path | str) -> list[dict[str, Any]]:
    """Return a summary of each log of a workspace, newest first, as ``lsmix logs`` prints them.

    Returns:
        For each log ``run`` (its name), ``path``, ``began``, ``command``, ``recipe``, ``outcome`` ("done",
        "interrupted", the name of an error, or "unfinished" if the run is still running or was killed) and ``seconds``
        (None if unfinished).
    """
    found = []
    for path in reversed(_log_files(workspace)):
        with path.open("rb") as file:
            first = _events(file.readline())
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            last = _events(file.read())[-1:]
        begin = first[0] if first else {}
        end = last[0] if last and last[0].get("event") == "end" else {}
        found.append(
            {
                "run": path.stem,
                "path": str(path),
                "began": begin.get("at"),
                "command": begin.get("stage") or begin.get("command"),
                "recipe": begin.get("recipe"),
                "outcome": end.get("outcome", "unfinished"),
                "seconds": end.get("seconds"),
            }
        )
    return found


def read_log(workspace: Path | str, run: str) -> list[dict[str, Any]]:
    """Return the events of a run, each with ``at`` and ``event``, as ``lsmix logs RUN`` prints them.

    Args:
        workspace: Folder or URL of the workspace; the logs of a remote workspace are on this machine.
        run: Start of the log's name, or "last".

    Raises:
        MissingError: No log matches.
        RecipeError: Several logs match.
    """
    files = _log_files(workspace)
    matches = files[-1:] if run == "last" else [path for path in files if path.stem.startswith(run)]
    if not matches:
        raise MissingError(f"there is no log {run!r} in workspace {str(workspace)!r}. 'lsmix logs' lists all logs.")
    if len(matches) > 1:
        raise RecipeError(f"{len(matches)} logs start with {run!r}. Give more of the name.")
    return _events(matches[0].read_bytes())


def _log_files(workspace: Path | str) -> list[Path]:
    return sorted((Workspace(workspace).root / LOG_FOLDER).glob("*.jsonl"))


def _events(content: bytes) -> list[dict[str, Any]]:
    """Return the events in the lines of a log; truncated lines are skipped."""
    found = []
    for line in content.splitlines():
        with suppress(msgspec.DecodeError):
            found.append(msgspec.json.decode(line, type=dict[str, Any]))
    return found
