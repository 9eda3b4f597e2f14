"""File locks: exclusive, shared, released at the end, and skipped with a warning on file systems without locks."""

import errno
import fcntl
import warnings

import pytest

from lsmix.data import atomic
from lsmix.data.atomic import locked_file
from lsmix.data.errors import LockedError


def test_a_lock_is_exclusive_and_released_at_the_end(tmp_path):
    path = tmp_path / "lock"
    with locked_file(path), pytest.raises(LockedError, match="being written by another run"), locked_file(path):
        pass
    with locked_file(path):
        pass


def test_shared_locks_coexist_and_exclude_an_exclusive_lock(tmp_path):
    path = tmp_path / "lock"
    refused = pytest.raises(LockedError, match="is busy")
    with locked_file(path, shared=True), locked_file(path, shared=True), refused, locked_file(path, message="is busy"):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_causes_one_warning_per_folder(code, tmp_path, monkeypatch):
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
            stream.write(b"continues")
    assert (tmp_path / "b").read_bytes() == b"continues"


def test_other_errors_of_flock_are_raised(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), locked_file(tmp_path / "a"):
        pass
