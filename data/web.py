"""URLs that are accepted, and HTTP requests with limits of time and size."""

import http.client
import io
import re
import socket
import ssl
import string
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from lsmix.data.errors import DownloadError, RecipeError
from lsmix.data.progress import ROUND_SECONDS, bounded, stop_point

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

__all__ = [
    "TransientError",
    "checked_url",
    "file_path",
    "is_web",
    "open_web",
]

_WEB: Final = ("http", "https")
_SCHEMES: Final = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3", "s3a")
_MOST_SHOWN: Final = 200


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
        if parts.scheme in _WEB:
            _ = parts.port, (parts.hostname or "").encode("idna")  # which raise what a request would
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
    elif not (parts.hostname if parts.scheme in _WEB else parts.netloc) and parts.scheme != "memory":
        what = "host" if parts.scheme in _WEB else "bucket"
        raise RecipeError(f"{shown} names no {what}. Write it as {parts.scheme}://{what.upper()}/PATH.")
    elif parts.scheme in _WEB and not re.fullmatch(r"[!-~]+", normal):
        raise RecipeError(
            f"{shown} holds spaces or characters beyond ASCII. Write them percent-encoded, such as %20, and the host as 'xn--…'."
        )
    return normal


def _check_file(parts: SplitResult, shown: str) -> None:
    if parts.netloc not in ("", "localhost"):
        raise RecipeError(f"{shown} names a file on another host. Write file:///path for a folder of this one.")
    if not parts.path.startswith("/") or parts.query or parts.fragment or "\0" in unquote(parts.path):
        raise RecipeError(f"{shown} is not a valid file URL. Write file:///path, with '%23' for '#' and '%3F' for '?'.")


_TIMEOUT_SECONDS = 30.0  # without a byte
_PATIENCE_SECONDS = 60.0  # spent waiting, with less than so many bytes of the file a second
_LEAST_BYTES_PER_SECOND = 4096
_MOST_OTHER_BYTES = 1 << 20  # headers, trailers
_MOST_REDIRECTS = 5
_TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])  # statuses that may be gone in a moment
_ABSENT = frozenset([404, 410, 416])  # there is no such file, or no such byte
_REDIRECTS = frozenset([301, 302, 303, 307, 308])


class TransientError(Exception):  # no error yet: another attempt may get the rest
    """The connection failed in a way that may pass."""


class _Stream(io.RawIOBase):
    """What a socket receives; a stop counts at once.

    The server has some seconds and some bytes until it must have sent more of the file; both fill up again as the file comes.
    So a server that sends too slowly, or other things than the file, is given up.
    """

    def __init__(self, held: io.RawIOBase, sock: socket.socket) -> None:
        self._held = held  # keeps the socket open
        self._sock = sock
        self.seconds = _PATIENCE_SECONDS
        self.bytes = _MOST_OTHER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        begun = time.monotonic()
        end = begun + min(_TIMEOUT_SECONDS, self.seconds)
        while (left := end - time.monotonic()) > 0:
            stop_point()
            self._sock.settimeout(min(left, ROUND_SECONDS))
            with suppress(TimeoutError):
                count = self._sock.recv_into(buffer)
                self.seconds -= time.monotonic() - begun
                self.bytes -= count
                if self.bytes < 0:
                    raise ConnectionError("the server sends headers or trailers without end")
                return count
        raise TimeoutError(
            f"timed out: the server sends nothing, or less than {_LEAST_BYTES_PER_SECOND} bytes a second"
        )

    def close(self) -> None:
        super().close()
        self._held.close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._raw = _Stream(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._raw)

    def read1(self, n: int = -1) -> bytes:
        """Return some bytes of the body."""
        self._raw.bytes = max(n, 0) + _MOST_OTHER_BYTES
        block = super().read1(n)
        self._raw.seconds = min(_PATIENCE_SECONDS, self._raw.seconds + len(block) / _LEAST_BYTES_PER_SECOND)
        return block


class _Connection(http.client.HTTPConnection):
    response_class = _Response

    def connect(self) -> None:
        bounded(super().connect, _TIMEOUT_SECONDS)


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response

    def connect(self) -> None:
        bounded(super().connect, _TIMEOUT_SECONDS)


class _Web(urllib.request.AbstractHTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, req)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


@contextmanager
def open_web(url: str, have: int = 0) -> Iterator[http.client.HTTPResponse | None]:
    """Ask for a file from byte ``have`` on; yield None where the server says that there is no such file or byte.

    Redirects are followed, but to the web only. A server that knows nothing of ranges answers with status 200 and the whole file.

    Raises:
        TransientError: it failed in a way that may pass.
        DownloadError: it cannot be fetched.
    """
    asked = url
    for _ in range(_MOST_REDIRECTS + 1):
        with _asked(url, have) as answer:
            if answer.status not in _REDIRECTS:
                yield answer if _is_there(answer, url) else None
                return
            url = _target(url, answer.headers.get("Location", ""))
    raise DownloadError(
        f"{asked!r} cannot be fetched: it leads on and on, last to {url[:_MOST_SHOWN]!r}. Check the URL."
    )


def _asked(url: str, have: int) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()  # the usual one would also open local files and ftp
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(_Web())
    # Without "identity" a server may compress on the way, and then its byte counts are others.
    headers = {"User-Agent": "lsmix", "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  # only http and https get here
    try:
        answer: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise DownloadError(f"{url!r} cannot be trusted: {_reason_of(error)}. Fetch the file by hand.") from error
        raise TransientError(_reason_of(error)) from error
    return answer


def _is_there(answer: http.client.HTTPResponse, url: str) -> bool:
    """Tell whether an answer brings bytes of the file, or says that there are none."""
    if answer.status in (http.client.OK, http.client.PARTIAL_CONTENT):
        return True
    if answer.status in _ABSENT:
        return False
    said = f"the server answers {answer.status} {answer.reason}"
    if answer.status in _TRANSIENT:
        raise TransientError(said)
    raise DownloadError(f"{url!r} cannot be fetched: {said}. Check the URL, or fetch the file by hand.")


def _target(url: str, location: str) -> str:
    """Return the URL that a redirect leads to."""
    try:
        target = checked_url(quote(urljoin(url, location), safe=string.punctuation))
        if is_web(target):
            return target
        reason = "it is not on the web."
    except ValueError as error:  # a RecipeError, or what urljoin raises
        reason = str(error)
    raise DownloadError(
        f"{url!r} leads to {location[:_MOST_SHOWN]!r}, which was not followed: {reason} Fetch the file by hand."
    )


def _reason_of(error: Exception) -> str:
    """Return why a request failed, as text."""
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__
