"""Remote pools: the same batches as from a local pool, through a cache of limited size."""

import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import places
import pytest
import torch
from factory import flip, write_pool
from places import web_server
from torch.utils.data import DataLoader

from lsmix.data.artifact import read_manifest
from lsmix.data.cache import cache_folder
from lsmix.data.errors import (
    CorruptError,
    DiskSpaceError,
    DownloadError,
    LsmixError,
    MissingError,
    RecipeError,
)
from lsmix.data.loaders.pool_loader import PoolLoader
from lsmix.data.pool import open_pool
from lsmix.pipeline.api import push

SHARD = "pool/pool.zarr/image/c/1/0/0/0"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("made") / "mix-0123456789ab", rows=96)


@pytest.fixture
def web(artifact, tmp_path):
    shutil.copytree(artifact, tmp_path / "www" / "pool")
    with web_server(tmp_path / "www") as server:
        yield server


@pytest.fixture(scope="module")
def s3_url(artifact, s3):
    push(artifact, "s3://bucket/pool")
    return "s3://bucket/pool"


@pytest.fixture(params=["web", "memory", "s3"])
def url(request, artifact, tmp_path):
    if request.param == "web":
        yield f"{request.getfixturevalue('web').url}/pool"
    elif request.param == "memory":
        push(artifact, f"memory://{tmp_path.name}/pool")
        yield f"memory://{tmp_path.name}/pool"
    else:
        yield request.getfixturevalue("s3_url")


def batches(pool, **options):
    return [[part.numpy().copy() for part in batch] for batch in PoolLoader(pool, 7, shuffle_blocks=3, **options)]


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a, b) for one, other in zip(left, right, strict=True) for a, b in zip(one, other, strict=True)
    )


def cached(tmp_path):
    return [path for path in (tmp_path / "cache/files").iterdir() if path.is_file()]


def largest(artifact):
    return max(file.bytes for file in read_manifest(artifact).files)


def test_a_remote_pool_yields_the_same_batches(url, artifact):
    local, remote = open_pool(artifact), open_pool(url)
    assert remote.location == url
    assert {**remote.info, "path": ""} == {**local.info, "path": ""}
    for epoch in range(2):
        assert same(batches(local, seed=3, epoch=epoch), batches(remote, seed=3, epoch=epoch))
    assert remote[5].label_a == local[5].label_a
    np.testing.assert_array_equal(remote.image[10:70], local.image[10:70])


def test_a_cache_smaller_than_the_pool_yields_the_same_batches(web, artifact, tmp_path):
    limit = largest(artifact) * 3
    remote = open_pool(f"{web.url}/pool", cache_bytes=limit)
    assert same(batches(open_pool(artifact)), batches(remote))
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= limit
    assert sum(file.bytes for file in read_manifest(artifact).files) > limit


def test_opening_downloads_only_metadata_and_shards_follow_on_first_use(web):
    pool = open_pool(f"{web.url}/pool/pool.zarr/")
    assert len(pool) == 96
    assert all(path.endswith(".json") for path, _ in web.asked)
    web.asked.clear()
    pool.image[20]
    pool.image[21]
    assert [path for path, _ in web.asked] == [SHARD]


def test_cached_shards_are_not_downloaded_again(web):
    batches(open_pool(f"{web.url}/pool"))
    web.asked.clear()
    batches(open_pool(f"{web.url}/pool"))
    assert [path for path, _ in web.asked] == ["pool/manifest.json"]


def test_the_cache_evicts_the_least_recently_used_files(web, artifact, tmp_path):
    pool = open_pool(f"{web.url}/pool", cache_bytes=largest(artifact) * 4)
    for row in (0, 16, 0, 32, 0, 48, 64, 80):  # shards 0, 1, 2, …; shard 0 is used repeatedly
        open_pool(f"{web.url}/pool", cache_bytes=largest(artifact) * 4).image[row]
    names = {path.name for path in cached(tmp_path)}
    shards = {file.path: file.sha256 for file in read_manifest(artifact).files if "/image/c/" in file.path}
    kept = [shard for shard in range(6) if shards[f"pool.zarr/image/c/{shard}/0/0/0"] in names]
    assert 5 in kept
    assert 1 not in kept
    assert len(pool) == 96


def test_a_damaged_shard_is_downloaded_once_more_and_then_rejected(web, artifact):
    web.flips[SHARD] = 1
    assert same(batches(open_pool(f"{web.url}/pool")), batches(open_pool(artifact)))
    web.flips["pool/pool.zarr/image/c/2/0/0/0"] = 99
    with pytest.raises(CorruptError, match=r"image/c/2/0/0/0' is damaged: expected sha256"):
        open_pool(f"{web.url}/pool", cache=cache_folder() / "new").image[:]


def test_damage_in_the_cache_is_detected_and_repaired(web, artifact, tmp_path):
    batches(open_pool(f"{web.url}/pool"))
    for path in cached(tmp_path):
        flip(path)
    assert same(batches(open_pool(f"{web.url}/pool")), batches(open_pool(artifact)))


def test_a_shard_download_is_resumed_after_a_lost_connection(web):
    web.cuts[SHARD] = 500
    pool = open_pool(f"{web.url}/pool")
    pool.image[20]
    assert [start for path, start in web.asked if path == SHARD] == [None, 500]


def test_missing_damaged_and_unreachable_pools_raise_errors(web):
    with pytest.raises(MissingError, match="no artifact at"):
        open_pool(f"{web.url}/nowhere")
    Path(web.folder, SHARD).unlink()
    with pytest.raises(CorruptError, match="is missing"):
        open_pool(f"{web.url}/pool").image[:]
    with pytest.raises(DownloadError, match="cannot be reached"):
        open_pool("http://127.0.0.1:9/pool")
    with pytest.raises(RecipeError, match=r"Raise cache_bytes"):
        _ = open_pool(f"{web.url}/pool", cache_bytes=10).image[:]
    with pytest.raises(MissingError, match="lsmix pull"):
        _ = open_pool(f"{web.url}/pool").path


def test_a_cache_that_cannot_be_written_is_reported(web, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(LsmixError, match="cannot be created"):
        open_pool(f"{web.url}/pool", cache=tmp_path / "file" / "cache")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DiskSpaceError, match="but only 10 B are free"):
        open_pool(f"{web.url}/pool")


def test_a_file_url_is_read_in_place(artifact, tmp_path):
    assert open_pool(artifact.as_uri()).path == artifact
    assert not (tmp_path / "cache").exists()


def test_metadata_with_more_shards_than_the_manifest_is_rejected(web):
    from test_transfer import rewrite

    rewrite(Path(web.folder, "pool"), lambda files: files[:] and files.remove(shard_record(files)))
    with pytest.raises(CorruptError, match="is not in the manifest"):
        open_pool(f"{web.url}/pool")


def shard_record(files):
    return next(file for file in files if file["path"] == SHARD.removeprefix("pool/"))


def test_worker_processes_reopen_the_pool_by_its_url(web, artifact):
    pool = open_pool(f"{web.url}/pool")
    again = pickle.loads(pickle.dumps(pool))
    np.testing.assert_array_equal(again.image[:], open_pool(artifact).image[:])
    loader = DataLoader(PoolLoader(pool, 7, seed=1), batch_size=None, num_workers=2)
    got = [[part.numpy() for part in batch] for batch in loader]
    assert same(got, [[part.numpy() for part in batch] for batch in PoolLoader(open_pool(artifact), 7, seed=1)])
    assert torch.is_tensor(next(iter(PoolLoader(pool, 7))).images)


def test_two_concurrent_processes_share_a_cache(web, artifact):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    processes = [
        context.Process(target=places.read_all, args=(f"{web.url}/pool", limit, out))
        for limit in (largest(artifact) * 100, largest(artifact) * 2)
    ]
    for process in processes:
        process.start()
    totals = {out.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert totals == {int(open_pool(artifact).image[:].sum())}


def test_a_remote_pool_needs_no_torch_and_no_zarr(web):
    code = (
        "import sys\nfrom lsmix.data.pool import open_pool\n"
        f"print(int(open_pool({web.url + '/pool'!r}).image[:].sum()))\n"
        "assert not {'torch', 'zarr', 'dask', 'fsspec'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
