"""Pools on other file systems: links, files that others add, few open files, no permission."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from factory import write_pool

import lsmix
from lsmix.data.errors import CorruptError, SystemLimitError
from lsmix.data.progress import NullProgress
from lsmix.data.sharing.transfer import push_artifact

SHARD = "pool.zarr/image/c/0/0/0/0"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    return write_pool(tmp_path / "pool")


@pytest.fixture
def linked(pool: Path, tmp_path: Path) -> Path:
    """Return a pool of links, as the Hugging Face cache, DVC and git-annex lay one out."""
    for path in pool.rglob("*"):
        if path.is_file():
            link = tmp_path / "linked" / path.relative_to(pool)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path / "linked"


def test_a_pool_whose_files_are_links_is_verified_read_pulled_and_pushed(pool, linked, tmp_path, command):
    assert command("verify", linked).code == 0
    assert (lsmix.open_pool(linked).image[:] == lsmix.open_pool(pool).image[:]).all()
    assert lsmix.pull(str(linked), tmp_path / "pulled").moved_bytes > 0
    push_artifact(linked, str(tmp_path / "pushed"), NullProgress())
    for copy in ("pulled", "pushed"):
        assert not [path for path in (tmp_path / copy).rglob("*") if path.is_symlink()]
        assert lsmix.verify(tmp_path / copy)["edited"] == []


@pytest.mark.parametrize("target", ["missing", "/dev/zero", ".", "loop", "other"])
def test_a_link_to_anything_else_is_refused(target, linked, tmp_path):
    (linked / SHARD).unlink()
    (linked / SHARD).symlink_to({"loop": linked / SHARD, "other": tmp_path / "other"}.get(target, target))
    (tmp_path / "other").write_bytes(bytes((tmp_path / "pool" / SHARD).stat().st_size))
    with pytest.raises(CorruptError, match=SHARD):
        lsmix.verify(linked)
    if target != "other":  # which the checksum of the chunk finds when it is read
        with pytest.raises(CorruptError, match=SHARD):
            lsmix.open_pool(linked)


def test_what_file_managers_and_hubs_add_is_ignored_and_mentioned(pool, tmp_path, command):
    for name in (".DS_Store", "pool.zarr/Thumbs.db", ".gitattributes", ".cache/huggingface/download/x.lock"):
        (pool / name).parent.mkdir(parents=True, exist_ok=True)
        (pool / name).write_bytes(b"x")
    result = command("verify", pool)
    assert result.code == 0
    assert ".DS_Store, .cache, .gitattributes, pool.zarr/Thumbs.db: put there by" in result.out
    assert json.loads(command("verify", pool, "--json").out)["content"]["ignored"][0] == ".DS_Store"
    push_artifact(pool, str(tmp_path / "there"), NullProgress())
    assert not (tmp_path / "there/.DS_Store").exists()
    (pool / "notes.txt").touch()
    with pytest.raises(CorruptError, match=r"notes\.txt' is not listed"):
        lsmix.verify(pool)


USE = """
import resource, sys, lsmix
path, limit = sys.argv[1], int(sys.argv[2])
lsmix.open_pool(path).image[0]
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
"""


def under_limit(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", USE + code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_pool_of_514_files_is_verified_and_streamed_with_256_open_files(tmp_path):
    write_pool(tmp_path / "pool", rows=504, copies=1, chunk_rows=8, image_shape=(2, 2, 3))
    code = (
        "files = lsmix.verify(path)['files']\n"
        "print(files, sum(len(batch.images) for batch in lsmix.PoolLoader(lsmix.open_pool(path), 32)))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 256
    done = under_limit(code, tmp_path / "pool", 256)
    files, rows = map(int, done.stdout.split())
    assert (files >= 514, rows) == (True, 504), done.stderr


def test_too_many_open_files_are_no_damage(tmp_path):
    write_pool(tmp_path / "pool", rows=64, copies=1, chunk_rows=1)
    code = (
        "pool = lsmix.open_pool(path)\n"
        "try:\n"
        "    print(pool.image[:])\n"
        "except lsmix.LsmixError as error:\n"
        "    print(type(error).__name__, error.exit_code, error)\n"
    )
    done = under_limit(code, tmp_path / "pool", 20)
    assert done.stdout.startswith("SystemLimitError 1 Too many open files: "), done.stderr
    assert "'ulimit -n 4096'" in done.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_missing_permission_is_no_damage(pool, command):
    (pool / SHARD).chmod(0)
    result = command("verify", pool)
    assert (result.code, "Permission denied" in result.err, "chmod" in result.err) == (1, True, True)


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(12, "Cannot allocate memory")])
def test_a_file_that_the_system_does_not_map_is_no_damage(error, pool, monkeypatch):
    opened = lsmix.open_pool(pool)

    def refuse(*_args, **_options):
        raise error

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(SystemLimitError, match=error.strerror):
        opened.image[0]
