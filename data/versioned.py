"""Reading JSON and weights with bounds: versioned JSON is decoded so that another version is told from damage.

The one rule: the version is looked at first, since what another version holds is unknown.
"""

from pathlib import Path
from typing import Final, TypeVar

import msgspec

from lsmix.data.errors import FormatError

__all__ = ["UNDECODABLE", "check_tensor_header", "decode_versioned", "read_small"]

_Record = TypeVar("_Record")

# What is counted before decoding, since every list, object, key and value takes much more memory than its bytes in JSON:
# 64 MiB of "[]," took 3 GB. A pool has one number for each corrupted row, and a manifest four keys for each file.
_MOST_PARTS: Final = {b"[": 200_000, b"{": 200_000, b":": 1_000_000, b'"': 3_000_000, b",": 6_000_000}

# What decoding raises on bytes that are damaged, or were made to do harm.
UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


_MOST_HEADER_BYTES = 4 << 20  # some 40,000 tensors
_MOST_BYTES = 16 << 20  # of results, which have some hundred bytes for each epoch or sample


def read_small(path: Path) -> bytes:
    """Return the content of a file of results.

    Raises:
        One of UNDECODABLE: it is larger than any such file.
    """
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise msgspec.ValidationError(f"it has {path.stat().st_size} bytes, and lsmix reads at most {_MOST_BYTES}")
    return content


def check_tensor_header(path: Path) -> None:
    """Look at the length of a safetensors file's header, which takes some 16 times as much memory when it is read.

    Raises:
        OSError: it is longer than any of ours, or the file cannot be read.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > _MOST_HEADER_BYTES:
        raise OSError(f"its header has {size} bytes, and lsmix reads at most {_MOST_HEADER_BYTES}")


class _Version(msgspec.Struct):
    format_version: int


def decode_versioned(content: bytes, kind: type[_Record], version: int, *, what: str, remedy: str) -> _Record:
    """Return the record that JSON holds.

    Args:
        content: JSON, an object with ``format_version``.
        kind: struct of the record.
        version: the only one that is read.
        what: begins the message about another version, up to the word format.
        remedy: ends it.

    Raises:
        FormatError: it is of another version.
        One of UNDECODABLE: it is no such record; the caller knows what that means of its file.
    """
    for mark, most in _MOST_PARTS.items():
        if (count := content.count(mark)) > most:
            raise msgspec.ValidationError(f"it holds {count} times {mark.decode()!r}, and lsmix reads at most {most}")
    found = msgspec.json.decode(content, type=_Version).format_version
    if found != version:
        raise FormatError(f"{what} format {found}; this version of lsmix reads format {version}. {remedy}")
    return msgspec.json.decode(content, type=kind)
