"""URLs that are accepted, and HTTP requests with limits of time and size."""

import errno
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit

from lsmix.data.errors import DiskSpaceError, DownloadError, RecipeError
from lsmix.data.progress import ROUND_SECONDS, bounded, stop_point

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

__all__ = [
    "LEAST_PROGRESS_BYTES",
    "TransientError",
    "append_block",
    "checked_url",
    "file_path",
    "is_web",
    "open_web",
    "reason_of",
]

_WEB: Final = ("http", "https")
_SCHEMES: Final = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3", "s3a")
_MOST_SHOWN: Final = 200
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_MOST_HOST: Final = 253


def is_web(url: str) -> bool:
    """Tell whether a checked URL names a web server."""
    return url.partition("://")[0] in _WEB


def file_path(url: str) -> Path | None:
    """Return the path that a ``file://`` URL names; None for other URLs. Refuses what ``checked_url`` refuses."""
    checked = checked_url(url)
    return Path(unquote(urlsplit(checked).path)) if checked.startswith("file://") else None


def checked_url(url: str) -> str:
    """Return a URL that lsmix may use, with its scheme in lower case.

    Raises:
        RecipeError: its scheme is not supported, it chains file systems with "::", or it is not well formed.

    Example:
        >>> from lsmix.data.web import checked_url
        >>> checked_url("S3://bucket/pool")
        's3://bucket/pool'
    """
    shown = repr(url[:_MOST_SHOWN])
    scheme, _, rest = url.partition("://")
    if not url.isprintable() or url != url.strip():
        raise RecipeError(f"{shown} holds control characters, or spaces at its ends. Write the URL without them.")
    if scheme.lower() not in _SCHEMES:
        kind = "chained file systems ('::')" if "::" in scheme else f"the scheme {scheme[:_MOST_SHOWN]!r}"
        raise RecipeError(f"{shown} uses {kind}, which lsmix does not read. Supported schemes: {', '.join(_SCHEMES)}.")
    normal = f"{scheme.lower()}://{rest}"
    try:
        parts = urlsplit(normal)
        _ = parts.port if parts.scheme in _WEB else None
    except ValueError as error:
        raise RecipeError(f"{shown} is not a valid URL: {error}. Check its host and port.") from error
    user, _, host = parts.netloc.rpartition("@")
    if user and (":" in user or parts.scheme in _WEB):
        raise RecipeError(
            f"a URL to {host!r} holds a user name or password, which would show in messages and logs. Leave it out; "
            "credentials belong into the provider's own settings."
        )
    if "::" in (rest[len(parts.netloc) :] if parts.scheme in _WEB else rest):  # "[::1]" is a host
        raise RecipeError(f"{shown} holds '::', which chains file systems. lsmix reads plain URLs only.")
    if parts.scheme == "file":
        _check_file(parts, shown)
    elif parts.scheme in _WEB:
        _check_web(parts, shown, normal)
    elif not parts.netloc and parts.scheme != "memory":
        raise RecipeError(f"{shown} names no bucket. Write it as {parts.scheme}://BUCKET/PATH.")
    return normal


def _check_file(parts: SplitResult, shown: str) -> None:
    if parts.netloc not in ("", "localhost"):
        raise RecipeError(f"{shown} names a file on another host. Write file:///path for a folder of this one.")
    if not parts.path.startswith("/") or parts.query or parts.fragment or "\0" in unquote(parts.path):
        raise RecipeError(f"{shown} is not a valid file URL. Write file:///path, with '%23' for '#' and '%3F' for '?'.")


def _check_web(parts: SplitResult, shown: str, url: str) -> None:
    if not re.fullmatch(r"[!-~]+", url):
        raise RecipeError(
            f"{shown} holds spaces or characters beyond ASCII. Write them percent-encoded, such as %20, and the host as 'xn--…'."
        )
    host = parts.hostname or ""
    if parts.netloc.startswith("["):
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise RecipeError(f"{shown} is not a valid URL: {error}. Check its host and port.") from error
        return
    labels = host.removesuffix(".").split(".")
    if len(host) > _MOST_HOST or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise RecipeError(f"{shown} names no valid host: got {host[:_MOST_SHOWN]!r}. Write http://HOST/PATH.")


_TIMEOUT_SECONDS = 30.0  # without a byte
_PATIENCE_SECONDS = 60.0  # spent waiting, with less than so many bytes of the file a second
_LEAST_BYTES_PER_SECOND = 4096
_MOST_OTHER_BYTES = 1 << 20  # headers, trailers, pages that redirect
LEAST_PROGRESS_BYTES = 1 << 16  # of an attempt that gets on
_TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])  # statuses that may be gone in a moment
_Answer = TypeVar("_Answer")
_Kind = TypeVar("_Kind", bound=http.client.HTTPConnection)


class TransientError(Exception):  # no error yet: another attempt may get the rest
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


@contextmanager
def open_web(url: str, have: int = 0) -> Iterator[http.client.HTTPResponse | None]:
    """Ask for a file from byte ``have`` on; yield None where the server says that there is no such byte.

    A server that knows nothing of ranges answers with status 200 and the whole file.

    Raises:
        TransientError: it failed in a way that may pass.
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
                raise TransientError(f"the server answers {error.code} {error.reason}") from error
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
            raise DownloadError(f"{url!r} cannot be trusted: {reason_of(error)}. Fetch the file by hand.") from error
        raise TransientError(reason_of(error)) from error
    if answer is None:
        yield None
        return
    with answer:
        yield answer


def reason_of(error: Exception) -> str:
    """Return why a request failed, as text."""
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__
