"""Readers of digits, NumPy archives, MNIST and image folders, and the detection of formats."""

import io
import os
import re
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from lsmix.data.errors import MissingError, RecipeError, SourceError
from lsmix.data.readers.registry import DATA_FORMATS, SourceConfig, read_source, source_files, source_version
from lsmix.data.readers.source_images import PublishedData, Split


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def read(path: Path, kind: str = "auto") -> PublishedData:
    return read_source(SourceConfig(path=str(path), format=kind))


# Digits.


def test_a_folder_with_only_an_unfinished_download_is_reported_as_such(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(b"half")
    config = SourceConfig(path=str(tmp_path), download="cifar10")
    with pytest.raises(MissingError, match=r"the folder contains no complete files.*'lsmix ingest --download'"):
        read_source(config)
    (tmp_path / "cifar-10-python.tar.gz.part").unlink()
    tmp_path.rmdir()
    with pytest.raises(MissingError, match="the path does not exist"):
        read_source(config)


def test_digits_are_a_stratified_split_of_1500_train_and_297_test_images():
    data = read_source(SourceConfig(format="digits"))
    images = np.concatenate([data.splits[name].images for name in ("train", "test")])
    assert images.shape == (1797, 8, 8, 1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1500, "test": 297}
    assert set(np.unique(images)) == {(level * 255 + 8) // 16 for level in range(17)}
    counts = np.array([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])  # from the documentation of scikit-learn
    labels = [np.bincount(data.splits[name].labels) for name in ("train", "test")]
    assert (labels[0] + labels[1] == counts).all()
    assert (abs(labels[1] - counts * 297 / 1797) < 1).all()
    assert data.class_names == tuple("0123456789")


def test_digits_are_deterministic_and_verified_by_their_checksum(monkeypatch):
    config = SourceConfig(format="digits")
    first, second = (read_source(config).splits["test"].images.tobytes() for _ in range(2))
    assert first == second
    assert source_files(config) == []
    assert re.fullmatch("[0-9a-f]{64}", source_version(config))
    monkeypatch.setattr("lsmix.data.readers.digits.DIGITS_SHA256", "0" * 64)
    with pytest.raises(SourceError, match="were changed"):
        read_source(config)


# The configuration, and detection.


def test_a_recipe_accepts_only_registered_formats():
    for name in DATA_FORMATS.names():
        assert DATA_FORMATS.load(name).name == msgspec.convert({"format": name}, SourceConfig).format
    with pytest.raises(msgspec.ValidationError, match="unknown format 'tfrecord'"):
        msgspec.convert({"format": "tfrecord"}, SourceConfig)
    with pytest.raises(msgspec.ValidationError, match="unknown field `pth`"):
        msgspec.convert({"pth": "x"}, SourceConfig)


def test_a_missing_or_superfluous_path_is_rejected():
    with pytest.raises(RecipeError, match="no path given"):
        read_source(SourceConfig())
    with pytest.raises(RecipeError, match="have no path; got 'x'"):
        read_source(SourceConfig(path="x", format="digits"))
    for kind in ("auto", "npz"):
        with pytest.raises(MissingError, match="no data set at '/none/at/all'"):
            source_files(SourceConfig(path="/none/at/all", format=kind))


def test_the_error_for_an_unknown_format_lists_all_formats(tmp_path):
    with pytest.raises(
        SourceError,
        match=r"matches no known format.*cifar10-python.*cifar100-binary.*svhn.*tiny-imagenet.*npz.*hdf5.*image-folder",
    ):
        read(tmp_path)


def test_the_error_for_an_ambiguous_format_lists_the_candidates(tmp_path):
    (tmp_path / "data_batch_1").touch()
    (tmp_path / "data_batch_1.bin").touch()
    with pytest.raises(SourceError, match="matches several formats: cifar10-python, cifar10-binary"):
        read(tmp_path)


def test_the_cache_key_contains_only_fields_that_change_images_or_labels():
    from lsmix.pipeline.config.schema import DataConfig
    from lsmix.pipeline.stages.ingest import INGEST
    from lsmix.pipeline.workspace.cache_key import key_fields

    def fields(**more):
        return key_fields(DataConfig(**more), INGEST.not_in_key)

    assert fields() == fields(path="x", format="svhn", download="svhn")
    assert len({str(fields()), str(fields(labels="coarse")), str(fields(extra=True)), str(fields(limit=5))}) == 4


@pytest.mark.parametrize("kind", ["auto", "npz"])
def test_a_folder_with_only_an_archive_is_read_like_the_archive(tmp_path, kind):
    np.savez(tmp_path / "data.npz", images=pixels(3, 4, 4, 3), labels=[0, 1, 2])
    (tmp_path / ".hidden").touch()
    (tmp_path / "other.zip.part").touch()
    assert len(read(tmp_path, kind).splits["train"]) == 3
    assert source_files(SourceConfig(path=str(tmp_path))) == [tmp_path / "data.npz"]
    (tmp_path / "more.npz").touch()
    with pytest.raises(SourceError, match="matches no known format" if kind == "auto" else "not an .npz archive"):
        read(tmp_path, kind)


# The types that readers return.


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pixels(2, 4, 4), np.zeros(2, np.int64), "must be uint8 of shape"),
        (pixels(0, 4, 4, 3), np.zeros(0, np.int64), "without empty axes"),
        (pixels(2, 4, 4, 3).astype("f4"), np.zeros(2, np.int64), "got float32"),
        (pixels(2, 4, 4, 3), np.zeros(3, np.int64), r"labels must be int64 of shape \(2,\)"),
        (pixels(2, 4, 4, 3), np.zeros(2, np.int32), "got int32"),
    ],
)
def test_a_split_validates_its_arrays(images, labels, message):
    with pytest.raises(SourceError, match=message):
        Split(images, labels)


def test_a_data_set_validates_its_splits():
    split = Split(pixels(2, 4, 4, 3), np.array([0, 1]))
    with pytest.raises(SourceError, match="must have the split 'train'"):
        PublishedData(splits={"test": split}, class_names=("a", "b"))
    with pytest.raises(SourceError, match=r"labels of 'train' range from 0 to 1, but there are 1 class names"):
        PublishedData(splits={"train": split}, class_names=("a",))
    with pytest.raises(SourceError, match=r"images of 'test' have shape \(5, 4, 3\)"):
        PublishedData(splits={"train": split, "test": Split(pixels(1, 5, 4, 3), np.array([0]))}, class_names=("a", "b"))


# NumPy archives.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "keys",
    [
        ("images", "labels"),
        ("train_images", "train_labels"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
    ],
    ids=len,
)
def test_an_npz_is_read_with_every_supported_set_of_names(tmp_path, save, keys):
    arrays = [pixels(4, 5, 6, 3), np.array([0, 1, 2, 0], np.uint8), pixels(2, 5, 6, 3, seed=1), np.array([[2], [1]])]
    save(tmp_path / "data.npz", **dict(zip(keys, arrays, strict=False)), another=np.zeros(3))
    data = read(tmp_path / "data.npz")
    assert list(data.splits) == ["train", "test"][: len(keys) // 2]
    np.testing.assert_array_equal(data.splits["train"].images, arrays[0])
    assert data.splits["train"].labels.tolist() == [0, 1, 2, 0]
    if "test" in data.splits:
        np.testing.assert_array_equal(data.splits["test"].images, arrays[2])
        assert data.splits["test"].labels.tolist() == [2, 1]
    assert data.class_names == ("0", "1", "2")
    assert source_files(SourceConfig(path=str(tmp_path / "data.npz"))) == [tmp_path / "data.npz"]


@pytest.mark.parametrize(
    ("others", "splits"), [(("val",), ["train", "test"]), (("test", "val"), ["train", "test", "heldout"])]
)
def test_validation_arrays_are_held_out_if_there_are_test_arrays(tmp_path, others, splits):
    arrays = {f"{name}_images": pixels(3, 4, 4) for name in ("train", *others)}
    labels = {f"{name}_labels": np.array([[0], [1], [1]]) for name in ("train", *others)}
    np.savez(tmp_path / "medmnist.npz", **arrays, **labels)
    assert list(read(tmp_path).splits) == splits


def test_arrays_can_be_resized_too(tmp_path):
    images = np.repeat(pixels(2, 1, 1, 3), 20, axis=1).repeat(30, axis=2)
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1])
    data = read_source(SourceConfig(path=str(tmp_path), size=(8, 9)))
    np.testing.assert_array_equal(data.splits["train"].images, images[:, :8, :9])
    assert read_source(SourceConfig(format="digits", size=16)).splits["test"].images.shape == (297, 16, 16, 1)


def test_class_names_and_grey_images_of_an_npz_are_read(tmp_path):
    images = np.asfortranarray(pixels(3, 4, 5))
    np.savez(tmp_path / "data.npz", images=images, labels=[0, 1, 1], class_names=["cät", "dog", "cow"])
    data = read(tmp_path / "data.npz")
    assert data.class_names == ("cät", "dog", "cow")
    np.testing.assert_array_equal(data.splits["train"].images, images[..., None])


GOOD = {"images": pixels(3, 4, 4, 3), "labels": np.arange(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((3, 4, 4, 3), "f4")}, r"'images' in .* must be uint8, 0 to 255; got float32"),
        ({"images": pixels(3, 3, 4, 4)}, r"channels last; got \(3, 3, 4, 4\)"),
        ({"images": pixels(3, 16)}, r"must have the shape"),
        ({"labels": np.arange(4)}, r"must be integers of shape \(3,\)"),
        ({"labels": np.zeros(3)}, r"got float64"),
        ({"labels": np.array([0, 1, -1])}, r"range from -1 to 1"),
        ({"labels": np.array([{}, 1, 2], object)}, r"Python objects or records"),
        ({"class_names": np.array(["a", "b", {}], object)}, r"Python objects or records"),
        ({"class_names": np.array([1, 2, 3])}, r"one-dimensional array of strings"),
        ({"class_names": np.array(["a"])}, r"there are 1 class names"),
        ({"x_train": pixels(1), "y_train": pixels(1)}, r"must contain exactly one of"),
        ({"images": pixels(0, 4, 4, 3), "labels": np.zeros(0, int)}, r"contains no images: its shape is"),
    ],
)
def test_an_npz_with_invalid_arrays_is_rejected(tmp_path, change, message):
    np.savez(tmp_path / "data.npz", **GOOD | change)
    with pytest.raises(SourceError, match=message):
        read(tmp_path / "data.npz")


def test_an_npz_with_test_images_but_no_test_labels_is_rejected(tmp_path):
    np.savez(tmp_path / "data.npz", x_train=GOOD["images"], y_train=GOOD["labels"], x_test=GOOD["images"])
    with pytest.raises(SourceError, match="only one of 'x_test' and 'y_test'"):
        read(tmp_path / "data.npz")


def test_a_truncated_or_changed_npz_is_rejected(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, **GOOD)
    content = path.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"damaged or not an .npz archive"):
            read(path)
    changed = bytearray(content)
    changed[250] ^= 1  # in the first image, found by the archive's checksum
    path.write_bytes(changed)
    with pytest.raises(SourceError, match="damaged"):
        read(path)


def test_a_header_that_claims_a_huge_array_does_not_allocate_memory(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 4, 4, 3)})
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("images.npy", stream.getvalue() + bytes(48))
        archive.writestr("labels.npy", b"noise")
    with pytest.raises(SourceError, match=r"needs 52776558133248 bytes, got 48"):
        read(tmp_path / "data.npz")


def test_an_npz_with_an_implausible_compression_ratio_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.npz._SPARE_BYTES", 1000)
    np.savez_compressed(tmp_path / "data.npz", images=np.zeros((100, 64, 64, 3), np.uint8), labels=np.arange(100))
    with pytest.raises(SourceError, match="more than 100 times"):
        read(tmp_path / "data.npz")


# MNIST.


@pytest.mark.parametrize("packed", [False, True])
def test_the_idx_files_of_mnist_are_read_and_damage_is_detected(tmp_path, packed):
    import gzip
    import struct

    arrays = {"train": (pixels(5, 4, 3), [0, 1, 2, 1, 0]), "t10k": (pixels(2, 4, 3), [2, 0])}
    for prefix, (images, labels) in arrays.items():
        texts = {
            "images-idx3": struct.pack(">4I", 0x803, *images.shape) + images.tobytes(),
            "labels-idx1": struct.pack(">2I", 0x801, len(labels)) + bytes(labels),
        }
        for name, content in texts.items():
            path = tmp_path / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(content) if packed else content)
    data = read(tmp_path)
    np.testing.assert_array_equal(data.splits["train"].images[..., 0], arrays["train"][0])
    assert data.splits["test"].labels.tolist() == [2, 0]
    assert data.class_names == ("0", "1", "2")
    for damaged in (path.read_bytes()[:-9], b"\0\0\x08\x03" * 9, struct.pack(">2I", 0x801, 1 << 31), b""):
        path.write_bytes(damaged)
        with pytest.raises(SourceError, match="t10k-labels-idx1-ubyte"):
            read(tmp_path)
    path.unlink()
    with pytest.raises(SourceError, match="'t10k-labels-idx1-ubyte' missing"):
        read(tmp_path)


# Image folders.


def fill(folder: Path, names: dict[str, int], mode: str = "RGB", ending: str = "png", size=(6, 5)) -> None:
    for name, count in names.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            Image.fromarray(pixels(*shape, seed=hash((len(name), k)) % 1000)).save(folder / name / f"{k:03}.{ending}")


def test_class_folders_without_split_folders_are_training_images(tmp_path):
    fill(tmp_path, {"dog": 2, "cat": 3})
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / "notes.txt").touch()
    data = read(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert list(data.splits) == ["train"]
    assert data.splits["train"].labels.tolist() == [0, 0, 0, 1, 1]
    assert data.splits["train"].images.shape == (5, 5, 6, 3)
    files = source_files(SourceConfig(path=str(tmp_path)))
    assert [os.path.relpath(file, tmp_path) for file in files] == [
        "cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png", "dog/001.png",
    ]  # fmt: skip
    for file, image in zip(files, data.splits["train"].images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)


def test_images_have_one_channel_if_all_are_grey(tmp_path):
    fill(tmp_path, {"a": 1, "b": 1}, mode="L")
    grey = read(tmp_path).splits["train"].images
    assert grey.shape == (2, 5, 6, 1)
    fill(tmp_path, {"c": 1})
    mixed = read(tmp_path).splits["train"].images
    assert mixed.shape == (3, 5, 6, 3)
    np.testing.assert_array_equal(mixed[:2], grey.repeat(3, axis=3))


@pytest.mark.parametrize("ending", ["bmp", "ppm", "webp", "tiff", "jpg", "PNG"])
def test_all_supported_image_types_are_read(tmp_path, ending):
    fill(tmp_path, {"a": 1, "b": 1}, ending=ending)
    assert read(tmp_path).splits["train"].images.shape == (2, 5, 6, 3)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40), b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_the_error_for_an_unreadable_image_names_it(tmp_path, content):
    fill(tmp_path, {"a": 1})
    (tmp_path / "a" / "bad.png").write_bytes(content)
    with pytest.raises(SourceError, match=r"a/bad.png' is not an image that lsmix can read"):
        read(tmp_path)


def test_the_error_for_a_truncated_image_names_it(tmp_path):
    fill(tmp_path, {"a": 2})
    content = (tmp_path / "a" / "001.png").read_bytes()
    for length in range(0, len(content) - 40, 13):  # the last bytes, after the pixels, are checksums and the end chunk
        (tmp_path / "a" / "001.png").write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"a/001.png' is not an image that lsmix can read"):
            read(tmp_path)


def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch):
    fill(tmp_path, {"a": 1})
    for limit in (20, 5):  # Pillow warns above the limit and raises above twice the limit; both must be errors
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(SourceError, match="is far too large"):
            read(tmp_path)


def test_errors_name_folders_that_are_not_classes(tmp_path):
    fill(tmp_path / "train", {"a": 1})
    fill(tmp_path / "test", {"b": 1, "c": 1})
    with pytest.raises(SourceError, match=r"has the classes \['b', 'c'\], which are missing in train/"):
        read(tmp_path)
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(SourceError, match="1 class folder contains no images: 'train/empty'"):
        read(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(SourceError, match="has no class folders"):
        read(tmp_path / "none", "image-folder")
    with pytest.raises(SourceError, match="is not a folder, zip or tar"):
        read(tmp_path / "train" / "a" / "000.png", "image-folder")
