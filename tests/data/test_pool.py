"""Pools and latents: reading returns the written values, and only complete, intact artifacts are opened."""

import json
import multiprocessing
import pickle

import factory
import numpy as np
import pytest
import zarr

from lsmix.data.artifact import verify_files
from lsmix.data.errors import CorruptError, FormatError, MissingError
from lsmix.data.latents import create_latents, latent_store, open_latents, write_latent_shard
from lsmix.data.pool import create_pool, open_pool, pool_store, write_pool_shard


def pool_rows(rows):
    """Return random columns of a pool."""
    draw = np.random.default_rng(rows)
    return {
        "image": draw.integers(0, 256, (rows, 4, 6, 3), dtype=np.uint8),
        "source_a": np.arange(rows) % max(rows // 2, 1),
        "source_b": np.arange(rows)[::-1] % max(rows // 2, 1),
        "label_a": draw.integers(0, 3, rows),
        "label_b": draw.integers(0, 3, rows),
        "lam": draw.random(rows, dtype=np.float32),
        "share_b": draw.random(rows, dtype=np.float32),
        "status": draw.integers(0, 3, rows).astype(np.uint8),
    }


def write_pool(folder, **options):
    """Write a pool of two copies in shards of 8 rows."""
    shape = {"rows": 22, "chunk_rows": 8, "image_shape": (4, 6, 3), "method": "ls-mix"}
    return factory.write_pool(
        folder,
        columns=lambda part: {name: values[part] for name, values in pool_rows(22).items()},
        counts={"ok": 5},
        **shape,
        **options,
    )


@pytest.fixture
def folder(tmp_path):
    return write_pool(tmp_path / "mix-0123456789ab")


def test_a_pool_returns_the_written_values(folder):
    pool, expected = open_pool(folder), pool_rows(22)
    assert len(pool) == 22
    for name, rows in expected.items():
        np.testing.assert_array_equal(getattr(pool, name)[:], rows)
    assert (pool.copies, pool.images_per_copy, pool.class_names) == (2, 11, factory.CLASSES)
    assert pool.image_shape == (4, 6, 3)


def test_a_sample_has_image_labels_share_and_sources(folder):
    pool, expected = open_pool(folder), pool_rows(22)
    for row in (0, 9, 21, -1, -22):
        sample = pool[row]
        np.testing.assert_array_equal(sample.image, expected["image"][row])
        for name in ("label_a", "label_b", "source_a", "source_b", "lam", "share_b"):
            assert getattr(sample, name) == expected[name][row]
        assert sample.status == ("ok", "redrawn", "replaced")[expected["status"][row]]
        assert type(sample.label_a) is int
        assert type(sample.share_b) is float
    assert sum(1 for _ in pool) == 22


def test_a_pool_is_a_sequence(folder):
    pool = open_pool(folder)
    every = list(pool)
    for index, rows in ((slice(3, 7), [3, 4, 5, 6]), ([1, -5], [1, 17]), (np.array([9, 9]), [9, 9]), (slice(5, 5), [])):
        for got, row in zip(pool[index], rows, strict=True):
            np.testing.assert_array_equal(got.image, every[row].image)
            assert got[1:] == every[row][1:] == pool[row][1:]
    assert pool[np.int64(3)].lam == every[3].lam
    with pytest.raises(TypeError, match="indexed by integers, got float64"):
        pool[1.5]


@pytest.mark.parametrize("index", [22, -23, [1, 22]])
def test_a_sample_out_of_range_raises_index_error(folder, index):
    with pytest.raises(IndexError, match=r"sample -?2\d is out of range: pool .* has 22 images"):
        open_pool(folder)[index]


def test_info_can_be_encoded_as_json_and_describes_the_pool(folder):
    info = json.loads(json.dumps(open_pool(folder).info))
    assert (info["method"], info["images"], info["cache_key"]) == ("ls-mix", 22, "0123456789ab")
    assert (info["counts"], info["attributes"]["copies"]) == ({"ok": 5}, 2)
    assert "22 images 4×6×3" in repr(open_pool(folder))


def test_the_path_may_be_a_string_that_ends_in_pool_zarr(folder):
    assert len(open_pool(str(folder / "pool.zarr"))) == 22


def test_the_content_digest_covers_chunks_but_not_zarr_metadata(folder):
    files = [file for file in open_pool(folder).manifest.files if file.path.startswith("pool.zarr/")]
    assert [file for file in files if not file.payload] == [file for file in files if file.path.endswith("zarr.json")]


def test_a_pool_written_twice_has_the_same_bytes_and_checksums(folder, tmp_path):
    other = write_pool(tmp_path / "again")
    assert open_pool(other).info["content_digest"] == open_pool(folder).info["content_digest"]
    verify_files(folder, open_pool(folder).manifest)


def read_by_zarr(store):
    return zarr.open_group(store, mode="r")


def read_by_xarray(store):
    return pytest.importorskip("xarray").open_zarr(store, consolidated=False)


def read_by_dask(store):
    import dask.array

    return {name: dask.array.from_zarr(store / name) for name in pool_rows(22)}


def read_by_tensorstore(store):
    tensorstore = pytest.importorskip("tensorstore", exc_type=ImportError)
    files = {name: {"driver": "file", "path": str(store / name)} for name in pool_rows(22)}
    opened = {name: tensorstore.open({"driver": "zarr3", "kvstore": kvstore}) for name, kvstore in files.items()}
    return {name: array.result().read().result() for name, array in opened.items()}


@pytest.mark.parametrize("read", [read_by_zarr, read_by_xarray, read_by_dask, read_by_tensorstore])
def test_any_zarr_library_reads_a_pool(folder, read):
    columns = read(folder / "pool.zarr")
    for name, rows in pool_rows(22).items():
        np.testing.assert_array_equal(np.asarray(columns[name]), rows)


def test_xarray_accepts_the_dimension_names_of_all_columns_together(tmp_path):
    xarray = pytest.importorskip("xarray")
    written = xarray.open_zarr(factory.write_pool(tmp_path, sources=4) / "pool.zarr", consolidated=False)
    assert written.image.dims == ("row", "height", "width", "channel")
    assert written.label_more.dims == ("row", "source")
    assert written.attrs["class_names"] == list(factory.CLASSES)


def test_differences_to_zarr_python_are_detected(folder, monkeypatch):
    pool = open_pool(folder)
    pool.columns.check_against_zarr()
    row = len(pool) - 1
    other = {name: np.array(column[:]) for name, column in pool.columns.items()}
    other["label_b"][row] += 1
    monkeypatch.setattr(zarr, "open_group", lambda *args, **kwargs: other)
    with pytest.raises(CorruptError, match=f"read rows .0, {row}. of 'label_b' differently"):
        pool.columns.check_against_zarr()


def test_a_pool_can_be_pickled_to_another_process(folder):
    pool = pickle.loads(pickle.dumps(open_pool(folder)))
    np.testing.assert_array_equal(pool.image[:], pool_rows(22)["image"])
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(len, (pool,)) == 22


def test_an_unfinished_pool_is_not_opened(tmp_path):
    write_pool(tmp_path / "p", complete=False)
    with pytest.raises(MissingError, match=r"has no manifest\.json: it is not an artifact, or it is unfinished"):
        open_pool(tmp_path / "p")
    assert pool_store(tmp_path / "p").is_written(2)
    with pytest.raises(MissingError, match="the folder does not exist"):
        open_pool(tmp_path / "nothing")


def test_missing_files_and_wrong_sizes_are_detected(folder):
    for path in sorted((folder / "pool.zarr").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for damaged in (None, content[:-1], content + b"x"):
                path.unlink(missing_ok=True)
                if damaged is not None:
                    path.write_bytes(damaged)
                with pytest.raises(CorruptError, match=f"{path.name}' is (missing|damaged)"):
                    open_pool(folder)
            path.write_bytes(content)
    open_pool(folder)


def test_reading_a_damaged_shard_raises_an_error(folder):
    for path in sorted((folder / "pool.zarr").glob("*/c/**/*")):
        if path.is_file():
            factory.flip(path, 5)
            pool = open_pool(folder)
            with pytest.raises(CorruptError, match="is damaged: its checksum does not match"):
                _ = [pool[row] for row in range(len(pool))]
            factory.flip(path, 5)


def test_columns_that_are_not_in_the_manifest_are_ignored(tmp_path):
    write_pool(tmp_path / "p", complete=False)
    hidden = tmp_path / "p/pool.zarr/lam"
    hidden.rename(tmp_path / "lam")
    factory.complete_artifact(tmp_path / "p")
    (tmp_path / "lam").rename(hidden)
    with pytest.raises(FormatError, match="is not a pool: expected the columns"):
        open_pool(tmp_path / "p")


def change_attributes(folder, **attributes):
    path = folder / "pool.zarr/zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"].update(attributes)
    path.write_text(json.dumps(metadata))
    factory.complete_artifact(folder)


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"format_version": 2}, FormatError, "has format 2; this version of lsmix reads format 1"),
        ({"format_version": None}, FormatError, "has format None"),
        ({"copies": 3}, CorruptError, "3 copies of 11 images do not add up to 22 rows"),
        ({"copies": "2"}, CorruptError, r"has invalid attributes: .*copies"),
        ({"class_names": []}, CorruptError, r"has invalid attributes: .*class_names"),
    ],
)
def test_unsupported_formats_and_inconsistent_attributes_are_rejected(folder, attributes, error, message):
    change_attributes(folder, **attributes)
    with pytest.raises(error, match=message):
        open_pool(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("label_a", 3, "in row 5 label_a is 3, but the classes are 0 to 2"),
        ("label_b", -1, "in row 5 label_b is -1, but the classes are 0 to 2"),
        ("share_b", 1.5, "in row 5 share_b is 1.5, but must be from 0 to 1"),
        ("share_b", np.nan, "in row 5 share_b is nan, but must be from 0 to 1"),
        ("lam", -0.1, "in row 5 lam is -0.1.*, but must be from 0 to 1"),
        ("status", 3, r"in row 5 status is 3, but must be from 0 to 2 \(ok, redrawn, replaced\)"),
        ("source_b", -1, "in row 5 source_b is -1, but the training split has rows 0 to 7"),
        ("source_a", 8, "in row 5 source_a is 8, but the training split has rows 0 to 7"),
    ],
)
def test_values_out_of_range_are_not_written(tmp_path, name, value, message):
    rows = pool_rows(8)
    create_pool(
        tmp_path, images_per_copy=8, copies=1, image_shape=(4, 6, 3), class_names=factory.CLASSES, method="mixup"
    )
    rows[name][5] = value
    with pytest.raises(ValueError, match=message):
        write_pool_shard(tmp_path, 0, rows)
    assert not pool_store(tmp_path).is_written(0)


@pytest.mark.parametrize("change", [{"copies": 0}, {"images_per_copy": 0}, {"class_names": ()}])
def test_a_pool_without_images_or_classes_cannot_be_created(tmp_path, change):
    fields = {
        "images_per_copy": 4,
        "copies": 1,
        "image_shape": (4, 6, 3),
        "class_names": factory.CLASSES,
        "method": "mixup",
    }
    with pytest.raises(ValueError, match="a pool needs"):
        create_pool(tmp_path, **(fields | change))


def latent_rows(rows):
    draw = np.random.default_rng(rows)
    return {
        "z": draw.standard_normal((rows, 12)).astype(np.float32),
        "label": draw.integers(0, 3, rows),
        "log_prob": draw.standard_normal(rows),
        "bits_per_dim": draw.random(rows, dtype=np.float32),
    }


def write_latents(folder, rows):
    store = create_latents(folder, rows=rows, dim=12, chunk_rows=8, attributes={"order": "morton"})
    for shard in range(store.shards):
        span = store.shard_range(shard)
        write_latent_shard(folder, shard, {n: c[span.start : span.stop] for n, c in latent_rows(rows).items()})
    factory.complete_artifact(folder, stage="encode")


def test_latents_return_the_written_values(tmp_path):
    write_latents(tmp_path, 19)
    latents, expected = open_latents(tmp_path), latent_rows(19)
    for name, rows in expected.items():
        np.testing.assert_array_equal(getattr(latents, name)[:], rows)
    assert (len(latents), latents.dim, latents.attributes["order"]) == (19, 12, "morton")
    order = np.random.default_rng(0).permutation(19)
    np.testing.assert_array_equal(latents.z.gather(order), expected["z"][order])
    stored = zarr.open_array(tmp_path / "latents.zarr/z", mode="r")
    np.testing.assert_array_equal(stored[:], expected["z"])
    assert stored.metadata.dimension_names == ("row", "component")


def test_latents_must_be_finite(tmp_path):
    create_latents(tmp_path, rows=8, dim=12)
    rows = latent_rows(8)
    rows["z"][3, 4] = np.inf
    with pytest.raises(ValueError, match="'z' has values that are not finite"):
        write_latent_shard(tmp_path, 0, rows)
    assert not latent_store(tmp_path).is_written(0)


def test_pools_are_not_opened_as_latents(folder, tmp_path):
    with pytest.raises(MissingError, match="no table at"):
        open_latents(folder)
    (folder / "pool.zarr").rename(folder / "latents.zarr")
    for name in ("README.md", "samples.csv"):
        (folder / name).unlink()
    factory.complete_artifact(folder, stage="encode")
    with pytest.raises(FormatError, match="contains no latents"):
        open_latents(folder)
    write_latents(tmp_path / "z", 4)
    path = tmp_path / "z/latents.zarr/zarr.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))
    factory.complete_artifact(tmp_path / "z", stage="encode")
    with pytest.raises(FormatError, match="have format 7"):
        open_latents(tmp_path / "z")
