"""The in-process executor: failed shards are skipped and made by the next run; models are closed after their stage."""

import shutil
import weakref

import pytest
import stubborn
from factory import content_digests
from stubborn import stubborn_job

from lsmix.data.errors import CorruptError, PartialError
from lsmix.glow.flow import Flow
from lsmix.pipeline.api import run
from lsmix.pipeline.engine import shards
from lsmix.pipeline.engine.executor import raise_failures
from lsmix.pipeline.stages.encode import EncodeProcessor


def without(workspace, *stages):
    for stage in stages:
        shutil.rmtree(workspace / stage)


class Breaks:
    """An encode processor that fails on some shards, like a GPU that runs out of memory."""

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


@pytest.mark.parametrize(("where", "bad"), [("load", (0,)), ("compute", (2, 3)), ("store", (2, 3))])
def test_a_failing_shard_is_skipped_and_made_by_the_next_run(
    tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch, where, bad
):
    without(tiny_workspace, "encode", "mix", "train", "report")
    words = ("encode", tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu")
    with monkeypatch.context() as broken:
        break_shards(broken, bad, where, RuntimeError("out of memory"))
        result = command(*words)
    assert result.code == PartialError.exit_code == 6
    assert f"error: {len(bad)} of 5 shards of " in result.err
    assert f"the first is shard {bad[0]}: RuntimeError: out of memory. All others are kept" in result.err
    (folder,) = (tiny_workspace / "encode").iterdir()
    assert not (folder / "manifest.json").exists()
    assert shards.finished_shards(folder).keys() == set(range(5)) - set(bad)
    status = command("status", tiny_recipe, "--workspace", tiny_workspace)
    assert f"interrupted: {5 - len(bad)} shards done" in status.out

    shards.close_job()
    made = []
    real = EncodeProcessor.load
    monkeypatch.setattr(EncodeProcessor, "load", lambda self, shard: made.append(shard) or real(self, shard))
    assert command(*words).code == 0
    assert made == list(bad), "complete shards must not be made again"
    assert content_digests(tiny_workspace, "encode") == content_digests(finished_workspace, "encode")
    assert not (folder / "work").exists()


def test_damage_in_an_input_is_reported_as_damage(tiny_recipe, tiny_workspace, command, monkeypatch):
    without(tiny_workspace, "encode", "mix", "train", "report")
    break_shards(monkeypatch, (1,), "load", CorruptError("chunk 3 is damaged."))
    result = command("encode", tiny_recipe, "--workspace", tiny_workspace)
    assert (result.code, result.err.splitlines()[-1]) == (5, "error: chunk 3 is damaged.")


def test_a_full_disk_stops_the_stage_immediately(tiny_recipe, tiny_workspace, command, monkeypatch):
    without(tiny_workspace, "encode", "mix", "train", "report")
    break_shards(monkeypatch, (0, 1, 2, 3, 4), "store", OSError(28, "No space left on device", "z/c/0"))
    result = command("encode", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: No space left on device: 'z/c/0'")


def test_failures_of_several_kinds_become_one_error_with_the_first(tmp_path):
    job = stubborn_job(tmp_path)
    raise_failures(job, 9, {})
    with pytest.raises(CorruptError, match=r"^first$"):
        raise_failures(job, 9, {3: CorruptError("first"), 7: CorruptError("later")})
    with pytest.raises(PartialError, match=r"2 of 9 shards of .* failed; the first is shard 3: CorruptError: first"):
        raise_failures(job, 9, {7: ValueError("later"), 3: CorruptError("first")})


def test_a_shard_longer_than_the_data_is_shortened(tiny_recipe, tiny_workspace):
    # Otherwise the only chunk of a column would be padded to 10¹² rows.
    overrides = ["latents.chunk_rows=16777216", "pools.lsmix.chunk_rows=16777216"]
    result = run(tiny_recipe, workspace=tiny_workspace, stage="mix", device="cpu", overrides=overrides)
    assert result["encode"].manifest.counts["shards"] == result["mix/lsmix"].manifest.counts["shards"] == 1


def test_a_finished_stage_closes_its_model_before_it_frees_memory(tiny_recipe, tiny_workspace, monkeypatch):
    seen, alive = [], []
    real = EncodeProcessor.close

    def close(self):
        seen.append("close")
        alive.append(weakref.ref(self))
        real(self)

    def free():
        seen.append("free")
        assert all(worker() is None for worker in alive), "its memory cannot be released yet"

    monkeypatch.setattr(EncodeProcessor, "close", close)
    monkeypatch.setattr(shards, "free_device_memory", free)
    monkeypatch.setattr(Flow, "forget_recordings", lambda _: seen.append("forget"))
    run(tiny_recipe, workspace=tiny_workspace, stage="encode", device="cpu", force="encode")
    assert seen[-3:] == ["close", "forget", "free"]
    assert seen.count("close") == 1
    assert not shards._opened


def test_a_stage_that_fails_frees_the_recordings_of_its_model(tiny_recipe, tiny_workspace, monkeypatch):
    forgotten = []
    monkeypatch.setattr(Flow, "forget_recordings", lambda _: forgotten.append(len(shards._opened)))
    monkeypatch.setattr(EncodeProcessor, "compute", lambda *_: 1 / 0)
    with pytest.raises(PartialError):
        run(tiny_recipe, workspace=tiny_workspace, stage="encode", device="cpu", force="encode")
    assert forgotten == [0]


def test_a_worker_closes_the_model_of_one_stage_before_it_opens_the_next(tmp_path, monkeypatch):
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
