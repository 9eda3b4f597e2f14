"""The restricted unpickler reads batches of CIFAR and executes no code."""

import contextlib
import pickle
import struct
import tracemalloc

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lsmix.data.errors import SourceError
from lsmix.data.readers.published.unpickler import load_batch

PROTOCOLS = (2, 3, 4)

_texts = st.text(max_size=8) | st.binary(max_size=8)
_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31 - 1) | _texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=12,
)
_arrays = hnp.arrays("u1", hnp.array_shapes(min_dims=1, max_dims=3, max_side=4))


def load(content: bytes) -> dict:
    return load_batch(content, name="'batch'")


class Evil:
    """Calls a function with one argument when it is unpickled normally."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def old_string(data: bytes) -> bytes:
    """Pickle a string like Python 2 with protocol 2."""
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def old_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Pickle a batch exactly like the published ones: Python 2, protocol 2, NumPy before 2."""
    dtype = b"cnumpy\ndtype\n" + old_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + old_string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", length) for length in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + old_string(b"b") + b"\x87Rq\x01"
    array += b"(K\x01" + shape + dtype + b"\x89" + old_string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + old_string(b"data") + array + old_string(b"labels") + listed + b"u."


@settings(deadline=None)  # shared machines pause
@given(value=_plain, array=_arrays, fortran=st.booleans(), protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_and_arrays_of_bytes_are_loaded_unchanged(value, array, fortran, protocol):
    array = np.asfortranarray(array) if fortran else array
    loaded = load(pickle.dumps({"value": value, b"array": array}, protocol))
    assert list(loaded) == ["value", b"array"]
    assert loaded["value"] == value
    assert loaded[b"array"].dtype == np.uint8
    np.testing.assert_array_equal(loaded[b"array"], array)


def test_a_batch_from_python_2_is_read_as_bytes_without_a_warning():
    pixels = np.arange(2 * 300, dtype=np.uint8).reshape(2, 300)
    loaded = load(old_batch(pixels, [3, 9]))
    assert list(loaded) == [b"data", b"labels"]
    np.testing.assert_array_equal(loaded[b"data"], pixels)
    assert loaded[b"labels"] == [3, 9]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_reported_and_not_executed(protocol, tmp_path):
    marker = tmp_path / "ran"
    content = pickle.dumps(
        {"data": Evil(open, str(marker))} | {"more": Evil(eval, f"open({str(marker)!r}, 'w')")}, protocol
    )
    with pytest.raises(
        SourceError, match=r"'batch' contains code \((_io|io|__builtin__|builtins)\.open\), which was not run"
    ):
        load(content)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"cos\nsystem\n)\x81.",  # NEWOBJ
        b"cos\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"Psome\n.",  # PERSID
        b"N\x51.",  # BINPERSID
        b"\x82\x01.",  # EXT1
        b"\x97.",  # NEXT_BUFFER
        b"cnumpy\nndarray\n(K\x02tR.",  # creates an array directly
        b"cnumpy\ndtype\n}b.",  # sets the state of a global
        b"cnumpy.core.multiarray\n_reconstruct\n(N}U\x05_callK\x01stb.",
        b"c__builtin__\nbytes\n(J\x00\x00\x00\x7ftR.",  # two gigabytes of zeros
        b"\x96" + bytes(8) + b".",  # BYTEARRAY8, which is mutable memory for an array
        b"L1L\n.",  # integers of any size, which can collide in a dictionary
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",  # another codec
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85U\x01btR.",  # another type
        b"]}b.",  # sets the state of a list
        b"K\x01K\x02\x85R.",  # calls a number
        b"c__builtin__\ngetattr\n.",
        b"cnumpy\nndarray.dump\n.",
    ],
)
def test_every_opcode_that_could_run_code_or_change_an_object_is_rejected(content):
    with pytest.raises(SourceError, match=r"contains code|is damaged|expected uint8"):
        load(content)


def test_messages_contain_no_control_characters():
    with pytest.raises(SourceError) as caught:
        load(b"cos\n\x1b[2Jsystem\n.")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.array([{}]), np.array(["a"]), np.array([0], "M8[s]"), np.zeros(1, "i4,f8"), np.zeros(1, "f4")]
)
def test_arrays_of_other_types_than_bytes_are_rejected(array):
    with pytest.raises(SourceError, match=r"expected uint8|contains code"):
        load(pickle.dumps({"data": array}, 2))


def test_a_truncated_pickle_is_an_error():
    content = old_batch(np.zeros((2, 30), np.uint8), [1, 2])
    for length in range(len(content)):
        with pytest.raises(SourceError):
            load(content[:length])


@settings(deadline=None)  # shared machines pause
@given(data=st.data())
def test_a_changed_byte_is_harmless_or_a_source_error(data):
    content = bytearray(old_batch(np.zeros((2, 30), np.uint8), [1, 2]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SourceError):
        assert isinstance(load(bytes(content)), dict)


@settings(deadline=None)  # shared machines pause
@given(content=st.binary(max_size=60))
@example(content=b"}.")  # an empty dictionary, found by Hypothesis
@example(content=b"}(X\x01\x00\x00\x00a]q\x00h\x00au.")  # a list that contains itself
def test_random_bytes_are_a_dictionary_or_a_source_error(content):
    """The reader checks the fields of a batch; see the test with random bytes in test_cifar.py."""
    with contextlib.suppress(SourceError):
        assert isinstance(load(content), dict)


def test_encoding_text_repeatedly_does_not_exhaust_memory():
    """One megabyte of text, encoded a thousand times, must not become a gigabyte."""
    # The text is stored in the memo at index 100.
    text = b"X" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"qd"
    encoded = b"c_codecs\nencode\n(hdX\x06\x00\x00\x00latin1tR"
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="encoded too often"):
            load(b"}X\x01\x00\x00\x00a](" + text + encoded * 1000 + b"es.")
        assert (
            tracemalloc.get_traced_memory()[1] < 16 << 20
        )  # the file, its stream, and encoded texts of twice the file's size
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 1 << 40) + b"few.",  # a false length
        b"}r\xff\xff\xff\x7f.",  # a huge memo number
        b"})" + b"\x85" * 200_000 + b"Ns.",  # a deeply nested key, whose hash overflows the C stack
        pickle.dumps([1], 2),  # not a dictionary
    ],
)
def test_pickles_that_would_exhaust_memory_or_the_stack_are_rejected(content):
    with pytest.raises(SourceError, match=r"damaged|opcodes"):
        load(content)


def test_the_number_of_opcodes_is_limited(monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.published.unpickler._MAX_OPCODES", 100)
    with pytest.raises(SourceError, match="has more than 100 opcodes"):
        load(b"]" * 200 + b"}.")
