"""Several processes in one workspace: artifacts in use are not removed; file permissions follow the umask."""

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lsmix.data.artifact import Artifact, read_manifest
from lsmix.data.errors import CorruptError, LockedError, MissingError
from lsmix.data.progress import NullProgress
from lsmix.pipeline.api import plan, push, run, verify
from lsmix.pipeline.engine.garbage import collect_garbage
from lsmix.pipeline.workspace import workspace as workspace_module
from lsmix.pipeline.workspace.locks import InputLocks, removal_lock
from lsmix.pipeline.workspace.workspace import Workspace

OTHER = 'name = "other"\n[data]\nformat = "digits"\nlimit = 10\n'


@pytest.fixture
def other_recipe(tmp_path):
    path = tmp_path / "other.toml"
    path.write_text(OTHER, encoding="utf-8")
    return path


class WhileMixing(NullProgress):
    """Calls a function once, when a stage has started its work."""

    def __init__(self, label, action):
        self._label, self._action, self.done = label, action, None

    def start(self, label, total, unit, done=0):
        if label.startswith(self._label) and self.done is None:
            self.done = self._action()


def test_gc_keeps_everything_that_a_running_mix_reads(tiny_recipe, tiny_workspace, other_recipe, command):
    shutil.rmtree(tiny_workspace / "mix")
    kept = [path for stage in ("ingest", "train-glow", "encode") for path in (tiny_workspace / stage).iterdir()]
    gc = ("gc", other_recipe, "--workspace", tiny_workspace, "--delete")
    progress = WhileMixing("mix", lambda: command(*gc))
    run(tiny_recipe, workspace=tiny_workspace, stage="mix", device="cpu", progress=progress)
    assert progress.done.code == 0, progress.done.err
    assert "(in use, kept)" in progress.done.out
    assert all((path / "manifest.json").is_file() for path in kept if "evaluator" not in path.name)
    assert command(*gc).code == 0
    assert not any(path.exists() for path in kept), "after the run nothing is in use"


def test_force_does_not_remove_a_flow_in_use(tiny_recipe, tiny_workspace):
    (flow,) = [path for path in (tiny_workspace / "train-glow").iterdir() if "evaluator" not in path.name]
    with InputLocks() as locks:
        locks.hold(Artifact(folder=flow, manifest=read_manifest(flow)))
        with pytest.raises(LockedError, match="is being read by another run"):
            run(tiny_recipe, workspace=tiny_workspace, stage="train-glow", device="cpu", force="train-glow")
    assert (flow / "manifest.json").is_file()


def test_a_removed_artifact_cannot_be_locked(tiny_workspace):
    folder = next((tiny_workspace / "ingest").iterdir())
    artifact = Artifact(folder=folder, manifest=read_manifest(folder))
    with (
        InputLocks() as locks,
        removal_lock(tiny_workspace, artifact.manifest.cache_key, "ingest"),
        pytest.raises(LockedError, match="is being removed"),
    ):
        locks.hold(artifact)
    shutil.rmtree(folder)
    with InputLocks() as locks, pytest.raises(MissingError, match="was removed by another process"):
        locks.hold(artifact)


def test_a_read_only_workspace_needs_no_lock(tiny_recipe, tiny_workspace, monkeypatch):
    folder = next((tiny_workspace / "ingest").iterdir())

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr("lsmix.pipeline.workspace.locks._lock", refuse)
    with InputLocks() as locks:
        locks.hold(Artifact(folder=folder, manifest=read_manifest(folder)))


def make_garbage(workspace):
    model = next((workspace / "train").iterdir())
    for number in range(30):
        shutil.copytree(model, workspace / "train" / f"old-{number:012x}")


def test_many_concurrent_gc_all_succeed_and_leave_no_garbage(small_recipe, small_workspace):
    make_garbage(small_workspace)
    _, nodes, _ = plan(small_recipe, workspace=small_workspace)
    together = threading.Barrier(8)

    def collect(_):
        together.wait()
        return collect_garbage(nodes, Workspace(small_workspace), delete=True)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(collect, range(8)))
    assert not list((small_workspace / "train").glob("old-*"))
    assert collect_garbage(nodes, Workspace(small_workspace), delete=True) == []


def test_concurrent_gc_in_two_processes_succeeds(small_recipe, small_workspace):
    make_garbage(small_workspace)
    words = [sys.executable, "-m", "lsmix", "gc", small_recipe, "--workspace", small_workspace, "--delete"]
    begun = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in begun:
        _, printed = process.communicate()
        assert process.returncode == 0, printed
    assert not list((small_workspace / "train").glob("old-*"))


def test_an_artifact_that_is_removed_during_the_search_is_not_found(tiny_workspace, monkeypatch):
    folder = next((tiny_workspace / "mix").iterdir())
    key = read_manifest(folder).cache_key

    def gone(*_):
        shutil.rmtree(folder)
        raise CorruptError("a file is missing")

    monkeypatch.setattr(workspace_module, "open_artifact", gone)
    assert Workspace(tiny_workspace).find("mix", key) is None


@pytest.mark.parametrize("mask", [0o077, 0o027], ids=oct)
def test_every_file_and_folder_has_the_permissions_that_the_umask_allows(
    mask, small_recipe, tmp_path, monkeypatch, command
):
    monkeypatch.setenv("LSMIX_CACHE", str(tmp_path / "cache"))
    before = os.umask(mask)
    try:
        made = run(small_recipe, workspace=tmp_path / "runs", stage="" if mask == 0o077 else "ingest", device="cpu")
        if mask == 0o077:
            pool = made["mix/mixed"].folder
            push(pool, f"memory://{tmp_path.name}")
            verify(f"memory://{tmp_path.name}")
            for words in (
                ("export", pool, tmp_path / "h5", "--format", "hdf5"),
                ("export", pool, tmp_path / "parquet", "--format", "parquet"),
                ("push", pool, tmp_path / "stick"),
                ("pull", tmp_path / "stick", tmp_path / "pulled"),
                ("show", pool, "--html", tmp_path / "page.html"),
            ):
                result = command(*words)
                assert result.code == 0, result.err
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if not path.is_symlink()]
    assert len(written) > 5
    for path in written:
        assert path.stat().st_mode & 0o777 & mask == 0, path
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert path.stat().st_mode & 0o777 == wanted, f"{path} has fewer permissions than the umask allows"
