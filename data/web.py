"""Fetching one published file over http or https, whatever happens on the way.

The one rule: a file gets its final name only when its checksum is the known one. Until then it lies beside it as
``NAME.part``, and the next call goes on from there; if what was put together so is wrong, it is fetched once more whole.
"""

import errno
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import urlsplit

from lsmix.data.errors import DiskSpaceError, DownloadError

__all__ = ["TransientError", "append_block", "open_web", "reason_of"]

_TIMEOUT_SECONDS = 30.0  # without a byte


_TRANSIENT = frozenset([408, 425, 429, 500, 502, 503, 504])  # statuses that may be gone in a moment


class TransientError(Exception):  # no error yet: another attempt may get the rest
    """The connection failed in a way that may pass."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but to the web only."""

    def redirect_request(  # the signature of urllib
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise DownloadError(
                f"{req.full_url!r} leads to {newurl[:200]!r}, which is no place on the web; it was not followed. "
                "Fetch the file by hand."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
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
