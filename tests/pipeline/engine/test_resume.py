"""After a kill, an interruption or an error, the next run continues and gives the bytes of an undisturbed one."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from factory import content_digests
from forked import forked

from lsmix.data.artifact import read_manifest
from lsmix.data.progress import graceful_signals, stop_point
from lsmix.pipeline.api import run
from lsmix.pipeline.stages.registry import STAGES


def remove_from(workspace, stage):
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(workspace / later, ignore_errors=True)  # not every recipe has every stage


def test_a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_an_undisturbed_one(
    tiny_recipe, finished_workspace, tiny_workspace
):
    remove_from(tiny_workspace, "train-glow")
    *kills, last = forked("killed", tiny_recipe, tiny_workspace, "train")
    assert set(kills) == {-signal.SIGKILL}
    assert last == 0
    assert len(kills) > 8, "the kills must be spread over all stages"
    for stage in ("train-glow", "encode", "mix", "train"):
        assert content_digests(tiny_workspace, stage)
        assert content_digests(tiny_workspace, stage).items() <= content_digests(finished_workspace, stage).items()
        for folder in (tiny_workspace / stage).iterdir():
            names = {file.path for file in read_manifest(folder).files} | {"manifest.json"}
            assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == names


@pytest.mark.parametrize(("stage", "flush"), [("train-glow", 3), ("encode", 9), ("train", 1), ("report", 3)])
def test_a_failed_write_ends_in_one_sentence_and_leaves_nothing_half_written(
    small_recipe, small_finished, small_workspace, command, monkeypatch, stage, flush
):
    remove_from(small_workspace, stage)
    before = {path: path.stat().st_mtime_ns for path in small_workspace.rglob("*") if path.is_file()}
    words = (stage, small_recipe, "--workspace", small_workspace, "--device", "cpu", "-q")
    real, left = os.fsync, [flush]

    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(handle)

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fsync)
        result = command(*words)
    assert left[0] <= 0
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith(f"error: {os.strerror(errno.EIO)}")
    assert "Traceback" not in result.err
    made = [path for path in small_workspace.rglob("*") if path.is_file() and path not in before]
    assert not [path for path in made if path.suffix == ".part"]
    assert not [path for path in made if path.name == "manifest.json" and path.parent.parent.name == stage]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert command(*words).code == 0
    if stage != "report":  # the page says how long things took
        assert content_digests(small_workspace, stage).items() <= content_digests(small_finished, stage).items()


def test_ctrl_c_exits_with_130_and_prints_the_command_to_continue(tiny_recipe, tiny_workspace):
    remove_from(tiny_workspace, "train-glow")
    words = [sys.executable, "-m", "lsmix", "encode", tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu"]
    # Many iterations, so that the signal comes in time on any machine.
    long = [*words, "--set", "flow.training.iterations=100000", "--set", "flow.evaluate_every=100000"]
    process = subprocess.Popen(long, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tiny_workspace.glob("train-glow/*/work/checkpoint.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1].startswith("interrupted; what is done is kept. Go on with: lsmix encode ")
    assert "Traceback" not in err


def interrupt_after(calls):
    """Return a stand-in for ``stop_point`` that sends this process SIGINT at one of its calls."""

    def stop():
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGINT)
        stop_point()

    return stop


@pytest.mark.parametrize(
    ("stage", "module", "calls"),
    [
        ("train-glow", "data.loaders.ranks", 7),
        ("mix", "pipeline.engine.executor", 8),
        ("train", "data.loaders.ranks", 2),
    ],
)
def test_an_interrupted_stage_keeps_what_is_done_and_continues(
    tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch, stage, module, calls
):
    remove_from(tiny_workspace, stage)
    words = (stage, tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(f"lsmix.{module}.stop_point", interrupt_after(calls))
        result = command(*words)
    assert result.code == 130
    assert result.err.splitlines()[-1].startswith(f"interrupted; what is done is kept. Go on with: lsmix {stage} ")
    assert command(*words).code == 0
    assert content_digests(tiny_workspace, stage) == content_digests(finished_workspace, stage)


@pytest.fixture
def python_s_own_handler():
    """Let SIGINT raise KeyboardInterrupt, which it does not in processes that a shell started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_s_own_handler")
def test_the_first_signal_waits_for_a_safe_point_and_the_second_does_not():
    with graceful_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop_point()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    stop_point()  # a request does not outlive the work that it was meant for
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_seconds_of_all_sessions_count(small_recipe, small_workspace, command, monkeypatch):
    remove_from(small_workspace, "train-glow")
    with monkeypatch.context() as interrupted:
        interrupted.setattr("lsmix.data.loaders.ranks.stop_point", interrupt_after(2))
        command("train-glow", small_recipe, "--workspace", small_workspace)
    (folder,) = (small_workspace / "train-glow").iterdir()
    (folder / "work" / "seconds.json").write_text("1000.0")
    run(small_recipe, workspace=small_workspace, stage="train-glow", device="cpu")
    assert 1000 < read_manifest(folder).seconds < 1100


@pytest.mark.parametrize("damage", [b"", b"\xff" * 8])
def test_a_damaged_checkpoint_is_named_with_what_to_do(small_recipe, small_workspace, command, damage):
    folder = next(path for path in (small_workspace / "train-glow").iterdir() if "evaluator" not in path.name)
    (folder / "manifest.json").unlink()
    (folder / "work").mkdir()
    checkpoint = folder / "work" / "checkpoint.safetensors"
    checkpoint.write_bytes(damage)
    words = ("train-glow", small_recipe, "--workspace", small_workspace)
    result = command(*words)
    assert result.code == 5
    assert f"checkpoint {str(checkpoint)!r} is damaged" in result.err.splitlines()[-1]
    assert "Remove it to restart training" in result.err
    checkpoint.unlink()
    assert command(*words).code == 0
