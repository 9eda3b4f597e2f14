"""The readers of CIFAR-10 and CIFAR-100: all layouts give the same images, damage is an error, nothing is extracted."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lsmix.data.errors import RecipeError, SourceError
from lsmix.data.readers.published.cifar import (
    CIFAR10_BINARY,
    CIFAR10_PYTHON,
    CIFAR100_BINARY,
    CIFAR100_PYTHON,
)
from lsmix.data.readers.registry import SourceConfig, read_source

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]
FORMATS = [CIFAR10_PYTHON, CIFAR10_BINARY]
FOLDERS = {"cifar10-python": "cifar-10-batches-py", "cifar10-binary": "cifar-10-batches-bin"}
SHARED = Path(os.environ.get("LSMIX_SHARED_DATA", Path(__file__).resolve().parents[4] / "shared" / "data"))


def batch(number: int, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return planes uint8 (n, 3072) and labels of a random batch."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (count, 3072), dtype=np.uint8), rng.integers(0, 10, count, dtype=np.uint8)


def write(kind, parent: Path) -> Path:
    """Write a data set with 15 training and 3 test images in one of the layouts; return its folder."""
    folder = parent / FOLDERS[kind.name]
    folder.mkdir()
    for number, name in enumerate(BATCHES):
        planes, labels = batch(number)
        if kind is CIFAR10_PYTHON:
            content = {b"data": planes, b"labels": labels.tolist(), b"batch_label": b"x", b"filenames": [b"y"] * 3}
            (folder / name).write_bytes(pickle.dumps(content, 2))
        else:
            (folder / f"{name}.bin").write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    if kind is CIFAR10_PYTHON:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES}, 2))
    else:
        (folder / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return folder


def pack(folder: Path, target: Path, mode="w:gz") -> Path:
    with tarfile.open(target, mode) as archive:
        archive.add(folder, folder.name)
    return target


@pytest.fixture(params=FORMATS, ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path) -> Path:
    return write(kind, tmp_path)


def first_batch(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("data_batch_1"))


def check(data) -> None:
    planes = np.concatenate([batch(number)[0] for number in range(5)])
    images = data.splits["train"].images
    assert images.shape == (15, 32, 32, 3)
    for row, column, channel in ((0, 0, 0), (0, 1, 0), (1, 0, 2), (31, 30, 1)):
        np.testing.assert_array_equal(images[:, row, column, channel], planes[:, 1024 * channel + 32 * row + column])
    assert data.splits["train"].labels.tolist() == np.concatenate([batch(number)[1] for number in range(5)]).tolist()
    assert data.splits["test"].labels.tolist() == batch(5)[1].tolist()
    assert data.class_names == tuple(NAMES)
    assert "Krizhevsky" in data.citation


def test_a_folder_or_its_parent_folder_is_read(kind, folder, tmp_path):
    for path in (folder, tmp_path):
        assert kind.recognise(path)
        check(kind.read(path))
        assert [file.name for file in kind.files(path)][:2] == [
            first_batch(folder).name,
            first_batch(folder).name.replace("1", "2"),
        ]
        assert sorted(kind.files(path)) == sorted(folder.iterdir())


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_the_archive_is_read_without_extracting_it(kind, folder, tmp_path, mode):
    archive = pack(folder, tmp_path / "any.tar.gz", mode)
    before = sorted(tmp_path.rglob("*"))
    assert kind.recognise(archive)
    assert not next(other for other in FORMATS if other is not kind).recognise(archive)
    check(kind.read(archive))
    assert kind.files(archive) == [archive]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_error_for_a_missing_batch_names_it(kind, folder, tmp_path):
    gone = first_batch(folder)
    gone.unlink()
    assert kind.recognise(folder)
    for path in (folder, pack(folder, tmp_path / "any.tar.gz")):
        with pytest.raises(SourceError, match=f"is an incomplete copy of {folder.name}: '{gone.name}' missing"):
            kind.read(path)
    with pytest.raises(SourceError, match=f"'{gone.name}' missing"):
        kind.files(folder)


def test_the_error_for_a_truncated_batch_names_it(kind, folder, tmp_path):
    cut = first_batch(folder)
    cut.write_bytes(cut.read_bytes()[:-1])
    message = (
        f"{cut.name}'.*(expected a multiple of 3073 bytes .* got 9218 = 2 × 3073 . 3072|is damaged or not a pickle)"
    )
    for path in (folder, pack(folder, tmp_path / "any.tar.gz")):
        with pytest.raises(SourceError, match=message):
            kind.read(path)


def test_a_label_without_a_class_is_rejected(tmp_path):
    folder = write(CIFAR10_BINARY, tmp_path)
    content = bytearray(first_batch(folder).read_bytes())
    content[3073] = 10
    first_batch(folder).write_bytes(content)
    with pytest.raises(SourceError, match=r"data_batch_1.bin' has labels from \d to 10, expected 0 to 9"):
        CIFAR10_BINARY.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": np.zeros((3, 3072), np.float32)}, r"contains an array of dtype 'f4', expected uint8"),
        ({b"data": np.zeros((3, 3071), np.uint8)}, r"got shape \(3, 3071\)"),
        ({b"data": np.zeros(3072, np.uint8)}, r"got shape \(3072,\)"),
        ({b"data": [1]}, r"got list"),
        ({b"labels": [1, 2]}, r"is damaged: 3 images but 2 labels"),
        ({b"labels": [1, 2, 10]}, r"labels from 1 to 10"),
        ({b"labels": [1, 2, -1]}, r"must be a list of small integers"),
        ({b"labels": [1, 2, 0.5]}, r"contains code \(BINFLOAT\)"),
        ({b"labels": None, b"fine_labels": [1]}, r"must be a list of small integers"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, r"contains no images"),
        ({b"data": np.zeros((), np.uint8)}, r"got shape \(\)"),
        ({b"data": None}, r"got NoneType"),
        ({b"labels": np.arange(3, dtype=np.uint8)}, r"must be a list of small integers"),
        ({b"labels": {b"a": 1}}, r"must be a list of small integers"),
        ({b"labels": [1, True, 2]}, r"must be a list of small integers"),
    ],
)
def test_a_python_batch_with_invalid_content_is_rejected(tmp_path, change, message):
    folder = write(CIFAR10_PYTHON, tmp_path)
    content = {b"data": batch(0)[0], b"labels": [0, 0, 0]} | change
    first_batch(folder).write_bytes(pickle.dumps(content, 2))
    with pytest.raises(SourceError, match=message):
        CIFAR10_PYTHON.read(folder)


def test_a_batch_that_is_an_empty_dictionary_is_rejected(tmp_path):
    folder = write(CIFAR10_PYTHON, tmp_path)
    first_batch(folder).write_bytes(b"}.")
    with pytest.raises(SourceError, match=r"data_batch_1' has no 'data'; it has \[\]. Is it a batch of CIFAR-10\?$"):
        CIFAR10_PYTHON.read(folder)


def test_a_batch_with_other_labels_is_rejected(tmp_path):
    folder = write(CIFAR10_PYTHON, tmp_path)
    first_batch(folder).write_bytes(pickle.dumps({b"data": batch(0)[0], b"fine_labels": [1, 2, 3]}, 2))
    with pytest.raises(SourceError, match=r"has no 'labels'; it has .*fine_labels"):
        CIFAR10_PYTHON.read(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # every example rewrites the file
@given(content=st.binary(max_size=60))
@example(content=b"}.")  # a valid pickle of an empty dictionary
def test_random_bytes_instead_of_a_batch_or_of_the_names_are_a_source_error(tmp_path, content):
    folder = tmp_path / FOLDERS[CIFAR10_PYTHON.name]
    if not folder.is_dir():
        write(CIFAR10_PYTHON, tmp_path)
    for path in (first_batch(folder), folder / "batches.meta"):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(SourceError):
            CIFAR10_PYTHON.read(folder)
        path.write_bytes(before)


def test_a_wrong_number_of_class_names_is_rejected(kind, folder):
    if kind is CIFAR10_PYTHON:
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": NAMES[:9]}, 2))
    else:
        (folder / "batches.meta.txt").write_text("\n".join(NAMES[:9]))
    with pytest.raises(SourceError, match="has 9 class names, expected 10"):
        kind.read(folder)


def test_members_in_other_folders_are_ignored(kind, folder, tmp_path):
    with tarfile.open(tmp_path / "any.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"sub/{folder.name}/{first_batch(folder).name}")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
        archive.add(folder, folder.name)
    check(kind.read(tmp_path / "any.tar.gz"))


def test_an_oversized_batch_is_rejected_without_reading_it(kind, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.published.cifar._MAX_FILE_BYTES", 9000)
    for path in (folder, pack(folder, tmp_path / "any.tar.gz")):
        with pytest.raises(SourceError, match=r"is too large; at most 9.0 kB"):
            kind.read(path)


def test_an_archive_that_unpacks_to_too_many_bytes_is_rejected(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.trees._MAX_TAR_BYTES", 1 << 20)
    with tarfile.open(tmp_path / "any.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("zeros")
        member.size = 4 << 20
        archive.addfile(member, io.BytesIO(bytes(4 << 20)))
    with pytest.raises(SourceError, match=r"unpacks to more than 1.0 MB"):
        kind.read(tmp_path / "any.tar.gz")


def test_a_truncated_archive_is_an_error(kind, folder, tmp_path):
    content = pack(folder, tmp_path / "intact.tar.gz").read_bytes()
    # The end of the archive is padding and a checksum.
    for length in range(0, len(content) - 2000, len(content) // 23):
        path = tmp_path / "cifar-10-python.tar.gz"
        path.write_bytes(content[:length])
        with pytest.raises(SourceError, match=r"damaged or not a tar"):
            kind.read(path)


def test_other_archives_are_not_recognised(kind, tmp_path):
    (tmp_path / "notes").mkdir()
    assert not kind.recognise(pack(tmp_path / "notes", tmp_path / "any.tar.gz"))
    (tmp_path / "noise.tar.gz").write_bytes(b"\x1f\x8bnoise")
    assert not kind.recognise(tmp_path / "noise.tar.gz")
    assert not kind.recognise(tmp_path)


# CIFAR-100.

FINE = [f"fine{number}" for number in range(100)]
COARSE = [f"coarse{number}" for number in range(20)]
FORMATS_100 = [CIFAR100_PYTHON, CIFAR100_BINARY]


def write100(kind, parent: Path, **more) -> Path:
    """Write a data set with 3 training and 3 test images in one of the layouts of CIFAR-100; return its folder."""
    folder = parent / kind.name.replace("cifar100", "cifar-100")
    folder.mkdir()
    for number, name in enumerate(["train", "test"]):
        planes, coarse = batch(number)
        fine = coarse + 90
        if kind is CIFAR100_PYTHON:
            content = {b"data": planes, b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist(), **more}
            (folder / name).write_bytes(pickle.dumps(content, 2))
        else:
            (folder / f"{name}.bin").write_bytes(np.concatenate([coarse[:, None], fine[:, None], planes], 1).tobytes())
    if kind is CIFAR100_PYTHON:
        names = {"fine_label_names": FINE, "coarse_label_names": COARSE}
        (folder / "meta").write_bytes(pickle.dumps(names, 2))
    else:
        (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n")
        (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder


@pytest.fixture(params=FORMATS_100, ids=lambda kind: kind.name)
def kind100(request):
    return request.param


@pytest.mark.parametrize("place", ["folder", "parent", "archive"])
@pytest.mark.parametrize(("labels", "names", "shift"), [("fine", FINE, 90), ("coarse", COARSE, 0)])
def test_fine_and_coarse_labels_are_read_from_folders_and_archives(kind100, tmp_path, place, labels, names, shift):
    (tmp_path / "in").mkdir()
    folder = write100(kind100, tmp_path / "in")
    path = {"folder": folder, "parent": tmp_path / "in", "archive": pack(folder, tmp_path / "any.tar.gz")}[place]
    data = read_source(SourceConfig(path=str(path), labels=labels))
    for number, name in enumerate(["train", "test"]):
        planes, coarse = batch(number)
        np.testing.assert_array_equal(data.splits[name].images[:, 1, 0, 2], planes[:, 2 * 1024 + 32])
        assert data.splits[name].labels.tolist() == (coarse + shift).tolist()
    assert data.class_names == tuple(names)


def test_coarse_labels_are_rejected_for_other_data_sets(kind, folder):
    with pytest.raises(
        RecipeError, match=rf'labels = "coarse" is for cifar100-python and cifar100-binary, but .* is {kind.name}'
    ):
        read_source(SourceConfig(path=str(folder), labels="coarse"))


def test_errors_name_damaged_and_missing_batches_of_cifar_100(tmp_path):
    folder = write100(CIFAR100_BINARY, tmp_path)
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-1])
    with pytest.raises(SourceError, match=r"multiple of 3074 bytes \(2 labels and 3072 pixels per image\), got 9221"):
        CIFAR100_BINARY.read(folder)
    (folder / "train.bin").write_bytes(content[:3075] + b"d" + content[3076:])
    with pytest.raises(
        SourceError, match=r"has labels from 9\d to 100, expected 0 to 99. It is damaged or not CIFAR-100"
    ):
        CIFAR100_BINARY.read(folder)
    (folder / "test.bin").unlink()
    assert CIFAR100_BINARY.recognise(folder)
    with pytest.raises(SourceError, match=r"is an incomplete copy of cifar-100-binary: 'test.bin' missing"):
        CIFAR100_BINARY.read(folder)


def test_a_folder_with_only_a_file_named_test_is_not_recognised_as_cifar_100(tmp_path):
    (tmp_path / "test").touch()
    assert not CIFAR100_PYTHON.recognise(tmp_path)
    (tmp_path / "meta").touch()
    assert CIFAR100_PYTHON.recognise(tmp_path)


def test_published_images_are_the_same_in_every_layout(tmp_path):
    if not (SHARED / "unpack.py").is_file():
        pytest.skip(f"real images are not at {SHARED}; set LSMIX_SHARED_DATA")
    subprocess.run([sys.executable, SHARED / "unpack.py", tmp_path, "cifar10"], check=True, stdout=subprocess.DEVNULL)
    packed = pack(tmp_path / "cifar-10-batches-py", tmp_path / "cifar-10-python.tar.gz", "w")
    read = [CIFAR10_PYTHON.read(tmp_path), CIFAR10_BINARY.read(tmp_path), CIFAR10_PYTHON.read(packed)]
    for split, count in (("train", 10_000), ("test", 2000)):
        assert len(read[0].splits[split]) == count
        assert np.bincount(read[0].splits[split].labels).tolist() == [count // 10] * 10
        for other in read[1:]:
            np.testing.assert_array_equal(other.splits[split].images, read[0].splits[split].images)
            np.testing.assert_array_equal(other.splits[split].labels, read[0].splits[split].labels)


def test_published_images_of_cifar_100_have_all_classes(shared_data, tmp_path):
    subprocess.run([sys.executable, shared_data / "unpack.py", tmp_path, "cifar100"], check=True, capture_output=True)
    fine, coarse = (read_source(SourceConfig(path=str(tmp_path), labels=labels)) for labels in ("fine", "coarse"))
    for split, count in (("train", 15), ("test", 5)):
        np.testing.assert_array_equal(fine.splits[split].images, coarse.splits[split].images)
        assert np.bincount(fine.splits[split].labels).tolist() == [count] * 100
        assert np.bincount(coarse.splits[split].labels).tolist() == [5 * count] * 20
    together = dict.fromkeys(zip(fine.splits["train"].labels, coarse.splits["train"].labels, strict=True))
    assert len(together) == 100, "every class belongs to one superclass"
    assert (fine.class_names[0], coarse.class_names[0]) == ("apple", "aquatic_mammals")
