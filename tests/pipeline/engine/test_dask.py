"""Dask gives the same bytes as one process, and survives lost workers, crashing shards and a lost scheduler."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
from places import TESTS
from stubborn import stubborn_job

from lsmix.data.errors import DeviceMemoryError, PartialError, RecipeError
from lsmix.pipeline.engine import shards
from lsmix.pipeline.engine.dask import DaskExecutor, make_executor, worker_environment
from lsmix.pipeline.engine.executor import InProcessExecutor
from lsmix.pipeline.engine.shards import finished_shards
from lsmix.pipeline.workspace.workspace import Workspace

# distributed leaves sockets that are garbage-collected late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.faults,
]


def manifests(workspace, *stages):
    """Return the digest and the counts of each artifact."""
    return {
        f"{stage} {found.name}": (found.content_digest, found.counts)
        for stage in stages
        for _, found in Workspace(workspace).manifests(stage)
    }


class Shared:
    """A Dask executor that outlives a command, because starting a cluster takes seconds."""

    def __init__(self, executor):
        self.run = executor.run
        self.worker_device = executor.worker_device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def cluster():
    """Return an executor with two worker processes, and the list of its messages."""
    said = []
    with DaskExecutor(workers=2, say=said.append) as executor:
        yield executor, said


@pytest.fixture
def on_dask(cluster, monkeypatch):
    """Let ``--workers`` use the cluster of this module; return the list of requested numbers."""
    requested = []
    monkeypatch.setattr(
        "lsmix.pipeline.engine.dask.DaskExecutor",
        lambda **options: requested.append(options["workers"]) or Shared(cluster[0]),
    )
    return requested


def test_dask_makes_the_same_bytes_as_this_process(
    tiny_recipe, finished_workspace, tiny_workspace, command, cluster, on_dask
):
    for stage in ("encode", "mix"):
        shutil.rmtree(tiny_workspace / stage)
    shutil.rmtree(next((tiny_workspace / "train").glob("lsmix-*")))  # a stage without shards
    result = command("train", tiny_recipe, "--workspace", tiny_workspace, "--workers", "2", "--device", "cpu")
    assert result.code == 0, result.err
    assert on_dask == [2]
    assert cluster[1][0].startswith("Dask dashboard: http://127.0.0.1:"), (
        "it has no password, so it must stay on loopback"
    )
    assert result.out.startswith("3 of 7 artifacts made")
    made, expected = (manifests(place, "encode", "mix", "train") for place in (tiny_workspace, finished_workspace))
    del expected["mix zero"]  # no training needs it
    assert made == expected


def test_a_failing_shard_is_skipped_and_made_by_the_next_run(
    tiny_recipe, finished_workspace, tiny_workspace, command, on_dask
):
    folder = next((tiny_workspace / "encode").iterdir())
    shutil.rmtree(tiny_workspace / "encode")
    stone = folder / "latents.zarr" / "z" / "c" / "2"
    stone.parent.mkdir(parents=True)
    stone.write_text("a file where shard 2 needs a folder, as seen from any process")
    words = ("encode", tiny_recipe, "--workspace", tiny_workspace, "--workers", "2", "--device", "cpu")
    result = command(*words)
    assert result.code == 6, result.err
    assert "error: 1 of 5 shards of " in result.err
    assert "the first is shard 2: FileExistsError: " in result.err
    assert result.err.splitlines()[-1].endswith("Run the command again to retry the failed shards.")
    assert shards.finished_shards(folder).keys() == {0, 1, 3, 4}
    stone.unlink()
    assert command(*words).code == 0
    assert manifests(tiny_workspace, "encode") == manifests(finished_workspace, "encode")


def test_a_worker_that_dies_once_loses_no_shard(tmp_path, cluster):
    job = stubborn_job(tmp_path / "stage" / "some-key", once=[1, 4])
    done = []
    cluster[0].run(job, range(6), lambda record: done.append(record.shard))
    assert sorted(done) == list(range(6))
    assert finished_shards(tmp_path / "stage" / "some-key").keys() == set(range(6))


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_skipped_and_all_others_are_made(tmp_path, cluster):
    job = stubborn_job(tmp_path / "stage" / "some-key", always=[2])
    done = []
    with pytest.raises(PartialError, match=r"1 of 9 shards of .* failed; the first is shard 2: .*died"):
        cluster[0].run(job, range(9), lambda record: done.append(record.shard))
    assert sorted(done) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_a_full_device_stops_the_work_immediately(tmp_path, cluster):
    job = stubborn_job(tmp_path / "stage" / "some-key", out_of_memory=0, seconds=0.02)
    done = []
    with pytest.raises(DeviceMemoryError, match="card 0 is full"):
        cluster[0].run(job, range(100), lambda record: done.append(record.shard))
    assert len(done) < 50


def test_if_every_shard_fails_the_rest_is_not_attempted(tmp_path, cluster):
    job = stubborn_job(tmp_path / "stage" / "some-key", raises=list(range(1000)))
    with pytest.raises(PartialError, match=r"of 1000 shards of .* failed; .*No space left on device") as caught:
        cluster[0].run(job, range(1000), lambda record: None)
    assert int(str(caught.value).split()[0]) < 100


@pytest.fixture
def running_scheduler():
    """Return address and process of a separate Dask scheduler with one worker."""
    code = (
        "from distributed import LocalCluster\n"
        "cluster = LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol='tcp', host='127.0.0.1',"
        " dashboard_address=None)\n"
        "print(cluster.scheduler_address, flush=True)\n"
        "input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=TESTS, **pipes
    ) as process:  # the folder of the processor's module
        yield process.stdout.readline().strip(), process
        process.kill()


def test_a_killed_scheduler_is_reported_and_the_next_run_makes_the_rest(tmp_path, running_scheduler):
    address, scheduler = running_scheduler
    folder = tmp_path / "stage" / "some-key"
    job = stubborn_job(folder, seconds=0.05)
    done = []

    def report(record):
        done.append(record.shard)
        if len(done) == 3:
            scheduler.kill()

    with (
        DaskExecutor(scheduler=address, say=lambda _: None) as executor,
        pytest.raises(PartialError, match=r"lost the connection .*'?tcp://.* of 20 shards") as caught,
    ):
        executor.run(job, range(20), report)
    assert "\n" not in str(caught.value)
    finished = finished_shards(folder).keys()
    assert set(done) <= finished < set(range(20))
    with InProcessExecutor() as executor:
        executor.run(job, sorted(set(range(20)) - finished), lambda record: None)
    assert finished_shards(folder).keys() == set(range(20))


def test_no_cluster_is_started_without_shards(tmp_path):
    with DaskExecutor(workers=2, say=print) as executor:
        executor.run(stubborn_job(tmp_path), [], print)
        assert executor._client is None


def test_only_local_workers_get_the_local_folder_of_a_remote_artifact(tmp_path, monkeypatch):
    folders = []
    monkeypatch.setattr(DaskExecutor, "_connected", lambda self: None)
    monkeypatch.setattr(DaskExecutor, "_run", lambda self, client, job, *_: folders.append(job.folder))
    job = dataclasses.replace(stubborn_job(tmp_path), url="s3://bucket/runs")
    for options in ({"workers": 1, "device": "cpu"}, {"scheduler": "tcp://somewhere"}):
        DaskExecutor(**options, say=print).run(job, [0], print)
    assert folders == [str(tmp_path), ""]


def test_a_scheduler_that_does_not_answer_is_named(tmp_path):
    with DaskExecutor(scheduler="nonsense://x", say=print) as executor, pytest.raises(RecipeError, match="nonsense"):
        executor.run(stubborn_job(tmp_path), [0], print)


def test_workers_close_their_models_at_the_end_of_a_stage_on_gpus(tmp_path, cluster, monkeypatch):
    executor, _ = cluster
    job = stubborn_job(tmp_path)

    def open_models():
        from lsmix.pipeline.engine import shards

        return len(shards._opened)

    for device, left in (("cpu", 1), ("cuda", 0)):
        executor.run(job, range(8), lambda _: None)  # starts the cluster, if this is the first test
        monkeypatch.setattr(executor, "_device", device)
        executor.run(job, range(8), lambda _: None)
        assert max(executor._client.run(open_models).values()) == left, device


def test_each_worker_gets_its_share_of_threads_and_its_own_gpu(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert worker_environment(0, 2, "cpu")["OMP_NUM_THREADS"] == "4"
    assert worker_environment(0, 16, "cpu")["OMP_NUM_THREADS"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(0, 2, "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert [worker_environment(i, 4, "cuda")["CUDA_VISIBLE_DEVICES"] for i in range(4)] == ["0", "1", "2", "0"]
    assert worker_environment(1, 4, "cuda:2")["CUDA_VISIBLE_DEVICES"] == "2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7f")
    assert [worker_environment(i, 3, "cuda")["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["5", "GPU-7f", "5"]


def test_workers_and_a_scheduler_together_are_rejected():
    with pytest.raises(RecipeError, match=r"'--workers 2' starts a Dask cluster and '--scheduler tcp://x'"):
        make_executor(workers=2, scheduler="tcp://x", device="cpu", say=print)
