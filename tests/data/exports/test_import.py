"""Imports: HDF5 and Parquet exports become the very pool again, and a stranger's file is believed in nothing."""

import io
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lsmix.data.artifact import verify_files
from lsmix.data.errors import (
    CorruptError,
    FormatError,
    LsmixError,
    MissingError,
    RecipeError,
    SourceError,
)
from lsmix.data.exports.facts import seal_facts, unseal_facts
from lsmix.data.pool import open_pool
from lsmix.pipeline.export import export_pool, import_pool

FORMS = {"hdf5": "h5", "parquet": "parquet"}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def exported(invented_pool: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that exports an invented pool, and returns the only file of the export."""

    def make(form: str, **options: Any) -> Path:
        export_pool(invented_pool(**options), tmp_path / "out", format=form)
        return tmp_path / "out" / f"pool-00000.{FORMS[form]}"

    return make


@every_form
@pytest.mark.parametrize(
    "options",
    [{}, {"image_shape": (5, 3, 1)}, {"sources": 3}, {"sources": 5, "corners": True}, {"class_names": ("a", "a", "")}],
    ids=["colour", "grey", "three sources", "corners", "twice the same class"],
)
@pytest.mark.parametrize("shard_images", [0, 7, 16, 45])
def test_a_round_trip_gives_the_same_pool_to_the_last_byte(form, options, shard_images, invented_pool, tmp_path):
    pool = invented_pool(**options)
    out = export_pool(pool, tmp_path / "out", format=form, shard_images=shard_images)
    back = import_pool(tmp_path / "out", tmp_path / "back")
    before, after = open_pool(pool), open_pool(tmp_path / "back")
    assert back["pixel_digest"] == out["pixel_digest"]
    assert back["root"] == back["exported_root"] == before.manifest.root
    assert after.manifest.files == before.manifest.files
    assert after.manifest.config == before.manifest.config
    assert after.manifest.counts == before.manifest.counts
    assert after.columns.attributes == before.columns.attributes
    for name in before.columns:
        np.testing.assert_array_equal(after.columns[name][:], before.columns[name][:])
    verify_files(tmp_path / "back", after.manifest)


def test_a_round_trip_through_webp_gives_the_same_pixels(invented_pool, tmp_path):
    pool = invented_pool(sources=3)
    export_pool(pool, tmp_path / "out", format="parquet", image="webp")
    assert import_pool(tmp_path / "out", tmp_path / "back")["root"] == open_pool(pool).manifest.root


@every_form
def test_the_real_pool_of_a_run_comes_back(form, finished_workspace, tmp_path):
    (pool,) = (finished_workspace / "mix").glob("lsmix-*")
    export_pool(pool, tmp_path / "out", format=form)
    back = import_pool(tmp_path / "out", tmp_path / "back")
    assert back["root"] == open_pool(pool).manifest.root
    assert (tmp_path / "back" / "plan.json").read_bytes() == (pool / "plan.json").read_bytes()


@every_form
def test_a_single_file_is_enough_if_it_holds_all_rows(form, exported, tmp_path):
    file = exported(form)
    alone = shutil.move(file, tmp_path / f"alone.{FORMS[form]}")
    assert import_pool(alone, tmp_path / "back")["images"] == 46


@every_form
def test_files_that_are_missing_added_or_swapped_are_found(form, invented_pool, tmp_path):
    export_pool(invented_pool(), tmp_path / "out", format=form, shard_images=20)
    first, second, third = sorted((tmp_path / "out").glob(f"*.{FORMS[form]}"))
    with pytest.raises(CorruptError, match="fewer rows"):
        import_pool(first, tmp_path / "back")
    more = Path(shutil.copy(third, third.with_stem("pool-00003")))
    with pytest.raises(CorruptError, match="more rows"):
        import_pool(tmp_path / "out", tmp_path / "back")
    more.unlink()
    third.unlink()
    with pytest.raises(CorruptError, match="fewer rows"):
        import_pool(tmp_path / "out", tmp_path / "back")
    shutil.copy(more := first, third)
    with pytest.raises(CorruptError, match="more rows"):
        import_pool(tmp_path / "out", tmp_path / "back")
    third.unlink()
    content = [first.read_bytes(), second.read_bytes()]
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    shutil.copy(first, third)
    with pytest.raises(CorruptError):
        import_pool(tmp_path / "out", tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pool"]
    assert more.is_file()


@every_form
def test_files_of_two_pools_are_not_joined(form, invented_pool, tmp_path):
    export_pool(invented_pool(), tmp_path / "out", format=form, shard_images=20)
    export_pool(invented_pool("other", rows=44), tmp_path / "two", format=form, shard_images=20)
    shutil.copy(tmp_path / "two" / f"pool-00001.{FORMS[form]}", tmp_path / "out")
    with pytest.raises(SourceError, match="is of another pool"):
        import_pool(tmp_path / "out", tmp_path / "back")


def test_what_is_no_export_is_told(invented_pool, tmp_path):
    with pytest.raises(MissingError, match="no such file or folder"):
        import_pool(tmp_path / "nothing", tmp_path / "back")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="neither"):
        import_pool(tmp_path / "empty", tmp_path / "back")
    for ending in ("h5", "parquet"):
        (tmp_path / f"some.{ending}").write_bytes(b"PAR1 or not")
        with pytest.raises(SourceError, match="damaged or no"):
            import_pool(tmp_path / f"some.{ending}", tmp_path / "back")
    with pytest.raises(SourceError, match="both"):
        import_pool(tmp_path, tmp_path / "back")
    (tmp_path / "some.tar").write_bytes(b"")
    with pytest.raises(SourceError, match=r"neither in \.h5|ends in neither"):
        import_pool(tmp_path / "some.tar", tmp_path / "back")
    export_pool(invented_pool(), tmp_path / "npz", format="npz")
    with pytest.raises(SourceError, match="only hdf5 and parquet"):
        import_pool(tmp_path / "npz", tmp_path / "back")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["images"] = np.zeros(3)
    with pytest.raises(SourceError, match="'lsmix export' did not write it"):
        import_pool(tmp_path / "foreign.h5", tmp_path / "back")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(SourceError, match="'lsmix export' did not write it"):
        import_pool(tmp_path / "foreign.parquet", tmp_path / "back")


@every_form
def test_nothing_that_is_there_is_overwritten(form, exported, tmp_path):
    with pytest.raises(RecipeError, match="is there already"):
        import_pool(exported(form), tmp_path / "pool")


@every_form
def test_a_failure_in_the_middle_leaves_nothing(form, exported, tmp_path, monkeypatch):
    file = exported(form)

    def fail(folder: Path, shard: int, arrays: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("lsmix.data.exports.reading.write_pool_shard", fail)
    with pytest.raises(OSError, match="no space left"):
        import_pool(file, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pool"]


# Facts that somebody changed.


def change_facts(path: Path, change: Callable[[Any], Any], *, seal: bool = True) -> None:
    """Write a file's facts anew, sealed again or as they are."""

    def changed(content: bytes) -> bytes:
        if not seal:
            return change(content)
        return seal_facts(change(unseal_facts(content, "test")))

    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            content = changed(bytes(file["facts"][()]))
            del file["facts"]
            file["facts"] = np.bytes_(content)
    else:
        table = pq.read_table(path)
        metadata = {**table.schema.metadata, b"lsmix": changed(table.schema.metadata[b"lsmix"])}
        rewrite(path, table.replace_schema_metadata(metadata))


def rewrite(path: Path, table: pa.Table, **options: Any) -> None:
    pq.write_table(
        table, path, **{"compression": "none", "use_dictionary": False, "write_statistics": False, **options}
    )


@every_form
def test_facts_that_fit_no_checksum_are_refused(form, exported, tmp_path):
    file = exported(form)
    change_facts(file, lambda content: content.replace(b"CC-BY", b"CC-XY"), seal=False)
    with pytest.raises(CorruptError, match="do not fit their checksum"):
        import_pool(file, tmp_path / "back")
    change_facts(file, lambda _: b"{nothing", seal=False)
    with pytest.raises(CorruptError, match="are damaged"):
        import_pool(file, tmp_path / "back")


def replaced(**fields: Any) -> Callable[[Any], Any]:
    return lambda facts: msgspec.structs.replace(facts, **fields)


def with_attributes(**fields: Any) -> Callable[[Any], Any]:
    return lambda facts: msgspec.structs.replace(facts, attributes={**facts.attributes, **fields})


@every_form
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (replaced(format_version=2), FormatError, "reads format 1"),
        (replaced(images=47), SourceError, "contradicts itself"),
        (replaced(image_shape=(4, 7, 3)), LsmixError, "must be|expected|images differ"),
        (replaced(image_shape=(2**40, 2**40, 3)), SourceError, "bytes of memory|must be"),
        (replaced(class_names=["a"]), SourceError, "contradicts itself"),
        (replaced(digests={"image": "0" * 64}), SourceError, "contradicts itself"),
        (with_attributes(format_version=9), FormatError, "reads format 1"),
        (with_attributes(copies=10**9), SourceError, "contradicts itself"),
        (with_attributes(copies="2"), CorruptError, "attributes are wrong"),
        (with_attributes(sources=3), SourceError, "contradicts itself"),
        (with_attributes(corners=True), SourceError, "contradicts itself"),
    ],
)
def test_facts_that_do_not_fit_the_file_are_refused(form, change, kind, message, exported, tmp_path):
    file = exported(form)
    change_facts(file, change)
    with pytest.raises(kind, match=message):
        import_pool(file, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pool"]


@every_form
def test_facts_that_only_the_root_digest_tells_are_warned_of(form, exported, tmp_path, command):
    file = exported(form)
    change_facts(file, replaced(shard_rows=8))
    done = command("import", file, tmp_path / "back")
    assert done.code == 0
    assert "warning: all values are as exported, but the root digest is" in done.err


# Values that somebody changed.


@every_form
@pytest.mark.parametrize("name", ["image", "label_a", "label_b", "lam", "share_b", "source_a", "source_b", "state"])
def test_a_value_that_was_changed_is_found(form, name, exported, tmp_path):
    file = exported(form)
    if form == "hdf5":
        with h5py.File(file, "a") as content:
            rows = content[name][...]
            rows.flat[7] = (rows.flat[7] + 1) % 3 if rows.dtype.kind != "f" else 0.25
            content[name][...] = rows
    else:
        table = pq.read_table(file)
        column = table.column(name).to_pylist()
        if name == "image":
            buffer = io.BytesIO()
            Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(buffer, "PNG")
            column[7] = {"bytes": buffer.getvalue(), "path": None}
        else:
            column[7] = (column[7] + 1) % 3 if isinstance(column[7], int) else 0.25
        field = table.schema.field(name)
        index = table.schema.get_field_index(name)
        rewrite(file, table.set_column(index, field, pa.array(column, field.type)))
    with pytest.raises(CorruptError, match=f"column '{name}' .* is not what was exported"):
        import_pool(file, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@every_form
@pytest.mark.parametrize(("name", "value"), [("label_a", 3), ("label_b", -1), ("share_b", 1.5), ("lam", float("nan"))])
def test_values_that_no_pool_has_are_refused(form, name, value, exported, tmp_path):
    file = exported(form)
    if form == "hdf5":
        with h5py.File(file, "a") as content:
            content[name][3] = value
    else:
        table = pq.read_table(file)
        column = table.column(name).to_pylist()
        column[3] = value
        field = table.schema.field(name)
        rewrite(file, table.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type)))
    with pytest.raises(CorruptError, match=f"values that no pool has: .*{name}"):
        import_pool(file, tmp_path / "back")


# What a stranger's HDF5 could do.


def swap(path: Path, name: str, make: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        make(file)


def make_virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((46,), "<i8")
    layout[:] = h5py.VirtualSource("other.h5", "label_a", (46,))
    file.create_virtual_dataset("label_a", layout)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "got nothing"),
        (lambda file: file.__setitem__("label_a", h5py.ExternalLink("/etc/hostname", "/")), "never followed"),
        (lambda file: file.__setitem__("label_a", h5py.SoftLink("/label_b")), "never followed"),
        (make_virtual, "lies in other files"),
        (lambda file: file.create_dataset("label_a", (46,), "<i8", external="other.raw"), "lies in other files"),
        (lambda file: file.create_dataset("label_a", data=np.zeros(46, "<i4")), "must be int64"),
        (lambda file: file.create_dataset("label_a", data=np.zeros(46, ">i8")), "must be int64"),
        (lambda file: file.create_dataset("label_a", data=np.zeros((46, 2), "<i8")), "must be int64"),
        (lambda file: file.create_dataset("label_a", data=np.zeros(45, "<i8")), "different lengths"),
        (lambda file: file.create_dataset("label_a", (46,), "<i8", chunks=(46,)), "never written whole"),
        (lambda file: file.create_dataset("label_a", (2**40,), "<i8", chunks=(2**20,)), "more than 100 times"),
        (lambda file: file.create_dataset("label_a", data=["x"] * 46), "must be int64"),
        (lambda file: file.create_group("label_a"), "got nothing"),
        (lambda file: file.create_dataset("label_a", data=np.zeros(46, "<i8"), scaleoffset=3), "filters"),
    ],
    ids=range(14),
)
def test_hdf5_reads_plain_numbers_of_this_very_file_alone(make, message, exported, tmp_path):
    file = exported("hdf5")
    swap(file, "label_a", make)
    with pytest.raises(SourceError, match=message):
        import_pool(file, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_hdf5_chunks_that_unpack_to_more_than_they_should_are_refused(exported, tmp_path):
    def make(file: h5py.File) -> None:
        item = file.create_dataset("label_a", (46,), "<i8", chunks=(46,), compression="gzip")
        item.id.write_direct_chunk((0,), zlib.compress(bytes(1 << 14)))

    file = exported("hdf5")
    swap(file, "label_a", make)
    with pytest.raises(SourceError, match="unpacks to more"):
        import_pool(file, tmp_path / "back")


def test_hdf5_that_was_packed_by_a_known_filter_is_read(exported, tmp_path):
    file = exported("hdf5")
    with h5py.File(file) as content:
        images = content["image"][:]
    swap(file, "image", lambda content: content.create_dataset("image", data=images, compression="gzip"))
    assert import_pool(file, tmp_path / "back")["images"] == 46


@pytest.mark.parametrize(
    "content", [np.zeros(3), np.array([b"a", b"b"]), "free length"], ids=["numbers", "many", "free"]
)
def test_hdf5_facts_of_another_kind_are_refused(content, exported, tmp_path):
    file = exported("hdf5")
    swap(file, "facts", lambda opened: opened.create_dataset("facts", data=content))
    with pytest.raises(SourceError, match="'lsmix export' did not write it"):
        import_pool(file, tmp_path / "back")


# What a stranger's Parquet could do.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "zstd"}, "is packed"),
        ({"compression": "snappy"}, "is packed"),
        ({"use_dictionary": True}, "is packed"),
        ({"use_dictionary": False, "column_encoding": {"label_a": "DELTA_BINARY_PACKED"}}, "is packed"),
    ],
)
def test_parquet_that_is_packed_is_refused(options, message, exported, tmp_path):
    file = exported("parquet")
    rewrite(file, pq.read_table(file), **options)
    with pytest.raises(SourceError, match=message):
        import_pool(file, tmp_path / "back")


def edited(path: Path, name: str, values: list[Any], kind: pa.DataType | None = None) -> None:
    table = pq.read_table(path)
    field = table.schema.field(name) if kind is None else pa.field(name, kind)
    rewrite(path, table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type)))


@pytest.mark.parametrize(
    ("name", "values", "kind", "message"),
    [
        ("label_a", [None] * 46, None, "fewer bytes than its rows need"),
        ("label_a", [0] * 45 + [None], None, "fewer bytes than|without their numbers"),
        ("label_a", [0] * 46, pa.int32(), "must have the columns"),
        ("image", [b"x" * 50] * 46, pa.binary(), "must have the columns"),
        ("image", [None] * 46, None, "fewer bytes than"),
        ("image", [{"bytes": b"x" * 50, "path": None}] * 46, None, "cannot be read as an image"),
        ("image", [{"bytes": None, "path": "/etc/passwd" * 90}] * 46, None, "fewer bytes than|is missing"),
    ],
    ids=range(7),
)
def test_parquet_columns_that_are_not_of_a_pool_are_refused(name, values, kind, message, exported, tmp_path):
    file = exported("parquet")
    edited(file, name, values, kind)
    with pytest.raises(SourceError, match=message):
        import_pool(file, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("lengths", [[2] * 45 + [0], [1] * 45 + [3]], ids=["shorter", "longer"])
def test_parquet_lists_of_other_lengths_are_refused(lengths, exported, tmp_path):
    file = exported("parquet", sources=4)
    edited(file, "label_more", [[0] * length for length in lengths])
    with pytest.raises(SourceError, match=r"fewer bytes|without their numbers|other lengths"):
        import_pool(file, tmp_path / "back")


@pytest.mark.parametrize(
    ("shape", "message"),
    [((4, 7, 3), "images differ in size"), ((9000, 9000), "images differ in size"), ((4, 6), "expected")],
    ids=["other size", "bomb", "grey"],
)
def test_an_image_of_another_size_is_refused_before_its_pixels_are_made(shape, message, exported, tmp_path):
    file = exported("parquet")
    images = pq.read_table(file).column("image").to_pylist()
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, "PNG")
    images[7]["bytes"] = buffer.getvalue()
    edited(file, "image", images)
    with pytest.raises(SourceError, match=message):
        import_pool(file, tmp_path / "back")


@every_form
@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.9, 0.97])
def test_a_file_that_is_cut_short_is_one_sentence(form, where, exported, tmp_path):
    file = exported(form)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * where)])
    with pytest.raises(LsmixError):
        import_pool(file, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@every_form
def test_any_byte_that_flips_is_found_or_means_nothing(form, exported, tmp_path):
    file = exported(form, rows=6)
    root = import_pool(file, tmp_path / "good")["root"]
    content = file.read_bytes()
    for place in np.random.default_rng(0).permutation(len(content))[:100].tolist():
        file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        back = tmp_path / f"back-{place}"
        try:
            assert import_pool(file, back)["root"] == root
        except LsmixError:
            assert not back.exists()


def test_the_record_of_an_export_may_be_lost(invented_pool, tmp_path):
    export_pool(invented_pool(), tmp_path / "out", format="hdf5", shard_images=20)
    for name in ("lsmix-export.json", "SHA256SUMS", "README.md"):
        (tmp_path / "out" / name).unlink()
    assert json.loads(json.dumps(import_pool(tmp_path / "out", tmp_path / "back")))["images"] == 46
