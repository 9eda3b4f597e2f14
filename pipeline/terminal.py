"""Progress of a command on stderr: bars on a terminal, lines in a log. Results go to stdout and are not printed here."""

import io
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from lsmix.data.errors import escape_terminal, format_bytes, format_count, format_duration

__all__ = ["TerminalProgress", "discard_output", "output_is_gone", "prepare_streams"]

_SECONDS_BETWEEN_LINES = 30.0
_LINE = "{prefix}: {n} of {total}, {pace}, {left}{note}"


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


class TerminalProgress:
    """Progress on stderr: bars on a terminal, a line every half minute elsewhere.

    Args:
        quiet: print only warnings.
        verbose: also print details.
    """

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self._quiet = quiet
        self._verbose = verbose
        self._bar: Any = None
        self._line_at = 0.0  # when the last line was printed, without a terminal

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
        """Begin a bar."""
        if self._quiet:
            return
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        bytewise = unit == "byte"
        if not terminal:
            size = format_bytes(total) if bytewise else format_count(total, unit)
            rest = f", {format_bytes(done) if bytewise else f'{done:,}'} of them done" if done else ""
            _print(f"{label}: {size}{rest}")
        target = None if terminal else io.StringIO()  # without a terminal, tqdm only counts
        self._line_at = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=escape_terminal(label),
            unit="B" if bytewise else f" {unit}",
            unit_scale=bytewise,
            dynamic_ncols=terminal,
            leave=False,
            file=target,
        )

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._bar is None:
            return
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(units)
        now = time.monotonic()
        if not sys.stderr.isatty() and now - self._line_at > _SECONDS_BETWEEN_LINES and self._bar.n < self._bar.total:
            self._line_at = now
            _print(_LINE.format(**{**self._bar.format_dict, **_pace(self._bar.format_dict)}))

    def event(self, kind: str, **facts: Any) -> None:
        """Print nothing: events are for the log."""

    def finish(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _pace(facts: dict[str, Any]) -> dict[str, Any]:
    rate = (facts["n"] - facts["initial"]) / max(facts["elapsed"], 1e-9)
    left = f"{format_duration((facts['total'] - facts['n']) / rate)} left" if rate else "time left unknown"
    note = f", {facts['postfix']}" if facts["postfix"] else ""
    if facts["unit_scale"]:
        amounts = {"n": format_bytes(facts["n"]), "total": format_bytes(facts["total"])}
        return {**amounts, "pace": f"{format_bytes(round(rate))}/s", "left": left, "note": note}
    pace = f"{1 / rate:.1f} s/{facts['unit'].strip()}" if 0 < rate < 1 else f"{rate:.1f}{facts['unit']}s/s"
    return {"n": f"{facts['n']:,}", "total": f"{facts['total']:,}", "pace": pace, "left": left, "note": note}
