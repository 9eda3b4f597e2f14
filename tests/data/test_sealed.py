"""A manifest has a checksum of its own bytes: one that flips is found, and what an older lsmix wrote is still read."""

import hashlib

import msgspec
import numpy as np
import pytest
from factory import write_pool

from lsmix.data.artifact import read_manifest, verify_files, write_manifest
from lsmix.data.atomic import checksummed_json, is_as_written, is_broken, seal
from lsmix.data.errors import CorruptError, FormatError


class Facts(msgspec.Struct):
    seconds: float
    counts: dict


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("sealed") / "pool")


def without_checksum(content):
    return b"{\n" + content.split(b"\n", 2)[2]


def test_every_flipped_byte_of_a_manifest_is_found(pool):
    path, draw = pool / "manifest.json", np.random.default_rng(0)
    content = path.read_bytes()
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= int(draw.integers(1, 256))
        path.write_bytes(flipped)
        with pytest.raises(CorruptError, match=r"manifest\.json' "):
            verify_files(pool, read_manifest(pool))
    path.write_bytes(content)
    verify_files(pool, read_manifest(pool))


def test_the_checksum_is_the_first_line_and_counts_all_others(pool):
    content = (pool / "manifest.json").read_bytes()
    opening, line, rest = content.split(b"\n", 2)
    assert opening == b"{"
    digest = hashlib.sha256(b"{\n" + rest).hexdigest()
    assert line == f' "checksum": "{digest}",'.encode()
    assert msgspec.json.decode(content)["checksum"] == digest, "it is JSON like any other"


def test_a_manifest_of_an_older_lsmix_is_read_and_verified(pool):
    path = pool / "manifest.json"
    content = path.read_bytes()
    path.write_bytes(without_checksum(content))
    verify_files(pool, read_manifest(pool))
    path.write_bytes(without_checksum(content).replace(b'"counts"', b'"counts" '))
    with pytest.raises(CorruptError, match=r"manifest\.json' is damaged: its bytes are not those that were written"):
        verify_files(pool, read_manifest(pool))
    path.write_bytes(without_checksum(content))
    write_manifest(pool, read_manifest(pool))
    assert path.read_bytes() == content


def test_a_newer_version_is_told_from_damage(pool):
    path = pool / "manifest.json"
    content = path.read_bytes()
    newer = without_checksum(content).replace(b'"format_version": 1', b'"format_version": 2')
    path.write_bytes(seal(newer))
    with pytest.raises(FormatError, match="has format 2"):
        read_manifest(pool)
    path.write_bytes(content.replace(b'"format_version": 1', b'"format_version": 2'))
    with pytest.raises(CorruptError, match="its bytes are not those that were written"):
        read_manifest(pool)
    path.write_bytes(content)


def test_a_field_that_only_a_newer_version_knows_does_no_harm():
    content = seal(b'{\n "counts": {},\n "invented": 1,\n "seconds": 1.5\n}\n')
    assert not is_broken(content)
    assert is_as_written(content, msgspec.json.decode(content, type=Facts))
    assert checksummed_json(Facts(1.5, {})) == seal(b'{\n "counts": {},\n "seconds": 1.5\n}\n')
