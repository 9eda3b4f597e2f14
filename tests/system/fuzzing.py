"""Fuzzing of all parsers of untrusted input.

For any bytes, a parser must return a valid value or raise an LsmixError. Any other exception, a delay of many seconds
and a large allocation are bugs. ``python tests/system/fuzzing.py npz --seconds 10`` fuzzes one parser with bounded
memory.
"""

import argparse
import base64
import contextlib
import os
import random
import re
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzz_targets import TARGETS

from lsmix.data.errors import LsmixError

__all__ = ["BrokenLawError", "fuzz", "mutate", "read_bytes"]

SECONDS_AN_INPUT = 20  # timeout for an input of a few kilobytes on a busy machine
MEMORY_BYTES = 3 << 30  # limit above the memory mapped at the start, more than 1,000 times the size of any seed

# Syntax of file formats, and values that have broken other readers.
_TOKENS = [
    b"../", b"/etc/passwd", b"\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80", b"\x1b[2J", b"[" * 2000,
    b'{"a":' * 2000, b"-1", b"0", b"1e400", b"NaN", b"null", b"true", b'""', b"{}", b"[]", b"99999999999999999999",
    b"281474976710656", b"9223372036854775807", b"\xed\xa0\x80", b"\\ud800", b"a." * 900, b"(" * 200, b"'", b'"', b"\n", b",",
    b"PK\x03\x04", b"PK\x05\x06", b"\x89HDF", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"cos\nsystem\n", b"\x80\x04", b"\x93", b"R", b"b.",
    b"O", b"object", b"F32", b"BF16", b"data_offsets", b"ustar", b"L" * 8, b"%!PS-Adobe-3.0 EPSF-3.0\n",
]  # fmt: skip


class BrokenLawError(AssertionError):
    """A reader neither returned a valid value nor raised an LsmixError for the input ``content``."""

    def __init__(self, target: str, content: bytes, reason: str) -> None:
        super().__init__(f"{target}: input (base64): {base64.b64encode(content).decode()}\n{reason}")
        self.content = content


def mutate(draw: random.Random, seeds: list[bytes]) -> bytes:
    """Return a seed with a few mutations: flipped bits, changed, removed, repeated or copied bytes, new tokens."""
    content = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at = draw.randrange(len(content) + 1)
        length = min(draw.choice((1, 2, 4, 8, 32, 256)), len(content) - at)
        match draw.randrange(9):
            case 0 | 1 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 2 if at < len(content):
                content[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
            case 3:
                del content[at:]
            case 4:
                del content[at : at + length]
            case 5:
                content[at:at] = content[at : at + length] * draw.choice((1, 1, 20))
            case 6:
                other = draw.choice(seeds)
                start = draw.randrange(len(other) + 1)
                content[at : at + length] = other[start : start + draw.choice((4, 32, 256, len(other)))]
            case 7:
                content[at:at] = draw.choice(_TOKENS)
            case _:
                _replace_a_value(draw, content)
    return bytes(content)


def _replace_a_value(draw: random.Random, content: bytearray) -> None:
    """Replace a number, a keyword or a quoted word by a token, since most headers contain such values."""
    found = list(re.finditer(rb'"[^"\n]{0,200}"|\d+|true|false|null', bytes(content[:20_000])))
    if not found:
        return
    match = draw.choice(found)
    new = draw.choice(_TOKENS)
    quoted = match[0].startswith(b'"') and draw.random() < 0.7
    content[match.start() : match.end()] = b'"' + new.replace(b'"', b"") + b'"' if quoted else new


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise TimeoutError in a reader that does not finish."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not finished after {SECONDS_AN_INPUT} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_AN_INPUT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_bytes(name: str, content: bytes, folder: Path) -> bool:
    """Let a target read some bytes; return whether it returned a value.

    Raises:
        BrokenLawError: The result was neither a valid value nor an LsmixError.
    """
    try:
        with _alarm(), warnings.catch_warnings():
            warnings.simplefilter("error")
            TARGETS[name].read(content, folder)
    except LsmixError as error:
        if not str(error).strip():
            raise BrokenLawError(name, content, "an error without a message") from error
        return False
    except Exception as error:
        raise BrokenLawError(name, content, traceback.format_exc()) from error
    return True


def fuzz(name: str, *, seed: int = 0, count: int = 0, seconds: float = 0.0) -> tuple[int, int]:
    """Read mutated seeds, ``count`` or for ``seconds``; return the numbers of tried and of readable inputs.

    Raises:
        BrokenLawError: A result was neither a valid value nor an LsmixError, or a seed was rejected.
    """
    draw, begun = random.Random(f"{name} {seed}"), time.monotonic()
    tried = read = 0
    with tempfile.TemporaryDirectory(prefix="lsmix-fuzz-") as scratch:
        folder = Path(scratch)
        seeds = TARGETS[name].seeds()
        for content in seeds:
            try:
                TARGETS[name].read(content, folder)
            except LsmixError as error:
                raise BrokenLawError(name, content, f"a seed was rejected: {error}") from error
        while tried < count or time.monotonic() - begun < seconds:
            read += read_bytes(name, mutate(draw, seeds), folder)
            tried += 1
    return tried, read


def main() -> None:
    """Fuzz one target for some seconds with bounded memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    TARGETS[options.target].seeds()  # load imports and create seeds before measuring
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, -1))
    tried, read = fuzz(options.target, seed=options.seed, seconds=options.seconds)
    print(f"{options.target}: {tried} inputs, {read} read, the rest rejected")  # noqa: T201 - a command-line tool


if __name__ == "__main__":
    main()
