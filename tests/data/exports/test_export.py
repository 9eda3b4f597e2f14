"""Exports: the target library of each format reads equal images and numbers, and no partial export is left behind."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import factory
import h5py
import numpy as np
import pytest
from PIL import Image

from lsmix.data.artifact import (
    DESCRIPTION_FILES,
    FileRecord,
    Manifest,
    content_digest,
    read_manifest,
    write_manifest,
)
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    LockedError,
    LsmixError,
    MissingError,
    RecipeError,
)
from lsmix.data.exports.format import EXPORT_FORMATS
from lsmix.data.exports.writing import write_export
from lsmix.data.pool import open_pool
from lsmix.pipeline.api import export_pool, pull, push, verify

ROWS = 46
NAMES = ("cat", "dög", "../frog")
every_form = pytest.mark.parametrize("form", EXPORT_FORMATS.builtin())
POOLS = {
    "colour": {},
    "grey": {"image_shape": (5, 3, 1)},
    "five sources from corners": {"sources": 5, "corners": True},
}
every_pool = pytest.mark.parametrize("kind", POOLS)


def columns_of(folder: Path) -> dict[str, np.ndarray]:
    pool = open_pool(folder)
    return {name: pool.columns[name][:] for name in pool.columns}


def assert_equal(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    for name, values in expected.items():
        got = np.asarray(found[name])
        np.testing.assert_array_equal(got.astype(values.dtype), values, err_msg=name)
        if values.dtype.kind == "f":  # exactly equal, not only after the cast above
            assert (got.astype(np.float64) == values.astype(np.float64)).all()


def picture(image: Any) -> np.ndarray:
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the module ``datasets`` in offline mode, with its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its imports warn on newer versions of Python and NumPy
        import datasets
    datasets.disable_progress_bars()
    return datasets


# Each format in its library.


@every_pool
def test_h5py_reads_an_hdf5_export(kind, invented_pool, tmp_path):
    pool = invented_pool(**POOLS[kind])
    export_pool(pool, tmp_path / "out", format="hdf5", shard_images=20)
    files = sorted((tmp_path / "out").glob("*.h5"))
    assert len(files) == 3
    found: dict[str, list] = {}
    for path in files:
        with h5py.File(path) as file:
            for name in columns_of(pool):
                assert file[name].chunks is None
                assert file[name].id.get_offset()
                found.setdefault(name, []).append(file[name][:])
            assert [name.decode() for name in file["class_names"][:]] == list(NAMES)
            about = json.loads(file["about"][()])
    assert_equal({name: np.concatenate(parts) for name, parts in found.items()}, columns_of(pool))
    assert about["licence"] == "CC-BY-4.0"
    assert about["pool_content_digest"] == open_pool(pool).manifest.content_digest


@every_pool
@every_form
def test_datasets_loads_an_export_from_its_folder_with_class_labels(form, kind, invented_pool, tmp_path, offline):
    pool = invented_pool(**POOLS[kind])
    export_pool(pool, tmp_path / "out", format=form, shard_images=20)
    rows = offline.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    features = rows.features["json"] if form == "webdataset" else rows.features
    samples = [{**row["json"], "image": row["png"]} for row in rows] if form == "webdataset" else rows[:]
    found = {name: [row[name] for row in samples] for name in samples[0]} if form == "webdataset" else samples
    found["image"] = np.stack([picture(image) for image in found["image"]])
    expected = columns_of(pool)
    if form == "folder":
        expected = {name: values[found["row"]] for name, values in expected.items()}
    assert_equal(found, expected)
    for name, column in expected.items():
        if name != "image":
            feature = features[name].feature if name.endswith("_more") else features[name]
            assert feature.dtype == str(column.dtype)
            assert getattr(feature, "names", None) == (list(NAMES) if name.startswith("label") else None)


def test_datasets_loads_exports_with_equal_or_non_ascii_class_names(invented_pool, tmp_path, offline):
    for number, names in enumerate([("cat", "cat", "dog"), ("a: b", '"\u2028#', "\x9b😀\\")]):
        pool = invented_pool(f"pool{number}", class_names=names)
        for form in EXPORT_FORMATS.builtin():
            out = tmp_path / f"{form}{number}"
            export_pool(pool, out, format=form)
            features = offline.load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"].features
            label = (features["json"] if form == "webdataset" else features)["label_a"]
            assert label == (offline.ClassLabel(names=list(names)) if number else offline.Value("int64"))


@every_pool
def test_webdataset_reads_a_webdataset_export(kind, invented_pool, tmp_path):
    pool = invented_pool(**POOLS[kind])
    export_pool(pool, tmp_path / "out", format="webdataset", shard_images=20)
    files = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(files) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset warns about how it splits shards
        import webdataset

        stream = webdataset.WebDataset(files, shardshuffle=False).decode("pil").to_tuple("png", "json")
        samples = list(stream)
    expected = columns_of(pool)
    found = {name: [metadata[name] for _, metadata in samples] for name in expected if name != "image"}
    # webdataset's "pil" converts greyscale images to RGB
    images = [picture(image)[..., : expected["image"].shape[-1]] for image, _ in samples]
    assert_equal({**found, "image": np.stack(images)}, expected)
    assert [metadata["row"] for _, metadata in samples] == list(range(ROWS))
    assert all(metadata["class_b"] == NAMES[metadata["label_b"]] for _, metadata in samples)


def test_tars_contain_the_licence_but_no_user_name(invented_pool, tmp_path):
    pool = invented_pool()
    export_pool(pool, tmp_path / "out", format="webdataset")
    with tarfile.open(tmp_path / "out" / "pool-00000.tar") as archive:
        assert {(item.mtime, item.uid, item.gid, item.uname, item.mode) for item in archive} == {(0, 0, 0, "", 0o644)}
        about = json.loads(archive.pax_headers["comment"])
    assert about["pool_content_digest"] == open_pool(pool).manifest.content_digest
    assert (about["licence"], about["origin"]["train_images"]) == ("CC-BY-4.0", ROWS // 2)


@every_pool
def test_a_folder_export_sorts_images_by_first_label_and_keeps_all_columns_in_its_metadata(
    kind, invented_pool, tmp_path
):
    pool = invented_pool(**POOLS[kind])
    export_pool(pool, tmp_path / "out", format="folder", shard_images=5)
    images, expected = tmp_path / "out" / "images", columns_of(pool)
    # Listed like torchvision's ImageFolder does: sorted class names, images at any depth below them.
    classes = sorted(entry.name for entry in os.scandir(images))
    assert classes == ["0-cat", "1-d_g", "2-frog"]
    listed = {path: label for label, name in enumerate(classes) for path in (images / name).rglob("*.png")}
    assert len(listed) == ROWS
    assert max(len(files) for _, _, files in os.walk(images)) == 5
    lines = lines_of(tmp_path / "out")
    for line, image, label in zip(lines, expected["image"], expected["label_a"].tolist(), strict=True):
        path = tmp_path / "out" / line["file_name"]
        assert listed[path] == label
        np.testing.assert_array_equal(picture(Image.open(path)), image)
    found = {name: [line[name] for line in lines] for name in expected if name != "image"}
    assert_equal({**found, "image": expected["image"]}, expected)


def test_webp_is_lossless_too(invented_pool, tmp_path):
    pool = invented_pool()
    summary = export_pool(pool, tmp_path / "out", format="folder", image="webp")
    assert verify(summary["folder"])["files"] == summary["files"] == ROWS + 9
    for line in lines_of(tmp_path / "out"):
        with Image.open(tmp_path / "out" / line["file_name"]) as image:
            assert image.format == "WEBP"
            np.testing.assert_array_equal(picture(image), open_pool(pool).image[line["row"]])


# All formats.


@every_form
def test_exports_are_reproducible_and_their_manifest_has_the_pixel_digest(form, invented_pool, tmp_path):
    pool = invented_pool(sources=3)
    summary, _ = [export_pool(pool, tmp_path / name, format=form, shard_images=20) for name in ("a", "b")]
    assert factory.contents(tmp_path / "a") == factory.contents(tmp_path / "b")
    digest = hashlib.sha256(open_pool(pool).image[:].tobytes()).hexdigest()
    manifest = read_manifest(tmp_path / "a")
    assert summary["pixel_digest"] == manifest.counts["pixel_digest"] == digest
    pool_digest = open_pool(pool).manifest.content_digest
    assert summary["pool_content_digest"] == manifest.inputs[0].content_digest == pool_digest
    assert manifest.config["format"] == form
    assert (tmp_path / "a" / "plan.json").read_bytes() == (pool / "plan.json").read_bytes()
    for path in factory.contents(tmp_path / "a"):
        assert str(tmp_path).encode() not in (tmp_path / "a" / path).read_bytes()


@every_form
def test_verify_finds_a_flipped_byte_a_missing_file_and_an_additional_file(form, invented_pool, tmp_path):
    folder = tmp_path / "out"
    export_pool(invented_pool(rows=6), folder, format=form)
    assert verify(folder)["edited"] == []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        for damage in (
            lambda path, content: path.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
            lambda path, _: path.unlink(),
        ):
            damage(path, content)
            if name in DESCRIPTION_FILES:
                assert verify(folder)["edited"] == [name]
            else:
                with pytest.raises((CorruptError, MissingError), match=path.name):
                    verify(folder)
            path.write_bytes(content)
    (folder / "more").write_bytes(b"")
    with pytest.raises(CorruptError, match="it was added later"):
        verify(folder)


@every_form
def test_sha256sum_checks_an_export(form, invented_pool, tmp_path):
    export_pool(invented_pool(rows=6), tmp_path / "out", format=form)
    done = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True, capture_output=True, text=True
    )
    listed = {line.partition(":")[0] for line in done.stdout.splitlines()}
    assert listed == {file.path for file in read_manifest(tmp_path / "out").files if file.payload}


@every_form
def test_exports_can_be_pushed_and_pulled(form, invented_pool, tmp_path):
    export_pool(invented_pool(rows=6), tmp_path / "out", format=form)
    (tmp_path / "out" / "README.md").write_text("My own words.", encoding="utf-8")
    push(tmp_path / "out", str(tmp_path / "remote"))
    pull(str(tmp_path / "remote"), tmp_path / "back")
    assert verify(tmp_path / "back")["edited"] == []
    assert (tmp_path / "back" / "README.md").read_text(encoding="utf-8") == "My own words."


@every_form
def test_a_failed_export_leaves_no_files(form, invented_pool, tmp_path):
    pool = open_pool(invented_pool())
    for stop_at in (1, 3):
        blocks = []

        def stop(rows: int, blocks: list = blocks, stop_at: int = stop_at) -> None:
            blocks.append(rows)
            if len(blocks) == stop_at:
                raise KeyboardInterrupt

        if stop_at < 2 or form in ("hdf5", "parquet", "webdataset"):
            with pytest.raises(KeyboardInterrupt):
                write_export(pool, tmp_path / "out", form=form, shard_images=20, on_rows=stop)
            assert [path.name for path in tmp_path.iterdir()] == ["pool"]


def test_the_remains_of_a_killed_export_are_replaced(invented_pool, tmp_path):
    pool = invented_pool()
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lsmix.data.exports.writing import write_export\n"
        "from lsmix.data.pool import open_pool\n"
        "blocks = []\n"
        "def kill(rows):\n"
        "    blocks.append(rows)\n"
        "    if len(blocks) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_export(open_pool(sys.argv[1]), Path(sys.argv[2]), form='hdf5', shard_images=20, on_rows=kill)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(pool), str(tmp_path / "out")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.part", "pool"]
    export_pool(pool, tmp_path / "out", format="hdf5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pool"]
    verify(tmp_path / "out")


def test_existing_files_are_not_overwritten(invented_pool, tmp_path):
    pool, mine = invented_pool(), tmp_path / "mine"
    mine.mkdir()
    with pytest.raises(RecipeError, match="already exists and is not overwritten"):
        export_pool(pool, mine, format="hdf5")
    mine.rename(tmp_path / "out.part")
    (tmp_path / "out.part" / "letter").write_text("dear")
    with pytest.raises(RecipeError, match=r"out\.part.* already exists and was not created by lsmix"):
        export_pool(pool, tmp_path / "out", format="hdf5")
    assert (tmp_path / "out.part" / "letter").read_text() == "dear"
    with pytest.raises(MissingError, match=r"the folder .* does not exist"):
        export_pool(pool, tmp_path / "no" / "out", format="hdf5")


def test_two_exports_to_one_folder_exclude_each_other(invented_pool, tmp_path):
    pool = open_pool(invented_pool())

    def export_again(rows: int) -> None:
        with pytest.raises(LockedError, match="is being written by another run"):
            write_export(pool, tmp_path / "out", form="hdf5")

    write_export(pool, tmp_path / "out", form="hdf5", on_rows=export_again)
    verify(tmp_path / "out")


def test_a_damaged_pool_is_not_exported(invented_pool, tmp_path):
    pool = invented_pool()
    factory.flip(pool / "pool.zarr/image/c/1/0/0/0", 5)
    with pytest.raises(CorruptError, match="damaged"):
        export_pool(pool, tmp_path / "out", format="folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tiff"}, "unknown export format 'tiff'"),
        ({"format": "folder", "shard_images": 10_000}, "the large hubs reject"),
        ({"format": "parquet", "image": "gif"}, "unknown image encoding 'gif'"),
    ],
)
def test_invalid_options_are_rejected_before_anything_is_written(options, message, invented_pool, tmp_path):
    with pytest.raises(RecipeError, match=message):
        export_pool(invented_pool(), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_exports_stay_within_the_limits_of_the_large_hubs(invented_pool, tmp_path, monkeypatch):
    pool = invented_pool()
    monkeypatch.setattr("lsmix.data.exports.writing._MAX_HUB_FILES", 9)
    with pytest.raises(RecipeError, match="Choose at least 6 images per file"):
        export_pool(pool, tmp_path / "out", format="hdf5", shard_images=5)
    monkeypatch.setattr("lsmix.data.exports.writing._MAX_FILE_BYTES", 3000)
    with pytest.raises(RecipeError, match="more than 20 GB"):
        export_pool(pool, tmp_path / "out", format="hdf5")
    monkeypatch.setattr("lsmix.data.exports.writing._FILE_BYTES", 1500)
    assert export_pool(pool, tmp_path / "out", format="hdf5")["files"] == 8 + -(-ROWS // (1500 // 113))
    monkeypatch.setattr("lsmix.data.exports.folder._MAX_ENTRIES", 2)
    with pytest.raises(RecipeError, match="which the large hubs reject"):
        export_pool(pool, tmp_path / "folder", format="folder")


@pytest.mark.parametrize(
    ("channels", "image", "message"), [(4, "png", "1 or 3 channels.*hdf5"), (1, "webp", "Choose png")]
)
def test_images_that_an_encoding_cannot_store_exactly_are_rejected(channels, image, message, invented_pool, tmp_path):
    pool = invented_pool(image_shape=(3, 3, channels))
    with pytest.raises(RecipeError, match=message):
        export_pool(pool, tmp_path / "out", format="parquet", image=image)
    export_pool(pool, tmp_path / "out", format="hdf5")


def test_a_full_disk_is_reported_before_anything_is_written(invented_pool, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DiskSpaceError, match="but only 100 B are free"):
        export_pool(invented_pool(), tmp_path / "out", format="hdf5")
    assert not (tmp_path / "out.part").exists()


def test_a_missing_library_is_reported_with_the_extra_that_installs_it(invented_pool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LsmixError, match=r"pip install 'lsmix\[parquet\]'"):
        export_pool(invented_pool(), tmp_path / "out", format="parquet")


def test_the_commands_export_and_verify_work_on_a_pool(invented_pool, tmp_path, command: Callable[..., Any]):
    pool = invented_pool()
    done = command("export", pool, tmp_path / "out", "--format", "parquet", "--shard-images", "20", "--json", "-q")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert document["schema"] == "lsmix/export/1"
    assert command("verify", tmp_path / "out").code == 0
    shown = command("export", pool, tmp_path / "hdf5", "--format", "hdf5")
    assert f"pixel_digest         {document['content']['pixel_digest']}" in shown.out
    assert "export hdf5: 46 images" in shown.err
    refused = command("export", pool, tmp_path / "hdf5", "--format", "hdf5")
    assert (refused.code, "already exists" in refused.err) == (1, True)


def test_the_command_line_accepts_the_formats_of_the_registry(command, monkeypatch):
    known = [*EXPORT_FORMATS.names(), "elsewhere"]
    monkeypatch.setattr(EXPORT_FORMATS, "_external", lambda: {"elsewhere": "lsmix.data.exports.hdf5:HDF5_FORMAT"})
    assert f"[{'|'.join(known)}]" in command("export", "--help").out
    refused = command("export", "pool", "out", "--format", "parket")
    assert refused.code == 2
    assert f"unknown export format 'parket'. Did you mean 'parquet'? Known: {', '.join(known)}." in refused.err


def test_an_export_in_a_format_of_another_package_is_verified_without_that_package(
    invented_pool, tmp_path, monkeypatch
):
    plugins = {"elsewhere": "lsmix.data.exports.hdf5:HDF5_FORMAT"}
    monkeypatch.setattr(EXPORT_FORMATS, "_external", lambda: plugins)
    export_pool(invented_pool(), tmp_path / "out", format="elsewhere")
    plugins.clear()
    assert read_manifest(tmp_path / "out").config["format"] == "elsewhere"
    verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["lsmix.py", "sub/pool-00000.h5", "pool-00000", "README.md.h5"])
def test_a_format_may_only_write_files_with_valid_names(name, invented_pool, tmp_path, monkeypatch):
    def write(job):
        (job.folder / name).parent.mkdir(exist_ok=True)
        (job.folder / name).write_bytes(b"")
        yield job.folder / name

    strange = replace(EXPORT_FORMATS.load("hdf5"), write=write)
    monkeypatch.setattr(EXPORT_FORMATS, "load", lambda name: strange)
    with pytest.raises(LsmixError, match=f"wrote '{name}', which is not a valid file name in an export"):
        export_pool(invented_pool(), tmp_path / "out", format="hdf5")
    assert not (tmp_path / "out").exists()


def test_a_format_that_leaves_out_rows_is_rejected(invented_pool, tmp_path, monkeypatch):
    empty = replace(EXPORT_FORMATS.load("hdf5"), write=lambda job: iter(()))
    monkeypatch.setattr(EXPORT_FORMATS, "load", lambda name: empty)
    with pytest.raises(LsmixError, match="read 0 rows of 46"):
        export_pool(invented_pool(), tmp_path / "out", format="hdf5")


def test_too_many_files_for_a_manifest_are_rejected_before_anything_is_written(invented_pool, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.exports.writing._MAX_FILES", ROWS - 1)
    with pytest.raises(RecipeError, match=r"at most 45 files\. Choose webdataset, parquet or hdf5"):
        export_pool(invented_pool(), tmp_path / "out", format="folder")
    assert [path.name for path in tmp_path.iterdir()] == ["pool"]


@pytest.mark.slow
def test_the_manifest_of_the_largest_export_can_be_read(tmp_path):
    digest = "f" * 64
    files = [
        FileRecord(
            path=f"images/{row % 100:02d}-class/{row // 5000:04d}/{row:08d}.webp",
            bytes=3000,
            sha256=digest,
            payload=True,
        )
        for row in range(250_010)
    ]
    manifest = Manifest(
        stage="export",
        stage_version=1,
        name="x",
        cache_key="",
        content_digest=content_digest(files),
        config={},
        inputs=[],
        files=files,
    )
    write_manifest(tmp_path, manifest)
    assert len(read_manifest(tmp_path).files) == 250_010
