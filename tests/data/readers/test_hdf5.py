"""HDF5 sources: the same arrays by any of the names in use, nothing from outside the file, no bombs."""

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
def test_arrays_are_read_by_any_of_their_names_through_known_filters(tmp_path, names, options):
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


def test_class_names_and_grey_images_are_taken(path):
    with h5py.File(path, "w") as file:
        file["images"], file["labels"] = IMAGES[..., 0], LABELS
        file["class_names"] = np.char.encode(["cät", "dog", "cow"], "utf-8")
    data = read(path)
    assert data.class_names == ("cät", "dog", "cow")
    np.testing.assert_array_equal(data.splits["train"].images, IMAGES[..., :1])


def test_a_data_set_of_lsmix_is_read_with_its_heldout_images_in_train(path):
    digits = read_digits()
    write_dataset(path, digits, heldout=100, test=0, limit=None, seed=0)
    ours, again = open_dataset(path), read(path)
    train = again.splits["train"]
    np.testing.assert_array_equal(train.images[:1400], ours.train.images)
    np.testing.assert_array_equal(train.images[1400:], ours.heldout.images)
    np.testing.assert_array_equal(again.splits["test"].images, digits.splits["test"].images)
    assert np.bincount(train.labels).tolist() == np.bincount(digits.splits["train"].labels).tolist()
    assert (again.class_names, again.licence, again.citation) == (digits.class_names, digits.licence, digits.citation)


def test_a_data_set_of_lsmix_with_another_format_version_is_refused(path):
    write_dataset(path, read_digits(), heldout=0, test=0, limit=None, seed=0)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 9
    with pytest.raises(LsmixError, match="has format 9"):
        read(path)


def good(file) -> None:
    file["images"], file["labels"] = IMAGES, LABELS


def replaced(name: str, **how):
    def write(file) -> None:
        good(file)
        if name in file:
            del file[name]
        file.create_dataset(name, **how)

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
        (lambda file: None, r"must hold exactly one of: .* It holds \[\]"),
        (lambda file: file.create_group("images"), r"must hold exactly one of: .* It holds \['images'\]"),
        (replaced("x_train", data=IMAGES), None),
        (replaced("train_images", data=1), None),
        (replaced("images", data=IMAGES.astype("f4")), r"'images' of .* must be uint8, 0 to 255; got float32"),
        (replaced("images", data=IMAGES.transpose(0, 3, 1, 2)), r"channels last; got \(6, 3, 5, 4\)"),
        (replaced("images", data=np.zeros((0, 4, 4, 3), "u1")), r"must be integers of shape \(0,\)"),
        (replaced("labels", data=np.zeros(6)), r"must be integers of shape \(6,\)"),
        (replaced("labels", data=np.arange(5)), r"must be integers of shape \(6,\)"),
        (replaced("labels", data=np.array(list("abcdef"), object), dtype=h5py.string_dtype()), r"only plain numbers"),
        (replaced("labels", data=np.zeros(6, [("a", "i4")])), r"only plain numbers are read"),
        (replaced("labels", shape=(6,), dtype=h5py.vlen_dtype(np.int32)), r"only plain numbers are read"),
        (replaced("labels", data=-LABELS), r"are in -2\.\.0"),
        (replaced("class_names", data=["a", "b", "c"]), r"text of fixed length; got object of shape \(3,\)"),
        (replaced("class_names", data=np.array([b"a"])), r"there are 1 class names"),
        (replaced("class_names", data=np.arange(3)), r"text of fixed length; got int64"),
        (replaced("images", shape=IMAGES.shape, dtype="u1", external=[("/etc/passwd", 0, 360)]), r"is stored in other files"),
        (virtual, r"is stored in other files"),
        (linked("images", h5py.SoftLink("/elsewhere")), r"links 'images' to another place"),
        (linked("labels", h5py.ExternalLink("other.h5", "/labels")), r"links 'labels' to another place"),
        (replaced("images", shape=(1 << 30, 4, 4, 3), dtype="u1", chunks=(1, 4, 4, 3)), r"would take 51539607552 bytes"),
        (replaced("images", shape=IMAGES.shape, dtype="u1", chunks=(1, 5, 4, 3)), r"was never written whole"),
        (replaced("images", shape=IMAGES.shape, dtype="u1"), r"was never written whole"),
        (replaced("images", data=IMAGES, scaleoffset=0), r"through filters that are not read here"),
    ],
)  # fmt: skip
def test_a_file_of_another_content_is_refused(path, write, message):
    with h5py.File(path, "w") as file:
        write(file)
    if message is None:
        assert len(read(path).splits["train"]) == 6
        return
    with pytest.raises(SourceError, match=message):
        read(path)


def test_a_group_that_links_elsewhere_is_refused(path):
    with h5py.File(path, "w") as file:
        file["real/images"], file["real/labels"] = IMAGES, LABELS
        file["train"] = h5py.SoftLink("/real")
    with pytest.raises(SourceError, match="links 'train/images' to another place"):
        read(path)


def test_a_chunk_that_is_stored_in_far_more_than_it_holds_is_refused(path):
    with h5py.File(path, "w") as file:
        good(file)
        del file["images"]
        stored = file.create_dataset("images", IMAGES.shape, "u1", chunks=IMAGES.shape, compression="lzf")
        stored.id.write_direct_chunk((0, 0, 0, 0), bytes(1000))
    with pytest.raises(SourceError, match="a chunk of 360 bytes is stored in 1000"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"no HDF5 at all", b"\x89HDF\r\n\x1a\n"])
def test_other_files_than_hdf5_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(SourceError, match="is damaged or no HDF5 file"):
        read(path)


@pytest.fixture(scope="module", params=[{}, {"compression": "gzip"}, {"compression": "lzf"}], ids=str)
def whole(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("hdf5") / "data.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("train/images", data=IMAGES, **request.param)
        file["train/labels"] = LABELS
        file["class_names"] = np.char.encode(["a", "b", "c"], "utf-8")
    return path, path.read_bytes()


@settings(max_examples=40)
@given(data=st.data())
def test_damage_anywhere_is_an_error_or_gives_whole_arrays(whole, data):
    path, content = whole
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
