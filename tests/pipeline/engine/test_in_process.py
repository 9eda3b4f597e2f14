"""The in-process executor: loading, computing and storing overlap with bounded memory, and can be interrupted."""

import os
import signal
import threading
import time
from typing import ClassVar

import pytest
import stubborn
from stubborn import stubborn_job

from lsmix.data.errors import CorruptError
from lsmix.data.progress import NullProgress, graceful_signals
from lsmix.pipeline.api import run
from lsmix.pipeline.engine.executor import InProcessExecutor
from lsmix.pipeline.engine.run_log import logged
from lsmix.pipeline.engine.shards import ShardRecord, finished_shards, merge_counts

SHARDS = range(6)
REAL = stubborn.Processor


class Traced(stubborn.Processor):
    """Records each step; if ``waits``, a computation waits until its neighbours are being loaded and stored."""

    trace: ClassVar[list[tuple[str, int]]] = []
    threads: ClassVar[set[tuple[str, str]]] = set()
    waits = False
    batches = 1

    def _note(self, what, shard):
        self.trace.append((what, shard))
        self.threads.add((what.split()[0], threading.current_thread().name))

    def _wait_for(self, *steps):
        deadline = time.monotonic() + 30
        while self.waits and not set(steps) <= set(self.trace):
            assert time.monotonic() < deadline, f"{steps} did not begin in time"
            time.sleep(0.001)

    def load(self, shard):
        self._note("load begins", shard)
        return shard

    def compute(self, shard, advance):
        self._note("compute begins", shard)
        ahead = [("load begins", shard + 1)] if shard + 1 in SHARDS else []
        behind = [("store begins", shard - 1)] if shard - 1 in SHARDS else []
        self._wait_for(*ahead, *behind)
        for _ in range(self.batches):
            advance(1)
        self._note("compute ends", shard)
        return super().compute(shard, advance)

    def store(self, shard, computed):
        self._note("store begins", shard)
        try:
            return super().store(shard, computed)
        finally:
            self._note("store ends", shard)


@pytest.fixture
def traced(monkeypatch):
    """Let jobs use a processor that records its steps; return its class."""
    monkeypatch.setattr(stubborn, "Processor", Traced)
    monkeypatch.setattr(Traced, "trace", [])
    monkeypatch.setattr(Traced, "threads", set())
    return Traced


def test_at_most_one_shard_is_loaded_ahead_and_one_is_stored_in_the_background(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(traced, "waits", True)
    InProcessExecutor().run(stubborn_job(tmp_path), SHARDS, lambda record: None)
    assert finished_shards(tmp_path).keys() == set(SHARDS)
    at = {step: position for position, step in enumerate(traced.trace)}
    for shard in SHARDS[1:-1]:
        assert at["load begins", shard + 1] > at["compute ends", shard - 1], "two shards wait to be computed"
        assert at["compute begins", shard + 1] > at["store ends", shard - 1], "two shards wait to be stored"
    assert ("compute", threading.current_thread().name) in traced.threads
    assert len(traced.threads) == len({thread for _, thread in traced.threads}) == 3


def test_a_stored_shard_is_released(tmp_path, traced, monkeypatch):
    alive, most = 0, 0

    class Big:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(traced, "load", lambda self, shard: (shard, Big()))
    monkeypatch.setattr(traced, "compute", lambda self, loaded, advance: (loaded[0], Big()))
    monkeypatch.setattr(traced, "store", lambda self, shard, made: REAL.store(self, shard, made[0]))
    InProcessExecutor().run(stubborn_job(tmp_path), range(20), lambda record: None)
    assert alive == 0
    # One loaded ahead, one loaded and computed, one being stored, and for a moment the shard before it.
    assert most <= 5


def test_every_batch_is_counted(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(traced, "batches", 3)
    counted = []
    InProcessExecutor().run(stubborn_job(tmp_path), SHARDS, lambda record: None, counted.append)
    assert counted == [1] * 3 * len(SHARDS)


def test_an_interrupt_stops_after_the_batch_and_keeps_finished_shards(tmp_path, traced, monkeypatch):
    monkeypatch.setattr(traced, "batches", 100)
    counted = []

    def advance(images):
        counted.append(images)
        if len(counted) == 307:
            os.kill(os.getpid(), signal.SIGINT)

    with graceful_signals(), pytest.raises(KeyboardInterrupt):
        InProcessExecutor().run(stubborn_job(tmp_path), SHARDS, lambda record: None, advance)
    assert len(counted) == 307, "the rest of the shard is not computed"
    assert finished_shards(tmp_path).keys() == {0, 1, 2}


class Counted(NullProgress):
    """Keeps every running total and every message."""

    def __init__(self):
        self.sums, self.lines = [], []

    def start(self, label, total, unit, done=0):
        self.sums, self.total = [done], total

    def advance(self, units=1, note=""):
        self.sums.append(self.sums[-1] + units)

    def info(self, message):
        self.lines.append(message)


@pytest.mark.parametrize("stage", ["encode", "mix"])
def test_progress_advances_batch_by_batch_to_the_number_of_images(stage, tiny_recipe, tiny_workspace):
    progress = Counted()
    run(tiny_recipe, workspace=tiny_workspace, stage=stage, device="cpu", force=stage, progress=progress)
    assert progress.sums[0] == 0
    assert progress.sums[-1] == progress.total
    assert progress.sums == sorted(progress.sums)
    assert len(progress.sums) > 2 * 5, "more steps than the five shards of a stage"


def test_an_interrupt_is_acknowledged_immediately_with_the_time_of_a_batch(tmp_path):
    progress = Counted()
    with logged(progress, tmp_path, "run") as log, graceful_signals(log.interrupted):
        log.start("encode x", 10, "image")
        time.sleep(0.2)
        log.advance()
        os.kill(os.getpid(), signal.SIGINT)
        assert progress.lines == [
            "stopping after this batch, in about 0.2 s; completed work is kept. Press Ctrl-C again to stop immediately"
        ]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("counts", [({"ok": 1}, {"ok": [1]}), ({"ok": None}, {"ok": None})])
def test_records_with_different_counts_are_rejected(counts):
    records = {shard: ShardRecord(shard=shard, files=[], seconds=0.0, counts=one) for shard, one in enumerate(counts)}
    with pytest.raises(CorruptError, match=r"record of shard 1 .* does not match the others \(count 'ok'\)"):
        merge_counts(records, 2)
