"""Every parser of untrusted input returns a valid value or raises an LsmixError, for any bytes.

Bugs found by fuzzing are kept here as examples. ``make test-all`` fuzzes each parser for ten seconds, the normal run
only with a few inputs.
"""

import gzip
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_targets import TARGETS
from fuzzing import fuzz, read_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

INPUTS = 10  # for each reader in the normal run
SECONDS = 10  # for each reader in the slow run
PROCESS_SECONDS = 240  # timeout of the slow run, including imports on a busy machine
DRIVER = Path(__file__).with_name("fuzzing.py")


@pytest.mark.parametrize("target", TARGETS)
def test_a_few_mutated_files_are_read_or_rejected(target):
    tried, read = fuzz(target, seed=20_260_101, count=INPUTS)
    assert tried == INPUTS
    assert read < INPUTS or target == "notes"  # notes never fail


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_mutated_files_are_read_or_rejected_for_some_seconds(target):
    """Fuzz in a separate process with bounded memory; a crash is a failure."""
    words = [sys.executable, DRIVER, target, "--seconds", str(SECONDS), "--seed", str(os.getpid())]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, capture_output=True, text=True, timeout=PROCESS_SECONDS, env=env, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert f"{target}: " in done.stdout


# Replacing a value of a valid document by any JSON value.

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["../x", "\x1b[2J", "f" * 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
JSON_TARGETS = ("manifest", "plan", "columns", "flow", "notes", "results")


def _places(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths to all values within a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, part in parts for place in _places(part, (*path, key))]


def _with(value, path: tuple, new: object):
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[path[0]] = _with(changed[path[0]], path[1:], new)
    return changed


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@pytest.mark.parametrize("target", JSON_TARGETS)
@given(data=st.data())
def test_any_replaced_json_value_is_read_or_rejected(target, scratch, data):
    seed = data.draw(st.sampled_from(TARGETS[target].seeds()))
    prefix, text = (seed[:1], seed[1:]) if seed[:1] < b"\x20" else (b"", seed)
    try:
        good = json.loads(text)
    except ValueError:  # not a JSON file
        return
    place = data.draw(st.sampled_from(_places(good)))
    content = json.dumps(_with(good, place, data.draw(_json)))  # NaN and infinities as Python writes them
    read_bytes(target, prefix + content.encode(), scratch)


# Inputs that once broke a parser, and further special cases.


def npz(header: bytes, body: bytes = b"") -> bytes:
    """Return an .npz file whose images have this header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        header = header.ljust(118) + b"\n"
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body)
        label = io.BytesIO()
        np.save(label, np.arange(1))
        archive.writestr("labels.npy", label.getvalue())
    return buffer.getvalue()


def png_chunk_of_gigabytes() -> bytes:
    content = bytearray(TARGETS["picture"].seeds()[0])
    at = content.index(b"IDAT")
    content[at - 4 : at] = b"\xf0\x00\x00\x00"
    return bytes(content)


def zip_of_another_version() -> bytes:
    content = bytearray(TARGETS["tiny-imagenet-zip"].seeds()[0])
    content[content.index(b"PK\x01\x02") + 6] = 255
    return bytes(content)


def zip_with_a_name_that_begins_with_nul() -> bytes:
    return (
        TARGETS["tiny-imagenet-zip"].seeds()[0].replace(b"tiny-imagenet-200/words.txt", b"\0iny-imagenet-200/words.txt")
    )


def npz_with_a_name_that_is_not_utf8() -> bytes:
    content = bytearray(TARGETS["npz"].seeds()[0])
    at = content.index(b"PK\x01\x02")
    content[at + 9] |= 0x08  # the flag for a UTF-8 name
    content[at + 46] = 0xFF
    return bytes(content)


def long_names() -> bytes:
    name = tarfile.TarInfo("././@LongLink")
    name.type, name.size = tarfile.GNUTYPE_LONGNAME, 5
    return (name.tobuf(tarfile.GNU_FORMAT) + b"abcd\0".ljust(512, b"\0")) * 2000 + bytes(1024)


def tiff_with_an_odd_tag() -> bytes:
    content = bytearray(TARGETS["picture"].seeds()[10])
    at = struct.unpack("<I", content[4:8])[0] + 2  # start of the first tag
    content[at + 2 : at + 8] = struct.pack("<HI", 5, 1 << 30)
    return bytes(content)


EXAMPLES = {
    "an odd escape in a pickled name, for which pickletools warns": ("unpickler", b"c\\\xc3a\nb\n."),
    "a pickle of nothing": ("cifar-batch", b"}."),
    "class names with a lone surrogate": ("cifar-batch", pickle.dumps({"data": "\ud800"})),
    "a negative shape whose product fits": ("npz", npz(b"{'descr':'|u1','fortran_order':False,'shape':(-2,-2,1)}", bytes(4))),
    "items of no size": ("npz", npz(b"{'descr':'|S0','fortran_order':False,'shape':(3,)}")),
    "items that are arrays": ("npz", npz(b"{'descr':('<f4',(1000,)),'fortran_order':False,'shape':(0,)}")),
    "a header with too many brackets": ("npz", npz(b"(" * 5000)),
    "a header that is not Python": ("npz", npz(b"{'descr':'\n  \n |u1")),
    "a header of another type": ("npz", npz(b"{'descr':1,'fortran_order':2,'shape':3}")),
    "a member name that is not UTF-8": ("npz", npz_with_a_name_that_is_not_utf8()),
    "a zip of a version that zipfile does not support": ("tiny-imagenet-zip", zip_of_another_version()),
    "a zip with a name that starts with NUL": ("tiny-imagenet-zip", zip_with_a_name_that_begins_with_nul()),
    "a PNG chunk that claims gigabytes": ("image-folder", png_chunk_of_gigabytes()),
    "a TIFF for which Pillow warns": ("picture", tiff_with_an_odd_tag()),
    "a tar with endless long names": ("cifar-tar", long_names()),
    "the same, compressed": ("cifar-tar-gz", gzip.compress(long_names())),
    "a key of 3,000 parts": ("recipe", b'name="a"\n[data]\nformat="digits"\n' + b".".join([b"a"] * 3000) + b"=1\n"),
    "a flow configuration with too many brackets": ("flow", b'\x00{"kind":"lsmix-glow","format_version":1,"facts":' + b"[" * 5000),
    "a flow configuration that is not UTF-8": ("flow", b'\x00{"kind":"lsmix-glow","format_version":1,"facts":{"a":"\xff"}}'),
    "a shard record with too many brackets": ("notes", b"\x00" + b"[" * 5000),
    "a lock owner without a process number": ("notes", b'\x01{"user":"a","host":"b","process":"c","since":"d"}'),
    "a lock owner that is not UTF-8": ("notes", b"\x01\xff"),
    "metrics without epochs": ("results", b"\x01[]"),
    "versions that are a list": ("pool", b'\x00{"format_version":1,"environment":{"versions":[1]}}'),
}  # fmt: skip


@pytest.mark.parametrize(("target", "content"), EXAMPLES.values(), ids=EXAMPLES)
def test_an_input_that_once_broke_a_parser_is_read_or_rejected(target, content, scratch):
    read_bytes(target, content, scratch)
