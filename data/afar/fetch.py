"""Fetching one listed file from a place, whatever happens on the way.

The one rule: a file counts as fetched only when what lies on the disk has the listed size and SHA-256; what is wrong is
fetched once more, and then given up.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from lsmix.data.afar.download import Interruption, append_block
from lsmix.data.afar.remote import Place
from lsmix.data.durable import is_file_at
from lsmix.data.errors import CorruptError, DownloadError, LockedError
from lsmix.data.manifest import FileRecord

__all__ = ["Stopped", "digest_of", "fetch_file", "locked_file", "patiently"]

_BLOCK_BYTES = 1 << 20
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt; a byte that comes begins the row anew
_Answer = TypeVar("_Answer")


class Stopped(Exception):  # noqa: N818  # no error: whoever asked for it knows why
    """Somebody asked the transfer to stop."""


def patiently(what: str, action: Callable[[], _Answer]) -> _Answer:
    """Return what ``action`` returns, trying again after each ``Interruption``, a few times.

    Raises:
        DownloadError: it was interrupted each time; ``what`` begins the message.
    """
    for pause in (*_PAUSES_SECONDS, None):
        try:
            return action()
        except Interruption as reason:
            if pause is None:
                raise DownloadError(f"{what} cannot be reached: {reason}. Try again later.") from reason
            time.sleep(pause)
    raise AssertionError  # unreachable: the last pause is None


def fetch_file(
    place: Place, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None], stop: Callable[[], bool]
) -> int:
    """Complete a file that was fetched in part, or not at all, and check it.

    Args:
        place: where it lies.
        record: its path, size and checksum.
        stream: opened unbuffered to read and append; what is in it is taken for the beginning of the file.
        tell: is told how many bytes came; a negative number when they are thrown away.
        stop: tells whether to stop.

    Returns:
        The number of bytes that were fetched.

    Raises:
        CorruptError: what is there is not the listed file; the stream is empty then.
        DownloadError: it cannot be reached; what came so far is in the stream.
        DiskSpaceError: the disk is full.
        Stopped: ``stop`` said so.
    """
    fetched, got = 0, ""
    for _ in range(2):
        fetched += _complete(place, record, stream, tell, stop)
        got = digest_of(stream)
        if got == record.sha256:
            os.fsync(stream.fileno())
            return fetched
        stream.truncate(0)
        tell(-record.bytes)
    raise CorruptError(
        f"{place.url + '/' + record.path!r} is damaged: expected sha256 {record.sha256[:12]}…, got {got[:12]}…, twice. "
        "Ask its owner to send it again, or fetch it elsewhere."
    )


def _complete(
    place: Place, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None], stop: Callable[[], bool]
) -> int:
    fetched = failures = 0
    while True:
        have = os.fstat(stream.fileno()).st_size
        if have > record.bytes:  # of another file
            stream.truncate(0)
            have = 0
        if have == record.bytes:
            return fetched
        before = have
        try:
            for block in place.stream(record.path, have, record.bytes):
                if stop():
                    raise Stopped
                append_block(stream, block[: record.bytes - have], repr(record.path))
                have += len(block)
                fetched += len(block)
                tell(len(block))
            reason: Interruption | str = f"the connection ended after {have} of {record.bytes} bytes"
        except Interruption as error:
            reason = error
        if have < record.bytes:
            failures = 1 if have > before else failures + 1
            if failures > len(_PAUSES_SECONDS):
                raise DownloadError(
                    f"{place.url + '/' + record.path!r} cannot be fetched: {reason}. What came is kept; run again to go on."
                )
            time.sleep(_PAUSES_SECONDS[failures - 1])


def digest_of(stream: IO[bytes]) -> str:
    """Return the SHA-256 of all bytes of an open file, in hex; the file is left at its end."""
    digest = hashlib.sha256()
    stream.seek(0)
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked_file(path: Path, *, wait: bool) -> Iterator[IO[bytes]]:
    """Open a file to read and append, made if need be, for this thread of this process alone; yield it unbuffered.

    The lock goes with the process. Where another thread or process holds it, wait, or raise LockedError.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        stream = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Between opening and locking, another may have given the file its final name or removed it.
            mine = is_file_at(path, stream)
        except BlockingIOError as error:
            stream.close()
            raise LockedError(
                f"{str(path.parent)!r} is being written by another run. Wait for it, or stop it."
            ) from error
        except BaseException:
            stream.close()
            raise
        if mine:
            break
        stream.close()
    try:
        yield stream
    finally:
        stream.close()
