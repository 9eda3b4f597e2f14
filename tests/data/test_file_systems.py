"""Pools on real file systems: links, stray files, few open files, missing permissions."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from factory import write_pool

import lsmix
from lsmix.data import table_reader
from lsmix.data.errors import CorruptError, SystemLimitError
from lsmix.data.progress import NullProgress
from lsmix.data.sharing.transfer import push_artifact

SHARD = "pool.zarr/image/c/0/0/0/0"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool")


@pytest.fixture
def linked(pool: Path, tmp_path: Path) -> Path:
    """Return a pool whose files are links, as in the Hugging Face cache, DVC and git-annex."""
    for path in pool.rglob("*"):
        if path.is_file():
            link = tmp_path / "linked" / path.relative_to(pool)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path / "linked"


def test_a_pool_of_links_can_be_verified_read_pulled_and_pushed(pool, linked, tmp_path, command):
    assert command("verify", linked).code == 0
    assert (lsmix.open_pool(linked).image[:] == lsmix.open_pool(pool).image[:]).all()
    assert lsmix.pull(str(linked), tmp_path / "pulled").moved_bytes > 0
    push_artifact(linked, str(tmp_path / "pushed"), NullProgress())
    for copy in ("pulled", "pushed"):
        assert not [path for path in (tmp_path / copy).rglob("*") if path.is_symlink()]
        assert lsmix.verify(tmp_path / copy)["edited"] == []


@pytest.mark.parametrize("target", ["missing", "/dev/zero", ".", "loop", "other"])
def test_links_to_other_files_are_rejected(target, linked, tmp_path):
    (linked / SHARD).unlink()
    (linked / SHARD).symlink_to({"loop": linked / SHARD, "other": tmp_path / "other"}.get(target, target))
    (tmp_path / "other").write_bytes(bytes((tmp_path / "pool" / SHARD).stat().st_size))
    with pytest.raises(CorruptError, match=SHARD):
        lsmix.verify(linked)
    if target != "other":  # detected later, by the CRC32C of the chunk
        with pytest.raises(CorruptError, match=SHARD):
            lsmix.open_pool(linked)


def test_files_of_file_managers_and_hubs_are_ignored_and_reported(pool, tmp_path, command):
    for name in (".DS_Store", "pool.zarr/Thumbs.db", ".gitattributes", ".cache/huggingface/download/x.lock"):
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        (pool / name).write_bytes(b"x")
    result = command("verify", pool)
    assert result.code == 0
    assert ".DS_Store, .cache, .gitattributes, pool.zarr/Thumbs.db: added by a file manager" in result.out
    assert json.loads(command("verify", pool, "--json").out)["content"]["ignored"][0] == ".DS_Store"
    push_artifact(pool, str(tmp_path / "there"), NullProgress())
    assert not (tmp_path / "there/.DS_Store").exists()
    (pool / "notes.txt").touch()
    with pytest.raises(CorruptError, match=r"notes\.txt' is not listed"):
        lsmix.verify(pool)


@contextmanager
def few_open_files(more: int) -> Iterator[None]:
    """Limit this process to ``more`` additional open files."""
    table_reader._map_chunk.cache_clear()  # maps of other tests keep files open
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = os.open(".", os.O_RDONLY)  # the lowest free descriptor
    os.close(used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_pool_of_200_files_can_be_verified_and_streamed_with_100_open_files(tmp_path):
    write_pool(tmp_path / "pool", rows=96, copies=1, chunk_rows=4, image_shape=(2, 2, 3))
    with few_open_files(100):
        assert lsmix.verify(tmp_path / "pool")["files"] >= 200
        assert sum(len(batch.images) for batch in lsmix.PoolLoader(lsmix.open_pool(tmp_path / "pool"), 32)) == 96


def test_too_many_open_files_are_not_reported_as_damage(tmp_path):
    write_pool(tmp_path / "pool", rows=64, copies=1, chunk_rows=1)
    pool = lsmix.open_pool(tmp_path / "pool")
    with few_open_files(10), pytest.raises(SystemLimitError, match=r"Too many open files: .*'ulimit -n 4096'") as error:
        _ = pool.image[:]
    assert error.value.exit_code == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_missing_permission_is_not_reported_as_damage(pool, command):
    (pool / SHARD).chmod(0)
    result = command("verify", pool)
    assert (result.code, "Permission denied" in result.err, "chmod" in result.err) == (1, True, True)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(12, "Cannot allocate memory")])
def test_a_failed_mmap_is_not_reported_as_damage(error, pool, monkeypatch):
    opened = lsmix.open_pool(pool)

    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(SystemLimitError, match=error.strerror):
        opened.image[0]
