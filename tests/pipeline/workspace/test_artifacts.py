"""Artifacts: the manifest is written last, damage of every kind is found; locks, disk space and garbage collection."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from collections import namedtuple

import msgspec
import pytest

from lsmix.data.artifact import read_manifest
from lsmix.data.atomic import add_checksum, dump_checksummed
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, DiskSpaceError, FormatError, LockedError
from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.glow.checkpoint import load_flow
from lsmix.pipeline.api import plan, run, verify
from lsmix.pipeline.engine.garbage import collect_garbage
from lsmix.pipeline.engine.status import recipe_status
from lsmix.pipeline.workspace.locks import artifact_lock
from lsmix.pipeline.workspace.workspace import Workspace

# A fork is the fastest way to get another process. It only takes a lock, so the threads of this process do not matter.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

# For each kind of artifact, a file whose loss must be noticed, and the function that opens the artifact.
PARTS = {
    "ingest": ("dataset.h5", open_dataset),
    "train-glow": ("glow.safetensors", load_flow),
    "encode": ("latents.zarr/z/c/1/0", open_latents),
    "mix": ("pool.zarr/image/c/0/0/0/0", open_pool),
    "train": ("metrics.json", None),
    "report": ("report.html", None),
}


def first_folder(workspace, stage):
    return sorted((workspace / stage).iterdir())[0]


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (flip_a_bit, "is damaged: expected sha256"),
    "a truncated file": (
        lambda path: os.truncate(path, path.stat().st_size - 1),
        r"is damaged: expected [\d,]+ bytes, got",
    ),
    "an empty file": (lambda path: os.truncate(path, 0), r"is damaged: expected [\d,]+ bytes, got 0"),
    "a missing file": (lambda path: path.unlink(), "is missing; manifest.json lists it with"),
    "an extra file": (lambda path: path.with_name("extra").write_bytes(b"x"), "is not listed in manifest.json"),
    "a dangling link": (
        lambda path: (path.unlink(), path.symlink_to("nothing")),
        "is missing; manifest.json lists it with",
    ),
}


# All combinations of file and damage are tested in tests/system/faults/test_damage.py.
@pytest.mark.parametrize(("stage", "damage"), list(zip(PARTS, DAMAGES, strict=True)))
def test_verify_finds_any_damage_in_any_kind_of_artifact(small_workspace, command, stage, damage):
    folder = first_folder(small_workspace, stage)
    assert verify(folder)["files"] > 0
    damage_file, message = DAMAGES[damage]
    damage_file(folder / PARTS[stage][0])
    with pytest.raises(CorruptError, match=message):
        verify(folder)
    result = command("verify", folder)
    assert (result.code, result.out, result.err.count("\n")) == (5, "", 1)


@pytest.mark.parametrize(
    ("stage", "damage"),
    [
        ("ingest", "a truncated file"),
        ("train-glow", "an empty file"),
        ("encode", "a missing file"),
        ("mix", "a truncated file"),
    ],
)
def test_opening_finds_a_wrong_size(small_workspace, stage, damage):
    folder = first_folder(small_workspace, stage)
    name, open_it = PARTS[stage]
    open_it(folder)
    DAMAGES[damage][0](folder / name)
    with pytest.raises(CorruptError, match=r"is missing|is damaged: expected [\d,]+ bytes"):
        open_it(folder)


@pytest.mark.parametrize("stage", ["ingest", "train-glow", "encode", "mix", "train"])
def test_a_run_notices_a_wrong_size_and_force_reruns_the_stage(small_recipe, small_workspace, command, stage):
    folder = first_folder(small_workspace, stage)
    digest = read_manifest(folder).content_digest
    os.truncate(folder / PARTS[stage][0], 1)
    before = snapshot(small_workspace)
    result = command("run", small_recipe, "--workspace", small_workspace)
    assert result.code == 5
    assert f"{PARTS[stage][0]}' is damaged: expected" in result.err.splitlines()[-1]
    assert snapshot(small_workspace) == before
    status = command("status", small_recipe, "--workspace", small_workspace)
    assert status.code == 0
    assert "damaged" in status.out
    assert command(stage, small_recipe, "--workspace", small_workspace, "--device", "cpu", "--force").code == 0
    assert verify(folder)["content_digest"] == digest, "the same recipe must give the same bytes"


def test_a_newer_format_is_rejected_with_its_version(small_recipe, small_workspace, command):
    path = first_folder(small_workspace, "mix") / "manifest.json"
    bare = b"{\n" + path.read_bytes().split(b"\n", 2)[2]  # without the checksum
    path.write_bytes(add_checksum(bare.replace(b'"format_version": 1', b'"format_version": 2')))
    with pytest.raises(FormatError, match=r"has format 2; this version of lsmix reads format 1\. Use a newer lsmix"):
        verify(path.parent)
    result = command("run", small_recipe, "--workspace", small_workspace)
    assert result.code == 1
    assert "has format 2; this version of lsmix reads format 1" in result.err.splitlines()[-1]


def test_a_damaged_manifest_is_reported_as_damage(small_recipe, small_workspace, command):
    path = first_folder(small_workspace, "encode") / "manifest.json"
    for content in (b"", b"{", b"[]", b"\xff", b'{"format_version": 1}', b'{"format_version": "1"}'):
        path.write_bytes(content)
        run_words = ("run", small_recipe, "--workspace", small_workspace)
        for words in (("verify", path.parent), run_words, ("show", path.parent)):
            result = command(*words)
            assert result.code == 5, (content, result)
            assert "manifest.json' is damaged" in result.err.splitlines()[-1]


def test_a_renamed_artifact_is_rejected(tiny_recipe, tiny_workspace, command):
    first, second = sorted((tiny_workspace / "mix").iterdir())
    shutil.rmtree(second)
    first.rename(second)
    result = command("run", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == 5
    assert "contains another artifact: its manifest says mix" in result.err


def test_without_its_manifest_an_artifact_is_unfinished_work(small_recipe, small_workspace, command):
    folder = first_folder(small_workspace, "encode")
    root = read_manifest(folder).content_digest
    (folder / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: it is not an artifact, or it is unfinished"):
        verify(folder)
    assert "unfinished" in command("status", small_recipe, "--workspace", small_workspace).out
    assert run(small_recipe, workspace=small_workspace, device="cpu")["encode"].manifest.content_digest == root


def test_the_manifest_is_written_after_everything_else(small_recipe, tmp_path, monkeypatch):
    from lsmix.pipeline.engine import runner

    seen = []

    def watch(folder, manifest):
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        seen.append("manifest.json" not in present and {file.path for file in manifest.files} <= present)
        write(folder, manifest)

    write = runner.write_manifest
    monkeypatch.setattr(runner, "write_manifest", watch)
    run(small_recipe, workspace=tmp_path / "runs", stage="ingest")
    assert seen == [True]


def test_work_files_left_by_a_kill_after_the_manifest_was_written_are_removed(small_recipe, small_workspace):
    work = first_folder(small_workspace, "encode") / "work"
    (work / "ledger").mkdir(parents=True)
    (work / "ledger" / "000000.json").write_bytes(b"{}")
    verify(work.parent)  # not part of the artifact, so not damage
    run(small_recipe, workspace=small_workspace, device="cpu")
    assert not work.exists()


def test_partial_files_left_by_a_kill_do_not_get_into_the_artifact(small_recipe, small_finished, small_workspace):
    folder = first_folder(small_workspace, "encode")
    (folder / "manifest.json").unlink()
    (folder / "latents.zarr" / "z" / "c" / ".0.x1y2z3.part").write_bytes(b"half of a shard")
    again = run(small_recipe, workspace=small_workspace, stage="encode", device="cpu")["encode"]
    assert again.manifest.files == read_manifest(first_folder(small_finished, "encode")).files


def hold_lock(workspace, key, ready, done):
    with artifact_lock(workspace, key, "mix lsmix"):
        ready.set()
        done.wait(30)


@pytest.fixture
def other_run(tiny_workspace):
    """Return a process that holds the lock of the first pool, and the pool's key."""
    key = first_folder(tiny_workspace, "mix").name.rpartition("-")[2]
    fork = multiprocessing.get_context("fork")
    ready, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold_lock, args=(tiny_workspace, key, ready, done))
    process.start()
    assert ready.wait(10)
    yield process, key
    done.set() if process.is_alive() else None
    process.join()


def test_a_lock_in_use_names_its_owner_and_the_lock_of_a_dead_owner_is_free(
    tiny_recipe, tiny_workspace, command, other_run
):
    process, key = other_run
    shutil.rmtree(first_folder(tiny_workspace, "mix"))
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == LockedError.exit_code == 4
    last = result.err.splitlines()[-1]
    assert "is being made by another run (user " in last
    assert f"host {os.uname().nodename}, process {process.pid}, since 20" in last
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with artifact_lock(tiny_workspace, key, "mix lsmix"):
        pass


def test_a_workspace_in_use_can_be_inspected(tiny_recipe, tiny_workspace, command, other_run):
    for words in (("status", tiny_recipe), ("run", tiny_recipe, "--dry-run"), ("gc", tiny_recipe)):
        assert command(*words, "--workspace", tiny_workspace).code == 0


def test_gc_keeps_artifacts_that_are_being_made(tiny_recipe, tiny_workspace, command, other_run):
    folder = first_folder(tiny_workspace, "mix")
    result = command("gc", tiny_recipe, "--workspace", tiny_workspace, "--delete", "--set", "latents.seed=5")
    assert result.code == 0
    assert folder.is_dir()


def test_too_little_space_is_noticed_before_anything_starts(tiny_recipe, tiny_workspace, command, monkeypatch):
    shutil.rmtree(tiny_workspace / "mix")
    before = snapshot(tiny_workspace)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 1000))
    result = command("mix", tiny_recipe, "--workspace", tiny_workspace)
    assert result.code == DiskSpaceError.exit_code == 1
    last = result.err.splitlines()[-1]
    assert re.match(r"error: mix lsmix needs about \d+\.\d kB in", last)
    assert "Free some space, for example with 'lsmix gc', or choose another '--workspace'" in last
    assert {path for path in snapshot(tiny_workspace) if ".locks" not in path.parts} <= before.keys()
    assert not (tiny_workspace / "mix").exists()


def garbage(recipe, workspace, *overrides, delete=False):
    _, nodes, place = plan(recipe, workspace=workspace, overrides=overrides)
    return collect_garbage(nodes, place, delete=delete)


def test_gc_lists_and_removes_only_what_no_recipe_needs(tiny_recipe, tiny_workspace, command):
    alpha = "pools.lsmix.alpha=0.5"
    run(tiny_recipe, workspace=tiny_workspace, stage="mix", device="cpu", overrides=[alpha])
    pools = set((tiny_workspace / "mix").iterdir())
    assert len(pools) == 3
    (unwanted,) = garbage(tiny_recipe, tiny_workspace)
    assert unwanted.bytes > 0
    assert not unwanted.removed
    assert set((tiny_workspace / "mix").iterdir()) == pools, "listing must not remove anything"
    before = snapshot(tiny_workspace)
    result = command("gc", tiny_recipe, "--workspace", tiny_workspace, "--delete", "--json")
    assert json.loads(result.out)["content"][0]["removed"]
    assert {str(folder) for folder in pools - set((tiny_workspace / "mix").iterdir())} == {unwanted.folder}
    kept = {path for path in before if not path.is_relative_to(unwanted.folder)}
    assert kept <= snapshot(tiny_workspace).keys()
    assert garbage(tiny_recipe, tiny_workspace) == []


def test_gc_keeps_unfinished_work_that_is_needed(small_recipe, small_workspace):
    folder = first_folder(small_workspace, "report")
    (folder / "manifest.json").unlink()
    assert garbage(small_recipe, small_workspace, delete=True) == []
    assert folder.is_dir()


def test_gc_keeps_artifacts_whose_keys_are_unknown_because_an_input_is_missing(small_recipe, small_workspace):
    shutil.rmtree(small_workspace / "encode")
    assert garbage(small_recipe, small_workspace, delete=True) == []


def test_gc_keeps_folders_that_lsmix_did_not_make(small_recipe, small_workspace, tmp_path):
    (small_workspace / "mix" / "my-notes").mkdir()
    others = tmp_path / "others"
    others.mkdir()
    (others / "manifest.json").write_text("theirs")
    (small_workspace / "mix" / "shared-0123456789ab").symlink_to(others)
    assert garbage(small_recipe, small_workspace, delete=True) == []
    assert (others / "manifest.json").exists()
    assert (small_workspace / "mix" / "my-notes").is_dir()


def test_status_names_the_field_that_differs(tiny_recipe, tiny_workspace):
    def why(*overrides):
        _, nodes, place = plan(tiny_recipe, workspace=tiny_workspace, overrides=overrides)
        return {f"{node.stage} {node.name}": (node.state, node.why) for node in recipe_status(nodes, place)}

    assert set(why().values()) == {("cached", "up to date")}
    changed = why("pools.lsmix.alpha=0.5")
    assert changed["mix lsmix"] == ("to-run", "alpha 0.4 → 0.5")
    assert changed["train lsmix-seed0"] == ("waits", "waits for mix lsmix")
    assert changed["train baseline-seed0"] == ("cached", "up to date")
    assert why("flow.training.warmup=3")["train-glow tiny"] == ("to-run", "training.warmup 10 → 3")


def test_an_artifact_is_found_under_any_name(small_recipe, small_workspace):
    result = run(small_recipe, workspace=small_workspace, device="cpu", overrides=["name=other"])
    assert all(item.cached for item in result.built)


def test_a_trained_flow_in_another_folder_is_the_same_input(tiny_recipe, tiny_workspace, tmp_path):
    flow = first_folder(tiny_workspace, "train-glow")
    moved = tmp_path / "elsewhere" / "a flow"
    shutil.copytree(flow, moved)
    shutil.rmtree(tiny_workspace / "train-glow")
    result = run(tiny_recipe, workspace=tiny_workspace, device="cpu", overrides=[f"flow.path={moved}"])
    assert all(item.cached for item in result.built)
    manifest = msgspec.structs.replace(read_manifest(moved), stage="mix", files=[])
    (moved / "manifest.json").write_bytes(dump_checksummed(manifest))
    with pytest.raises(
        FileNotFoundError, match=r"is not a flow: it is an artifact of the stage 'mix'\. Name one of 'train-glow'"
    ):
        run(tiny_recipe, workspace=tiny_workspace, overrides=[f"flow.path={moved}"])


def test_workspace_lists_complete_artifacts_only(tiny_workspace):
    place = Workspace(tiny_workspace)
    assert len(list(place.manifests("mix"))) == 2
    (first_folder(tiny_workspace, "mix") / "manifest.json").write_bytes(b"{")
    assert len(list(place.manifests("mix"))) == 1
