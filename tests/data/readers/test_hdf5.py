"""The HDF5 reader: reads arrays by all supported names, never opens other files, and rejects decompression bombs."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmix.data.dataset import open_dataset
from lsmix.data.errors import LsmixError, SourceError
from lsmix.data.readers.dataset_writer import write_dataset
from lsmix.data.readers.digits import read_digits
from lsmix.data.readers.registry import SourceConfig, read_source, source_files
from lsmix.data.readers.source_images import PublishedData

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8), np.array([0, 1, 2, 0, 1, 2])
TEST_IMAGES, TEST_LABELS = RNG.integers(0, 256, (2, 5, 4, 3), np.uint8), np.array([[2], [1]], np.uint8)


def read(path: Path) -> PublishedData:
    return read_source(SourceConfig(path=str(path)))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "data.h5"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunks": (2, 5, 4, 3)},
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf", "chunks": (2, 3, 4, 3)},
    ],
    ids=["plain", "chunked", "gzip", "lzf"],
)
@pytest.mark.parametrize(
    "names",
    [
        ("images", "labels"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("x_train", "y_train", "x_test", "y_test"),
        ("train/images", "train/labels"),
        ("train/images", "train/labels", "test/images", "test/labels"),
    ],
    ids=" ".join,
)
def test_arrays_are_read_by_all_supported_names_and_filters(tmp_path, names, options):
    path = tmp_path / "data.hdf5"
    with h5py.File(path, "w") as file:
        for name, array in zip(names, [IMAGES, LABELS, TEST_IMAGES, TEST_LABELS], strict=False):
            file.create_dataset(name, data=array, **(options if array.ndim == 4 else {}))
        file["more"] = np.zeros(3)
    data = read(path)
    assert list(data.splits) == ["train", "test"][: len(names) // 2]
    np.testing.assert_array_equal(data.splits["train"].images, IMAGES)
    assert data.splits["train"].labels.tolist() == LABELS.tolist()
    if "test" in data.splits:
        np.testing.assert_array_equal(data.splits["test"].images, TEST_IMAGES)
        assert data.splits["test"].labels.tolist() == [2, 1]
    assert data.class_names == ("0", "1", "2")
    assert source_files(SourceConfig(path=str(path))) == [path]


def test_class_names_and_grey_images_are_read(path):
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = IMAGES[..., 0], LABELS
        file["class_names"] = np.char.encode(["cät", "dog", "cow"], "utf-8")
    data = read(path)
    assert data.class_names == ("cät", "dog", "cow")
    np.testing.assert_array_equal(data.splits["train"].images, IMAGES[..., :1])


def test_held_out_images_of_an_lsmix_data_set_are_read_as_training_images(path):
    digits = read_digits()
    write_dataset(path, digits, heldout=100, test=0, limit=None, seed=0)
    stored, data = open_dataset(path), read(path)
    train = data.splits["train"]
    np.testing.assert_array_equal(train.images[:1400], stored.train.images)
    np.testing.assert_array_equal(train.images[1400:], stored.heldout.images)
    np.testing.assert_array_equal(data.splits["test"].images, digits.splits["test"].images)
    assert np.bincount(train.labels).tolist() == np.bincount(digits.splits["train"].labels).tolist()
    assert (data.class_names, data.licence, data.citation) == (digits.class_names, digits.licence, digits.citation)


def test_an_lsmix_data_set_with_another_format_version_is_rejected(path):
    write_dataset(path, read_digits(), heldout=0, test=0, limit=None, seed=0)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 9
    with pytest.raises(LsmixError, match="has format 9"):
        read(path)


def good(file) -> None:
    file["images"], file["labels"] = IMAGES, LABELS


def replaced(name: str, **options):
    def write(file) -> None:
        good(file)
        if name in file:
            del file[name]
        file.create_dataset(name, **options)

    return write


def linked(name: str, link):
    def write(file) -> None:
        good(file)
        file.move(name, "elsewhere")
        file[name] = link

    return write


def virtual(file) -> None:
    good(file)
    layout = h5py.VirtualLayout(IMAGES.shape, "u1")
    layout[:] = h5py.VirtualSource("other.h5", "images", IMAGES.shape)
    del file["images"]
    file.create_virtual_dataset("images", layout)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda file: None, r"must contain exactly one of: .* It contains \[\]"),
        (lambda file: file.create_group("images"), r"must contain exactly one of: .* It contains \['images'\]"),
        (replaced("x_train", data=IMAGES), None),
        (replaced("train_images", data=1), None),
        (replaced("images", data=IMAGES.astype("f4")), r"'images' in .* must be uint8, 0 to 255; got float32"),
        (replaced("images", data=IMAGES.transpose(0, 3, 1, 2)), r"channels last; got \(6, 3, 5, 4\)"),
        (replaced("images", data=np.zeros((0, 4, 4, 3), "u1")), r"must be integers of shape \(0,\)"),
        (replaced("labels", data=np.zeros(6)), r"must be integers of shape \(6,\)"),
        (replaced("labels", data=np.arange(5)), r"must be integers of shape \(6,\)"),
        (replaced("labels", data=np.array(list("abcdef"), object), dtype=h5py.string_dtype()), r"reads numbers, no objects"),
        (replaced("labels", data=np.zeros(6, [("a", "i4")])), r"reads numbers, no objects"),
        (replaced("labels", shape=(6,), dtype=h5py.vlen_dtype(np.int32)), r"reads numbers, no objects"),
        (replaced("labels", data=-LABELS), r"range from -2 to 0"),
        (replaced("class_names", data=["a", "b", "c"]), r"fixed-length strings; got object of shape \(3,\)"),
        (replaced("class_names", data=np.array([b"a"])), r"there are 1 class names"),
        (replaced("class_names", data=np.arange(3)), r"fixed-length strings; got int64"),
        (replaced("images", shape=IMAGES.shape, dtype="u1", external=[("/etc/passwd", 0, 360)]), r"is stored in other files"),
        (virtual, r"is stored in other files"),
        (linked("images", h5py.SoftLink("/elsewhere")), r"contains 'images' as a link"),
        (linked("labels", h5py.ExternalLink("other.h5", "/labels")), r"contains 'labels' as a link"),
        (replaced("images", shape=(1 << 30, 4, 4, 3), dtype="u1", chunks=(1, 4, 4, 3)), r"needs 51\.5 GB"),
        (replaced("images", shape=IMAGES.shape, dtype="u1", chunks=(1, 5, 4, 3)), r"was not written completely"),
        (replaced("images", shape=IMAGES.shape, dtype="u1"), r"was not written completely"),
        (replaced("images", data=IMAGES, scaleoffset=0), r"uses filters that lsmix does not support"),
    ],
)  # fmt: skip
def test_a_file_with_invalid_arrays_is_rejected(path, write, message):
    with h5py.File(path, "w") as file:
        write(file)
    if message is None:
        assert len(read(path).splits["train"]) == 6
        return
    with pytest.raises(SourceError, match=message):
        read(path)


def test_a_linked_group_is_rejected(path):
    with h5py.File(path, "w") as file:
        file["real/images"], file["real/labels"] = IMAGES, LABELS
        file["train"] = h5py.SoftLink("/real")
    with pytest.raises(SourceError, match="contains 'train/images' as a link"):
        read(path)


def test_a_chunk_that_is_stored_in_more_bytes_than_its_size_is_rejected(path):
    with h5py.File(path, "w") as file:
        good(file)
        del file["images"]
        stored = file.create_dataset("images", IMAGES.shape, "u1", chunks=IMAGES.shape, compression="lzf")
        stored.id.write_direct_chunk((0, 0, 0, 0), bytes(1000))
    with pytest.raises(SourceError, match="a chunk of 360 bytes is stored in 1000"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all", b"\x89HDF\r\n\x1a\n"])
def test_files_that_are_not_hdf5_are_rejected(path, content):
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is damaged or not an HDF5 file"):
        read(path)


@pytest.fixture(scope="module", params=[{}, {"compression": "gzip"}, {"compression": "lzf"}], ids=str)
def intact(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hdf5") / "data.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("train/images", data=IMAGES, **request.param)
        file["train/labels"] = LABELS
        file["class_names"] = np.char.encode(["a", "b", "c"], "utf-8")
    return path, path.read_bytes()


@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_file_is_a_source_error_or_gives_complete_arrays(intact, data):
    path, content = intact
    damaged = bytearray(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))])
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 255)), max_size=4)
    ):
        if position < len(damaged):
            damaged[position] = value
    path.write_bytes(damaged)
    try:
        split = read(path).splits["train"]
    except SourceError:
        assert bytes(damaged) != content
    else:
        assert len(split.images) == len(split.labels)
