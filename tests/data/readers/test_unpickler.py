"""The unpickler: reads what CIFAR is made of, and runs nothing."""

import contextlib
import pickle
import struct
import tracemalloc
from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from fuzz_targets import is_plain
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lsmix.data.errors import MissingError, SourceError
from lsmix.data.readers.published.unpickler import load_batch

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)

_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.binary(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
_arrays = hnp.arrays(
    st.sampled_from(["u1", "<i8", ">i4", "f4", "f8", "?"]), hnp.array_shapes(min_dims=1, max_dims=3, max_side=4)
)


class Evil:
    """Runs a function of one argument when it is unpickled in the usual way."""

    def __init__(self, function, argument):
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


def old_string(data: bytes) -> bytes:
    """Write a string as Python 2 did for protocol 2."""
    return b"U" + bytes([len(data)]) + data if len(data) < 256 else b"T" + struct.pack("<i", len(data)) + data


def old_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Write a batch exactly as the published ones are: Python 2, protocol 2, NumPy before 2."""
    dtype = b"cnumpy\ndtype\n" + old_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + old_string(b"|") + b"NNN"
    dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
    shape = b"".join(b"M" + struct.pack("<H", length) for length in pixels.shape) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + old_string(b"b") + b"\x87Rq\x01"
    array += b"(K\x01" + shape + dtype + b"\x89" + old_string(pixels.tobytes()) + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + old_string(b"data") + array + old_string(b"labels") + listed + b"u."


def same(got, expected) -> bool:
    if isinstance(expected, np.ndarray):
        # NumPy brings bytes of the other order into the machine's own.
        return got.dtype == expected.dtype.newbyteorder("=") and np.array_equal(
            got, expected, equal_nan=expected.dtype.kind == "f"
        )
    return type(got) is type(expected) and got == expected


@settings(deadline=None)  # shared machines pause
@given(value=_plain, array=_arrays, fortran=st.booleans(), protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_and_numeric_arrays_come_back_as_they_went(value, array, fortran, protocol):
    array = np.asfortranarray(array) if fortran else array
    batch = {"value": value, "array": array, b"number": array.dtype.type(1)}
    loaded = load_batch(pickle.dumps(batch, protocol))
    assert list(loaded) == list(batch)
    assert same(loaded["value"], value)
    assert same(loaded["array"], array)
    assert loaded[b"number"] == 1


def test_a_batch_as_python_2_wrote_it_is_read_as_bytes_without_a_warning():
    pixels = np.arange(2 * 300, dtype=np.uint8).reshape(2, 300)
    loaded = load_batch(old_batch(pixels, [3, 9]))
    assert list(loaded) == [b"data", b"labels"]
    assert same(loaded[b"data"], pixels)
    assert loaded[b"labels"] == [3, 9]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_code_is_named_and_not_run(protocol, tmp_path):
    marker = tmp_path / "ran"
    content = pickle.dumps(
        {"data": Evil(open, str(marker))} | {"more": Evil(eval, f"open({str(marker)!r}, 'w')")}, protocol
    )
    with pytest.raises(SourceError, match=r"contains code \((_io|io|__builtin__|builtins)\.open\); it was not run"):
        load_batch(content, name="'batch'")
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
        b"cnumpy\nndarray\n(K\x02tR.",  # an array of its own making
        b"cnumpy\ndtype\n}b.",  # a state for what is named
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.",  # another codec
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\nK\x00\x85U\x01btR.",  # another type
        b"]}b.",  # a state for a list
        b"K\x01K\x02\x85R.",  # a call of a number
        b"c__builtin__\ngetattr\n.",
        b"cnumpy\nndarray.dump\n.",
    ],
)
def test_every_way_to_name_run_or_alter_anything_is_refused(content):
    with pytest.raises(SourceError, match="contains code"):
        load_batch(content)


def test_control_characters_in_names_do_not_reach_the_terminal():
    with pytest.raises(SourceError) as caught:
        load_batch(b"cos\n\x1b[2Jsystem\n.")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "array", [np.array([{}]), np.array(["a"]), np.array([b"a"]), np.array([0], "M8[s]"), np.zeros(1, "i4,f8")]
)
def test_arrays_of_anything_but_numbers_are_refused(array):
    with pytest.raises(SourceError, match=r"only plain numbers are read|contains code"):
        load_batch(pickle.dumps({"data": array}, 2))


def test_a_pickle_cut_short_anywhere_is_an_error():
    content = old_batch(np.zeros((2, 30), np.uint8), [1, 2])
    for length in range(len(content)):
        with pytest.raises(SourceError):
            load_batch(content[:length])


@settings(deadline=None)  # shared machines pause
@given(data=st.data())
def test_any_changed_byte_reads_as_plain_values_or_is_a_source_error(data):
    content = bytearray(old_batch(np.zeros((2, 30), np.uint8), [1, 2]))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SourceError):
        assert is_plain(load_batch(bytes(content)))


@settings(deadline=None)  # shared machines pause
@given(content=st.binary(max_size=60))
@example(content=b"}.")  # an empty dictionary, which Hypothesis found as noise
@example(content=b"}(X\x01\x00\x00\x00a]q\x00h\x00au.")  # a list that holds itself
def test_noise_reads_as_plain_values_or_is_a_source_error(content):
    """That a batch's fields are there is for its reader to see: test_cifar.py holds it to an error for all noise."""
    with contextlib.suppress(SourceError):
        assert is_plain(load_batch(content))


@pytest.mark.parametrize(
    "value", [b"cnumpy\nndarray\n", b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R", b"](c_codecs\nencode\ne"]
)
def test_a_name_that_is_left_in_the_result_is_refused(value):
    with pytest.raises(SourceError, match="a name that stands for itself"):
        load_batch(b"}X\x01\x00\x00\x00a" + value + b"s.")


def test_arrays_cannot_outgrow_the_file():
    """One megabyte, used a thousand times, must not become a gigabyte."""
    # The buffer is memoized as 100 and handed to each array anew.
    buffer = b"\x96" + struct.pack("<Q", 1 << 20) + bytes(1 << 20) + b"qd0"
    dtype = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"
    one = b"cnumpy._core.numeric\n_frombuffer\n(hd" + dtype + b"J\x00\x00\x10\x00\x85X\x01\x00\x00\x00CtR"
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="unpack to more than"):
            load_batch(b"](" + buffer + one * 1000 + b"e.")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # the file, its stream, and twice the file in arrays
    finally:
        tracemalloc.stop()


def test_a_length_that_lies_takes_no_memory():
    with pytest.raises(SourceError, match="damaged"):
        load_batch(b"\x8e" + struct.pack("<Q", 1 << 40) + b"few.")


def test_a_huge_memo_number_takes_no_memory():
    assert load_batch(b"}r\xff\xff\xff\x7f.") == {}


def test_endless_opcodes_stop(monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.published.unpickler._MAX_OPCODES", 100)
    with pytest.raises(SourceError, match="past 100 opcodes"):
        load_batch(b"]0" * 200 + b"}.")


def test_a_deeply_nested_key_does_not_overflow_the_stack():
    with pytest.raises(SourceError, match="key is a tuple"):
        load_batch(b"})" + b"\x85" * 200_000 + b"Ns.")


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(SourceError, match="holds a list, expected a dictionary"):
        load_batch(pickle.dumps([1]))


def test_a_file_is_read_and_named_and_a_missing_one_is_missing(tmp_path: Path):
    path = tmp_path / "batch"
    with pytest.raises(MissingError, match="no pickle at"):
        load_batch(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert load_batch(path) == {"a": 1}
    path.write_bytes(b"\x80")
    with pytest.raises(SourceError, match=str(path)):
        load_batch(path)
