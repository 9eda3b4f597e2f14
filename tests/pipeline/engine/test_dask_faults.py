"""On Dask a lost worker loses no shard, a shard that kills its workers is left out alone, a lost scheduler is told."""

import json
import signal
import subprocess
import sys
import time

import pytest
from places import TESTS
from stubborn import stubborn_job

from lsmix.data.errors import DeviceMemoryError, PartialError, RecipeError
from lsmix.pipeline.engine.dask import DaskExecutor, make_executor, worker_environment
from lsmix.pipeline.engine.executor import InProcessExecutor
from lsmix.pipeline.engine.shards import finished_shards

# distributed keeps sockets of its own that are collected late.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.faults,
]


def run(executor, job, shards):
    done = []
    with executor:
        executor.run(job, range(shards), lambda record: done.append(record.shard))
    return sorted(done)


def on_dask(workers=2):
    return DaskExecutor(workers=workers, device="cpu", say=lambda _: None)


def test_a_worker_that_dies_once_loses_no_shard(tmp_path):
    job = stubborn_job(tmp_path / "stage" / "some-key", once=[1, 4])
    assert run(on_dask(), job, 6) == list(range(6))
    assert finished_shards(tmp_path / "stage" / "some-key").keys() == set(range(6))


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_left_out_and_all_others_are_made(tmp_path):
    job = stubborn_job(tmp_path / "stage" / "some-key", always=[2])
    executor, done = on_dask(), []
    with executor, pytest.raises(PartialError, match=r"1 of 9 shards of .* failed; the first is shard 2: .*died"):
        executor.run(job, range(9), lambda record: done.append(record.shard))
    assert sorted(done) == [0, 1, 3, 4, 5, 6, 7, 8]


def test_a_device_that_is_full_stops_the_work_at_once(tmp_path):
    job = stubborn_job(tmp_path / "stage" / "some-key", out_of_memory=0, seconds=0.05)
    done = []
    with on_dask(1) as executor, pytest.raises(DeviceMemoryError, match="card 0 is full"):
        executor.run(job, range(100), lambda record: done.append(record.shard))
    assert len(done) < 50


def test_where_every_shard_fails_not_all_are_tried(tmp_path):
    job = stubborn_job(tmp_path / "stage" / "some-key", raises=list(range(1000)))
    with pytest.raises(PartialError, match=r"of 1000 shards of .* failed; .*No space left on device") as caught:
        run(on_dask(), job, 1000)
    assert int(str(caught.value).split()[0]) < 100


@pytest.fixture
def running_scheduler(tmp_path):
    """Return (address, process) of a Dask scheduler with one worker, both processes of their own."""
    facts = tmp_path / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen([*words, "--no-dashboard", "--scheduler-file", facts], **quiet)
    deadline = time.monotonic() + 60
    while not facts.exists() or not facts.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    address = json.loads(facts.read_text())["address"]
    words = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    worker = subprocess.Popen(words, cwd=TESTS, **quiet)  # from where it imports the stage
    yield address, scheduler
    for process in (worker, scheduler):
        process.kill()
        process.wait()


def test_a_scheduler_that_is_killed_is_told_in_one_sentence_and_the_next_run_makes_the_rest(
    tmp_path, running_scheduler
):
    address, scheduler = running_scheduler
    folder = tmp_path / "stage" / "some-key"
    job = stubborn_job(folder, seconds=0.1)
    done = []

    def report(record):
        done.append(record.shard)
        if len(done) == 3:
            scheduler.send_signal(signal.SIGKILL)

    with (
        DaskExecutor(scheduler=address, say=lambda _: None) as executor,
        pytest.raises(PartialError, match=r"the Dask scheduler of .* went away \('?tcp://.* of 40 shards") as caught,
    ):
        executor.run(job, range(40), report)
    assert "\n" not in str(caught.value)
    there = finished_shards(folder).keys()
    assert set(done) <= there < set(range(40))
    rest = [shard for shard in range(40) if shard not in there]
    with InProcessExecutor() as executor:
        executor.run(job, rest, lambda record: None)
    assert finished_shards(folder).keys() == set(range(40))


def test_each_worker_gets_its_share_of_threads_and_a_card_of_its_own(monkeypatch):
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


def test_workers_and_a_scheduler_at_once_are_refused():
    with pytest.raises(RecipeError, match=r"'--workers 2' starts a Dask cluster of its own and '--scheduler tcp://x'"):
        make_executor(workers=2, scheduler="tcp://x", device="cpu", say=print)
