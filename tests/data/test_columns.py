"""Columns: zarr-python and we read each other's, and strangers' metadata cannot make us read what is not there."""

import hashlib
import json
import os
import subprocess
import sys

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from lsmix.data import atomic as durable
from lsmix.data import table_reader as column_reader
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.table import Column, ColumnStore, open_store, rows_per_chunk, rows_per_shard, shard_bytes, shard_pieces
from lsmix.data.table_reader import open_columns

IMAGES = Column(name="image", dtype="uint8", row_shape=(2, 2, 3), chunk_rows=2)
NUMBERS = Column(name="number", dtype="int64", chunk_rows=8)


def contents(rows):
    """Return the rows of both columns; no value is 0, which stands for "not stored" in Zarr."""
    images = np.random.default_rng(rows).integers(1, 256, (rows, 2, 2, 3), dtype=np.uint8)
    return {"image": images, "number": np.arange(1, rows + 1)}


def written(folder, rows, shard_rows=8):
    """Write both columns whole, the last shard first."""
    store = ColumnStore(folder=folder, columns=(IMAGES, NUMBERS), rows=rows, shard_rows=shard_rows)
    store.create({"note": "λ"})
    for shard in reversed(range(store.shards)):
        span = store.shard_range(shard)
        store.write_shard(shard, {name: c[span.start : span.stop] for name, c in contents(rows).items()})
    return store


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 21, 24])
def test_zarr_python_reads_what_we_write(tmp_path, rows):
    written(tmp_path / "s.zarr", rows)
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    assert dict(group.attrs) == {"note": "λ"}
    for name, expected in contents(rows).items():
        np.testing.assert_array_equal(group[name][:], expected)
        assert group[name].dtype == expected.dtype


@pytest.mark.parametrize("rows", [1, 7, 9, 24])
def test_we_read_what_zarr_python_writes(tmp_path, rows):
    group = zarr.create_group(tmp_path / "s.zarr", attributes={"note": "λ"})
    codecs = [BytesCodec(endian="little"), Crc32cCodec()]
    for column, content in zip((IMAGES, NUMBERS), contents(rows).values(), strict=True):
        inner = (column.chunk_rows, *column.row_shape)
        array = group.create_array(
            column.name,
            shape=content.shape,
            dtype=column.dtype,
            chunks=(8, *column.row_shape),
            serializer=ShardingCodec(chunk_shape=inner, codecs=codecs, index_codecs=codecs),
            compressors=None,
            filters=None,
            config={"write_empty_chunks": True},
        )
        array[:] = content
    reader = open_columns(tmp_path / "s.zarr")
    assert reader.attributes == {"note": "λ"}
    for name, expected in contents(rows).items():
        np.testing.assert_array_equal(reader[name][:], expected)


@given(data=st.data())
def test_a_column_is_indexed_as_an_array_is(module_store, data):
    reader, expected = module_store
    for name, array in expected.items():
        bound = st.one_of(st.none(), st.integers(-30, 30))
        span = slice(data.draw(bound), data.draw(bound), data.draw(st.sampled_from([None, 1, 2, -1, 5])))
        rows = data.draw(st.lists(st.integers(-21, 20), max_size=12))
        np.testing.assert_array_equal(reader[name][span], array[span])
        np.testing.assert_array_equal(reader[name].gather(rows), array[np.array(rows, int)])
        np.testing.assert_array_equal(reader[name][rows], array[np.array(rows, int)])
        for row in rows:
            np.testing.assert_array_equal(reader[name][row], array[row])


@pytest.fixture(scope="module")
def module_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns") / "s.zarr"
    written(folder, 21)
    return open_columns(folder), contents(21)


def test_a_column_can_stand_in_for_an_array(module_store):
    reader, expected = module_store
    np.testing.assert_array_equal(np.asarray(reader["number"]), expected["number"])
    assert np.asarray(reader["number"], np.float32).dtype == np.float32
    assert list(reader["number"]) == expected["number"].tolist()
    assert len(reader["image"]) == 21
    assert reader["image"].shape == (21, 2, 2, 3)
    assert reader["image"][3:5].flags.writeable
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(reader["number"], copy=False)


@pytest.mark.parametrize("row", [21, -22, 2**40])
def test_a_row_outside_is_an_index_error(module_store, row):
    with pytest.raises(IndexError, match=f"row {row} is outside of column 'image', which has 21 rows"):
        module_store[0]["image"][row]


def test_rows_are_not_picked_by_other_things_than_integers(module_store):
    with pytest.raises(TypeError, match="picked by integers, got float64"):
        module_store[0]["image"][[0.5]]


def test_few_mapped_shards_are_enough_for_any_column(tmp_path, monkeypatch):
    monkeypatch.setattr(column_reader, "_OPEN_SHARDS", 2)
    written(tmp_path / "s.zarr", 60)
    reader = open_columns(tmp_path / "s.zarr")
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(reader["image"].gather(order), contents(60)["image"][order])
    np.testing.assert_array_equal(reader["image"][:], contents(60)["image"])


def test_writing_a_shard_gives_its_checksums_and_the_same_bytes_again(tmp_path):
    store = written(tmp_path / "s.zarr", 12)
    first = {name: rows[8:] for name, rows in contents(12).items()}
    digests = store.write_shard(1, first)
    assert set(digests) == {"image/c/1/0/0/0", "number/c/1"}
    for path, digest in digests.items():
        assert hashlib.sha256((store.folder / path).read_bytes()).hexdigest() == digest
    assert store.write_shard(1, first) == digests


def test_a_crash_in_the_middle_of_a_write_leaves_the_shard_unwritten(tmp_path, monkeypatch):
    store = ColumnStore(folder=tmp_path, columns=(IMAGES, NUMBERS), rows=12, shard_rows=8)
    store.create({})
    number_bytes = shard_bytes(8, row_bytes=8, chunk_rows=8, shard_rows=8)

    def fail_at_the_number(handle):
        if os.fstat(handle).st_size == number_bytes:  # columns are written side by side
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", fail_at_the_number)
        with pytest.raises(OSError, match="no space"):
            store.write_shard(0, {name: rows[:8] for name, rows in contents(12).items()})
    assert not store.is_written(0)
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(CorruptError, match="is missing"):
        open_columns(tmp_path)
    store.write_shard(0, {name: rows[:8] for name, rows in contents(12).items()})
    assert store.is_written(0)
    assert not store.is_written(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("number"), "takes .'image', 'number'., got .'image'."),
        (lambda arrays: arrays.update(other=arrays["number"]), "got .'image', 'number', 'other'."),
        (lambda arrays: arrays.update(number=arrays["number"][:-1]), r"takes int64 \(8,\), got int64 \(7,\)"),
        (lambda arrays: arrays.update(number=arrays["number"].astype(float)), "takes int64 .*, got float64"),
    ],
)
def test_a_shard_that_is_not_whole_is_refused(tmp_path, change, message):
    store = ColumnStore(folder=tmp_path, columns=(IMAGES, NUMBERS), rows=12, shard_rows=8)
    arrays = {name: rows[:8] for name, rows in contents(12).items()}
    change(arrays)
    with pytest.raises(ValueError, match=message):
        store.write_shard(0, arrays)
    assert not (tmp_path / "image").exists()


def test_a_shard_outside_is_an_index_error(tmp_path):
    store = ColumnStore(folder=tmp_path, columns=(NUMBERS,), rows=12, shard_rows=8)
    with pytest.raises(IndexError, match="shard 2 is outside of 0 to 1"):
        store.shard_range(2)


@pytest.mark.parametrize("name", ["", "Image", "../x", "c/0"])
def test_a_column_needs_a_plain_name(tmp_path, name):
    column = Column(name=name, dtype="uint8", chunk_rows=4)
    with pytest.raises(ValueError, match="is no name for a column"):
        ColumnStore(folder=tmp_path, columns=(column,), rows=4, shard_rows=4).create({})


def test_damage_is_found_when_its_chunk_is_first_touched(tmp_path):
    store = written(tmp_path / "s.zarr", 24)
    path = store.folder / "image/c/1/0/0/0"
    content = bytearray(path.read_bytes())
    content[30] ^= 4  # in rows 10 and 11, the shard's second chunk
    path.write_bytes(content)
    reader = open_columns(store.folder)
    np.testing.assert_array_equal(reader["image"][:10], contents(24)["image"][:10])
    np.testing.assert_array_equal(reader["image"][12:], contents(24)["image"][12:])
    for _ in range(2):
        with pytest.raises(CorruptError, match=r"image/c/1/0/0/0' is damaged: the checksum of bytes 28 to 51"):
            reader["image"][11]
    assert open_columns(store.folder, check_crc=False)["image"][11].shape == (2, 2, 3)


def test_a_missing_short_or_linked_shard_is_found_when_opening(tmp_path):
    store = written(tmp_path / "s.zarr", 24)
    path = store.folder / "number/c/2"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptError, match=r"number/c/2' is damaged: expected 88 bytes or more, got 87 bytes"):
        open_columns(store.folder)
    path.unlink()
    with pytest.raises(CorruptError, match=r"number/c/2' is missing"):
        open_columns(store.folder)
    path.symlink_to(store.folder / "number/c/1")
    with pytest.raises(CorruptError, match="no plain file"):
        open_columns(store.folder)


def edit(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: m.update(zarr_format=2), FormatError, "zarr_format"),
        (lambda m: m.update(data_type="object"), FormatError, "data_type"),
        (lambda m: m.update(shape=[0]), FormatError, "shape"),
        (lambda m: m.update(shape=[2**60]), FormatError, "shape"),
        (lambda m: m.update(shape=[2**40]), FormatError, "different .rows, rows per shard."),
        (lambda m: m.update(shape=[21, 2]), FormatError, "whole rows"),
        (lambda m: m.update(must_understand_me={}), FormatError, "must_understand_me"),
        (lambda m: m["codecs"].append({"name": "gzip"}), FormatError, "codecs"),
        (lambda m: m["codecs"][0].update(name="zstd"), FormatError, "zstd"),
        (lambda m: m["codecs"][0]["configuration"]["codecs"].pop(), FormatError, "codecs"),
        (lambda m: m["codecs"][0]["configuration"]["codecs"][0].pop("configuration"), FormatError, "no stated order"),
        (lambda m: m["codecs"][0]["configuration"].update(index_location="start"), FormatError, "index_location"),
        (lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[3]), FormatError, "do not fill a shard"),
    ],
)
def test_metadata_that_we_did_not_write_is_refused_by_name(tmp_path, change, error, message):
    store = written(tmp_path / "s.zarr", 21)
    edit(store.folder / "number/zarr.json", change)
    with pytest.raises(error, match=message):
        open_columns(store.folder)


def test_claimed_rows_without_files_are_refused_before_anything_is_allocated(tmp_path):
    store = written(tmp_path / "s.zarr", 21)
    for name in ("image", "number"):
        edit(store.folder / name / "zarr.json", lambda m: m["shape"].__setitem__(0, 2**47))
    with pytest.raises(CorruptError, match=r"image/c/2/0/0/0' is damaged: expected 180 bytes or more, got 152 bytes"):
        open_columns(store.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[" * 100_000])
def test_metadata_that_is_no_json_is_damage(tmp_path, content):
    store = written(tmp_path / "s.zarr", 4)
    (store.folder / "zarr.json").write_bytes(content)
    with pytest.raises((CorruptError, FormatError), match=r"zarr\.json'"):
        open_columns(store.folder)


def test_a_folder_without_a_store_is_missing_and_one_without_columns_is_damaged(tmp_path):
    with pytest.raises(MissingError, match="no columns at"):
        open_store(tmp_path)
    store = ColumnStore(folder=tmp_path, columns=(), rows=1, shard_rows=1)
    store.create({})
    with pytest.raises(CorruptError, match="has no columns at all"):
        open_store(tmp_path)


def test_chunks_are_read_by_the_index_of_a_writer_that_orders_them_otherwise(tmp_path):
    store = written(tmp_path / "s.zarr", 4)
    path = store.folder / "image/c/0/0/0/0"
    whole = b"".join(shard_pieces(contents(4)["image"], chunk_rows=2, shard_rows=8))
    index = np.frombuffer(whole[56:-4], "<u8").reshape(4, 2).copy()
    index[:2, 0] = [28, 0]
    checksum = google_crc32c.value(index.tobytes()).to_bytes(4, "little")
    path.write_bytes(whole[28:56] + whole[:28] + index.tobytes() + checksum)
    np.testing.assert_array_equal(open_columns(store.folder)["image"][:], contents(4)["image"])


@given(row_bytes=st.integers(1, 10**8), rows=st.integers(1, 10**6))
def test_shards_are_whole_chunks_and_never_much_longer_than_the_column(row_bytes, rows):
    shard_rows = rows_per_shard(row_bytes, rows)
    chunk_rows = rows_per_chunk(row_bytes, shard_rows)
    assert shard_rows % chunk_rows == 0
    assert shard_rows < 2 * rows or shard_rows == 1
    assert chunk_rows == 1 or chunk_rows * row_bytes <= 800_000


def test_reading_columns_imports_neither_zarr_nor_torch():
    code = "import sys, lsmix.data.pool, lsmix.data.latents; print({'zarr', 'torch', 'dask', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "row_shape", [(), (2, 2, 3), (7,), (200, 200, 3)]
)  # the last is beyond what one indexing takes
def test_rows_are_gathered_over_shards_and_part_by_part(tmp_path, row_shape):
    column = Column(name="image", dtype="uint8", row_shape=row_shape, chunk_rows=2)
    store = ColumnStore(folder=tmp_path / "s.zarr", columns=(column,), rows=11, shard_rows=4)
    store.create({})
    content = np.random.default_rng(0).integers(0, 256, (11, *row_shape), dtype=np.uint8)
    for shard in range(store.shards):
        span = store.shard_range(shard)
        store.write_shard(shard, {"image": content[span.start : span.stop]})
    image = open_columns(store.folder)["image"]
    rows = np.array([10, 0, 3, 3, 9, -1, 4])
    located = image.locate(rows)
    image.release()  # whoever located rows holds the maps that they lie in
    np.testing.assert_array_equal(located.take(), content[rows])
    np.testing.assert_array_equal(located.take(2, 5), content[rows[2:5]])
    assert located.take().flags.writeable
    assert image.locate([]).take().shape == (0, *row_shape)


@pytest.mark.parametrize("touched_bytes", [1, 60, 10**9])
def test_however_little_may_be_mapped_rows_come_in_the_order_asked_for(tmp_path, monkeypatch, touched_bytes):
    written(tmp_path / "s.zarr", 24)
    monkeypatch.setattr(column_reader, "_TOUCHED_BYTES", touched_bytes)
    rows = np.random.default_rng(0).integers(-24, 24, 100)
    columns = open_columns(tmp_path / "s.zarr")
    for name, expected in contents(24).items():
        np.testing.assert_array_equal(columns[name].gather(rows), expected[rows])
        assert columns[name].gather(rows).flags.writeable
