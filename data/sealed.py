"""JSON that carries a checksum of its own bytes, so that a bit that flips is found even in a number that only informs.

The one rule: the checksum is the object's first line and counts every other byte as it lies in the file, spaces too; JSON
without that line was written by an older lsmix, and then has the bytes that writing it again would give.
"""

import hashlib
import re

import msgspec

__all__ = ["is_as_written", "is_broken", "seal", "sealed_json"]

_OPENING = b"{\n"
_SEAL = re.compile(rb'\{\n "checksum": "([0-9a-f]{64})",\n')


def sealed_json(record: msgspec.Struct) -> bytes:
    """Return a record as JSON, its fields sorted and one a line, below a checksum of these bytes."""
    return seal(_plain_json(record))


def seal(content: bytes) -> bytes:
    """Put the checksum's line into JSON that begins with a brace and a line feed."""
    digest = hashlib.sha256(content).hexdigest().encode()
    return _OPENING + b' "checksum": "' + digest + b'",\n' + content.removeprefix(_OPENING)


def is_broken(content: bytes) -> bool:
    """Tell whether JSON has a checksum that does not fit; so it can be told from damage what another version wrote."""
    found = _SEAL.match(content)
    if not found:
        return False
    digest = hashlib.sha256(_OPENING)
    digest.update(memoryview(content)[found.end() :])
    return digest.hexdigest().encode() != found[1]


def is_as_written(content: bytes, record: msgspec.Struct) -> bool:
    """Tell whether JSON, decoded as ``record``, has every byte that it was written with."""
    return not is_broken(content) if _SEAL.match(content) else content == _plain_json(record)


def _plain_json(record: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record, order="sorted"), indent=1) + b"\n"
