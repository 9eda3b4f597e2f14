"""Validation of URLs, and HTTP requests with limits on time and size."""

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
    """Return whether a checked URL begins with http:// or https://."""
    return url.partition("://")[0] in _WEB


def file_path(url: str) -> Path | None:
    """Return the path of a ``file://`` URL, or None for other URLs. Raises RecipeError like ``checked_url``."""
    checked = checked_url(url)
    return Path(unquote(urlsplit(checked).path)) if checked.startswith("file://") else None


def checked_url(url: str) -> str:
    """Validate a URL and return it with its scheme in lower case.

    Raises:
        RecipeError: The scheme is not supported, the URL chains file systems with "::", or it is not well formed.

    Example:
        >>> from lsmix.data.web import checked_url
        >>> checked_url("S3://bucket/pool")
        's3://bucket/pool'
    """
    shown = repr(url[:_MOST_SHOWN])
    scheme, _, rest = url.partition("://")
    if not url.isprintable() or url != url.strip():
        raise RecipeError(f"{shown} contains control characters, or spaces at its ends. Remove them from the URL.")
    if scheme.lower() not in _SCHEMES:
        kind = "chained file systems ('::')" if "::" in scheme else f"the scheme {scheme[:_MOST_SHOWN]!r}"
        raise RecipeError(f"{shown} uses {kind}, which lsmix does not support. Use one of {', '.join(_SCHEMES)}.")
    normal = f"{scheme.lower()}://{rest}"
    try:
        parts = urlsplit(normal)
        if parts.scheme in _WEB:
            _ = parts.port, (parts.hostname or "").encode("idna")  # raise here rather than in the request
    except ValueError as error:
        raise RecipeError(f"{shown} is not a valid URL: {error}. Check its host and port.") from error
    user, _, host = parts.netloc.rpartition("@")
    if user and (":" in user or parts.scheme in _WEB):
        raise RecipeError(
            f"a URL of {host!r} contains a user name or password, which would appear in messages and logs. Remove it, and "
            "put credentials into the provider's own settings."
        )
    if "::" in (rest[len(parts.netloc) :] if parts.scheme in _WEB else rest):  # "[::1]" is a host
        raise RecipeError(f"{shown} contains '::', which chains file systems. Use a plain URL.")
    if parts.scheme == "file":
        _check_file(parts, shown)
    elif not (parts.hostname if parts.scheme in _WEB else parts.netloc) and parts.scheme != "memory":
        what = "host" if parts.scheme in _WEB else "bucket"
        raise RecipeError(f"{shown} has no {what}. Write it as {parts.scheme}://{what.upper()}/PATH.")
    elif parts.scheme in _WEB and not re.fullmatch(r"[!-~]+", normal):
        raise RecipeError(
            f"{shown} contains spaces or non-ASCII characters. Percent-encode them, such as %20, and write the host as 'xn--…'."
        )
    return normal


def _check_file(parts: SplitResult, shown: str) -> None:
    if parts.netloc not in ("", "localhost"):
        raise RecipeError(f"{shown} names a file on another host. Write file:///path for a local folder.")
    if not parts.path.startswith("/") or parts.query or parts.fragment or "\0" in unquote(parts.path):
        raise RecipeError(f"{shown} is not a valid file URL. Write file:///path, with '%23' for '#' and '%3F' for '?'.")


_TIMEOUT_SECONDS = 30.0  # without receiving a byte
_PATIENCE_SECONDS = 60.0  # of waiting while the file arrives more slowly than the lowest rate
_LEAST_BYTES_PER_SECOND = 4096
_MOST_OTHER_BYTES = 1 << 20  # headers and trailers
_MOST_REDIRECTS = 5
_TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])  # temporary errors
_ABSENT = frozenset([404, 410, 416])  # the file or the requested byte does not exist
_REDIRECTS = frozenset([301, 302, 303, 307, 308])


class TransientError(Exception):  # not an LsmixError: callers catch it and retry
    """The connection failed in a way that may be temporary."""


class _Stream(io.RawIOBase):
    """The raw stream of a socket. An interrupt takes effect immediately.

    Waiting uses up a budget of seconds, and received bytes a budget of bytes; both are refilled as the file arrives. This
    ends connections to servers that send too slowly, or endless headers or trailers.
    """

    def __init__(self, raw: io.RawIOBase, sock: socket.socket) -> None:
        self._raw = raw  # keeps the socket open
        self._sock = sock
        self.seconds = _PATIENCE_SECONDS
        self.bytes = _MOST_OTHER_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "Buffer") -> int:
        start = time.monotonic()
        end = start + min(_TIMEOUT_SECONDS, self.seconds)
        while (left := end - time.monotonic()) > 0:
            stop_point()
            self._sock.settimeout(min(left, ROUND_SECONDS))
            with suppress(TimeoutError):
                count = self._sock.recv_into(buffer)
                self.seconds -= time.monotonic() - start
                self.bytes -= count
                if self.bytes < 0:
                    raise ConnectionError("the server sends endless headers or trailers")
                return count
        raise TimeoutError(
            f"timed out: the server sends nothing, or fewer than {_LEAST_BYTES_PER_SECOND:,} bytes per second"
        )

    def close(self) -> None:
        super().close()
        self._raw.close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._raw = _Stream(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._raw)

    def read1(self, n: int = -1) -> bytes:
        """Return up to ``n`` bytes of the body."""
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
    """Request a file from byte ``have`` on, and yield the response, or None if the file or byte does not exist.

    Only redirects to http and https are followed. Servers without range support send the entire file with status 200.

    Raises:
        TransientError: The request failed in a way that may be temporary.
        DownloadError: The file cannot be downloaded.
    """
    requested = url
    for _ in range(_MOST_REDIRECTS + 1):
        with _request(url, have) as response:
            if response.status not in _REDIRECTS:
                yield response if _has_body(response, url) else None
                return
            url = _redirect_target(url, response.headers.get("Location", ""))
    raise DownloadError(
        f"{requested!r} cannot be downloaded: too many redirects, the last to {url[:_MOST_SHOWN]!r}. Check the URL."
    )


def _request(url: str, have: int) -> http.client.HTTPResponse:
    opener = urllib.request.OpenerDirector()  # the default opener would also open local files and ftp
    opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(_Web())
    # Without "identity" a server may compress the file, and its byte counts would not match.
    headers = {"User-Agent": "lsmix", "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  # only http and https get here
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=_TIMEOUT_SECONDS)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
            raise DownloadError(f"{url!r} is not trusted: {_reason_of(error)}. Download the file manually.") from error
        raise TransientError(_reason_of(error)) from error
    return response


def _has_body(response: http.client.HTTPResponse, url: str) -> bool:
    """Return whether a response contains bytes of the file; False means that the file or byte does not exist."""
    if response.status in (http.client.OK, http.client.PARTIAL_CONTENT):
        return True
    if response.status in _ABSENT:
        return False
    reason = f"the server answers {response.status} {response.reason}"
    if response.status in _TRANSIENT:
        raise TransientError(reason)
    raise DownloadError(f"{url!r} cannot be downloaded: {reason}. Check the URL, or download the file manually.")


def _redirect_target(url: str, location: str) -> str:
    """Return the URL that a redirect leads to."""
    try:
        target = checked_url(quote(urljoin(url, location), safe=string.punctuation))
        if is_web(target):
            return target
        reason = "it is not an http or https URL."
    except ValueError as error:  # from checked_url or urljoin
        reason = str(error)
    raise DownloadError(
        f"{url!r} redirects to {location[:_MOST_SHOWN]!r}, which was not followed: {reason} Download the file manually."
    )


def _reason_of(error: Exception) -> str:
    """Return the reason of a failed request as text."""
    reason = getattr(error, "reason", None) or error
    return str(reason) or type(reason).__name__
