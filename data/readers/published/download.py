"""Download a published file over http or https.

A file gets its final name only when its checksum is right. Until then it is ``NAME.part``, which the next call resumes; if the
checksum of a resumed file is wrong, it is downloaded once more from the beginning.
"""

import hashlib
import http.client
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lsmix.data.atomic import fsync_folder, locked_file
from lsmix.data.errors import DiskSpaceError, DownloadError
from lsmix.data.progress import Progress, pause
from lsmix.data.readers.published_sets import PublishedFile
from lsmix.data.web import LEAST_PROGRESS_BYTES, TransientError, append_block, open_web, reason_of

__all__ = ["download"]

_BLOCK_BYTES = 1 << 18
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each new attempt; progress starts the row again


def download(file: PublishedFile, target: Path, progress: Progress) -> None:
    """Fetch ``file`` to ``target``, going on with what an earlier call left; its folder is made if need be.

    Raises:
        DownloadError: it cannot be fetched, or what came is not it; nothing is at ``target`` then.
        DiskSpaceError: it does not fit on the disk.
        LockedError: another run is fetching it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with _locked(part) as stream:
        pieced = os.fstat(stream.fileno()).st_size > 0
        pieced |= _fetch_all(file, stream, part, progress)
        got = _checksum(stream, file.algorithm)
        if got != file.checksum and pieced:
            progress.info(f"{file.name}: the resumed download is wrong; downloading it again")
            stream.truncate(0)
            _fetch_all(file, stream, part, progress)
            got = _checksum(stream, file.algorithm)
        if got != file.checksum:
            part.unlink()
            raise DownloadError(
                f"{file.url!r} is not the expected file: expected {file.algorithm} {file.checksum}, got {got}. It was "
                "thrown away; check the URL and its checksum, or fetch the file elsewhere."
            )
        os.fsync(stream.fileno())
        part.replace(target)
        fsync_folder(target.parent)


@contextmanager
def _locked(part: Path) -> Iterator[IO[bytes]]:
    """Open the part file to read and append, for this process alone; the lock goes with the process."""
    message = f"{str(part)!r} is being fetched by another run. Wait for it to end, or stop it."
    with locked_file(part, message=message) as stream:  # unbuffered, so that a full disk is noticed where it is handled
        try:
            yield stream
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                part.unlink(missing_ok=True)


def _fetch_all(file: PublishedFile, stream: IO[bytes], part: Path, progress: Progress) -> bool:
    """Append what is missing, attempt by attempt; return whether it took more than one."""
    failures = attempts = 0
    while True:
        before = os.fstat(stream.fileno()).st_size
        attempts += 1
        try:
            _fetch_rest(file, stream, part, progress)
        except TransientError as reason:
            came = os.fstat(stream.fileno()).st_size
            failures = 1 if came >= before + LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(_PAUSES_SECONDS):
                kept = f"{came} bytes are kept at {str(part)!r}; run again to go on." if came else "Run again later."
                raise DownloadError(f"{file.url!r} cannot be fetched: {reason}. {kept}") from reason
            seconds = _PAUSES_SECONDS[failures - 1]
            progress.info(f"{file.name}: {reason}; going on in {seconds:g} s")
            pause(seconds)
        else:
            return attempts > 1


def _fetch_rest(file: PublishedFile, stream: IO[bytes], part: Path, progress: Progress) -> None:
    have = os.fstat(stream.fileno()).st_size
    if file.size and have == file.size:
        return
    with open_web(file.url, have) as answer:
        if answer is None:  # there is nothing behind what we have: it is whole, or of another file
            return
        have, total = _where(file, have, answer)
        _check_size(file, part, have, total)
        if not have:  # only now, since an answer of the wrong size is no reason to throw away what we have
            stream.truncate(0)
        progress.start(file.name, total, "byte", done=have)
        try:
            have = _copy(answer, stream, have, file.size or total, progress, file)
        finally:
            progress.finish()
        if total and have < total:
            raise TransientError(f"the connection ended after {have} of {total} bytes")


def _where(file: PublishedFile, have: int, answer: http.client.HTTPResponse) -> tuple[int, int]:
    """Return at which byte the answer begins, ``have`` or 0, and how many the file has (0 if it does not say)."""
    length = answer.length or 0
    if answer.status == http.client.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have:
            raise DownloadError(
                f"{file.url!r} answers with another part than the one asked for, from byte {have}. Fetch the file by hand."
            )
        return have, have + length if found[2] == "*" else int(found[2])
    return 0, length  # the server sends the file whole, from its beginning


def _check_size(file: PublishedFile, part: Path, have: int, total: int) -> None:
    if file.size and total and total != file.size:
        raise DownloadError(
            f"{file.url!r} is not the expected file: expected {file.size} bytes, the server has {total}. "
            "Fetch the file elsewhere."
        )
    free = shutil.disk_usage(part.parent).free
    if (file.size or total) - have > free:
        raise DiskSpaceError(
            f"{file.name} needs {(file.size or total) - have} more bytes in {str(part.parent)!r}, where {free} are free. "
            "Free some space, or choose another data.path."
        )


def _copy(
    answer: http.client.HTTPResponse, stream: IO[bytes], have: int, limit: int, progress: Progress, file: PublishedFile
) -> int:
    while True:
        try:
            block = answer.read1(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(reason_of(error)) from error
        if not block:
            return have
        have += len(block)
        if limit and have > limit:
            raise DownloadError(
                f"{file.url!r} goes on past the {limit} bytes it should have. Fetch the file elsewhere."
            )
        append_block(stream, block, file.name)
        progress.advance(len(block))


def _checksum(stream: IO[bytes], algorithm: str) -> str:
    stream.seek(0)
    digest = hashlib.new(algorithm, usedforsecurity=False)  # md5 is what authors publish; it finds damage, not forgery
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
