"""A manifest contains a checksum of its own bytes; changed and missing checksums are rejected."""

import hashlib

import msgspec
import numpy as np
import pytest
from factory import write_pool

from lsmix.data.artifact import parse_manifest, read_manifest, write_manifest
from lsmix.data.atomic import add_checksum, dump_checksummed, load_checksummed
from lsmix.data.errors import CorruptError, FormatError


class Facts(msgspec.Struct):
    seconds: float
    counts: dict
    format_version: int = 1


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("sealed") / "pool")


def without_checksum(content):
    return b"{\n" + content.split(b"\n", 2)[2]


def test_every_changed_byte_of_a_manifest_is_detected(pool):
    content, draw = (pool / "manifest.json").read_bytes(), np.random.default_rng(0)
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= int(draw.integers(1, 256))
        with pytest.raises(CorruptError, match=r"'pool/manifest\.json' is damaged"):
            parse_manifest(bytes(flipped), "pool")
    assert parse_manifest(content, "pool") == read_manifest(pool)


def test_the_checksum_is_in_the_first_line_and_covers_all_other_lines(pool):
    content = (pool / "manifest.json").read_bytes()
    opening, line, rest = content.split(b"\n", 2)
    assert opening == b"{"
    digest = hashlib.sha256(b"{\n" + rest).hexdigest()
    assert line == f' "checksum": "{digest}",'.encode()
    assert msgspec.json.decode(content)["checksum"] == digest, "a manifest is plain JSON"


def test_a_manifest_without_its_checksum_is_rejected(pool):
    path = pool / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(without_checksum(content))
    with pytest.raises(CorruptError, match="its checksum does not match"):
        read_manifest(pool)
    path.write_bytes(content)
    write_manifest(pool, read_manifest(pool))
    assert path.read_bytes() == content


def test_a_newer_version_is_not_reported_as_damage(pool):
    path = pool / "manifest.json"
    content = path.read_bytes()
    newer = without_checksum(content).replace(b'"format_version": 1', b'"format_version": 2')
    path.write_bytes(add_checksum(newer))
    with pytest.raises(FormatError, match="has format 2"):
        read_manifest(pool)
    path.write_bytes(content.replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(CorruptError, match="its checksum does not match"):
        read_manifest(pool)
    path.write_bytes(content)


def test_unknown_fields_of_newer_versions_are_ignored():
    content = add_checksum(b'{\n "counts": {},\n "format_version": 1,\n "invented": 1,\n "seconds": 1.5\n}\n')
    facts = load_checksummed(content, Facts, 1, what="facts have", remedy="")
    assert facts == Facts(seconds=1.5, counts={})
    assert load_checksummed(dump_checksummed(facts), Facts, 1, what="facts have", remedy="") == facts
