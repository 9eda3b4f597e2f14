"""Whatever stops a run, the next one goes on and ends with the bytes of an undisturbed one.

A kill is a real one: a child process sends itself SIGKILL while it flushes a file, so that it dies in the middle of a
write or right after one.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lsmix.data.artifact import read_manifest
from lsmix.data.progress import graceful_signals, stop_point
from lsmix.pipeline.api import run
from lsmix.pipeline.stages.registry import STAGES
from lsmix.pipeline.workspace.workspace import Workspace


def roots(workspace, stage):
    return {manifest.cache_key: manifest.content_digest for _, manifest in Workspace(workspace).manifests(stage)}


def remove_from(workspace, stage):
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(workspace / later, ignore_errors=True)  # not every recipe has every stage


# Runs a stage once for each countdown, in a child that dies by SIGKILL when it flushes for the countdown-th time. The
# children are forks of a process that has imported everything and started no thread, so that none inherits a held lock.
KILLED_CHILDREN = """
import json, os, signal, sys
import lsmix.classifiers.training, lsmix.glow.training, lsmix.pipeline.api

recipe, workspace, stage, *countdowns = sys.argv[1:]
codes = []
for countdown in map(int, countdowns):
    child = os.fork()
    if child == 0:
        real, left = os.fsync, [countdown]
        def fsync(handle):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        os.fsync = fsync
        try:
            lsmix.pipeline.api.run(recipe, workspace=workspace, stage=stage, device="cpu")
        finally:
            os._exit(int(left[0] <= 0))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.parametrize(
    ("stage", "flushes"),
    [
        ("ingest", (1, 2, 3)),
        ("train-glow", (1, 2, 4, 9, 11)),  # two a checkpoint: of the file, then of its folder
        pytest.param("encode", (1, 3, 14, 20, 33), marks=pytest.mark.slow),  # in shards, as mix
        ("mix", (2, 27, 55, 90)),
        ("train", (1, 3, 6)),
    ],
)
def test_killed_at_many_places_it_ends_with_the_bytes_of_an_undisturbed_run(
    tiny_recipe, finished_workspace, tiny_workspace, stage, flushes
):
    remove_from(tiny_workspace, stage)
    words = [sys.executable, "-c", KILLED_CHILDREN, tiny_recipe, tiny_workspace, stage, *map(str, flushes)]
    codes = json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert set(codes) <= {0, -signal.SIGKILL}
    killed = codes.count(-signal.SIGKILL)
    assert killed >= min(len(flushes), 3), "the places must lie within the work, or nothing is tested"
    run(tiny_recipe, workspace=tiny_workspace, stage=stage, device="cpu")
    assert roots(tiny_workspace, stage) == roots(finished_workspace, stage)
    for folder in (tiny_workspace / stage).iterdir():
        names = {file.path for file in read_manifest(folder).files} | {"manifest.json"}
        assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == names


@pytest.mark.parametrize(
    ("stage", "flush"), [("ingest", 1), ("train-glow", 3), ("encode", 9), ("mix", 12), ("train", 1), ("report", 3)]
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_ends_in_one_sentence_and_leaves_nothing_half_written(
    tiny_recipe, finished_workspace, tiny_workspace, command, monkeypatch, stage, flush, number
):
    remove_from(tiny_workspace, stage)
    before = {path: path.stat().st_mtime_ns for path in tiny_workspace.rglob("*") if path.is_file()}
    words = (stage, tiny_recipe, "--workspace", tiny_workspace, "--device", "cpu", "-q")
    real, left = os.fsync, [flush]

    def fsync(handle):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        real(handle)

    with monkeypatch.context() as failing:
        failing.setattr(os, "fsync", fsync)
        result = command(*words)
    assert left[0] <= 0
    assert (result.code, result.out) == (1, "")
    assert result.err.splitlines()[-1].startswith(f"error: {os.strerror(number)}")
    assert "Traceback" not in result.err
    made = [path for path in tiny_workspace.rglob("*") if path.is_file() and path not in before]
    assert not [path for path in made if path.suffix == ".part"]
    assert not [path for path in made if path.name == "manifest.json" and path.parent.parent.name == stage]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert command(*words).code == 0
    assert roots(tiny_workspace, stage).items() <= roots(finished_workspace, stage).items()
    if stage != "report":  # the page tells how long things took
        assert roots(tiny_workspace, stage) == roots(finished_workspace, stage)


def test_ctrl_c_exits_with_130_and_the_command_to_go_on_which_does(tiny_recipe, finished_workspace, tiny_workspace):
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
    shutil.rmtree(tiny_workspace / "train-glow")
    assert subprocess.run(words, check=False, capture_output=True).returncode == 0
    assert roots(tiny_workspace, "encode") == roots(finished_workspace, "encode")


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
        ("encode", "pipeline.engine.executor", 8),
        ("mix", "pipeline.engine.executor", 8),
        ("train", "data.loaders.ranks", 2),
    ],
)
def test_an_interrupted_stage_keeps_what_is_done_and_goes_on(
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
    assert roots(tiny_workspace, stage) == roots(finished_workspace, stage)


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


def test_the_seconds_of_all_sessions_count(tiny_recipe, tiny_workspace, command, monkeypatch):
    remove_from(tiny_workspace, "train-glow")
    with monkeypatch.context() as interrupted:
        interrupted.setattr("lsmix.data.loaders.ranks.stop_point", interrupt_after(15))
        command("train-glow", tiny_recipe, "--workspace", tiny_workspace)
    (folder,) = (tiny_workspace / "train-glow").iterdir()
    (folder / "work" / "seconds.json").write_text("1000.0")
    run(tiny_recipe, workspace=tiny_workspace, stage="train-glow", device="cpu")
    assert 1000 < read_manifest(folder).seconds < 1100


@pytest.mark.parametrize("damage", [b"", b"x" * 100, b"\xff" * 8])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tiny_recipe, tiny_workspace, command, damage):
    folder = next((tiny_workspace / "train-glow").iterdir())
    (folder / "manifest.json").unlink()
    (folder / "work").mkdir()
    checkpoint = folder / "work" / "checkpoint.safetensors"
    checkpoint.write_bytes(damage)
    result = command("train-glow", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == 5
    assert f"checkpoint {str(checkpoint)!r} is damaged" in result.err.splitlines()[-1]
    assert "Remove it to start again" in result.err
    checkpoint.unlink()
    assert command("train-glow", tiny_recipe, "--workspace", tiny_workspace).code == 0
