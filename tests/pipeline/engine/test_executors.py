"""Shards come out the same wherever they are made, and one that fails does not take the others with it."""

import shutil
import weakref

import pytest
import stubborn
from stubborn import stubborn_job

from lsmix.data.errors import CorruptError, PartialError, RecipeError
from lsmix.glow.flow import Flow
from lsmix.pipeline.api import run
from lsmix.pipeline.engine import shards
from lsmix.pipeline.engine.dask import DaskExecutor
from lsmix.pipeline.engine.executor import raise_failures
from lsmix.pipeline.stages.encode import EncodeProcessor
from lsmix.pipeline.workspace.workspace import Workspace


def roots(workspace, *stages):
    return {
        manifest.name: manifest.content_digest
        for stage in stages
        for _, manifest in Workspace(workspace).manifests(stage)
    }


def without(workspace, *stages):
    for stage in stages:
        shutil.rmtree(workspace / stage)


class Shared:
    """A Dask executor that outlives a command, since starting a cluster takes seconds."""

    def __init__(self, executor):
        self._executor = executor
        self.run = executor.run
        self.worker_device = executor.worker_device

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def cluster():
    """Return (executor with two worker processes, what it said)."""
    said = []
    with DaskExecutor(workers=2, say=said.append) as executor:
        yield executor, said


@pytest.fixture
def on_dask(cluster, monkeypatch):
    """Let ``--workers`` use the one cluster of this module."""
    asked = []
    monkeypatch.setattr(
        "lsmix.pipeline.engine.dask.DaskExecutor",
        lambda **options: asked.append(options["workers"]) or Shared(cluster[0]),
    )
    return asked


# distributed keeps sockets of its own that are collected late.
late_sockets = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@late_sockets
def test_dask_makes_the_same_bytes_as_this_process(
    tiny_recipe, finished_workspace, tiny_workspace, command, cluster, on_dask
):
    without(tiny_workspace, "encode", "mix", "train", "report")
    # All pools, in one go up to the report, which has no shards.
    result = command("report", tiny_recipe, "--workspace", tiny_workspace, "--workers", "2", "--device", "cpu")
    assert result.code == 0, result.err
    assert on_dask == [2]
    assert cluster[1][0].startswith("Dask dashboard: http://127.0.0.1:"), "it has no password, so it stays at home"
    assert result.out.startswith("7 of 9 artifacts made")
    assert roots(tiny_workspace, "encode", "mix", "train") == roots(finished_workspace, "encode", "mix", "train")
    for stage in ("encode", "mix"):
        there, expected = (
            {manifest.cache_key: manifest.counts for _, manifest in Workspace(place).manifests(stage)}
            for place in (tiny_workspace, finished_workspace)
        )
        assert there == expected


@late_sockets
def test_on_dask_a_failing_shard_is_set_aside_and_made_the_next_time(
    tiny_recipe, finished_workspace, tiny_workspace, command, on_dask
):
    folder = next((tiny_workspace / "encode").iterdir())
    without(tiny_workspace, "encode", "mix", "train", "report")
    stone = folder / "latents.zarr" / "z" / "c" / "2"
    stone.parent.mkdir(parents=True)
    stone.write_text("a file where shard 2 needs a folder, as seen from any process")
    words = ("encode", tiny_recipe, "--workspace", tiny_workspace, "--workers", "2", "--device", "cpu")
    result = command(*words)
    assert result.code == 6, result.err
    assert "error: 1 of 5 shards of " in result.err
    assert "the first is shard 2: FileExistsError: " in result.err
    assert result.err.splitlines()[-1].endswith("run the same command again to make the rest.")
    assert shards.finished_shards(folder).keys() == {0, 1, 3, 4}
    stone.unlink()
    assert command(*words).code == 0
    assert roots(tiny_workspace, "encode") == roots(finished_workspace, "encode")


class Breaks:
    """An encode processor that fails on some shards, as a graphics card that runs out of memory does."""

    def __init__(self, worker, bad, where, error):
        self._worker, self._bad, self._where, self._error = worker, bad, where, error
        self._shard = -1

    def _maybe(self, where, shard):
        if where == self._where and shard in self._bad:
            raise self._error

    def load(self, shard):
        self._maybe("load", shard)
        return shard, self._worker.load(shard)

    def compute(self, loaded, advance):
        self._maybe("compute", loaded[0])
        return self._worker.compute(loaded[1], advance)

    def store(self, shard, computed):
        self._maybe("store", shard)
        return self._worker.store(shard, computed)

    def close(self):
        self._worker.close()


def break_shards(monkeypatch, bad, where, error):
    shards.close_job()  # this process may have opened the job of another test
    monkeypatch.setattr(
        "lsmix.pipeline.stages.encode.EncodeProcessor",
        lambda *words: Breaks(EncodeProcessor(*words), bad, where, error),
    )


@pytest.mark.parametrize("where", ["load", "compute", "store"])
@pytest.mark.parametrize("bad", [(0,), (2, 3)])
def test_a_failing_shard_is_set_aside_and_made_the_next_time(
    tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch, where, bad
):
    without(tiny_workspace, "encode", "mix", "train", "report")
    words = ("encode", tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu")
    with monkeypatch.context() as broken:
        break_shards(broken, bad, where, RuntimeError("out of memory"))
        result = command(*words)
    assert result.code == PartialError.exit_code == 6
    said = f"error: {len(bad)} of 5 shards of "
    assert said in result.err
    assert f"the first is shard {bad[0]}: RuntimeError: out of memory. All others are done and kept" in result.err
    (folder,) = (tiny_workspace / "encode").iterdir()
    assert not (folder / "manifest.json").exists()
    assert shards.finished_shards(folder).keys() == set(range(5)) - set(bad)
    status = command("status", tiny_recipe, "--workspace", tiny_workspace)
    assert f"was interrupted: {5 - len(bad)} shards done" in status.out

    shards.close_job()
    made = []
    real = EncodeProcessor.load
    monkeypatch.setattr(EncodeProcessor, "load", lambda self, shard: made.append(shard) or real(self, shard))
    assert command(*words).code == 0
    assert made == list(bad), "shards that were done must not be made again"
    assert roots(tiny_workspace, "encode") == roots(finished_workspace, "encode")
    assert not (folder / "work").exists()


def test_damage_in_what_is_read_is_told_as_such(tiny_recipe, tiny_workspace, command, monkeypatch):
    without(tiny_workspace, "encode", "mix", "train", "report")
    break_shards(monkeypatch, (1,), "load", CorruptError("chunk 3 is damaged."))
    result = command("encode", tiny_recipe, "--workspace", tiny_workspace)
    assert (result.code, result.err.splitlines()[-1]) == (5, "error: chunk 3 is damaged.")


def test_an_error_of_the_system_stops_at_once(tiny_recipe, tiny_workspace, command, monkeypatch):
    without(tiny_workspace, "encode", "mix", "train", "report")
    break_shards(monkeypatch, (0, 1, 2, 3, 4), "store", OSError(28, "No space left on device", "z/c/0"))
    result = command("encode", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: No space left on device: 'z/c/0'")


def test_a_dask_executor_starts_nothing_until_there_are_shards(tmp_path):
    with DaskExecutor(workers=2, say=print) as executor:
        executor.run(stubborn_job(tmp_path), [], print)
        assert executor._client is None


@late_sockets
def test_a_scheduler_that_does_not_answer_is_named(tmp_path):
    with DaskExecutor(scheduler="nonsense://x", say=print) as executor, pytest.raises(RecipeError, match="nonsense"):
        executor.run(stubborn_job(tmp_path), [0], print)


def test_failures_of_several_kinds_become_one_error_with_the_first(tmp_path):
    job = stubborn_job(tmp_path)
    raise_failures(job, 9, {})
    with pytest.raises(CorruptError, match=r"^first$"):
        raise_failures(job, 9, {3: CorruptError("first"), 7: CorruptError("later")})
    with pytest.raises(PartialError, match=r"2 of 9 shards of .* failed; the first is shard 3: CorruptError: first"):
        raise_failures(job, 9, {7: ValueError("later"), 3: CorruptError("first")})


def test_a_shard_longer_than_the_whole_is_cut_to_it(tiny_recipe, tiny_workspace):
    # A column's only chunk would otherwise be padded to 10¹² rows.
    overrides = ["latents.chunk_rows=16777216", "pools.lsmix.chunk_rows=16777216"]
    result = run(tiny_recipe, workspace=tiny_workspace, stage="mix", device="cpu", overrides=overrides)
    assert result["encode"].manifest.counts["shards"] == result["mix/lsmix"].manifest.counts["shards"] == 1


def test_a_finished_stage_leaves_no_model_behind(tiny_recipe, tiny_workspace, monkeypatch):
    seen, alive = [], []
    real = EncodeProcessor.close

    def close(self):
        seen.append("close")
        alive.append(weakref.ref(self))
        real(self)

    def free():
        seen.append("free")
        assert all(worker() is None for worker in alive), "its memory cannot be given back yet"

    monkeypatch.setattr(EncodeProcessor, "close", close)
    monkeypatch.setattr(shards, "free_device_memory", free)
    monkeypatch.setattr(Flow, "forget_recordings", lambda _: seen.append("forget"))
    run(tiny_recipe, workspace=tiny_workspace, stage="encode", device="cpu", force="encode")
    assert seen[-3:] == ["close", "forget", "free"]
    assert seen.count("close") == 1
    assert not shards._opened


def test_a_stage_that_fails_gives_back_what_its_model_recorded(tiny_recipe, tiny_workspace, monkeypatch):
    forgotten = []
    monkeypatch.setattr(Flow, "forget_recordings", lambda _: forgotten.append(len(shards._opened)))
    monkeypatch.setattr(EncodeProcessor, "compute", lambda *_: 1 / 0)
    with pytest.raises(PartialError):
        run(tiny_recipe, workspace=tiny_workspace, stage="encode", device="cpu", force="encode")
    assert forgotten == [0]


def test_a_worker_that_is_given_another_stage_closes_the_model_before_it_opens_the_next(tmp_path, monkeypatch):
    seen = []

    real = stubborn.Processor

    def opened(job, folder, *rest):
        seen.append(f"open {folder.name}")
        processor = real(job, folder, *rest)
        processor.close = lambda: seen.append(f"close {folder.name}")
        return processor

    monkeypatch.setattr(stubborn, "Processor", opened)
    monkeypatch.setattr(shards, "free_device_memory", lambda: seen.append("free"))
    shards.close_job()
    seen.clear()
    jobs = {name: stubborn_job(tmp_path / name) for name in ("encode", "mix")}
    for name, shard in (("encode", 0), ("encode", 1), ("mix", 0)):
        shards.run_shard(jobs[name], shard)
    shards.close_job()
    assert seen == ["free", "open encode", "close encode", "free", "open mix", "close mix", "free"]


@late_sockets
def test_dask_workers_close_their_models_when_a_stage_on_cards_ends(tmp_path, cluster, monkeypatch):
    executor, _ = cluster
    job = stubborn_job(tmp_path)

    def open_models():
        from lsmix.pipeline.engine import shards as it

        return len(it._opened)

    for device, left in (("cpu", 1), ("cuda", 0)):
        executor.run(job, range(8), lambda _: None)  # starts the cluster, where no test before did
        monkeypatch.setattr(executor, "_device", device)
        executor.run(job, range(8), lambda _: None)
        assert max(executor._client.run(open_models).values()) == left, device
