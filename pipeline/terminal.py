"""Progress of a command on stderr: bars on a terminal, lines in a log. Results go to stdout and are not printed here."""

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
    """Let standard output and error accept any text: escape characters that their encoding lacks, replace closed ones."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(
                os.devnull, os.O_RDWR
            )  # takes the lowest free number, so that no file of ours gets it, and our output
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - open to the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def output_is_gone() -> bool:
    """Return whether the reader of our standard output or error has closed it, as ``head`` does when it has enough."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def discard_output() -> None:
    """Discard all further output, so that the program's end does not fail on a closed pipe."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


def _print(line: str) -> None:
    print(escape_terminal(line), file=sys.stderr)  # noqa: T201 - this is where progress is printed


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(f"{record.levelname.lower()}: {record.getMessage()}")


def prepare_logging() -> None:
    """Print the warnings that the library logs, such as that a server is asked again, as progress prints its own."""
    log = logging.getLogger("lsmix")
    if not log.handlers:
        log.addHandler(_Handler())


class TerminalProgress:
    """Progress on stderr: bars on a terminal, a line every half minute elsewhere.

    Args:
        quiet: print only warnings.
        verbose: also print details.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: Any = None  # on a terminal
        self._count: Throughput | None = None  # elsewhere
        self._label = self._unit = ""
        self._line_at = 0.0  # when the last line was printed

    def __enter__(self) -> "TerminalProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()  # so that an error is not printed after half a bar

    def info(self, message: str) -> None:
        """Print a line, unless quiet."""
        if not self._quiet:
            _print(message)

    def debug(self, message: str) -> None:
        """Print a line, if verbose."""
        if self._verbose:
            _print(message)

    def warning(self, message: str) -> None:
        """Print a warning, even when quiet."""
        _print(f"warning: {message}")

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count, with a bar or a line."""
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
        _print(f"{label}: {size}{f', {self._amount(done)} of them done' if done else ''}")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move the bar, or print a line now and then."""
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
        """Print nothing: events are for the log."""

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        self._bar = self._count = None
