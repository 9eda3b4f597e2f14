"""Progress on stderr is a bar on a terminal, otherwise lines; the streams of the command line accept any text."""

import io
import os
import sys

import pytest

from lsmix.pipeline import terminal
from lsmix.pipeline.terminal import TerminalProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Return a function that advances the clock by some seconds."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize(
    ("unit", "total", "done", "note", "first", "line"),
    [
        ("image", 4000, 1000, "", "mix a: 4,000 images, 1,000 already done", "2,000 of 4,000, 25.0 images/s, 1 min 20 s left"),
        ("epoch", 20, 0, "error 3%", "mix a: 20 epochs", "10 of 20, 4.0 s/epoch, 40.0 s left, error 3%"),
        ("byte", 8_000_000, 4_000_000, "", "mix a: 8.0 MB, 4.0 MB already done", "6.0 MB of 8.0 MB, 50.0 kB/s, 40.0 s left"),
    ],
)  # fmt: skip
def test_without_a_terminal_progress_is_printed_in_lines(
    clock, capsys,
    unit, total, done, note, first, line,
):  # fmt: skip
    with TerminalProgress() as bars:
        bars.start("mix a", total, unit, done)
        half = (total - done) // 2 if unit != "image" else 1000
        bars.advance(0)
        clock(40)
        bars.advance(half, note)
        bars.advance(0)
        clock(40)
        bars.advance(total - done - half)
    assert capsys.readouterr().err.splitlines() == [first, f"mix a: {line}"]


def test_the_time_left_is_unknown_until_something_is_done(clock, capsys):
    bars = TerminalProgress()
    bars.start("a", 10, "image")
    clock(40)
    bars.advance(0)
    assert capsys.readouterr().err.splitlines()[-1] == "a: 0 of 10, 0.0 images/s, time left unknown"


def test_quiet_prints_warnings_only_and_verbose_prints_details(capsys):
    for options in ({"quiet": True}, {"verbose": True}):
        bars = TerminalProgress(**options)
        bars.info("one")
        bars.debug("two")
        bars.warning("three\x1b[2J")
        bars.event("shard", shard=1)
        bars.start("four", 2, "image")
        bars.advance()
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert [line.split("\\")[0] for line in shown.splitlines()] == [
        "warning: three", "one", "two", "warning: three", "four: 2 images"
    ]  # fmt: skip


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch):
    for unit in ("image", "byte"):
        monkeypatch.setattr(sys, "stderr", Terminal())
        with TerminalProgress() as bars:
            bars.start("encode a\x1b", 10, unit, 2)
            bars.advance(8, "2.1 bits/dim")
        assert "encode a" in sys.stderr.getvalue()
        assert "\x1b[2" not in sys.stderr.getvalue()
        assert "\n" not in sys.stderr.getvalue().rstrip("\n")


def test_closed_streams_are_replaced_and_others_escape_unknown_characters(monkeypatch):
    closed = os.dup(0)
    os.close(0)
    try:
        monkeypatch.setattr(sys, "stdout", None)
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stderr", stream)
        terminal.prepare_streams()
        os.fstat(0)
        sys.stdout.write("nowhere")
        sys.stdout.close()
        stream.write("λ")
        stream.flush()
        assert stream.buffer.getvalue() == b"\\u03bb"
    finally:
        os.dup2(closed, 0)
        os.close(closed)
