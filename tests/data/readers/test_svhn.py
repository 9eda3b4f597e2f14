"""The reader of SVHN and its MATLAB files: agrees with SciPy, and does not crash on damaged files."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import loadmat, savemat

from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.readers.published.mat5 import read_arrays
from lsmix.data.readers.published.svhn import SVHN
from lsmix.data.readers.registry import SourceConfig, read_source, source_files
from lsmix.data.readers.source_images import PublishedData


def invented(number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random images uint8 (n, 32, 32, 3) and digits 0 to 9 for one file."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


def save(path: Path, images: np.ndarray, digits: np.ndarray, *, packed: bool = True, kind: str = "u1") -> None:
    published = np.where(digits == 0, 10, digits)[:, None].astype(kind)
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": published}, do_compression=packed)


def write(folder: Path, *, packed: bool = True, extra: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(["train", "test", "extra"][: 2 + extra]):
        save(folder / f"{name}_32x32.mat", *invented(number, 12 - number), packed=packed)
    return folder


def read(path: Path, **more) -> PublishedData:
    return read_source(SourceConfig(path=str(path), **more))


@pytest.mark.parametrize("packed", [True, False])
def test_train_and_test_images_are_read_and_label_10_becomes_0(tmp_path, packed):
    data = read(write(tmp_path / "any", packed=packed))
    for number, name in enumerate(["train", "test"]):
        images, digits = invented(number, 12 - number)
        np.testing.assert_array_equal(data.splits[name].images, images)
        assert data.splits[name].labels.tolist() == digits.tolist()
    assert data.class_names == tuple("0123456789")
    assert "non-commercial" in data.licence
    assert "Netzer" in data.citation
    assert [file.name for file in source_files(SourceConfig(path=str(tmp_path / "any")))] == [
        "train_32x32.mat",
        "test_32x32.mat",
    ]


def test_extra_images_are_appended_to_the_training_images_on_request(tmp_path):
    folder = write(tmp_path / "any", extra=True)
    assert len(read(folder).splits["train"]) == 12
    train = read(folder, extra=True).splits["train"]
    np.testing.assert_array_equal(train.images, np.concatenate([invented(0, 12)[0], invented(2, 10)[0]]))
    assert len(source_files(SourceConfig(path=str(folder), extra=True))) == 3
    (folder / "extra_32x32.mat").unlink()
    with pytest.raises(SourceError, match=r"'extra_32x32.mat' missing. Download it, or set extra = false"):
        read(folder, extra=True)


def test_extra_is_rejected_for_other_data_sets(tmp_path):
    np.savez(tmp_path / "data.npz", images=invented(0, 3)[0], labels=[0, 1, 2])
    with pytest.raises(RecipeError, match="extra = true is for svhn, but this data set is npz"):
        read(tmp_path / "data.npz", extra=True)


def test_the_error_for_a_missing_file_names_it(tmp_path):
    folder = write(tmp_path / "any")
    (folder / "test_32x32.mat").unlink()
    assert SVHN.recognise(folder)
    with pytest.raises(SourceError, match=r"an incomplete copy of SVHN: 'test_32x32.mat' missing"):
        read(folder)
    with pytest.raises(SourceError, match=r"is not a folder. Set data.path to the folder"):
        read(folder / "train_32x32.mat", format="svhn")


GOOD = {"X": invented(0, 3)[0].transpose(1, 2, 3, 0), "y": np.array([[1], [2], [10]])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"X": GOOD["X"].astype("f4")}, r"'X' must be uint8 of shape \(32, 32, 3, n\); got float32"),
        ({"X": GOOD["X"][:31]}, r"got uint8 \(31, 32, 3, 3\)"),
        ({"X": invented(0, 3)[0]}, r"got uint8 \(3, 32, 32, 3\)"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8)}, r"got uint8 \(32, 32, 3, 0\)"),
        ({"y": np.arange(4)[:, None]}, r"'y' must have the shape \(3, 1\), one per image; got \(4, 1\)"),
        ({"y": np.array([[0], [1], [2]])}, "integers from 1 to 10"),
        ({"y": np.array([[11], [1], [2]])}, "integers from 1 to 10"),
        ({"y": np.array([[1.5], [1], [2]])}, "integers from 1 to 10"),
        ({"y": np.array([[np.nan], [1], [2]])}, "integers from 1 to 10"),
        ({"y": np.array([[1j], [1], [2]])}, r"arrays 'X' and 'y'; it contains \['X'\]"),
        ({"y": np.array([["a"], ["b"], ["c"]])}, r"it contains \['X'\]"),
        ({"X": np.array([[{"a": 1}]], object)}, r"it contains \['y'\]"),
        ({"X": {"a": 1}}, r"it contains \['y'\]"),
    ],
)
def test_a_file_with_invalid_arrays_is_rejected(tmp_path, change, message):
    folder = write(tmp_path / "any")
    savemat(folder / "train_32x32.mat", GOOD | change)
    with pytest.raises(SourceError, match=message):
        read(folder)


def test_sparse_arrays_are_rejected(tmp_path):
    from scipy.sparse import csc_matrix

    folder = write(tmp_path / "any")
    savemat(folder / "train_32x32.mat", GOOD | {"y": csc_matrix(np.eye(3))})
    with pytest.raises(SourceError, match=r"it contains \['X'\]"):
        read(folder)


@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("packed", [True, False])
def test_arrays_equal_those_that_scipy_reads(tmp_path, kind, packed):
    path = tmp_path / "x.mat"
    arrays = {"a": np.arange(24).reshape(2, 3, 4).astype(kind), "long_name_9": np.array([[7]], kind), "empty": np.zeros((0, 3), kind)}  # fmt: skip
    savemat(path, {**arrays, "text": "text", "cell": np.array([[1, "a"]], object)}, do_compression=packed)
    found = read_arrays(path)
    assert set(found) == set(arrays)
    for name, numbers in found.items():
        np.testing.assert_array_equal(numbers, loadmat(path)[name])
        assert numbers.dtype == np.dtype(kind)


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def hand_made(claimed: int, numbers: bytes, *, stored: int = 2, matrix_class: int = 6) -> bytes:
    """Return a MATLAB 5 file with one compressed (1, ``claimed``) matrix called X, according to its specification."""
    inner = element(6, struct.pack("<II", matrix_class, 0)) + element(5, struct.pack("<ii", 1, claimed))
    inner += struct.pack("<I", 1 << 16 | 1) + b"X\0\0\0" + struct.pack("<II", stored, claimed) + numbers
    packed = zlib.compress(element(14, inner))
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM" + struct.pack("<II", 15, len(packed)) + packed  # fmt: skip


def test_doubles_that_are_stored_as_bytes_are_read_as_doubles(tmp_path):
    (tmp_path / "x.mat").write_bytes(hand_made(8, bytes(range(8))))
    array = read_arrays(tmp_path / "x.mat")["X"]
    assert array.tolist() == [list(range(8))]
    assert array.dtype == np.float64
    assert loadmat(tmp_path / "x.mat")["X"].tolist() == [list(range(8))]


def test_an_array_that_claims_too_many_numbers_is_rejected(tmp_path):
    (tmp_path / "x.mat").write_bytes(hand_made(1 << 30, bytes(8)))
    with pytest.raises(SourceError, match="extends beyond its array"):
        read_arrays(tmp_path / "x.mat")


def test_an_array_with_an_implausible_compression_ratio_is_rejected(tmp_path, monkeypatch):
    (tmp_path / "x.mat").write_bytes(hand_made(1 << 20, bytes(1 << 20)))
    assert read_arrays(tmp_path / "x.mat")["X"].sum() == 0
    monkeypatch.setattr("lsmix.data.readers.published.mat5._SPARE_BYTES", 1 << 19)
    with pytest.raises(SourceError, match=r"would unpack from 1\.. kB to more than 524\.3 kB"):
        read_arrays(tmp_path / "x.mat")


def test_data_after_the_numbers_of_an_array_are_rejected(tmp_path):
    (tmp_path / "x.mat").write_bytes(hand_made(8, bytes(1 << 20)))
    with pytest.raises(SourceError, match="is longer than its numbers"):
        read_arrays(tmp_path / "x.mat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or not a MATLAB 5 file"),
        (b"MATLAB 7.3 MAT-file".ljust(600), "is a MATLAB 7.3 file"),
        (b"<html>404 not found</html>".ljust(600), "damaged or not a MATLAB 5 file"),
        (hand_made(8, bytes(8))[:-1], "element at byte 128 of .* is truncated"),
        (hand_made(8, bytes(8)) + b"x", "is damaged"),
        (hand_made(8, bytes(8), stored=8), "is damaged"),
    ],
)
def test_files_that_are_not_matlab_5_are_rejected(tmp_path, content, message):
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_arrays(tmp_path / "x.mat")


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "plain"])
def damaged(request, tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("svhn") / "any", packed=request.param)
    return folder, (folder / "train_32x32.mat").read_bytes()


@settings(max_examples=40)
@given(data=st.data())
def test_damage_anywhere_is_harmless_or_a_source_error(damaged, data):
    folder, intact = damaged
    content = bytearray(intact[: data.draw(st.integers(0, len(intact)) | st.just(len(intact)))])
    near_start = st.integers(0, 400)  # where the headers are
    for position, value in data.draw(st.lists(st.tuples(near_start | st.integers(0, len(intact)), st.integers(0, 255)), max_size=4)):  # fmt: skip
        if position < len(content):
            content[position] = value
    (folder / "train_32x32.mat").write_bytes(content)
    try:
        assert len(read(folder).splits["train"]) == 12
    except SourceError:
        assert bytes(content) != intact


def test_any_flipped_byte_of_a_compressed_array_is_detected(tmp_path):
    folder = write(tmp_path / "any")
    path = folder / "train_32x32.mat"
    intact = path.read_bytes()
    for position in range(136, len(intact), 997):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 16]) + intact[position + 1 :])
        with pytest.raises(SourceError):
            read(folder)


def test_published_images_equal_those_that_scipy_reads(shared_data, tmp_path):
    unpack = [sys.executable, shared_data / "unpack.py", tmp_path, "svhn"]
    subprocess.run(unpack, check=True, stdout=subprocess.DEVNULL)
    data = read(tmp_path / "svhn")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3000, "test": 1000}
    for name, split in data.splits.items():
        expected = loadmat(tmp_path / "svhn" / f"{name}_32x32.mat")
        np.testing.assert_array_equal(split.images, expected["X"].transpose(3, 0, 1, 2))
        np.testing.assert_array_equal(split.labels, expected["y"].ravel() % 10)
