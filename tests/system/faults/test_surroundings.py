"""Signals, concurrent runs, locks of dead processes, a wrong clock, and moved or read-only workspaces."""

import json
import os
import re
import shutil
import signal
import socket
from pathlib import Path

import pytest
from driver import COUNT, READ_ONLY, SIGNAL

from lsmix.data.artifact import read_manifest
from lsmix.pipeline.stages.registry import STAGES

pytestmark = pytest.mark.faults

YEAR = 365 * 24 * 3600
INTERRUPTED = "interrupted; what is done is kept. Go on with: lsmix "
# These commands stop at a safe point after a signal. All other commands end immediately; SIGTERM kills them.
RUNS = ("train-glow", "encode", "mix", "train", "naturalness")


def scene_of(workspace, recipe, words, made=STAGES, kept=()):
    return {
        "words": [*map(str, words), str(recipe), "--workspace", str(workspace), "--device", "cpu", "-q"],
        "within": workspace,
        "made": [workspace / name for name in (*made, ".locks")],
        "kept": [workspace / name for name in kept],
    }


def digests(workspace):
    return {path.parent.name: read_manifest(path.parent).content_digest for path in workspace.glob("*/*/manifest.json")}


def age(folder, seconds):
    """Move the timestamps of all files and folders back by ``seconds``, or forward if negative."""
    for path in [folder, *folder.rglob("*")]:
        facts = path.stat()
        os.utime(path, (facts.st_atime - seconds, facts.st_mtime - seconds))


def check_up_to_date(command, recipe, workspace):
    status = command("status", recipe, "--workspace", workspace, "--check")
    assert (status.code, status.err) == (0, ""), status
    result = command("run", recipe, "--workspace", workspace)
    assert result.code == 0
    assert "0 of 8 artifacts made, 8 already up to date" in result.out


# Signals


@pytest.mark.slow
@pytest.mark.parametrize("stage", RUNS)
def test_after_a_signal_at_any_call_a_run_succeeds_or_exits_with_130_and_the_next_run_resumes(
    small_recipe, small_workspace, trials, stage
):
    for later in STAGES[STAGES.index(stage) + 1 :]:
        shutil.rmtree(small_workspace / later)
    scene = scene_of(small_workspace, small_recipe, [stage], [stage], STAGES[: STAGES.index(stage)])
    wanted = {"mode": SIGNAL, "numbers": [signal.SIGTERM, signal.SIGINT], "stride": 5}
    ((undisturbed, *each),) = trials(**scene, trials=[wanted])
    codes = []
    for trial in each:
        first = trial["first"]
        codes.append(first.get("code"))
        if first.get("code") == 0:
            assert first["outcome"] == undisturbed["outcome"]
        elif "signal" in first:  # the signal came before or after the work
            assert first["signal"] == signal.SIGTERM
        else:
            assert first["code"] == 130
            assert first["err"].splitlines()[-1].startswith(INTERRUPTED + stage), first["err"]
            assert "Traceback" not in first["err"]
            assert not [name for name in trial["left"] if name.endswith(".part")]
        assert trial["changed"] == []
        assert trial["again"]["outcome"] == undisturbed["outcome"]
        assert trial["parts"] == []
    assert 130 in codes


# Concurrent runs


@pytest.mark.parametrize("races", [[3], pytest.param([2] * 15 + [3] * 5 + [6] * 3, marks=pytest.mark.slow)])
def test_concurrent_runs_succeed_or_exit_with_4_and_do_no_harm(small_recipe, small_finished, tmp_path, trials, races):
    scene = scene_of(tmp_path / "runs", small_recipe, ["mix"])
    expected = {name: digest for name, digest in digests(small_finished).items() if "evaluator" not in name}
    ((_, *each),) = trials(**scene, trials=[{"mode": COUNT, "races": races}])
    assert len(each) == len(races)
    codes = []
    for race in each:
        for run in race["runs"]:
            codes.append(run["code"])
            if run["code"] == 4:
                assert run["err"].count("\n") == 1
                # The owner file is written shortly after the lock is taken.
                assert re.search(r"is being made by another run \((user .*|owner unknown)\)", run["err"]), run["err"]
            else:
                assert run["code"] == 0, run
        assert 0 in codes[-len(race["runs"]) :], "one of them must succeed"
        assert race["again"]["code"] == 0
        made = {Path(folder).name: digest for folder, digest in race["again"]["outcome"].items()}
        assert made.items() <= expected.items()
        assert len(made) == 4


@pytest.mark.parametrize("host", [socket.gethostname(), "another-host"])
def test_the_lock_of_a_dead_process_does_not_block_a_run(small_recipe, small_workspace, small_finished, command, host):
    folder = next((small_workspace / "encode").iterdir())
    key = read_manifest(folder).cache_key
    shutil.rmtree(folder)
    locks = small_workspace / ".locks"
    locks.mkdir(exist_ok=True)
    (locks / f"{key}.lock").write_bytes(b"")
    owner = {"user": "somebody", "host": host, "process": 2**22 - 1, "since": "2020-01-01T00:00:00+00:00"}
    (locks / f"{key}.owner.json").write_text(json.dumps(owner))
    assert command("status", small_recipe, "--workspace", small_workspace).code == 0
    assert command("encode", small_recipe, "--workspace", small_workspace, "--device", "cpu").code == 0
    assert digests(small_workspace) == digests(small_finished)
    assert not (locks / f"{key}.owner.json").exists()


# Time


@pytest.mark.slow
def test_a_wrong_or_jumping_clock_does_not_change_digests(
    small_recipe, small_workspace, small_finished, command, trials
):
    for stage in STAGES[2:]:
        shutil.rmtree(small_workspace / stage)
    scene = scene_of(small_workspace, small_recipe, ["run"], STAGES[2:], STAGES[:2])
    clocks = [[-YEAR, -YEAR, 0], [0, -YEAR, 20], [YEAR, 0, 5], [0, -60 * YEAR, 3]]
    ((undisturbed, *each),) = trials(**scene, trials=[{"mode": COUNT, "clocks": clocks}])
    assert len(each) == len(clocks)
    for trial in each:
        first = trial["first"]
        assert first["looks"] > trial["clock"][2], "the clock must be read, otherwise nothing is tested"
        assert (first["code"], first["outcome"]) == (0, undisturbed["outcome"]), first
        assert trial["changed"] == []
        assert "0 of" in trial["again"]["out"]
    assert digests(small_workspace) == digests(small_finished)
    manifests = [read_manifest(path.parent) for path in small_workspace.glob("*/*/manifest.json")]
    assert all(0 <= manifest.seconds < 3600 for manifest in manifests)
    check_up_to_date(command, small_recipe, small_workspace)


@pytest.mark.parametrize("seconds", [YEAR, -YEAR], ids=["older", "in the future"])
def test_modification_times_of_files_do_not_matter(small_recipe, small_workspace, command, seconds):
    age(small_workspace, seconds)
    check_up_to_date(command, small_recipe, small_workspace)
    unfinished = next((small_workspace / "mix").iterdir())
    (unfinished / "manifest.json").unlink()
    before = digests(small_workspace)
    age(unfinished, -2 * seconds)
    assert command("mix", small_recipe, "--workspace", small_workspace, "--device", "cpu").code == 0
    assert before.items() <= digests(small_workspace).items()


# Places


def test_a_workspace_moved_copied_or_linked_is_up_to_date(small_recipe, small_workspace, tmp_path, command):
    moved = small_workspace.rename(tmp_path / "a name with späces")
    check_up_to_date(command, small_recipe, moved)
    (tmp_path / "link").symlink_to(moved)
    check_up_to_date(command, small_recipe, tmp_path / "link")
    recipe = Path(shutil.copytree(small_recipe.parent, tmp_path / "elsewhere")) / small_recipe.name
    check_up_to_date(command, recipe, moved)


def test_unfinished_work_continues_in_a_moved_workspace(
    small_recipe, small_workspace, small_finished, tmp_path, command
):
    folder = next((small_workspace / "mix").iterdir())
    (folder / "manifest.json").unlink()
    (folder / "pool.zarr/image/c/1/0/0/0").unlink()
    moved = small_workspace.rename(tmp_path / "moved")
    assert command("mix", small_recipe, "--workspace", moved, "--device", "cpu").code == 0
    assert digests(moved).items() <= digests(small_finished).items()


def test_a_read_only_workspace_can_be_read_and_commands_that_write_report_that_it_is_read_only(
    small_recipe, small_finished, tmp_path, trials
):
    workspace = Path(shutil.copytree(small_finished, tmp_path / "runs"))
    shutil.rmtree(workspace / ".locks")
    (workspace / ".sources.json").unlink()  # otherwise cached checksums would make a write unnecessary
    of = {stage: str(min((workspace / stage).iterdir())) for stage in STAGES}
    recipe = [str(small_recipe), "--workspace", str(workspace)]
    looks = [
        ["run", *recipe, "--device", "cpu", "-q"],
        ["status", *recipe, "--check"],
        ["status", *recipe, "--json"],
        ["run", *recipe, "--dry-run"],
        ["gc", *recipe],
        *(["verify", folder] for folder in of.values()),
        *(["show", of[stage], "--image", str(tmp_path / f"{stage}.png")] for stage in ("ingest", "mix")),
        ["export", of["mix"], str(tmp_path / "exported"), "--format", "hdf5", "-q"],
        ["push", of["mix"], str(tmp_path / "pushed"), "-q"],
    ]
    writes = [
        ["ingest", *recipe, "--set", "data.seed=1", "-q"],
        ["mix", *recipe, "--set", "pools.mixed.alpha=0.3", "--device", "cpu", "-q"],
        ["mix", *recipe, "--force", "--device", "cpu", "-q"],
        ["card", of["mix"], str(workspace / "card"), "--creator", "Somebody"],
        ["export", of["mix"], str(workspace / "exported"), "--format", "hdf5", "-q"],
        ["push", of["mix"], str(workspace / "pushed"), "-q"],
        ["pull", of["mix"], str(workspace / "pulled"), "-q"],
    ]
    scene = {**scene_of(workspace, small_recipe, ["status"], (), ()), "words": ["status", *recipe]}
    before = {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()}
    ((_, *said),) = trials(**scene, trials=[{"mode": READ_ONLY, "commands": [*looks, *writes]}])
    for words, done in zip([*looks, *writes], said, strict=True):
        assert done["code"] == (words in writes), (words, done)
        if words in writes:
            assert done["hits"] > 0
            *warnings, error = done["err"].splitlines()
            assert all(line.startswith("warning: ") for line in warnings), (words, done)
            assert error.startswith("error: "), (words, done)
            assert re.search("[Rr]ead-only|cannot be written", done["err"]), (words, done)
    assert {path: path.read_bytes() for path in workspace.rglob("*") if path.is_file()} == before
