"""Remote workspaces: all machines get the same digests, resume each other's work and ignore partial uploads."""

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
from factory import content_digests
from places import make_bucket, s3_server

import lsmix
from lsmix.data.artifact import WORK_FOLDER
from lsmix.data.errors import CorruptError, DownloadError, RecipeError
from lsmix.pipeline.engine.shards import Executor, close_job, read_ledger, run_shard
from lsmix.pipeline.stages.registry import STAGES
from lsmix.pipeline.workspace.workspace import Workspace

MADE = ("ingest", "train-glow", "encode", "mix", "train")


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        yield


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request):
    """Return the URL of an empty workspace."""
    name = uuid.uuid4().hex
    if request.param == "memory":
        yield f"memory://{name}/runs"
        fsspec.filesystem("memory").store.clear()
    else:
        request.getfixturevalue("s3")
        make_bucket(name)
        yield f"s3://{name}/runs"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Return a function that simulates another machine with its own cache."""

    def be(name):
        monkeypatch.setenv("LSMIX_CACHE", str(tmp_path / f"cache-of-{name}"))
        return tmp_path / f"cache-of-{name}"

    be("one")
    return be


def copy_to(url, workspace, *stages):
    """Upload the artifacts of some stages of a workspace to a URL, as a run would."""
    for stage in stages:
        for folder, _ in Workspace(workspace).manifests(stage):
            lsmix.push(folder, f"{url}/{stage}/{folder.name}")


def test_a_remote_run_gives_the_digests_of_a_local_run_and_other_machines_find_it(
    small_recipe, small_finished, command, url, machine
):
    made = command("run", small_recipe, "--workspace", url, "--device", "cpu")
    assert made.code == 0, made.err
    assert f"report      {url}/report/small-" in made.out
    assert content_digests(url, *MADE) == content_digests(small_finished, *MADE)
    assert {path.split("/")[2] for path in Workspace(url).remote.sizes("") if path.count("/") > 1} & {"work"} == set()

    cache = machine("two")
    again = command("run", small_recipe, "--workspace", url, "--device", "cpu")
    assert again.code == 0, again.err
    assert again.out.startswith("0 of 8 artifacts made, 8 already up to date")
    assert not list(cache.rglob("*.zarr")), "artifacts that are up to date must not be downloaded"
    assert "cached" in command("status", small_recipe, "--workspace", url, "--check").out
    result = lsmix.run(small_recipe, workspace=url, device="cpu")
    assert lsmix.verify(result["mix/mixed"].folder)["content_digest"] == content_digests(url, "mix")["mix/mixed"]
    assert result.report.is_file()
    assert len(lsmix.open_pool(result["mix/mixed"].location)) == 16


def test_a_file_url_is_its_folder(tiny_recipe, finished_workspace, tmp_path, command):
    shutil.copytree(finished_workspace, tmp_path / "a b")
    result = command("status", tiny_recipe, "--workspace", (tmp_path / "a b").as_uri(), "--check")
    assert result.code == 0, result.err


def test_another_machine_resumes_an_interrupted_stage(tiny_recipe, finished_workspace, url, machine, monkeypatch):
    copy_to(url, finished_workspace, "ingest", "train-glow")
    with monkeypatch.context() as stopped:
        stopped.setattr("lsmix.pipeline.engine.executor.stop_point", interrupt_after(8))
        with pytest.raises(KeyboardInterrupt):
            lsmix.run(tiny_recipe, stage="encode", workspace=url, device="cpu")
    machine("two")
    made = []
    from lsmix.pipeline.stages.encode import EncodeProcessor

    real = EncodeProcessor.load
    monkeypatch.setattr(EncodeProcessor, "load", lambda self, shard: made.append(shard) or real(self, shard))
    lsmix.run(tiny_recipe, stage="encode", workspace=url, device="cpu")
    assert 0 < len(set(made)) < 5, "shards of another machine must not be made again"
    assert content_digests(url, "encode") == content_digests(finished_workspace, "encode")


def interrupt_after(calls):
    def stop():
        nonlocal calls
        calls -= 1
        if calls == 0:
            raise KeyboardInterrupt

    return stop


def test_array_tasks_and_finalize_may_run_on_machines_that_share_only_the_url(
    small_recipe, small_finished, url, machine, command
):
    copy_to(url, small_finished, "ingest", "train-glow", "encode")
    where = (small_recipe, "--workspace", url, "--device", "cpu")
    for index in (1, 0):
        machine(f"task-{index}")
        result = command("mix", *where, "--array-index", index, "--array-size", "2")
        assert result.code == 0, result.err
        if index == 1:
            machine("impatient")
            early = command("finalize", *where)
            assert early.code == 6
            assert "lacks" in early.err
    machine("finisher")
    assert "unfinished" in command("status", *where[:3]).out
    result = command("finalize", *where)
    assert result.code == 0, result.err
    assert content_digests(url, "mix") == content_digests(small_finished, "mix")
    assert not [path for path in Workspace(url).remote.sizes("mix") if f"/{WORK_FOLDER}/" in path]


def test_damage_at_the_url_is_found_before_it_is_used(small_recipe, small_finished, url, machine, command, tmp_path):
    copy_to(url, small_finished, "ingest", "train-glow", "encode")
    place = Workspace(url).remote
    (name,) = place.entries("encode")
    path = f"encode/{name}/latents.zarr/z/c/1/0"
    content = place.read(path, 1 << 20)
    broken = tmp_path / "broken"
    broken.write_bytes(content[:-1])
    place.write(path, broken)
    short = command("mix", small_recipe, "--workspace", url)
    assert short.code == CorruptError.exit_code
    assert (
        f"error: '{url}/{path}' is damaged: expected {len(content):,} bytes, got {len(content) - 1:,} bytes"
        in short.err
    )
    broken.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    place.write(path, broken)
    flipped = command("mix", small_recipe, "--workspace", url)
    assert flipped.code == CorruptError.exit_code
    assert f"error: '{url}/{path}' is damaged: expected sha256" in flipped.err
    assert command("encode", small_recipe, "--workspace", url, "--force", "--device", "cpu").code == 0
    assert content_digests(url, "encode") == content_digests(small_finished, "encode")


@pytest.mark.parametrize(
    "path", ["../outside", "/etc/outside", "manifest.json", "work/ledger/000001.json", "a/../../b"]
)
def test_a_remote_record_of_a_file_outside_the_artifact_is_rejected(monkeypatch, tmp_path, path):
    file = {"path": path, "bytes": 3, "sha256": "0" * 64, "payload": True}
    record = {"shard": 0, "files": [file], "seconds": 1, "counts": {}}

    class Hostile:
        """A store with malicious keys."""

        def sizes(self, folder):
            return {path: 3, "work/ledger/000000.json": 99}

        def read(self, path, most_bytes):
            return json.dumps(record).encode()

    monkeypatch.setattr("lsmix.pipeline.engine.shards.open_remote", lambda url: Hostile())
    with pytest.raises(CorruptError, match="which does not belong to an artifact of the stage 'mix'"):
        read_ledger("s3://bucket/runs/mix/pool-0123456789ab", "mix")


def test_an_unreachable_store_is_reported_and_the_next_run_uploads_the_rest(
    tiny_recipe, finished_workspace, machine, monkeypatch
):
    url = f"memory://{uuid.uuid4().hex}"
    copy_to(url, finished_workspace, "ingest", "train-glow")
    kind, left = fsspec.get_filesystem_class("memory"), [25]
    real = kind.put_file

    def put_file(self, *words, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("connection refused")
        real(self, *words, **options)

    with monkeypatch.context() as failing:
        failing.setattr("lsmix.data.remote.PAUSES_SECONDS", ())
        failing.setattr(kind, "put_file", put_file)
        with pytest.raises(DownloadError, match="cannot be reached: OSError: connection refused"):
            lsmix.run(tiny_recipe, stage="encode", workspace=url, device="cpu")
    assert content_digests(url, "encode") == {}
    lsmix.run(tiny_recipe, stage="encode", workspace=url, device="cpu")
    assert content_digests(url, "encode") == content_digests(finished_workspace, "encode")


def test_gc_removes_remote_artifacts_that_no_recipe_needs(tiny_recipe, finished_workspace, url, command):
    copy_to(url, finished_workspace, "ingest", "train-glow", "encode", "mix")
    words = ("gc", tiny_recipe, "--workspace", url, "--set", "pools.lsmix.alpha=0.7")
    assert f"{url}/mix/lsmix-" in command(*words).out
    assert len(Workspace(url).remote.entries("mix")) == 2
    assert command(*words, "--delete").code == 0
    assert [entry.name for entry in Workspace(url).entries("mix")] == ["zero"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_local_dask_workers_upload_their_shards(tiny_recipe, finished_workspace, s3, command):
    name = uuid.uuid4().hex
    make_bucket(name)
    url = f"s3://{name}"
    copy_to(url, finished_workspace, "ingest", "train-glow")
    result = command("encode", tiny_recipe, "--workspace", url, "--workers", "2", "--device", "cpu")
    assert result.code == 0, result.err
    assert content_digests(url, "encode") == content_digests(finished_workspace, "encode")


class WorkersElsewhere(Executor):
    """Simulates workers on another machine, which have only the pickled job and their own cache."""

    def __init__(self, machine):
        self._machine = machine

    def run(self, job, shards, report, advance=None):
        self._machine("worker")
        job = pickle.loads(pickle.dumps(dataclasses.replace(job, folder="")))
        for shard in shards:
            report(run_shard(job, shard))
        close_job()
        self._machine("one")


def test_workers_on_other_machines_need_only_the_url(small_recipe, small_finished, url, machine, monkeypatch, tmp_path):
    copy_to(url, small_finished, "ingest", "train-glow")
    monkeypatch.setattr("lsmix.pipeline.engine.dask.DaskExecutor", lambda **_: WorkersElsewhere(machine))
    lsmix.run(small_recipe, stage="encode", workspace=url, scheduler="tcp://somewhere", device="cpu")
    assert list((tmp_path / "cache-of-worker").rglob("work/ledger/*.json")), (
        "the workers must have used their own folder"
    )
    assert not list((tmp_path / "cache-of-one").rglob("*.zarr/z/c/*"))
    assert content_digests(url, "encode") == content_digests(small_finished, "encode")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_of_a_running_cluster_need_only_the_url(
    tiny_recipe, finished_workspace, s3, command, tmp_path, monkeypatch
):
    from distributed import LocalCluster

    name = uuid.uuid4().hex
    make_bucket(name)
    url = f"s3://{name}/deep/runs"
    copy_to(url, finished_workspace, "ingest", "train-glow")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("LSMIX_CACHE", str(tmp_path / "cache-of-workers"))
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0")
    with cluster:
        words = ("encode", tiny_recipe, "--workspace", url, "--device", "cpu")
        result = command(*words, "--scheduler", cluster.scheduler_address)
    assert result.code == 0, result.err
    assert list((tmp_path / "cache-of-workers").rglob("work/ledger/*.json")), (
        "the workers must have used their own folder"
    )
    assert content_digests(url, "encode") == content_digests(finished_workspace, "encode")


def test_workers_cannot_use_a_workspace_in_memory(tiny_recipe, finished_workspace):
    url = f"memory://{uuid.uuid4().hex}"
    copy_to(url, finished_workspace, "ingest", "train-glow")
    with pytest.raises(RecipeError, match="is in the memory of this process"):
        lsmix.run(tiny_recipe, stage="encode", workspace=url, workers=2, device="cpu")


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("nonsense://x/runs", 1, "lsmix does not support"),
        ("http://127.0.0.1:9/runs", 1, "is a web server: lsmix can pull from it"),
    ],
)
def test_a_url_that_cannot_be_a_workspace_is_rejected(tiny_recipe, command, url, code, message):
    result = command("status", tiny_recipe, "--workspace", url)
    assert result.code == code
    assert message in result.err
    assert not Path(url.partition("/")[0]).exists(), "no folder may be created for the URL"


def test_a_local_workspace_does_not_import_fsspec():
    assert set(MADE) < set(STAGES)
    words = [
        sys.executable,
        "-c",
        "import lsmix.pipeline.api, sys; sys.exit('s3fs' in sys.modules or 'fsspec' in sys.modules)",
    ]
    assert subprocess.run(words, check=False).returncode == 0, "a local workspace needs neither"


def test_ls_lists_each_stage_and_each_artifact_once(finished_workspace, url, monkeypatch):
    copy_to(url, finished_workspace, "train-glow", "mix")
    remote = type(Workspace(url).remote)
    listed, entries = [], remote.entries
    monkeypatch.setattr(remote, "entries", lambda self, folder: listed.append(folder) or entries(self, folder))
    found = lsmix.pipeline.api.list_artifacts(url)
    assert listed == list(STAGES)
    assert sorted(row["folder"] for row in found) == sorted(
        f"{url}/{stage}/{folder.name}"
        for stage in ("train-glow", "mix")
        for folder, _ in Workspace(finished_workspace).manifests(stage)
    )
    assert all(row["complete"] and row["inputs"] for row in found)
