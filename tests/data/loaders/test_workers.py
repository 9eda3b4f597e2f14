"""With DataLoader workers, torchdata or several ranks, loaders yield every row once per epoch, in the same order."""

import copy
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import factory
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from lsmix.data.errors import RecipeError
from lsmix.data.loaders.array_loader import ArrayLoader
from lsmix.data.loaders.pool_loader import PoolLoader
from lsmix.data.pool import open_pool

ROWS, BATCH = 50, 8
# torch warns if there are more workers than cores and about torchdata; Python 3.12 warns about forks in threaded code.
pytestmark = pytest.mark.filterwarnings(
    "ignore:This DataLoader will create", "ignore:.*multi-threaded", "ignore:'set_vital'"
)


@pytest.fixture(scope="module")
def small_pool(tmp_path_factory):
    return factory.write_pool(tmp_path_factory.mktemp("pool"))


def loader_of_rows(**options):
    """Return a loader whose images contain their row number."""
    images = np.arange(ROWS, dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ArrayLoader(images, np.zeros(ROWS, int), BATCH, **options)


def rows(batches):
    return [batch.images.flatten().tolist() for batch in batches]


def plain(epoch, **options):
    return rows(loader_of_rows(epoch=epoch, **options))


def wrapped(kind, loader, **options):
    if kind == "DataLoader":
        return DataLoader(loader, batch_size=None, **options)
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    return stateful.StatefulDataLoader(loader, batch_size=None, **options)


@pytest.mark.parametrize("kind", ["DataLoader", "StatefulDataLoader"])
@settings(max_examples=5, deadline=None)
@given(
    persistent=st.booleans(),
    workers=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 4), min_size=1, max_size=2),
    epoch=st.integers(0, 2),
    ranks=st.integers(1, 2),
    snapshot=st.integers(1, 3),
)
def test_wrapped_and_resumed_loaders_yield_the_same_batches_as_a_plain_loader(
    kind, persistent, workers, cuts, epoch, ranks, snapshot
):
    options = {"num_workers": workers, "persistent_workers": persistent and workers > 0}
    options |= {"snapshot_every_n_steps": snapshot} if kind == "StatefulDataLoader" else {}
    part = {"rank": ranks - 1, "world_size": ranks}
    loader = loader_of_rows(**part)
    batches = wrapped(kind, loader, **options)
    for earlier in range(epoch):
        loader.set_epoch(earlier)
        assert rows(batches) == plain(earlier, **part)
    seen = []
    for taken in cuts:
        loader.set_epoch(epoch)
        iterator = iter(batches)
        taken = min(taken, len(loader) - len(seen))  # after the end, torchdata would continue with another full pass
        seen += rows(itertools.islice(iterator, taken))
        state = loader.state_after(taken) if kind == "DataLoader" else batches.state_dict()
        del iterator
        assert rows(batches) == plain(epoch, **part)  # after an early break
        loader = loader_of_rows(**part)
        batches = wrapped(kind, loader, **options)
        if kind == "DataLoader":
            loader.load_state_dict(json.loads(json.dumps(state)))
        else:
            batches.load_state_dict(pickle.loads(pickle.dumps(state)))
    loader.set_epoch(epoch)
    assert seen + rows(batches) == plain(epoch, **part)
    assert rows(batches) == plain(epoch, **part)  # the next pass covers the full epoch
    loader.set_epoch(epoch + 1)
    assert rows(batches) == plain(epoch + 1, **part)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_saved_at_the_end_of_an_epoch_continues_with_the_next_epoch(workers):
    loader = loader_of_rows()
    batches = wrapped("StatefulDataLoader", loader, num_workers=workers)
    assert rows(batches) == plain(0)
    loader = loader_of_rows()
    resumed = wrapped("StatefulDataLoader", loader, num_workers=workers)
    resumed.load_state_dict(batches.state_dict())
    loader.set_epoch(1)
    assert rows(resumed) == plain(1)


def test_a_resumed_pass_with_workers_can_be_saved_again():
    loader = loader_of_rows()
    loader.load_state_dict(loader.state_after(2))
    batches = DataLoader(loader, batch_size=None, num_workers=2)
    rest = rows(itertools.islice(batches, 3))
    state = loader.state_after(3)
    again = loader_of_rows()
    again.load_state_dict(state)
    assert plain(0)[:2] + rest + rows(again) == plain(0)
    assert rows(batches) == plain(0)
    assert loader.state_after(3) == loader_of_rows().state_after(3)


def test_state_dict_fails_if_only_the_workers_know_the_position():
    loader = loader_of_rows()
    batches = DataLoader(loader, batch_size=None, num_workers=2)
    before = loader.state_dict()
    next(iter(batches))
    with pytest.raises(RecipeError, match=r"save state_after\(batches\), or use state_dict\(\) of torchdata's"):
        loader.state_dict()
    next(iter(loader))
    assert loader.state_dict() == loader.state_after(1)
    loader.set_epoch(1)
    assert loader.state_dict() == {**before, "epoch": 1}


def test_a_loader_without_workers_rejects_the_state_of_a_worker():
    state = _worker_state(wrapped("StatefulDataLoader", loader_of_rows(), num_workers=2))
    with pytest.raises(RecipeError, match="another order of samples"):
        loader_of_rows().load_state_dict(state)


def _worker_state(batches):
    next(iter(batches))
    return batches.state_dict()["_snapshot"]["_worker_snapshots"]["worker_0"]["dataset_state"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_loaders_cannot_be_copied(copied):
    with pytest.raises(RecipeError, match="would not follow set_epoch"):
        copied(loader_of_rows())


def test_a_persistent_spawned_worker_follows_start_positions_and_epochs(small_pool):
    loader = PoolLoader(small_pool, 8, copies="cycle", labels="soft")
    loader.load_state_dict(loader.state_after(2))
    batches = DataLoader(
        loader, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )
    for start, epoch in ((2, 0), (0, 0), (0, 1)):
        loader.set_epoch(epoch)
        expected = list(PoolLoader(small_pool, 8, copies="cycle", labels="soft", epoch=epoch))[start:]
        for got, batch in zip(batches, expected, strict=True):
            assert all(map(torch.equal, got, batch))


def see_rows(rank, pool, folder, accelerated):
    """Write the images that one of two ranks sees with each way of loading; runs in a separate process."""
    from torch import distributed
    from torch.utils.data import DistributedSampler

    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    pool = open_pool(pool)
    launched = PoolLoader(pool, 8)
    del os.environ["RANK"]
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    joined = PoolLoader(pool, 8)
    assert launched.plan == joined.plan
    assert (joined.plan.rank, joined.plan.world_size) == (rank, 2)
    dataset = pool.as_dataset()
    seen = {
        "loader": [batch.images for batch in joined],
        "workers": [batch.images for batch in DataLoader(joined, batch_size=None, num_workers=2)],
        "sampler": [batch["image"] for batch in DataLoader(dataset, 8, sampler=DistributedSampler(dataset))],
    }
    if accelerated:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        from accelerate import Accelerator

        prepared = Accelerator(cpu=True).prepare(DataLoader(dataset, 8, shuffle=True))
        seen["accelerate"] = [batch["image"] for batch in prepared]
    found = {
        name: [image.numpy().tobytes().hex() for batch in batches for image in batch] for name, batches in seen.items()
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def test_two_ranks_see_disjoint_halves_of_the_rows(small_pool, tmp_path):
    accelerated = importlib.util.find_spec("accelerate") is not None
    if accelerated:
        import accelerate  # noqa: F401  # imported once, before the fork
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=see_rows, args=(rank, small_pool, tmp_path, accelerated)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    images = {image.tobytes().hex() for image in np.moveaxis(open_pool(small_pool).image[:], 3, 1)}
    assert set(first) >= {"loader", "workers", "sampler"}
    for name, seen in first.items():
        assert len(seen) == len(second[name]) == len(images) // 2, name
        assert {*seen, *second[name]} == images, name
    assert first["loader"] == first["workers"]


def test_a_process_that_exits_during_a_pass_prints_nothing(small_pool):
    code = "import lsmix, sys; batches = iter(lsmix.PoolLoader(lsmix.open_pool(sys.argv[1]), 8)); next(batches)"
    done = subprocess.run([sys.executable, "-c", code, small_pool], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_a_map_style_data_set_returns_typed_rows(small_pool):
    pool = open_pool(small_pool)
    dataset = pool.as_dataset()
    batch = next(iter(DataLoader(dataset, batch_size=5)))
    assert [(name, values.dtype) for name, values in batch.items()] == [
        ("image", torch.uint8),
        ("label_a", torch.int64),
        ("label_b", torch.int64),
        ("share_b", torch.float32),
    ]
    np.testing.assert_array_equal(batch["image"].permute(0, 2, 3, 1), pool.image[:5])
    np.testing.assert_array_equal(batch["share_b"], pool.share_b[:5])
    assert len(dataset) == len(pool)
    assert torch.equal(dataset[4]["image"], batch["image"][4])
    forked = DataLoader(dataset, batch_size=5, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(next(iter(forked))["image"], batch["image"])
