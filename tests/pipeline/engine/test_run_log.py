"""A run logs what it does as JSON lines, and shows its progress to ``status`` in another process."""

import json
import os
import shutil
import subprocess
import sys
import time

import msgspec
import pytest

import lsmix
from lsmix.data.progress import NullProgress
from lsmix.pipeline.config.results import read_log
from lsmix.pipeline.engine.progress import Throughput
from lsmix.pipeline.engine.run_log import LOG_FOLDER, logged
from lsmix.pipeline.workspace.locks import artifact_lock, working_owners


def lines(workspace):
    return [
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((workspace / LOG_FOLDER).glob("*.jsonl"))
    ]


def test_a_run_writes_a_log_only_if_it_makes_an_artifact(tiny_recipe, tiny_workspace, command):
    shutil.rmtree(tiny_workspace / LOG_FOLDER)
    for stage in ("ingest", "encode"):
        shutil.rmtree(tiny_workspace / stage)
    words = ("encode", tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu")
    assert command(*words).code == 0
    (log,) = lines(tiny_workspace)
    assert (log[0]["event"], log[0]["command"], log[0]["recipe"]) == ("begin", "run", str(tiny_recipe))
    assert (log[-1]["event"], log[-1]["outcome"]) == ("end", "done")
    assert sorted(line["shard"] for line in log if line["event"] == "shard") == [0, 1, 2, 3, 4]
    assert [line["label"] for line in log if line["event"] == "artifact"] == ["ingest tiny", "encode tiny"]
    finish = next(line for line in log if line["event"] == "finish" and line["label"] == "encode tiny")
    assert (finish["done"], finish["total"], finish["seconds_left"]) == (300, 300, 0.0)
    assert all(line["at"].startswith("20") for line in log)
    assert command(*words).code == 0
    assert len(lines(tiny_workspace)) == 1


class Events(NullProgress):
    def __init__(self):
        self.seen = []

    def event(self, kind, **facts):
        self.seen.append((kind, facts))


def test_trainers_report_each_step_and_epoch_as_logged(small_recipe, small_workspace):
    shutil.rmtree(small_workspace / LOG_FOLDER)
    for stage in ("train-glow", "train"):
        shutil.rmtree(small_workspace / stage)
    events = Events()
    made = lsmix.run(small_recipe, stage="train", workspace=small_workspace, device="cpu", progress=events)
    steps = [facts for kind, facts in events.seen if kind == "step"]
    assert steps
    logged_steps = map(msgspec.to_builtins, read_log(made["train-glow"].folder))
    assert [{**line, "label": "train-glow small"} for line in logged_steps] == steps
    metrics = json.loads((made["train"].folder / "metrics.json").read_text(encoding="utf-8"))
    epochs = [facts for kind, facts in events.seen if kind == "epoch"]
    assert [{**one, "label": f"train {made['train'].name}"} for one in metrics] == epochs
    assert not any(line["event"] == "step" for log in lines(small_workspace) for line in log)


def test_an_error_and_an_interruption_end_the_log(small_recipe, small_workspace, command, monkeypatch):
    shutil.rmtree(small_workspace / "encode")
    words = ("encode", small_recipe, "--workspace", small_workspace, "--device", "cpu")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsmix.pipeline.stages.encode.write_latent_shard", fail)
    assert command(*words).code == 1
    assert lines(small_workspace)[-1][-1]["outcome"] == "OSError"
    assert "No space left" in lines(small_workspace)[-1][-1]["error"]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lsmix.pipeline.stages.encode.write_latent_shard", interrupt)
    assert command(*words).code == 130
    assert lines(small_workspace)[-1][-1]["outcome"] == "interrupted"


def test_a_run_continues_if_its_log_cannot_be_written(tiny_recipe, tmp_path, command):
    (tmp_path / LOG_FOLDER).write_text("a file in the way")
    assert command("ingest", tiny_recipe, "--workspace", tmp_path).code == 0


def test_old_logs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("lsmix.pipeline.engine.run_log._MAX_LOGS", 3)
    for number in range(5):
        with logged(NullProgress(), tmp_path, "run", number=number) as log:
            log.start("x", 2, "image")
            log.advance()
    assert [log[0]["number"] for log in lines(tmp_path)] == [2, 3, 4]


def test_status_shows_progress_and_time_left_of_a_run_in_another_process(tiny_recipe, tiny_workspace, command):
    shutil.rmtree(tiny_workspace / "train-glow")
    settings = ("--set", "flow.training.iterations=100000", "--set", "flow.evaluate_every=100000")
    where = (tiny_recipe, "--workspace", tiny_workspace, *settings)
    words = [sys.executable, "-m", "lsmix", "train-glow", *where, "-q", "--device", "cpu"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        try:
            deadline, node = time.monotonic() + 90, {}
            while not node.get("per_second"):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
                content = json.loads(command("status", *where, "--json").out)["content"]
                node = next(item for item in content if item["stage"] == "train-glow")
            assert node["state"] == "under-way"
            assert 0 < node["done"] < node["total"] == 100000
            assert node["unit"] == "iteration"
            assert node["seconds_left"] > 0
            assert f"process {process.pid}" in node["why"]
            assert "iterations/s" in node["why"]
            assert " left; user " in node["why"]
        finally:
            process.kill()
    assert "unfinished  train-glow tiny" in command("status", *where).out, "the note of a killed run must be ignored"


def test_each_process_that_holds_a_shared_lock_is_listed(tmp_path):
    with (
        artifact_lock(tmp_path, "0" * 12, "x", shared=True) as one,
        artifact_lock(tmp_path, "0" * 12, "x", shared=True) as two,
    ):
        one.write(done=10, total=40, unit="image", per_second=2.0, seconds_left=15.0)
        two.write(done=20, total=30, unit="image", per_second=1.0, seconds_left=10.0)
        assert [owner.done for owner in working_owners(tmp_path, "0" * 12)] == [10, 20]
    assert working_owners(tmp_path, "0" * 12) == []


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"user": "\x1b[2J"}', msgspec.json.encode({"process": -1})]
)
def test_damaged_notes_are_ignored(tmp_path, content):
    (tmp_path / ".locks").mkdir()
    (tmp_path / ".locks" / f"{'0' * 12}.x.owner.json").write_bytes(content)
    assert working_owners(tmp_path, "0" * 12) == []


def test_control_characters_in_a_note_do_not_reach_the_terminal(tmp_path):
    (tmp_path / ".locks").mkdir()
    note = {"user": "\x1b[2J", "host": os.uname().nodename + "x", "process": 1, "since": "\n"}
    (tmp_path / ".locks" / f"{'0' * 12}.x.owner.json").write_bytes(msgspec.json.encode(note))
    (owner,) = working_owners(tmp_path, "0" * 12)
    assert str(owner).isprintable()


def test_the_speed_counts_only_work_of_this_run(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("lsmix.pipeline.engine.progress.time.monotonic", lambda: now[0])
    throughput = Throughput(100, done=60)
    assert throughput.seconds_left is None
    now[0] += 5
    throughput.advance(10)
    assert throughput.to_dict() == {"done": 70, "total": 100, "per_second": 2.0, "seconds_left": 15.0}
