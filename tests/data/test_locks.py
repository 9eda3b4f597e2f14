"""Locks on files: exclusive, shared, free after their holder, and left out with one warning where a file system has none."""

import errno
import fcntl
import warnings

import pytest

from lsmix.data import atomic
from lsmix.data.atomic import locked_file
from lsmix.data.errors import LockedError


def test_a_lock_is_held_alone_and_freed_at_the_end(tmp_path):
    path = tmp_path / "lock"
    with locked_file(path), pytest.raises(LockedError, match="being written by another run"), locked_file(path):
        pass
    with locked_file(path):
        pass


def test_shared_locks_are_held_together_and_keep_out_one_that_is_not(tmp_path):
    path = tmp_path / "lock"
    refused = pytest.raises(LockedError, match="said so")
    with locked_file(path, shared=True), locked_file(path, shared=True), refused, locked_file(path, message="said so"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_gets_one_warning_that_names_the_folder(code, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(atomic, "_warned", set())
    with (
        pytest.warns(RuntimeWarning, match=f"'{tmp_path}' is on a file system without locks"),
        locked_file(tmp_path / "a"),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with locked_file(tmp_path / "b") as stream:
            stream.write(b"goes on")
    assert (tmp_path / "b").read_bytes() == b"goes on"


def test_another_error_of_a_lock_is_raised(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), locked_file(tmp_path / "a"):
        pass
