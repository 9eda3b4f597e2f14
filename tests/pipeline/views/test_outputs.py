"""Output paths given by the user: only regular files are overwritten, everything else is rejected with its kind."""

import os
import stat
from pathlib import Path

import pytest

from lsmix.data.atomic import atomic_path, write_atomic
from lsmix.data.errors import RecipeError


def _pipe(path):
    os.mkfifo(path)


def _link(path):
    target = path.with_name("elsewhere")
    target.write_bytes(b"somebody's")
    path.symlink_to(target)


def _device(path):
    path.symlink_to("/dev/null")  # a link like /dev/stdout, since creating a device needs root


KINDS = {"pipe": _pipe, "link": _link, "broken link": lambda path: path.symlink_to("nothing"), "device": _device}


@pytest.mark.parametrize("make", [*KINDS.values(), Path.mkdir])
def test_atomic_writes_replace_regular_files_only(tmp_path, make):
    path = tmp_path / "output"
    make(path)
    before = path.lstat()
    with pytest.raises(RecipeError, match=r"lsmix replaces only regular files\. Choose another path"):
        write_atomic(path, b"ours")
    after = path.lstat()
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"output", "elsewhere"}
    path.rmdir() if stat.S_ISDIR(after.st_mode) else path.unlink()
    write_atomic(path, b"old")
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"new")
    assert path.read_bytes() == b"new"


@pytest.fixture
def pool(invented_pool):
    """Return a small pool."""
    return invented_pool()


@pytest.fixture
def no_renames(monkeypatch):
    """Make a broken check fail the test instead of replacing a device file of this machine."""
    monkeypatch.setattr(Path, "replace", lambda *_: pytest.fail("a device was about to be replaced"))


@pytest.mark.usefixtures("no_renames")
def test_dev_null_is_rejected_and_stays_a_device():
    with pytest.raises(RecipeError, match="is a device"):
        write_atomic(Path("/dev/null"), b"")
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["--image", "--html"])
def test_show_rejects_an_output_that_is_not_a_regular_file(invented_pool, tmp_path, command, option, kind):
    target = tmp_path / "output"
    KINDS[kind](target)
    before = target.lstat()
    result = command("show", invented_pool(), option, target)
    assert (result.code, "lsmix replaces only regular files" in result.err) == (1, True)
    assert target.lstat().st_ino == before.st_ino


@pytest.mark.usefixtures("pool", "no_renames")
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/null"])
def test_show_rejects_the_terminal_and_devices(pool, command, path):
    before = os.lstat(path)
    result = command("show", pool, "--image", path)
    assert (result.code, "lsmix replaces only regular files" in result.err) == (1, True)
    assert os.lstat(path).st_ino == before.st_ino


def test_an_invalid_figure_path_is_rejected_before_any_work(tiny_recipe, tmp_path, command):
    out = tmp_path / "fig4.png"
    os.mkfifo(out)
    result = command("figure", "fig4", tiny_recipe, "--workspace", tmp_path / "runs", "--out", out)
    assert (result.code, "a pipe or a socket" in result.err) == (1, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [("export", "--format", "hdf5"), ("pull",)])
def test_a_broken_link_is_not_replaced_by_a_folder(invented_pool, tmp_path, command, words):
    target = tmp_path / "dest"
    target.symlink_to("nothing")
    name, *options = words
    assert command(name, invented_pool(), target, *options).code == 1
    assert target.is_symlink()


def test_a_broken_link_is_not_replaced_by_a_rebuilt_pool(tiny_workspace, tmp_path, command):
    (pool,) = (tiny_workspace / "mix").glob("lsmix-*")
    (flow,) = (tiny_workspace / "train-glow").iterdir()
    (data,) = (tiny_workspace / "ingest").iterdir()
    for name in ("out", "out.part"):
        link = tmp_path / name
        link.symlink_to("nothing")
        result = command("rebuild", pool, "--data", data, "--flow", flow, "--out", tmp_path / "out")
        assert (result.code, "Remove it" in result.err or "remove it" in result.err) == (1, True)
        assert link.is_symlink()
        link.unlink()
