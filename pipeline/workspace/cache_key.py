"""Cache keys: an artifact is identified by a digest of everything that determines its bytes.

A key covers the stage, its version, the configuration fields that change the output, and the contents of the inputs.
It excludes paths, times, the device and the number of workers. Because inputs enter by content, a flow that was trained
elsewhere gives the same key.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lsmix.data.artifact import InputRecord
from lsmix.data.atomic import DECODE_ERRORS, sha256_file, write_atomic
from lsmix.data.errors import MissingError, SourceError
from lsmix.data.readers.source_images import check_file

__all__ = ["KEY_DIGITS", "SourceDigests", "artifact_key", "canonical_json", "is_key", "key_fields"]

KEY_DIGITS = 12


def canonical_json(value: Any) -> bytes:
    """Return the canonical JSON of a value: keys sorted, no spaces, numbers in their shortest form."""
    return msgspec.json.encode(msgspec.to_builtins(value), order="deterministic")


def key_fields(config: msgspec.Struct, not_in_key: frozenset[str]) -> dict[str, Any]:
    """Return the configuration without the fields that don't change the output."""
    fields: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(config))  # with lists for tuples, as in a manifest
    return {name: value for name, value in fields.items() if name not in not_in_key}


def artifact_key(stage: str, version: int, fields: dict[str, Any], inputs: Sequence[InputRecord]) -> str:
    """Return the key, 12 hex digits, of a stage's output for this configuration and these inputs."""
    digests = sorted([record.role, record.content_digest] for record in inputs)
    return hashlib.sha256(canonical_json([stage, version, fields, digests])).hexdigest()[:KEY_DIGITS]


def is_key(text: str) -> bool:
    """Return whether ``text`` has the form of a key."""
    return re.fullmatch(f"[0-9a-f]{{{KEY_DIGITS}}}", text) is not None


_Known = dict[str, tuple[Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")], int, int, int]]


class SourceDigests:
    """Checksums of source files, cached by path, size, modification time and inode.

    Args:
        memory: The JSON file that stores the cache; ignored if it is damaged, because it only saves time.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: _Known = {}
        with contextlib.suppress(OSError, *DECODE_ERRORS):
            self._known = msgspec.json.decode(memory.read_bytes(), type=_Known)

    def digest(self, files: Sequence[str | Path], root: Path, *, remember: bool = True) -> str:
        """Return one digest over the names (relative to ``root``) and contents of ``files``.

        With ``remember=False`` the cache file is not written, as read-only commands require.

        Raises:
            MissingError: A file does not exist.
            SourceError: A file is a folder, or its name is not valid UTF-8.
        """
        lines, changed = [], {}
        # os, because pathlib would take most of the time for tens of thousands of files.
        for folder, group in groupby((os.fspath(file) for file in files), key=lambda file: file[: file.rfind("/") + 1]):
            relative, inside = os.path.relpath(folder or ".", root), f"{os.path.realpath(folder)}/"
            before = "" if relative == "." else f"{relative}/"
            for file in group:
                name = file[len(folder) :]
                real = inside + name
                try:
                    facts = os.stat(real)  # noqa: PTH116 - as above
                except (FileNotFoundError, NotADirectoryError) as error:
                    raise MissingError(f"source file {file!r} does not exist. Check 'data.path'.") from error
                stamp = facts.st_size, facts.st_mtime_ns, facts.st_ino
                known = self._known.get(real)
                if known is None or known[1:] != stamp:
                    known = changed[real] = self._known[real] = (_file_digest(Path(file), real), *stamp)
                lines.append((before + name, known[0]))
        if remember and changed:
            with contextlib.suppress(OSError):  # the cache only saves time
                write_atomic(self._memory, msgspec.json.encode(self._known))
        return hashlib.sha256(canonical_json(lines)).hexdigest()


def _file_digest(file: Path, real: str) -> str:
    try:
        real.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"the name of {str(file)!r} is not valid UTF-8. Rename the file.") from error
    check_file(file)
    try:
        return sha256_file(file)
    except IsADirectoryError as error:
        raise SourceError(f"{str(file)!r} is a folder, but 'data.format' needs a file. Check 'data.format'.") from error
