"""Fetching one listed file from a place, whatever happens on the way.

The one rule: a file counts as fetched only when what lies on the disk has the listed size and SHA-256; what is wrong is
fetched once more, and then given up.
"""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

from lsmix.data.afar.download import LEAST_PROGRESS_BYTES, Interruption, append_block
from lsmix.data.afar.remote import Place
from lsmix.data.durable import is_file_at
from lsmix.data.errors import CorruptError, DownloadError, LockedError
from lsmix.data.manifest import FileRecord
from lsmix.data.waiting import lock_file, pause, stop_point

__all__ = ["digest_of", "fetch_file", "locked_file", "patiently"]

_BLOCK_BYTES = 1 << 20
_PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt; one that gets on begins the row anew
_Answer = TypeVar("_Answer")


def patiently(what: str, action: Callable[[], _Answer]) -> _Answer:
    """Return what ``action`` returns, trying again after each ``Interruption``, a few times.

    Raises:
        DownloadError: it was interrupted each time; ``what`` begins the message.
    """
    for seconds in (*_PAUSES_SECONDS, None):
        try:
            return action()
        except Interruption as reason:
            if seconds is None:
                raise DownloadError(f"{what} cannot be reached: {reason}. Try again later.") from reason
            pause(seconds)
    raise AssertionError  # unreachable: the last pause is None


def fetch_file(place: Place, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None]) -> int:
    """Complete a file that was fetched in part, or not at all, and check it.

    Args:
        place: where it lies.
        record: its path, size and checksum.
        stream: opened unbuffered to read and append; what is in it is taken for the beginning of the file.
        tell: is told how many bytes came; a negative number when they are thrown away.

    Returns:
        The number of bytes that were fetched.

    Raises:
        CorruptError: what is there is not the listed file; the stream is empty then.
        DownloadError: it cannot be reached; what came so far is in the stream.
        DiskSpaceError: the disk is full.
    """
    fetched, got = 0, ""
    for _ in range(2):
        fetched += _complete(place, record, stream, tell)
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


def _complete(place: Place, record: FileRecord, stream: IO[bytes], tell: Callable[[int], None]) -> int:
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
                stop_point()
                append_block(stream, block[: record.bytes - have], repr(record.path))
                have += len(block)
                fetched += len(block)
                tell(len(block))
            reason: Interruption | str = f"the connection ended after {have} of {record.bytes} bytes"
        except Interruption as error:
            reason = error
        if have < record.bytes:
            failures = 1 if have >= before + LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(_PAUSES_SECONDS):
                raise DownloadError(
                    f"{place.url + '/' + record.path!r} cannot be fetched: {reason}. What came is kept; run again to go on."
                )
            pause(_PAUSES_SECONDS[failures - 1])


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
            if wait:
                lock_file(stream, fcntl.LOCK_EX)
            else:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
