"""Watch a command that reads a hostile file: what it opens, starts and prints.

Python's own audit events tell what was opened or started, so a test does not depend on an attack's success.
"""

import json
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lsmix.data.atomic import add_checksum

__all__ = ["Watch", "assert_refused", "plain_json", "sealed_again", "watched"]

_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn")
_SECRET = b"what nobody gave to lsmix"


def plain_json(record: dict[str, Any]) -> bytes:
    """Return a record as JSON as lsmix lays it out, without its checksum."""
    bare = {name: value for name, value in record.items() if name != "checksum"}
    return json.dumps(bare, indent=1, sort_keys=True).encode() + b"\n"


def sealed_again(record: dict[str, Any]) -> bytes:
    """Return a record with a fitting checksum, as a forger would."""
    return add_checksum(plain_json(record))


class Watch:
    """What happened while it was on."""

    def __init__(self, outside: Path) -> None:
        outside.mkdir(exist_ok=True)
        self.canary = outside / "canary"
        self.canary.write_bytes(_SECRET)
        self.opened: set[str] = set()
        self.started: list[str] = []
        self.peak_bytes = 0

    def check(self) -> None:
        """Hold that nothing was started, and that the folder outside was neither read nor written."""
        assert self.started == []
        assert not [path for path in self.opened if path.startswith(str(self.canary.parent))]
        assert [path.name for path in self.canary.parent.iterdir()] == ["canary"]
        assert self.canary.read_bytes() == _SECRET


_watching: list[Watch] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for watch in _watching:
        if (
            event in ("open", "os.listdir", "os.scandir", "os.link", "os.symlink", "os.rename", "os.remove")
            and arguments
        ):
            watch.opened.add(str(arguments[0]))
        elif event in _STARTS:
            watch.started.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_hook)  # for good: there is no way to take one away


@contextmanager
def watched(outside: Path, *, memory: bool = False) -> Iterator[Watch]:
    """Watch what is done within; ``memory`` also takes the peak of allocations, which makes it slow."""
    watch = Watch(outside)
    if memory:
        tracemalloc.start()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)
        if memory:
            watch.peak_bytes = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()


def assert_refused(result, code: int, *words: str) -> None:
    """Hold that a command ended with a code, nothing on stdout, and one sentence about it behind its progress."""
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert result.code == code, result.err
    assert errors == lines[-1:], result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert errors[0].isprintable()
    for word in words:
        assert word in errors[0]
