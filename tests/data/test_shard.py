"""One shard: its bytes are zarr-python's, and no damage to them goes unseen."""

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from lsmix.data.errors import CorruptError
from lsmix.data.table import CRC_BYTES, check_chunk, index_bytes, read_index, shard_bytes, shard_pieces


def decode(shard, *, slots, chunks, chunk_bytes):
    """Return the checked chunks of a shard, (chunks, chunk_bytes)."""
    content = np.frombuffer(bytes(shard), np.uint8)
    offsets = read_index(content, slots=slots, chunks=chunks, chunk_bytes=chunk_bytes, where="the shard")
    for offset in offsets.tolist():
        check_chunk(content, offset, chunk_bytes, where="the shard")
    return np.stack([content[offset : offset + chunk_bytes] for offset in offsets.tolist()])


def encode_shard(rows, **sizes):
    return bytearray(b"".join(shard_pieces(rows, **sizes)))


def with_index(shard, entries):
    """Return the shard with other (offset, size) entries and an index checksum that fits them."""
    index = np.array(entries, "<u8").tobytes()
    checksum = google_crc32c.value(index).to_bytes(CRC_BYTES, "little")
    return bytes(shard[: len(shard) - len(index) - CRC_BYTES]) + index + checksum


@given(
    rows=st.integers(1, 12),
    chunk_rows=st.sampled_from([1, 2, 3, 4, 6, 12]),
    row_shape=st.sampled_from([(), (1,), (3,), (2, 2, 3)]),
    dtype=st.sampled_from(["uint8", "int64", "float32", "float64"]),
)
def test_a_shard_gives_its_rows_back_padded_with_zeros(rows, chunk_rows, row_shape, dtype):
    content = np.arange(1, rows * int(np.prod(row_shape)) + 1).astype(dtype).reshape(rows, *row_shape)
    shard = encode_shard(content, chunk_rows=chunk_rows, shard_rows=12)
    row_bytes = content[0].nbytes
    chunks = -(-rows // chunk_rows)
    assert len(shard) == shard_bytes(rows, row_bytes=row_bytes, chunk_rows=chunk_rows, shard_rows=12)
    found = decode(shard, slots=12 // chunk_rows, chunks=chunks, chunk_bytes=chunk_rows * row_bytes).reshape(-1)
    assert found[: rows * row_bytes].tobytes() == content.tobytes()
    assert not found[rows * row_bytes :].any()


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
@pytest.mark.parametrize("rows", [8, 5, 2, 1])
def test_the_bytes_are_those_that_zarr_python_writes(tmp_path, rows, dtype):
    content = np.arange(1, rows * 3 + 1).astype(dtype).reshape(rows, 3)
    codecs = [BytesCodec(endian="little"), Crc32cCodec()]
    array = zarr.create_array(
        tmp_path,
        shape=content.shape,
        dtype=dtype,
        chunks=(8, 3),
        serializer=ShardingCodec(chunk_shape=(2, 3), codecs=codecs, index_codecs=codecs),
        compressors=None,
        filters=None,
        config={"write_empty_chunks": True},
    )
    array[:] = content
    assert bytes(encode_shard(content, chunk_rows=2, shard_rows=8)) == (tmp_path / "c/0/0").read_bytes()


def test_rows_in_the_other_byte_order_are_stored_little_endian():
    rows = np.arange(4, dtype=">i8")
    assert encode_shard(rows, chunk_rows=2, shard_rows=4) == encode_shard(
        rows.astype("<i8"), chunk_rows=2, shard_rows=4
    )


@pytest.mark.parametrize(("rows", "chunk_rows"), [(0, 2), (9, 2), (4, 3)])
def test_rows_that_do_not_fit_a_shard_are_refused(rows, chunk_rows):
    with pytest.raises(ValueError, match=f"{rows} rows in chunks of {chunk_rows} do not make a shard"):
        encode_shard(np.zeros((rows, 2), np.uint8), chunk_rows=chunk_rows, shard_rows=8)


def test_any_flipped_bit_is_found():
    rows = np.random.default_rng(0).integers(0, 256, (7, 3), dtype=np.uint8)
    shard = encode_shard(rows, chunk_rows=2, shard_rows=10)
    for position in range(len(shard)):
        damaged = bytearray(shard)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptError, match="is damaged"):
            decode(damaged, slots=5, chunks=4, chunk_bytes=6)


def test_any_cut_is_found():
    shard = encode_shard(np.ones((4, 3), np.uint8), chunk_rows=2, shard_rows=4)
    for length in range(len(shard)):
        with pytest.raises(CorruptError, match="cut short"):
            decode(shard[:length], slots=2, chunks=2, chunk_bytes=6)


def test_chunks_are_found_by_the_index_in_whatever_order_they_lie():
    rows = np.arange(12, dtype=np.uint8).reshape(4, 3)
    whole = bytes(encode_shard(rows, chunk_rows=2, shard_rows=4))
    shard = with_index(whole[10:20] + b"gap" + whole[:10] + bytes(index_bytes(2)), [(13, 10), (0, 10)])
    assert decode(shard, slots=2, chunks=2, chunk_bytes=6).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(0, 10), (2**64 - 1, 2**64 - 1)], "its chunk 1 is missing"),
        ([(0, 9), (10, 10)], "its chunk 0 is of a wrong size"),
        ([(0, 10), (2**63, 10)], "its chunk 1 is of a wrong size or outside"),
        ([(0, 10), (11, 10)], "its chunk 1 is of a wrong size or outside"),
        ([(0, 10), (5, 10)], "two of its chunks overlap"),
    ],
)
def test_an_index_that_lies_is_refused_though_its_checksum_fits(entries, message):
    shard = with_index(encode_shard(np.ones((4, 3), np.uint8), chunk_rows=2, shard_rows=4), entries)
    with pytest.raises(CorruptError, match=message):
        decode(shard, slots=2, chunks=2, chunk_bytes=6)
