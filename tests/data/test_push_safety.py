"""Push writes only to an empty folder or one with an unfinished push of the same artifact."""

import shutil
import subprocess
import sys

import fsspec
import pytest
from factory import reseal, write_pool
from places import TESTS, Meter

from lsmix.data.artifact import read_manifest
from lsmix.data.errors import RecipeError
from lsmix.data.sharing import transfer
from lsmix.data.sharing.transfer import push_artifact
from lsmix.pipeline.api import pull, push, verify


@pytest.fixture
def artifact(tmp_path):
    return write_pool(tmp_path / "mine")


@pytest.fixture(params=["folder", "memory"])
def place(request, tmp_path):
    return str(tmp_path / "there") if request.param == "folder" else f"memory://{tmp_path.name}/there"


def put(place, name, text):
    with fsspec.open(f"{place}/{name}", "w", auto_mkdir=True) as file:
        file.write(text)


def listing(place):
    fs, root = fsspec.url_to_fs(place)
    return {path.removeprefix(root): fs.cat_file(path) for path in fs.find(root)}


@pytest.mark.parametrize("name", ["README.md", "deep/folder/x"])
def test_a_push_does_not_change_a_folder_with_other_content(artifact, place, name):
    put(place, name, "of its owner")
    before = listing(place)
    with pytest.raises(RecipeError, match="is not empty: it contains"):
        push(artifact, place)
    assert listing(place) == before


def test_a_push_does_not_change_an_unfinished_push_of_another_artifact(artifact, place, tmp_path):
    other = write_pool(tmp_path / "other", seed=1)
    with pytest.raises(KeyboardInterrupt):
        push_artifact(other, place, Meter(stop_at=5000))
    before = listing(place)
    with pytest.raises(RecipeError, match="contains an unfinished push of another artifact"):
        push(artifact, place)
    assert listing(place) == before
    push(other, place)
    assert pull(place, tmp_path / "here").content_digest == read_manifest(other).content_digest


def test_a_push_is_resumed_after_an_edit_of_the_readme(artifact, place):
    reseal(artifact)
    with pytest.raises(KeyboardInterrupt):
        push_artifact(artifact, place, Meter(stop_at=5000))
    (artifact / "README.md").write_text("another one")
    push_artifact(artifact, place, Meter())
    assert verify(place)["edited"] == []


def test_a_killed_push_is_resumed_and_leaves_no_claim(artifact, tmp_path):
    target = str(tmp_path / "stick")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom places import Meter\n"
        "from lsmix.data.sharing.transfer import push_artifact\n"
        "class Kill(Meter):\n"
        "  def advance(self, units=1):\n"
        "    self.count += units\n"
        "    if self.count > 6000: os._exit(9)\n"
        "push_artifact(Path(sys.argv[1]), sys.argv[2], Kill())"
    )
    assert subprocess.run([sys.executable, "-c", code, artifact, target], cwd=TESTS, check=False).returncode == 9
    assert push(artifact, target).moved_files < len(read_manifest(artifact).files)
    assert not (tmp_path / "stick/work").exists()
    assert verify(target)["content_digest"] == read_manifest(artifact).content_digest


def test_a_push_stopped_after_the_manifest_is_complete_and_the_next_removes_the_claim(artifact, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    kind = type(transfer.open_remote(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(kind, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            push(artifact, str(tmp_path / "stick"))
    assert verify(tmp_path / "stick")["content_digest"] == read_manifest(artifact).content_digest
    assert push(artifact, str(tmp_path / "stick")).moved_files == 0
    assert not (tmp_path / "stick/work").exists()


def test_one_of_two_concurrent_pushes_is_rejected(artifact, place, tmp_path, monkeypatch):
    other, in_parallel = write_pool(tmp_path / "other", seed=1), transfer._in_parallel

    def with_concurrent_push(batches, *args):
        if len(batches) > 1:  # the claim of the first push has been sent
            claim = tmp_path / "claim"
            claim.write_bytes(transfer._claim_of(read_manifest(other)))
            transfer.open_remote(place).write("work/push.json", claim)
        return in_parallel(batches, *args)

    monkeypatch.setattr(transfer, "_in_parallel", with_concurrent_push)
    with pytest.raises(RecipeError, match="contains an unfinished push of another artifact"):
        push(artifact, place)
    assert not [name for name in listing(place) if name.endswith("manifest.json")]


@pytest.mark.parametrize("linked", ["pool.zarr", "pool.zarr/image", "work"])
def test_a_push_does_not_follow_links_to_folders(artifact, tmp_path, linked):
    target, outside = tmp_path / "stick", tmp_path / "outside"
    with pytest.raises(KeyboardInterrupt):
        push_artifact(artifact, str(target), Meter(stop_at=1))
    outside.mkdir()
    shutil.rmtree(target / linked, ignore_errors=True)
    (target / linked).parent.mkdir(exist_ok=True)
    (target / linked).symlink_to(outside)
    if linked == "work":
        (outside / "push.json").write_bytes(transfer._claim_of(read_manifest(artifact)))
    before = sorted(outside.rglob("*"))
    with pytest.raises(RecipeError, match="is a link, and lsmix does not write through links to folders"):
        push(artifact, str(target))
    assert sorted(outside.rglob("*")) == before


def test_a_push_does_not_overwrite_the_target_of_a_link(artifact, tmp_path):
    target, mine = tmp_path / "stick", tmp_path / "README.md"
    with pytest.raises(KeyboardInterrupt):
        push_artifact(artifact, str(target), Meter(stop_at=1))
    mine.write_text("mine")
    (target / "README.md").unlink(missing_ok=True)
    (target / "README.md").symlink_to(mine)
    with pytest.raises(RecipeError, match="it is a link, and lsmix replaces only regular files"):
        push(artifact, str(target))
    assert mine.read_text() == "mine"


def test_a_new_repository_of_the_hub_counts_as_empty(artifact, place):
    put(place, ".gitattributes", "*.bin filter=lfs")
    push(artifact, place)
    assert push(artifact, place).moved_files == 0


def test_a_push_to_a_file_is_rejected(artifact, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="is not a folder"):
        push(artifact, str(tmp_path / "file"))
