"""Tables: compatible with zarr-python, every flipped bit is detected, and metadata must match the listed files."""

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from lsmix.data import atomic, table_reader
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.table import Column, Table, TableFiles, crc32c, default_chunk_rows, table_in
from lsmix.data.table_reader import open_table

IMAGES = Column(name="image", dtype="uint8", row_shape=(2, 2, 3))
NUMBERS = Column(name="number", dtype="int64")


def contents(rows):
    """Return the rows of both columns."""
    images = np.random.default_rng(rows).integers(0, 256, (rows, 2, 2, 3), dtype=np.uint8)
    return {"image": images, "number": np.arange(rows)}


def written(folder, rows, chunk_rows=8):
    """Write all shards of both columns, the last shard first."""
    table = Table(folder=folder, columns=(IMAGES, NUMBERS), rows=rows, chunk_rows=chunk_rows)
    table.create({"note": "λ"})
    for shard in reversed(range(table.shards)):
        span = table.shard_range(shard)
        table.write_shard(shard, {name: c[span.start : span.stop] for name, c in contents(rows).items()})
    return table


def opened(folder, **options):
    """Open a table as if a manifest listed all files in its folder."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files = TableFiles(location=str(folder), sizes=sizes, open=lambda path: (folder / path).open("rb"))
    return open_table(files, **options)


def create_with_zarr(folder, name, content, chunk_rows):
    return zarr.create_array(
        folder / name,
        shape=content.shape,
        dtype=content.dtype,
        chunks=(chunk_rows, *content.shape[1:]),
        serializer=BytesCodec(endian="little"),
        compressors=Crc32cCodec(),
        filters=None,
        config={"write_empty_chunks": True},
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 21, 24])
def test_zarr_python_reads_tables_of_lsmix(tmp_path, rows):
    written(tmp_path / "t.zarr", rows)
    group = zarr.open_group(tmp_path / "t.zarr", mode="r")
    assert dict(group.attrs) == {"note": "λ"}
    for name, expected in contents(rows).items():
        np.testing.assert_array_equal(group[name][:], expected)
        assert group[name].dtype == expected.dtype
        assert group[name].metadata.dimension_names[0] == "row"


@pytest.mark.parametrize("rows", [1, 7, 9, 24])
def test_lsmix_reads_tables_of_zarr_python(tmp_path, rows):
    zarr.create_group(tmp_path / "t.zarr", attributes={"note": "λ"})
    for name, content in contents(rows).items():
        create_with_zarr(tmp_path / "t.zarr", name, content, 8)[:] = content
    reader = opened(tmp_path / "t.zarr")
    assert reader.attributes == {"note": "λ"}
    for name, expected in contents(rows).items():
        np.testing.assert_array_equal(reader[name][:], expected)


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float64"])
@pytest.mark.parametrize("rows", [8, 5, 1])
def test_chunk_files_are_identical_to_those_of_zarr_python(tmp_path, rows, dtype):
    content = np.arange(rows * 3).astype(dtype).reshape(rows, 3)
    create_with_zarr(tmp_path / "zarr", "x", content, 8)[:] = content
    column = Column(name="x", dtype=dtype, row_shape=(3,))
    Table(folder=tmp_path / "own", columns=(column,), rows=rows, chunk_rows=8).write_shard(0, {"x": content})
    assert (tmp_path / "own/x/c/0/0").read_bytes() == (tmp_path / "zarr/x/c/0/0").read_bytes()
    assert (tmp_path / "own/x/c/0/0").stat().st_size == 8 * content[0].nbytes + 4


def test_chunks_of_zeros_are_written_too(tmp_path):
    table = Table(folder=tmp_path, columns=(NUMBERS,), rows=8, chunk_rows=8)
    table.create({})
    table.write_shard(0, {"number": np.zeros(8, np.int64)})
    assert (tmp_path / "number/c/0").stat().st_size == 68


def test_rows_are_stored_in_little_endian_byte_order(tmp_path):
    rows = np.arange(4, dtype=">i8")
    Table(folder=tmp_path, columns=(NUMBERS,), rows=4, chunk_rows=4).write_shard(0, {"number": rows.astype("<i8")})
    first = (tmp_path / "number/c/0").read_bytes()
    assert first[:32] == rows.astype("<i8").tobytes()


@given(data=st.data())
def test_a_column_is_indexed_like_an_array(module_table, data):
    reader, expected = module_table
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
def module_table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tables") / "t.zarr"
    written(folder, 21)
    return opened(folder), contents(21)


def test_a_column_behaves_like_an_array(module_table):
    reader, expected = module_table
    np.testing.assert_array_equal(np.asarray(reader["number"]), expected["number"])
    assert np.asarray(reader["number"], np.float32).dtype == np.float32
    assert list(reader["number"]) == expected["number"].tolist()
    assert len(reader["image"]) == 21
    assert reader["image"].shape == (21, 2, 2, 3)
    for array in (reader["image"][3:5], reader["image"].gather([5, 2]), reader["number"][:]):
        assert array.flags.writeable
        assert array.flags.c_contiguous
        assert array.dtype.isnative
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(reader["number"], copy=False)


@pytest.mark.parametrize("row", [21, -22, 2**40])
def test_a_row_out_of_range_raises_index_error(module_table, row):
    with pytest.raises(IndexError, match=f"row {row} is out of range for column 'image' with 21 rows"):
        module_table[0]["image"][row]


def test_rows_are_indexed_by_integers_only(module_table):
    with pytest.raises(TypeError, match="indexed by integers, got float64"):
        module_table[0]["image"][[0.5]]


def test_a_process_maps_at_most_64_chunks_and_threads_can_share_a_reader(tmp_path):
    written(tmp_path / "t.zarr", 300, chunk_rows=2)
    reader, expected = opened(tmp_path / "t.zarr"), contents(300)
    wrong = []

    def read(seed):
        order = np.random.default_rng(seed).permutation(300)
        for name, array in expected.items():
            if not np.array_equal(reader[name].gather(order), array[order]):
                wrong.append((seed, name))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(reader["image"][:], expected["image"])
    assert not wrong
    if Path("/proc/self/maps").exists():
        assert 0 < Path("/proc/self/maps").read_text().count(f"{tmp_path}/t.zarr") <= 64


def test_writing_a_shard_returns_checksums_and_is_repeatable(tmp_path):
    table = written(tmp_path / "t.zarr", 12)
    first = {name: rows[8:] for name, rows in contents(12).items()}
    digests = table.write_shard(1, first)
    assert set(digests) == {"image/c/1/0/0/0", "number/c/1"}
    for path, digest in digests.items():
        assert hashlib.sha256((table.folder / path).read_bytes()).hexdigest() == digest
    assert table.write_shard(1, first) == digests


def test_a_failed_write_leaves_the_shard_unwritten(tmp_path, monkeypatch):
    table = Table(folder=tmp_path, columns=(IMAGES, NUMBERS), rows=12, chunk_rows=8)
    table.create({})

    def fail_at_the_number(handle):
        if os.fstat(handle).st_size == table.chunk_file_bytes(NUMBERS):  # columns are written in parallel
            raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", fail_at_the_number)
        with pytest.raises(OSError, match="no space"):
            table.write_shard(0, {name: rows[:8] for name, rows in contents(12).items()})
    assert not table.is_written(0)
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(CorruptError, match="is not in the manifest"):
        opened(tmp_path)
    table.write_shard(0, {name: rows[:8] for name, rows in contents(12).items()})
    assert table.is_written(0)
    assert not table.is_written(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("number"), "must have .*'number': .*, got {'image': [^{]*}"),
        (lambda arrays: arrays.update(other=arrays["number"]), "got .*'other'"),
        (
            lambda arrays: arrays.update(number=arrays["number"][:-1]),
            r"'number': \('int64', \(8,\)\).* got .*'number': \('int64', \(7,\)\)",
        ),
        (lambda arrays: arrays.update(number=arrays["number"].astype(float)), "'int64'.* got .*'float64'"),
    ],
)
def test_an_incomplete_shard_is_rejected(tmp_path, change, message):
    table = Table(folder=tmp_path, columns=(IMAGES, NUMBERS), rows=12, chunk_rows=8)
    arrays = {name: rows[:8] for name, rows in contents(12).items()}
    change(arrays)
    with pytest.raises(ValueError, match=message):
        table.write_shard(0, arrays)
    assert not (tmp_path / "image").exists()


def test_a_shard_out_of_range_raises_index_error(tmp_path):
    table = Table(folder=tmp_path, columns=(NUMBERS,), rows=12, chunk_rows=8)
    with pytest.raises(IndexError, match=r"shard 2 does not exist: .* has shards 0 to 1"):
        table.shard_range(2)


def test_any_flipped_bit_is_detected_when_its_chunk_is_first_mapped(tmp_path):
    table = written(tmp_path / "t.zarr", 21)
    path = table.folder / "image/c/2/0/0/0"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        image = opened(table.folder)["image"]
        np.testing.assert_array_equal(image[:16], contents(21)["image"][:16])
        for _ in range(2):
            with pytest.raises(CorruptError, match=r"image/c/2/0/0/0' is damaged: its checksum does not match"):
                image[16]
    assert opened(table.folder, check_crc=False)["image"][16].shape == (2, 2, 3)


def test_a_chunk_is_checked_only_once(tmp_path, monkeypatch):
    written(tmp_path / "t.zarr", 21)
    checked = []
    monkeypatch.setattr(table_reader, "crc32c", lambda content: checked.append(1) or crc32c(content))
    image = opened(tmp_path / "t.zarr")["image"]
    for _ in range(3):
        table_reader._map_chunk.cache_clear()
        image[:]
    assert len(checked) == 3


def test_missing_and_truncated_chunks_are_detected(tmp_path):
    table = written(tmp_path / "t.zarr", 24)
    path = table.folder / "number/c/2"
    content = path.read_bytes()
    listed = opened(table.folder)
    path.write_bytes(content[:-1])
    with pytest.raises(CorruptError, match=r"number/c/2' has 67 bytes, expected 68"):
        opened(table.folder)
    with pytest.raises(CorruptError, match=r"number/c/2' cannot be read"):
        listed["number"][23]
    path.unlink()
    with pytest.raises(CorruptError, match=r"number/c/2' is not in the manifest"):
        opened(table.folder)


def edit(path, change):
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(zarr_format=2), "zarr_format"),
        (lambda m: m.update(node_type="group"), "node_type"),
        (lambda m: m.update(data_type="object"), "data_type"),
        (lambda m: m.update(data_type=["int64"]), "data_type"),
        (lambda m: m.update(shape=[]), "shape"),
        (lambda m: m.update(shape=[0]), "shape"),
        (lambda m: m.update(shape=[2**60]), "shape"),
        (lambda m: m.update(shape=[2**40]), "different .rows, rows per chunk."),
        (lambda m: m.update(shape=[21, 2]), "complete rows"),
        (lambda m: [m.update(shape=[21, *[2**48] * 400]), m["chunk_grid"]["configuration"].update(chunk_shape=[8, *[2**48] * 400]), m.pop("dimension_names")], "rows of more than"),
        (lambda m: m.update(must_understand_me={}), "must_understand_me"),
        (lambda m: m.update(storage_transformers=[{"name": "x"}]), "storage_transformers"),
        (lambda m: m.update(dimension_names=["a", "b"]), "dimension_names"),
        (lambda m: m.update(chunk_grid={"name": "rectilinear"}), "chunk_grid"),
        (lambda m: m["chunk_grid"].update(name="rectilinear"), "chunk_grid"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[0]), "chunk_grid"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[8.5]), "chunk_grid"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape={"0": 8}), "chunk_grid"),
        (lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[]), "chunk_grid"),
        (lambda m: m["chunk_key_encoding"]["configuration"].update(separator="."), "chunk_key_encoding"),
        (lambda m: m["chunk_key_encoding"].update(name="v2"), "chunk_key_encoding"),
        (lambda m: m["codecs"].append({"name": "gzip"}), "codecs .*gzip"),
        (lambda m: m["codecs"].pop(), "codecs"),
        (lambda m: m["codecs"].reverse(), "codecs"),
        (lambda m: m["codecs"].insert(0, {"name": "transpose", "configuration": {"order": [0]}}), "codecs .*transpose"),
        (lambda m: m["codecs"][1].update(configuration={"a": 1}), "codecs"),
        (lambda m: m["codecs"][0]["configuration"].update(endian="big"), "codecs"),
        (lambda m: m["codecs"][0].pop("configuration"), "codecs"),
        (lambda m: m.update(codecs=[{"name": "sharding_indexed", "configuration": {}}]), "sharding_indexed"),
        (lambda m: m.update(codecs=["bytes"]), "codecs"),
    ],
)  # fmt: skip
def test_errors_name_the_unsupported_part_of_a_layout(tmp_path, change, message):
    table = written(tmp_path / "t.zarr", 21)
    edit(table.folder / "number/zarr.json", change)
    with pytest.raises(FormatError, match=message):
        opened(table.folder)


def test_rows_without_files_are_rejected_before_memory_is_allocated(tmp_path):
    table = written(tmp_path / "t.zarr", 21)
    for name in ("image", "number"):
        edit(table.folder / name / "zarr.json", lambda m: m["shape"].__setitem__(0, 2**47))
    with pytest.raises(CorruptError, match=r"image/c/3/0/0/0' is not in the manifest"):
        opened(table.folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[" * 100_000, b"null", b"[]"])
def test_metadata_that_is_not_the_json_of_a_group_is_rejected(tmp_path, content):
    table = written(tmp_path / "t.zarr", 4)
    (table.folder / "zarr.json").write_bytes(content)
    with pytest.raises((CorruptError, FormatError), match=r"zarr\.json'"):
        opened(table.folder)


def test_missing_tables_and_tables_without_columns_raise_errors(tmp_path):
    with pytest.raises(MissingError, match="no table at"):
        table_in(tmp_path)
    Table(folder=tmp_path, columns=(), rows=1, chunk_rows=1).create({})
    with pytest.raises(CorruptError, match="has no columns"):
        table_in(tmp_path)


@given(row_bytes=st.integers(1, 10**9), rows=st.integers(1, 10**8))
def test_the_default_chunk_is_25_mb_or_an_eighth_of_the_rows(row_bytes, rows):
    chunk_rows = default_chunk_rows(row_bytes, rows)
    assert 1 <= chunk_rows <= rows
    assert chunk_rows == 1 or chunk_rows * row_bytes <= 24 << 20
    assert chunk_rows <= -(-rows // 8) + 255
    assert chunk_rows == rows or chunk_rows % 256 == 0 or chunk_rows * row_bytes > (24 << 20) - row_bytes


@pytest.mark.parametrize(
    ("rows", "chunk_rows"), [(100, 100), (256, 256), (2048, 256), (2049, 512), (50_000, 6400), (65_536, 8192)]
)
def test_default_chunk_rows_of_32x32x3_images(rows, chunk_rows):
    assert default_chunk_rows(3072, rows) == chunk_rows
