"""The data-set store: disjoint splits, reproducible bytes, and no data from other files."""

import copy
import pickle
import time
from pathlib import Path

import h5py
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, FormatError, MissingError, RecipeError, SourceError
from lsmix.data.readers.dataset_writer import plan_splits, write_dataset
from lsmix.data.readers.source_images import PublishedData, Split
from lsmix.data.rng import class_quotas, stratified_sample


def published(train=40, test=12, classes=4, side=3, channels=3) -> PublishedData:
    """Return a data set with distinct images: their first two pixels are a row number that counts across splits."""
    splits = {}
    for name, count, first in (("train", train, 0), ("test", test, train)):
        if count:
            images = np.zeros((count, side, side, channels), np.uint8)
            images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(first, first + count), 256)
            splits[name] = Split(images, np.arange(count) % classes)
    return PublishedData(splits=splits, class_names=tuple("abcdefghij"[:classes]), licence="CC0", citation="Ünö, 2026")


def plan_of(data: PublishedData, **numbers):
    labels = {name: split.labels for name, split in data.splits.items()}
    return plan_splits(labels, data.class_names, **numbers)


def identities(images) -> set[int]:
    return set((images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 1, 0]).tolist())


PLAN = {"heldout": 5, "test": 0, "limit": None, "seed": 0}


@pytest.fixture
def stored(tmp_path) -> Path:
    path = tmp_path / "dataset.h5"
    write_dataset(path, published(), **PLAN)
    return path


labels = hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 5))


@settings(deadline=None)  # shared machines pause
@given(labels=labels, data=st.data(), seed=st.integers(0, 2**32))
def test_a_stratified_sample_has_its_size_and_keeps_the_share_of_every_class(labels, data, seed):
    count = data.draw(st.integers(0, len(labels)))
    rows = stratified_sample(labels, count, seed=seed, words=("test",))
    assert rows.dtype == np.int64
    assert len(rows) == count
    assert (np.diff(rows) > 0).all()
    for label in np.unique(labels):
        share = (labels == label).mean() * count
        assert abs((labels[rows] == label).sum() - share) < 1


def test_ties_between_classes_are_broken_at_random():
    labels = np.repeat(np.arange(10), 5)
    chosen = {tuple(labels[stratified_sample(labels, 3, seed=seed, words=("test",))]) for seed in range(20)}
    assert len(chosen) > 10


def test_quotas_cannot_exceed_the_number_of_rows():
    with pytest.raises(ValueError, match="cannot choose 4 of 3 rows"):
        class_quotas(np.array([1, 2]), 4)


@settings(deadline=None)  # shared machines pause
@given(draw=st.data(), train=st.integers(2, 60), test=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_test_images_are_never_in_train(draw, train, test, seed):
    limit = draw.draw(st.none() | st.integers(2, train), label="limit")
    kept = limit or train
    heldout = draw.draw(st.integers(0, kept - (1 if test else 2)), label="heldout")
    wanted = st.integers(0, test) if test else st.integers(1, kept - heldout - 1)
    data = published(train, test)
    try:
        plan = plan_of(data, heldout=heldout, test=draw.draw(wanted, label="test"), limit=limit, seed=seed)
    except RecipeError:  # a class is left without training images
        return
    images = {name: data.splits[rows.published_split].images[rows.index] for name, rows in plan.items()}
    found = {name: identities(split) for name, split in images.items()}
    assert all(len(found[name]) == len(images[name]) for name in found)
    assert not found["train"] & found["test"]
    assert not found["train"] & found["heldout"]
    assert not found["heldout"] & found["test"]
    if test:
        assert found["train"] | found["heldout"] <= set(range(train))
        assert found["test"] <= set(range(train, train + test))
    assert sum(len(rows.index) for rows in plan.values() if rows.published_split == "train") == kept
    assert len(found["heldout"]) == heldout
    assert len(found["train"]) >= 1
    assert len(found["test"]) >= 1


def test_all_classes_have_equally_many_held_out_and_test_images():
    data = published(train=400, test=0)
    plan = plan_of(data, heldout=40, test=80, limit=200, seed=3)
    for name, each in (("train", 20), ("heldout", 10), ("test", 20)):
        assert np.bincount(data.splits["train"].labels[plan[name].index]).tolist() == [each] * 4


def test_an_error_names_the_classes_without_training_images():
    with pytest.raises(RecipeError, match=r"leaves 2 of 4 classes without training images: '[abcd]', '[abcd]'"):
        plan_of(published(train=4, test=0), heldout=0, test=2, limit=None, seed=0)


def test_a_published_heldout_split_is_used():
    split = Split(np.zeros((6, 2, 2, 1), np.uint8), np.arange(6) % 2)
    data = PublishedData(splits={"train": split, "heldout": split, "test": split}, class_names=("a", "b"))
    sizes = {name: len(rows.index) for name, rows in plan_of(data, heldout=0, test=0, limit=None, seed=0).items()}
    assert sizes == {"train": 6, "heldout": 6, "test": 6}
    plan = plan_of(data, heldout=2, test=0, limit=None, seed=0)
    assert (plan["heldout"].published_split, len(plan["heldout"].index)) == ("heldout", 2)
    with pytest.raises(RecipeError, match="heldout is 7, but there are 6 published held-out images"):
        plan_of(data, heldout=7, test=0, limit=None, seed=0)


def test_different_seeds_hold_out_different_images():
    plans = [plan_of(published(), **PLAN | {"seed": seed})["heldout"].index.tolist() for seed in range(5)]
    assert len(set(map(tuple, plans))) == 5


@pytest.mark.parametrize(
    ("test_images", "change", "message"),
    [
        (12, {"heldout": 40}, r"40 training images − 40 held-out − 0 test = 0 left for train"),
        (12, {"limit": 41}, r"limit is 41, but there are 40 published training images"),
        (12, {"limit": 0}, r"limit is 0"),
        (12, {"test": 13}, r"test is 13, but there are 12 published test images"),
        (12, {"heldout": -1}, r"at least 0; got heldout = -1"),
        (0, {"test": 0}, r"no published test split and test is 0"),
        (0, {"test": 36}, r"40 training images − 5 held-out − 36 test = -1 left for train"),
    ],
)
def test_errors_about_impossible_splits_show_the_arithmetic(test_images, change, message):
    with pytest.raises(RecipeError, match=message):
        plan_of(published(test=test_images), **PLAN | change)


@pytest.mark.parametrize("test_images", [12, 0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("heldout", [0, 5])
def test_a_data_set_is_read_as_it_was_written(tmp_path, test_images, channels, heldout):
    data = published(test=test_images, channels=channels)
    counts = write_dataset(tmp_path / "dataset.h5", data, heldout=heldout, test=6, limit=30, seed=1)
    opened = open_dataset(tmp_path)
    assert opened.image_shape == (3, 3, channels)
    assert (opened.class_names, opened.licence, opened.citation) == (data.class_names, data.licence, data.citation)
    assert list(opened.splits) == ["train", "heldout", "test"]
    assert counts == {"train": len(opened.train), "heldout": len(opened.heldout), "test": len(opened.test)}
    assert counts["heldout"] == heldout
    assert counts["test"] == 6
    for split in opened.splits.values():
        source = data.splits[split.published_split]
        np.testing.assert_array_equal(split.images, source.images[split.source_index])
        np.testing.assert_array_equal(split.labels, source.labels[split.source_index])
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == split.source_index.dtype == np.int64


def test_the_block_size_does_not_change_the_bytes(tmp_path, stored, monkeypatch):
    monkeypatch.setattr("lsmix.data.readers.dataset_writer._BLOCK_BYTES", 100)
    write_dataset(tmp_path / "again.h5", published(), **PLAN)
    assert (tmp_path / "again.h5").read_bytes() == stored.read_bytes()


def test_the_time_of_writing_does_not_change_the_bytes(tmp_path, stored):
    # HDF5 gets timestamps in seconds from the C library, which cannot be patched from Python.
    time.sleep(1.1)
    write_dataset(tmp_path / "again.h5", published(), **PLAN)
    assert (tmp_path / "again.h5").read_bytes() == stored.read_bytes()


def test_a_failed_write_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk on fire")

    monkeypatch.setattr("lsmix.data.atomic.os.fsync", fail)
    with pytest.raises(OSError, match="disk on fire"):
        write_dataset(tmp_path / "dataset.h5", published(), **PLAN)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_data_set(stored, monkeypatch):
    before = stored.read_bytes()
    monkeypatch.setattr("lsmix.data.readers.dataset_writer._write_file", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(stored, published(), **PLAN)
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


def test_arrays_are_read_only_and_outlive_the_file(stored):
    train = open_dataset(stored).train
    stored.unlink()
    assert identities(train.images)
    for array in (train.images, train.labels, train.source_index):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_gather_equals_fancy_indexing(stored):
    train = open_dataset(stored).train
    rows = np.random.default_rng(0).integers(0, len(train), 50)  # in any order, some twice
    gathered = train.gather(rows)
    np.testing.assert_array_equal(gathered, train.images[rows])
    assert gathered.flags.writeable
    assert train.gather(rows[:0]).shape == (0, *train.images.shape[1:])


@pytest.mark.parametrize("take", [pickle.dumps, copy.deepcopy])
def test_a_split_cannot_be_pickled(stored, take):
    with pytest.raises(TypeError, match="Pass the path instead"):
        take(open_dataset(stored).train)


def test_a_missing_data_set_raises_missing_error(tmp_path):
    with pytest.raises(MissingError, match="no data set at"):
        open_dataset(tmp_path)
    with pytest.raises(MissingError, match="no data set at"):
        open_dataset(tmp_path / "none.h5")


def test_other_files_are_not_opened_as_data_sets(tmp_path):
    (tmp_path / "dataset.h5").write_bytes(b"something else")
    with pytest.raises(FormatError, match="is not an HDF5 file"):
        open_dataset(tmp_path)
    with h5py.File(tmp_path / "dataset.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(FormatError, match="no format_version"):
        open_dataset(tmp_path)


def test_truncation_at_any_length_is_detected(stored):
    content = stored.read_bytes()
    for length in [*range(8, len(content), 97), len(content) - 1]:
        stored.write_bytes(content[:length])
        with pytest.raises((CorruptError, FormatError)):
            open_dataset(stored)


def stored_with(**options):
    """Return a function that replaces the training images by another array."""

    def write(file, folder, shape):
        file.create_dataset("train/images", **({} if "data" in options else {"shape": shape, "dtype": "u1"}), **options)

    return write


def linked_to(link):
    def write(file, folder, shape):
        file["train/images"] = link

    return write


def external(file, folder, shape):
    (folder / "secret").write_bytes(bytes(10_000))
    file.create_dataset("train/images", shape, "u1", external=[(str(folder / "secret"), 0, 10_000)])


def virtual(file, folder, shape):
    layout = h5py.VirtualLayout(shape, "u1")
    layout[:12] = h5py.VirtualSource(str(folder / "other.h5"), "x", (12, *shape[1:]))
    file.create_virtual_dataset("train/images", layout)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (external, "external, virtual, chunked or filtered"),
        (virtual, "external, virtual, chunked or filtered"),
        (stored_with(chunks=True), "external, virtual, chunked or filtered"),
        (stored_with(compression="gzip"), "external, virtual, chunked or filtered"),
        (linked_to(h5py.ExternalLink("other.h5", "x")), "'images' of .* is a soft or external link"),
        (linked_to(h5py.SoftLink("/test/images")), "'images' of .* is a soft or external link"),
        (lambda file, *_: file.create_group("train/images"), "is not an HDF5 dataset"),
        (stored_with(data=np.zeros((35, 3, 3, 3), "f4")), "must be uint8 with 4 dimensions; got float32"),
        (stored_with(data=np.zeros(35, "u1")), "must be uint8 with 4 dimensions; got uint8 of shape"),
        (stored_with(data=np.zeros((3, 3, 3, 3), "u1")), "has 3 images, 35 labels"),
        (lambda *_: None, "has no 'images'"),
    ],
)
def test_images_outside_the_file_or_with_another_layout_are_rejected(stored, tmp_path, write, message):
    with h5py.File(stored, "r+") as file:
        shape = file["train/images"].shape
        del file["train/images"]
        write(file, tmp_path, shape)
    with pytest.raises(FormatError, match=message):
        open_dataset(stored)


def test_a_label_without_a_class_is_rejected(stored):
    with h5py.File(stored, "r+") as file:
        file["train/labels"][3] = 4
    with pytest.raises(CorruptError, match=r"labels of 'train' are from 0 to 4, expected 0 to 3"):
        open_dataset(stored)


def test_splits_that_share_a_published_image_are_rejected(stored):
    with h5py.File(stored, "r+") as file:
        file["heldout/source_index"][0] = file["train/source_index"][0]
    with pytest.raises(CorruptError, match="contains a published 'train' image twice"):
        open_dataset(stored)


def no_licence(file):
    del file.attrs["licence"]


def no_citation(file):
    del file.attrs["citation"]


def licence_of_variable_length(file):
    file.attrs["licence"] = "CC0"


def class_names_that_are_not_a_list(file):
    del file["class_names"]
    file["class_names"] = np.frombuffer(b'{"a": 1}', np.uint8)


def newer_format(file):
    file.attrs["format_version"] = np.int64(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (no_licence, FormatError, "has no string attribute 'licence'"),
        (no_citation, FormatError, "has no string attribute 'citation'"),
        (licence_of_variable_length, FormatError, "has no string attribute 'licence'"),
        (class_names_that_are_not_a_list, CorruptError, "is not a JSON list of names"),
        (newer_format, FormatError, "has format 3; this version of lsmix reads format 2"),
    ],
)
def test_wrong_attributes_are_rejected(stored, change, error, message):
    with h5py.File(stored, "r+") as file:
        change(file)
    with pytest.raises(error, match=message):
        open_dataset(stored)


def test_class_names_above_the_size_limit_are_rejected(tmp_path):
    split = Split(np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int64))
    data = PublishedData(splits={"train": split, "test": split}, class_names=("x" * (16 << 20),))
    with pytest.raises(SourceError, match="class names have 16,777,220 bytes"):
        write_dataset(tmp_path / "dataset.h5", data, heldout=0, test=0, limit=None, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_class_names_licence_and_citation_may_be_any_text(tmp_path):
    split = Split(np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2, np.int64))
    data = PublishedData(
        splits={"train": split, "test": split}, class_names=('ä"\\\n', ""), licence="", citation="é" * 300
    )
    write_dataset(tmp_path / "dataset.h5", data, heldout=0, test=0, limit=None, seed=0)
    opened = open_dataset(tmp_path)
    assert (opened.class_names, opened.licence, opened.citation) == (data.class_names, "", data.citation)
