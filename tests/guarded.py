"""Record which files a command opens and which programs it starts while it reads a hostile file.

The recording uses Python's audit events, so a test detects an attempt even if the attack fails.
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
_SECRET = b"a file that lsmix must not read"


def plain_json(record: dict[str, Any]) -> bytes:
    """Return a record as JSON in the layout of lsmix, without its checksum."""
    bare = {name: value for name, value in record.items() if name != "checksum"}
    return json.dumps(bare, indent=1, sort_keys=True).encode() + b"\n"


def sealed_again(record: dict[str, Any]) -> bytes:
    """Return a record as JSON with a matching checksum, like a forger."""
    return add_checksum(plain_json(record))


class Watch:
    """The events recorded inside a ``watched`` block."""

    def __init__(self, outside: Path) -> None:
        outside.mkdir(exist_ok=True)
        self.canary = outside / "canary"
        self.canary.write_bytes(_SECRET)
        self.opened: set[str] = set()
        self.started: list[str] = []
        self.peak_bytes = 0

    def check(self) -> None:
        """Assert that no program was started, and that the outside folder was neither read nor written."""
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


sys.addaudithook(_hook)  # permanent, since audit hooks cannot be removed


@contextmanager
def watched(outside: Path, *, memory: bool = False) -> Iterator[Watch]:
    """Record events inside the block; ``memory`` also records the peak of allocations, which is slow."""
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
    """Assert that a command exited with ``code``, an empty stdout, and a final error line that contains ``words``."""
    lines = result.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert result.code == code, result.err
    assert errors == lines[-1:], result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    assert errors[0].isprintable()
    for word in words:
        assert word in errors[0]
