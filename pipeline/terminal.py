"""Progress of a command on stderr: bars on a terminal, otherwise lines. Results, on stdout, are printed elsewhere."""

import io
import logging
import os
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsmix.data.errors import escape_terminal, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from lsmix.pipeline.engine.progress import Throughput

__all__ = ["TerminalProgress", "discard_output", "output_is_gone", "prepare_logging", "prepare_streams"]

_SECONDS_BETWEEN_LINES = 30.0


def prepare_streams() -> None:
    """Make stdout and stderr accept any text: escape characters that their encoding lacks; replace closed streams."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Uses the lowest free descriptor, so that no file opened later gets it and receives our output.
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - stays open until exit
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def output_is_gone() -> bool:
    """Return whether the reader of stdout or stderr has closed its end, as ``head`` does after its last line."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard_output() -> None:
    """Discard all further output, so that flushing at exit does not fail on a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def _print(line: str) -> None:
    print(escape_terminal(line), file=sys.stderr)  # noqa: T201 - progress goes to stderr


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(f"{record.levelname.lower()}: {record.getMessage()}")


def prepare_logging() -> None:
    """Print warnings that the library logs, such as a retried download, in the same form as progress messages."""
    log = logging.getLogger("lsmix")
    if not log.handlers:
        log.addHandler(_Handler())


class TerminalProgress:
    """Progress on stderr: a bar on a terminal, otherwise a line every 30 seconds.

    Args:
        quiet: Print only warnings.
        verbose: Also print details.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: Any = None  # tqdm's, on a terminal
        self._count: Throughput | None = None  # without a terminal
        self._label = self._unit = ""
        self._line_at = 0.0  # when the last line was printed

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()  # so that an error message does not follow an unfinished bar

    def info(self, message: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            _print(message)

    def debug(self, message: str) -> None:
        """Print a line if verbose."""
        if self._verbose:
            _print(message)

    def warning(self, message: str) -> None:
        """Print a warning, even when quiet."""
        _print(f"warning: {message}")

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Show a bar, or print a line."""
        self._label, self._unit, self._line_at = label, unit, time.monotonic()
        if self._quiet:
            return
        if sys.stderr.isatty():
            from tqdm import tqdm

            of_bytes = {"unit": "B", "unit_scale": True} if unit == "byte" else {"unit": f" {unit}"}
            text = escape_terminal(label)
            self._bar = tqdm(total=total, initial=done, desc=text, **of_bytes, dynamic_ncols=True, leave=False)
            return
        from lsmix.pipeline.engine.progress import Throughput

        self._count = Throughput(total, done)
        size = format_bytes(total) if unit == "byte" else format_count(total, unit)
        _print(f"{label}: {size}{f', {self._amount(done)} already done' if done else ''}")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move the bar, or print a line every 30 seconds."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        count, now = self._count, time.monotonic()
        if count:
            count.advance(units)
            if now - self._line_at > _SECONDS_BETWEEN_LINES and count.done < count.total:
                self._line_at = now
                left = (
                    "time left unknown" if count.seconds_left is None else f"{format_duration(count.seconds_left)} left"
                )
                rest = f", {note}" if note else ""
                amounts = f"{self._amount(count.done)} of {self._amount(count.total)}"
                _print(f"{self._label}: {amounts}, {self._rate(count.per_second)}, {left}{rest}")

    def _amount(self, units: int) -> str:
        return format_bytes(units) if self._unit == "byte" else f"{units:,}"

    def _rate(self, per_second: float) -> str:
        if self._unit == "byte":
            return f"{format_bytes(round(per_second))}/s"
        if 0 < per_second < 1:
            return f"{1 / per_second:.1f} s/{self._unit}"
        return f"{per_second:.1f} {self._unit}s/s"

    def event(self, kind: str, **facts: Any) -> None:
        """Do nothing: events are only logged."""

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._count = None
