"""Loaders: an epoch has the same batches for every setting, resumed or not, and no thread outlives it."""

import gc
import shutil
import threading
import time

import factory
import numpy as np
import pytest
import torch

from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.loaders.batch import Batch
from lsmix.data.loaders.epoch_loader import read_ahead
from lsmix.data.loaders.pool_loader import PoolLoader
from lsmix.data.pool import open_pool

ROWS, COPIES, CLASSES = 202, 2, 5


def images(rows):
    """Return images whose first pixel is their row number, which shows what rows a batch has."""
    content = np.random.default_rng(0).integers(0, 256, (rows, 2, 3, 3), dtype=np.uint8)
    content[:, 0, 0, 0] = np.arange(rows) % 256
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {
        "rows": ROWS,
        "copies": COPIES,
        "chunk_rows": 64,
        "image_shape": (2, 3, 3),
        "class_names": tuple("abcde"),
    }
    return factory.write_pool(
        tmp_path_factory.mktemp("pool"), columns=lambda here: {"image": images(ROWS)[here]}, **options
    )


@pytest.fixture
def pool(folder):
    return open_pool(folder)


def rows_of(batches):
    return [int(row) for batch in batches for row in batch[0][:, 0, 0, 0]]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("read_ahead_bytes", [0, 1, 1 << 20])
def test_each_sample_is_yielded_once_with_its_own_labels(pool, read_ahead_bytes):
    batches = list(PoolLoader(pool, 16, read_ahead_bytes=read_ahead_bytes))
    assert sorted(rows_of(batches)) == list(range(ROWS))
    assert rows_of(batches) != list(range(ROWS))
    assert rows_of(PoolLoader(pool.location, 16)) == rows_of(batches)
    for batch in batches:
        assert isinstance(batch, Batch)
        rows = rows_of([batch])
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), images(ROWS)[rows])
        np.testing.assert_array_equal(batch.label_a.numpy(), pool.label_a[rows])
        np.testing.assert_array_equal(batch.label_b.numpy(), pool.label_b[rows])
        np.testing.assert_array_equal(batch.share_b.numpy(), pool.share_b[rows])
    dtypes = [tensor.dtype for tensor in batches[0]]
    assert dtypes == [torch.uint8, torch.int64, torch.int64, torch.float32]
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    batches[0].images.zero_()  # the batch belongs to the caller
    assert sorted(rows_of(PoolLoader(pool, 16))) == list(range(ROWS))


def test_the_order_depends_only_on_seed_and_epoch(pool):
    def order(**settings):
        return rows_of(PoolLoader(pool, **({"batch_size": 16} | settings)))

    assert order() == order() == order(batch_size=7) == order(read_ahead_bytes=0)
    assert order(seed=1) != order()
    assert order(epoch=1) != order()
    assert order(shuffle=False) == list(range(ROWS))
    loader = PoolLoader(pool, 16)
    assert rows_of(loader) == rows_of(loader)
    loader.set_epoch(1)
    assert rows_of(loader) == order(epoch=1)


def test_the_length_of_a_loader_is_its_number_of_batches(pool):
    for drop_last in (False, True):
        for world_size in (1, 2, 3):
            loader = PoolLoader(pool, 16, world_size=world_size, drop_last=drop_last)
            assert len(list(loader)) == len(loader)


def test_ranks_get_disjoint_equal_parts_of_the_batches_of_one_process(pool):
    single = [rows_of([batch]) for batch in PoolLoader(pool, 24)]
    ranks = [[rows_of([batch]) for batch in PoolLoader(pool, 8, rank=rank, world_size=3)] for rank in range(3)]
    assert [[*step[0], *step[1], *step[2]] for step in zip(*ranks, strict=True)][:-1] == single[:-1]
    taken = [row for rank in ranks for batch in rank for row in batch]
    assert len(taken) == len(set(taken)) == ROWS // 3 * 3


def test_cycling_yields_one_copy_per_epoch(pool):
    half = ROWS // COPIES
    for epoch in range(3):
        rows = rows_of(PoolLoader(pool, 16, copies="cycle", epoch=epoch))
        assert sorted(rows) == list(range(epoch % 2 * half, (epoch % 2 + 1) * half))


def test_soft_targets_agree_with_the_pair_of_labels(pool):
    pairs, soft = (list(PoolLoader(pool, 50, labels=labels)) for labels in ("pair", "soft"))
    for pair, (soft_images, target) in zip(pairs, soft, strict=True):
        assert torch.equal(pair.images, soft_images)
        expected = np.zeros((len(pair.images), CLASSES))
        for row, (a, b, share) in enumerate(zip(pair.label_a, pair.label_b, pair.share_b, strict=True)):
            expected[row, a] += 1 - share.item()
            expected[row, b] += share.item()
        # float32 against float64: the last bit of a number up to 1.
        np.testing.assert_allclose(target.numpy(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("done", [0, 1, 5, 13])
@pytest.mark.parametrize("read_ahead_bytes", [0, 1 << 20])
def test_a_resumed_epoch_starts_with_the_next_batch(pool, done, read_ahead_bytes):
    full = list(PoolLoader(pool, 16, seed=5, epoch=3))
    assert len(full) == 13
    loader = PoolLoader(pool, 16, seed=5, epoch=3, read_ahead_bytes=read_ahead_bytes)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(done)]
    state = loader.state_dict()
    assert state == PoolLoader(pool, 16, seed=5, epoch=3).state_after(done)
    resumed = PoolLoader(pool, 16, seed=5)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # as a training loop does at the start of each epoch
    assert resumed.state_dict() == state
    assert_same(first + list(resumed), full)
    assert_same(list(resumed), full)  # the next pass covers the full epoch
    resumed.set_epoch(4)
    assert_same(list(resumed), list(PoolLoader(pool, 16, seed=5, epoch=4)))


def test_another_number_of_ranks_continues_with_exactly_the_remaining_samples(pool):
    loader = PoolLoader(pool, 20, rank=1, world_size=2)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    rest = []
    for rank in range(4):
        resumed = PoolLoader(pool, 7, rank=rank, world_size=4)
        resumed.load_state_dict(loader.state_dict())
        rest += rows_of(resumed)
    expected = rows_of(PoolLoader(pool, 16))[120:]
    assert len(rest) == len(set(rest)) == len(expected) // 4 * 4
    assert set(rest) <= set(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "another order of samples.*seed=1.*seed=0"),
        ({"shuffle_blocks": 3}, "another order of samples.*'shuffle_blocks': 3.*'shuffle_blocks': 8"),
        ({"shuffle": False}, "another order"),
        ({"copies": "cycle"}, "another order"),
    ],
)
def test_a_state_of_another_order_is_rejected(pool, settings, message):
    state = PoolLoader(pool, 16, epoch=2).state_dict()
    loader = PoolLoader(pool, 16, **settings)
    with pytest.raises(RecipeError, match=message):
        loader.load_state_dict(state)
    assert loader.epoch == 0


@pytest.mark.parametrize(
    "change", [{"position": 999}, {"position": -1}, {"epoch": "1"}, {"format_version": 2}, {"x": 1}]
)
def test_an_invalid_state_is_rejected(pool, change):
    loader = PoolLoader(pool, 16)
    with pytest.raises(RecipeError, match=r"not the state of a loader|another order"):
        loader.load_state_dict(loader.state_dict() | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size ≥ 1.*got batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank < world_size; got .*rank=2"),
        ({"labels": "hard"}, "labels='hard'"),
        ({"copies": "some"}, "copies='some'"),
        ({"shuffle_blocks": 0}, "shuffle_blocks=0"),
        ({"batch_size": 300, "drop_last": True}, "an epoch would have no batches"),
        ({"world_size": 300}, "an epoch would have no batches"),
    ],
)
def test_invalid_settings_are_rejected(pool, settings, message):
    with pytest.raises(RecipeError, match=message):
        PoolLoader(pool, **({"batch_size": 16} | settings))


def test_a_negative_epoch_is_rejected(pool):
    with pytest.raises(RecipeError, match="epoch must be 0 or greater, got -1"):
        PoolLoader(pool, 16).set_epoch(-1)


def test_deleting_an_iterator_stops_its_thread(pool):
    def running():
        return [thread for thread in threading.enumerate() if thread.name.startswith("lsmix-read-ahead")]

    iterator = iter(PoolLoader(pool, 4, read_ahead_bytes=200))
    next(iterator)
    assert running()
    del iterator
    gc.collect()
    assert not running()
    list(PoolLoader(pool, 4))
    assert not running()


def test_damage_found_by_the_reading_thread_is_raised_in_the_loop(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    factory.flip(tmp_path / "p/pool.zarr/image/c/1/0/0/0", 5)
    with pytest.raises(CorruptError, match=r"image/c/1/0/0/0' is damaged"):
        list(PoolLoader(open_pool(tmp_path / "p"), 16))


def test_labels_that_are_out_of_range_are_reported_before_the_first_batch(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "p")
    path = tmp_path / "p/pool.zarr/zarr.json"
    path.write_text(path.read_text().replace('"e"', "").replace('"d",', '"d"'))
    factory.complete_artifact(tmp_path / "p")
    with pytest.raises(CorruptError, match="in row 4 label_a is 4, but the classes are 0 to 3"):
        iter(PoolLoader(open_pool(tmp_path / "p"), 16))


def test_reading_ahead_keeps_the_order_and_its_limit():
    read = []

    def items():
        for item in range(50):
            read.append(item)
            yield item

    ahead = read_ahead(items(), 10)
    for expected in range(50):
        assert next(ahead) == expected
        time.sleep(0.001)
        assert len(read) <= expected + 1 + 10
    assert list(ahead) == []


def test_reading_ahead_yields_the_items_before_an_error_and_then_raises_it():
    def items():
        yield from (1, 2)
        raise KeyError("the third")

    ahead = read_ahead(items(), 100)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="the third"):
        next(ahead)


def test_unmixed_images_are_yielded_in_the_same_batch_type_as_pools():
    content, labels = images(100), np.arange(100) % 7
    loader = ArrayLoader(content, labels, 16, seed=1)
    batches = list(loader)
    assert sorted(rows_of(batches)) == list(range(100))
    for batch in batches:
        rows = rows_of([batch])
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), content[rows])
        assert batch.label_a.tolist() == batch.label_b.tolist() == labels[rows].tolist()
        assert not batch.share_b.any()
    resumed = ArrayLoader(content, labels, 16, seed=1)
    resumed.load_state_dict(loader.state_after(4))
    assert_same(list(resumed), batches[4:])


def test_images_may_be_a_read_only_memory_map(tmp_path):
    np.save(tmp_path / "images.npy", images(30))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    batches = list(ArrayLoader(mapped, np.zeros(30, np.uint8), 8))
    assert sorted(rows_of(batches)) == list(range(30))
    assert batches[0].label_a.dtype == torch.int64


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        (np.zeros((4, 2, 2, 3), np.float32), np.zeros(4, int)),
        (np.zeros((4, 2, 2), np.uint8), np.zeros(4, int)),
        (np.zeros((4, 2, 2, 3), np.uint8), np.zeros(3, int)),
        (np.zeros((4, 2, 2, 3), np.uint8), np.zeros(4)),
    ],
)
def test_arrays_of_wrong_shape_or_dtype_are_rejected(content, labels):
    with pytest.raises(RecipeError, match="needs uint8 images"):
        ArrayLoader(content, labels, 2)


def test_a_state_for_other_labels_is_rejected():
    first = ArrayLoader(images(10), np.zeros(10, int), 2)
    with pytest.raises(RecipeError, match="another order"):
        ArrayLoader(images(10), np.ones(10, int), 2).load_state_dict(first.state_dict())


def test_labels_of_a_large_pool_are_read_with_each_batch(pool, monkeypatch):
    kept = [tuple(part.numpy().tobytes() for part in batch) for batch in PoolLoader(pool, 7)]
    monkeypatch.setattr("lsmix.data.loaders.pool_loader._ROWS_KEPT", 1)
    assert [tuple(part.numpy().tobytes() for part in batch) for batch in PoolLoader(pool, 7)] == kept
