"""Which URLs lsmix reads and writes: one check that every URL passes before anything is connected to.

fsspec has file systems that run code from what a server answers or what the URL itself holds ("dask", "reference"), and it
chains file systems with "::". A recipe may hold a URL, so only plain URLs of the kinds below are accepted.
"""

import ipaddress
import re
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from lsmix.data.errors import RecipeError

__all__ = ["checked_url", "is_web"]

_WEB: Final = ("http", "https")
_SCHEMES: Final = ("abfs", "az", "file", "gcs", "gs", "hf", "http", "https", "memory", "s3", "s3a")
_MOST_SHOWN: Final = 200
_HOST_LABEL: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_MOST_HOST: Final = 253


def is_web(url: str) -> bool:
    """Tell whether a checked URL names a web server."""
    return url.partition("://")[0] in _WEB


def checked_url(url: str) -> str:
    """Return a URL that lsmix may use, with its scheme in lower case.

    Raises:
        RecipeError: its scheme is not supported, it chains file systems with "::", or it is not well formed.

    Example:
        >>> from lsmix.data.urls import checked_url
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
