"""Fetching one published file over http or https, whatever happens on the way.

The one rule: a file gets its final name only when its checksum is the known one. Until then it lies beside it as
``NAME.part``, and the next call goes on from there; if what was put together so is wrong, it is fetched once more whole.
"""

import errno
import fcntl
import functools
import hashlib
import http.client
import io
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from lsmix.data.durable import fsync_folder, is_file_at
from lsmix.data.errors import DiskSpaceError, DownloadError, LockedError, RecipeError
from lsmix.data.readers.published_sets import PublishedFile
from lsmix.data.urls import checked_url, is_web
from lsmix.data.waiting import ROUND_SECONDS, bounded, pause, stop_point

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

__all__ = ["LEAST_PROGRESS_BYTES", "Interruption", "Meter", "append_block", "download", "open_web"]

_BLOCK_BYTES = 1 << 18
_TIMEOUT_SECONDS = 30.0  # without a byte
_PATIENCE_SECONDS = 60.0  # spent waiting, with less than so many bytes of the file a second
_LEAST_BYTES_PER_SECOND = 4096
_MOST_OTHER_BYTES = 1 << 20  # headers, trailers, pages that redirect
_PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0)  # before each new attempt; one that gets on begins the row anew
LEAST_PROGRESS_BYTES = 1 << 16  # of an attempt that gets on
_TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])  # statuses that may be gone in a moment

_Answer = TypeVar("_Answer")
_Kind = TypeVar("_Kind", bound=http.client.HTTPConnection)


class Meter(Protocol):
    """Where a download tells how far it is, in bytes."""

    def say(self, message: str) -> None:
        """Tell one line."""

    def start(self, label: str, total: int, unit: str, done: int = 0) -> None:
        """Begin to count to ``total``, of which ``done`` were there before."""

    def advance(self, units: int = 1) -> None:
        """Count what came."""

    def finish(self) -> None:
        """End the count."""


class Interruption(Exception):  # noqa: N818  # no error yet: another attempt may get the rest
    """The connection failed in a way that may pass."""


class _Limits:
    """What a server may still take of time and bytes until it must have sent more of the file.

    The seconds fill up again as the file comes: so a server that sends too slowly, or other things than the file, is given up.
    """

    def __init__(self) -> None:
        self.seconds = _PATIENCE_SECONDS
        self.bytes = _MOST_OTHER_BYTES

    def wait(self, action: Callable[[], _Answer]) -> _Answer:
        """Return what ``action`` returns, and take the time that it needs."""
        if self.seconds <= 0:
            raise TimeoutError(f"the server sends less than {_LEAST_BYTES_PER_SECOND} bytes a second")
        begun = time.monotonic()
        try:
            return action()
        finally:
            self.seconds -= time.monotonic() - begun

    def take(self, count: int) -> None:
        """Count bytes that came, of whatever kind."""
        self.bytes -= count
        if self.bytes < 0:
            raise TimeoutError("the server sends headers or trailers without end")

    def came(self, count: int, next_bytes: int) -> None:
        """Count bytes of the file; before the next ``next_bytes`` of it, no more than some others may come."""
        self.seconds = min(_PATIENCE_SECONDS, self.seconds + count / _LEAST_BYTES_PER_SECOND)
        self.bytes = next_bytes + _MOST_OTHER_BYTES


class _Stream(io.RawIOBase):
    """What a socket receives, within limits; a stop counts at once."""

    def __init__(self, held: io.RawIOBase, sock: socket.socket, limits: _Limits) -> None:
        self._held = held  # keeps the socket open
        self._sock = sock
        self._limits = limits

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        count = self._limits.wait(lambda: self._receive(buffer))
        self._limits.take(count)
        return count

    def _receive(self, buffer: "Buffer") -> int:
        end = time.monotonic() + min(_TIMEOUT_SECONDS, self._limits.seconds)
        while True:
            stop_point()
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._sock.settimeout(min(left, ROUND_SECONDS))
            with suppress(TimeoutError):
                return self._sock.recv_into(buffer)

    def close(self) -> None:
        super().close()
        self._held.close()


class _Response(http.client.HTTPResponse):
    def __init__(self, limits: _Limits, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._limits = limits
        self.fp = io.BufferedReader(_Stream(self.fp.detach(), sock, limits))

    def read1(self, n: int = -1) -> bytes:
        """Return some bytes of the body."""
        self._limits.came(0, max(n, 0))
        block = super().read1(n)
        self._limits.came(len(block), 0)
        return block


def _limited(kind: type[_Kind], limits: _Limits) -> Callable[..., _Kind]:
    """Return what makes connections of a kind, http or https, that keep to limits."""

    def connection(host: str, **options: Any) -> _Kind:
        made = kind(host, **options)
        connect = made.connect
        made.response_class = functools.partial(_Response, limits)  # type: ignore[assignment]  # called, never asked for its type
        made.connect = lambda: limits.wait(lambda: bounded(connect, min(_TIMEOUT_SECONDS, limits.seconds)))  # type: ignore[method-assign]
        return made

    return connection


class _Web(urllib.request.AbstractHTTPHandler):
    """Opens http and https, all redirects of a request within the same limits."""

    def __init__(self) -> None:
        super().__init__()
        self._limits = _Limits()

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_limited(http.client.HTTPConnection, self._limits), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_limited(http.client.HTTPSConnection, self._limits), req)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to the web only."""

    def redirect_request(  # the signature of urllib
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        try:
            reason = "" if is_web(checked_url(newurl)) else "that is no place on the web."
        except RecipeError as error:
            reason = str(error)
        if reason:
            raise DownloadError(
                f"{req.full_url!r} leads to {newurl[:200]!r}, which was not followed: {reason} Fetch the file by hand."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except urllib.error.HTTPError:  # which holds the answer, and is closed by who catches it
            raise
        except BaseException:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def download(file: PublishedFile, target: Path, meter: Meter) -> None:
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
        pieced |= _fetch_all(file, stream, part, meter)
        got = _checksum(stream, file.algorithm)
        if got != file.checksum and pieced:
            meter.say(f"{file.name}: what was put together from several attempts is wrong; fetching it anew")
            stream.truncate(0)
            _fetch_all(file, stream, part, meter)
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
    with part.open("a+b", buffering=0) as stream:  # unbuffered, so that a full disk is noticed where it is handled
        try:
            fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, another run may have finished the file or thrown it away.
            mine = is_file_at(part, stream)
        except BlockingIOError:
            mine = False
        if not mine:
            raise LockedError(f"{str(part)!r} is being fetched by another run. Wait for it to end, or stop it.")
        try:
            yield stream
        finally:
            if os.fstat(stream.fileno()).st_size == 0:
                part.unlink(missing_ok=True)


def _fetch_all(file: PublishedFile, stream: IO[bytes], part: Path, meter: Meter) -> bool:
    """Append what is missing, attempt by attempt; return whether it took more than one."""
    failures = attempts = 0
    while True:
        before = os.fstat(stream.fileno()).st_size
        attempts += 1
        try:
            _fetch_rest(file, stream, part, meter)
        except Interruption as reason:
            came = os.fstat(stream.fileno()).st_size
            failures = 1 if came >= before + LEAST_PROGRESS_BYTES else failures + 1
            if failures > len(_PAUSES_SECONDS):
                kept = f"{came} bytes are kept at {str(part)!r}; run again to go on." if came else "Run again later."
                raise DownloadError(f"{file.url!r} cannot be fetched: {reason}. {kept}") from reason
            seconds = _PAUSES_SECONDS[failures - 1]
            meter.say(f"{file.name}: {reason}; going on in {seconds:g} s")
            pause(seconds)
        else:
            return attempts > 1


def _fetch_rest(file: PublishedFile, stream: IO[bytes], part: Path, meter: Meter) -> None:
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
        meter.start(file.name, total, "byte", done=have)
        try:
            have = _copy(answer, stream, have, file.size or total, meter, file)
        finally:
            meter.finish()
        if total and have < total:
            raise Interruption(f"the connection ended after {have} of {total} bytes")


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


def append_block(stream: IO[bytes], block: bytes, name: str) -> None:
    """Write a block whole to an unbuffered stream; ``name`` is what the file is called in messages.

    Raises:
        DiskSpaceError: the disk is full.
    """
    rest = memoryview(block)
    try:
        while rest:
            rest = rest[stream.write(rest) :]
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(f"the disk became full while {name} came. Free some space, run again.") from error


def _copy(
    answer: http.client.HTTPResponse, stream: IO[bytes], have: int, limit: int, meter: Meter, file: PublishedFile
) -> int:
    while True:
        try:
            block = answer.read1(_BLOCK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise Interruption(_reason(error)) from error
        if not block:
            return have
        have += len(block)
        if limit and have > limit:
            raise DownloadError(
                f"{file.url!r} goes on past the {limit} bytes it should have. Fetch the file elsewhere."
            )
        append_block(stream, block, file.name)
        meter.advance(len(block))


@contextmanager
def open_web(url: str, have: int = 0) -> Iterator[http.client.HTTPResponse | None]:
    """Ask for a file from byte ``have`` on; yield None where the server says that there is no such byte.

    A server that knows nothing of ranges answers with status 200 and the whole file.

    Raises:
        Interruption: it failed in a way that may pass.
        DownloadError: it cannot be fetched; caused by ``urllib.error.HTTPError`` where the server says so.
    """
    opener = urllib.request.OpenerDirector()  # the usual one would also open local files and ftp
    for handler in (
        urllib.request.ProxyHandler(),
        _Web(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    # Without "identity" a server may compress on the way, and then its byte counts are others.
    headers = {"User-Agent": "lsmix", "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)  # noqa: S310  # only http and https get here
    except DownloadError:  # of a redirect; it is an OSError too
        raise
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                answer = None
            elif error.code in _TRANSIENT:
                raise Interruption(f"the server answers {error.code} {error.reason}") from error
            else:
                raise DownloadError(
                    f"{url!r} cannot be fetched: the server answers {error.code} {error.reason}. Check the URL, or "
                    "fetch the file by hand."
                ) from error
    except (
        ValueError
    ) as error:  # of a redirect: urllib takes apart what the server sends before it asks whether to go there
        raise DownloadError(f"{url!r} leads to what is no URL: {error}. Fetch the file by hand.") from error
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise DownloadError(f"{url!r} cannot be trusted: {_reason(error)}. Fetch the file by hand.") from error
        raise Interruption(_reason(error)) from error
    if answer is None:
        yield None
        return
    with answer:
        yield answer


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__


def _checksum(stream: IO[bytes], algorithm: str) -> str:
    stream.seek(0)
    digest = hashlib.new(algorithm, usedforsecurity=False)  # md5 is what authors publish; it finds damage, not forgery
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()
