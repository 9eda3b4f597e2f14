"""Remotes for push and pull: a folder, a web server, the Hugging Face Hub, or an object store supported by fsspec.

Callers verify all bytes that they read from a remote. Web servers and folders are read with the standard library; fsspec
is imported for other URLs only.
"""

import functools
import glob
import hashlib
import http.client
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from lsmix.data.atomic import atomic_path, lock_open_file
from lsmix.data.errors import CorruptError, DownloadError, LsmixError, MissingError, RecipeError
from lsmix.data.progress import NoAnswerError, Stopped, bounded, pause
from lsmix.data.web import TransientError, checked_url, file_path, is_web, open_web

__all__ = ["PAUSES_SECONDS", "FsspecFS", "LocalFile", "RemoteFS", "open_remote", "retried", "wait_to_retry"]

_RANGE_BYTES = 8 << 20  # of each request to an object store
_BLOCK_BYTES = 1 << 18
_PATIENCE_SECONDS = 120.0  # timeout of a request to an object store, plus the time for its bytes at the lowest rate
_HUB_PATIENCE_SECONDS = 900.0
_LEAST_BYTES_PER_SECOND = 4096
_MOST_LISTING_BYTES = 4 << 20  # about 10,000 names
_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hub"}  # scheme -> extra of lsmix to install
# lsmix retries and reports failures itself; s3fs and botocore would retry silently for a long time.
_S3_ATTEMPTS: Mapping[str, Any] = {"connect_timeout": 3, "retries": {"max_attempts": 0}}
_LOG = logging.getLogger("lsmix")


class LocalFile(NamedTuple):
    """A local file to upload."""

    path: Path
    sha256: str


class RemoteFS(ABC):
    """Base class of remotes, which store the files of an artifact; it is read-only and cannot list files.

    Paths are relative, with forward slashes. A remote is safe to share among threads. Every method may raise DownloadError
    if the remote refuses a request or cannot be reached after several attempts. Only ``stream`` does not retry: it raises
    ``TransientError`` at the first temporary failure, because its caller can resume after the bytes that it received.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def where(self, path: str) -> str:
        """Return the URL of a file, for messages; path "" is for a URL that names a single file."""
        return f"{self.url}/{path}" if path else self.url

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""

    @abstractmethod
    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """Yield a file of ``size`` bytes from byte ``start`` on, in blocks of at most a few MB.

        Raises:
            CorruptError: The file is missing or has another size.
        """

    @abstractmethod
    def first(self, path: str, count: int) -> bytes | None:
        """Return the first ``count`` bytes of a file, or fewer if it is shorter; None if it does not exist."""

    def read(self, path: str, most_bytes: int) -> bytes:
        """Return the content of a small file.

        Raises:
            MissingError: The file does not exist.
            CorruptError: The file is larger than ``most_bytes``.
        """
        content = self.first(path, most_bytes + 1)
        if content is None:
            raise MissingError(f"{self.where(path)!r} does not exist.")
        if len(content) > most_bytes:
            raise CorruptError(f"{self.where(path)!r} has more than {most_bytes:,} bytes, the limit of lsmix for it.")
        return content

    files_at_once = 1  # files to send with one ``update``; if it is more than one, updates must not run in parallel
    advice = "Try again later."  # ends the message about a remote that cannot be reached

    def missing(self, files: Mapping[str, LocalFile]) -> set[str]:
        """Return the paths at which the remote has no file with the size and checksum of the local one."""
        return {path for path, file in files.items() if not self._has(path, file)}

    def update(self, files: Mapping[str, LocalFile], remove: Iterable[str] = ()) -> None:
        """Upload local files in this order, replacing existing ones, then remove the files in ``remove``."""
        for path, file in files.items():
            self.write(path, file.path)
        for path in remove:
            self.remove(path)

    def _has(self, path: str, file: LocalFile) -> bool:
        size = file.path.stat().st_size
        if self.size(path) != size:
            return False
        digest = hashlib.sha256()
        for block in self.stream(path, 0, size):
            digest.update(block)
        return digest.hexdigest() == file.sha256

    def write(self, path: str, source: Path) -> None:
        """Upload a local file, replacing an existing one."""
        raise self._read_only()

    def remove(self, path: str) -> None:
        """Remove a file if it exists, and its folder on this remote if it is empty then."""
        raise self._read_only()

    def entries(self, folder: str) -> dict[str, bool]:
        """Return the names directly in a folder, and whether each is a folder; empty if the folder does not exist."""
        raise self._read_only()

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every file below a folder, by relative path; empty if it does not exist."""
        raise self._read_only()

    def _read_only(self) -> RecipeError:
        return RecipeError(
            f"{self.url!r} is a web server: lsmix can pull from it, but neither push nor list. Push to the served folder."
        )

    def check_end(self, path: str, got: int | None, size: int) -> None:
        """Raise CorruptError unless ``got``, the size of a file, is ``size``; None is for a missing file."""
        if got is None:
            raise CorruptError(f"{self.where(path)!r} is missing; expected a file of {size:,} bytes. Check the URL.")
        if got != size:
            raise CorruptError(f"{self.where(path)!r} is not the listed file: expected {size:,} bytes, got {got:,}.")


def open_remote(url: Path | str) -> RemoteFS:
    """Return the remote at a URL or path; nothing is read or written yet.

    Raises:
        RecipeError: The URL is not supported or not valid, see ``checked_url``.
        LsmixError: The package that reads URLs of this kind is not installed.
    """
    if isinstance(url, Path) or "://" not in url:
        return _Folder(Path(url))
    if (folder := file_path(url)) is not None:
        return _Folder(folder)
    text = checked_url(url)
    if not text.endswith("://"):  # keep the root of a file system
        text = text.rstrip("/")
    if is_web(text):
        return _Web(text)
    return FsspecFS(text)


PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt
_Params = ParamSpec("_Params")
_Result = TypeVar("_Result")


def retried(method: Callable[Concatenate[Any, _Params], _Result]) -> Callable[Concatenate[Any, _Params], _Result]:
    """Retry a method of a remote after each ``TransientError``; raise DownloadError after the last attempt."""

    @functools.wraps(method)
    def call(remote: Any, /, *args: _Params.args, **options: _Params.kwargs) -> _Result:
        for seconds in (*PAUSES_SECONDS, None):
            try:
                return method(remote, *args, **options)
            except TransientError as reason:
                if seconds is None:
                    raise DownloadError(f"{remote.url!r} cannot be reached: {reason}. {remote.advice}") from reason
                wait_to_retry(remote.url, reason, seconds)
        raise AssertionError  # unreachable: the last pause is None

    return call


def wait_to_retry(where: str, reason: object, seconds: float) -> None:
    """Log why an attempt failed, and wait before the next one."""
    _LOG.warning("%r cannot be reached: %s. Trying again in %g s", where, reason, seconds)
    pause(seconds)


class _Folder(RemoteFS):
    """A local folder, such as one on a USB stick or a mounted share."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def size(self, path: str) -> int | None:
        file = self._folder / path
        return file.stat().st_size if file.is_file() else None

    def first(self, path: str, count: int) -> bytes | None:
        if not (self._folder / path).is_file():
            return None
        with (self._folder / path).open("rb") as file:
            return file.read(count)

    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        self.check_end(path, self.size(path), size)
        with (self._folder / path).open("rb") as file:
            file.seek(start)
            while start < size and (block := file.read(min(_BLOCK_BYTES, size - start))):
                start += len(block)
                yield block

    def write(self, path: str, source: Path) -> None:
        self._refuse_links(path)
        with (
            atomic_path(self._folder / path) as part,
            part.open("wb") as file,
            source.open("rb") as origin,
        ):
            lock_open_file(file, part)
            self._remove_stale_parts(self._folder / path)
            shutil.copyfileobj(origin, file, _BLOCK_BYTES)

    @staticmethod
    def _remove_stale_parts(path: Path) -> None:
        """Remove the temporary files of killed writers of a file, on which no process holds a lock."""
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with suppress(BlockingIOError, FileNotFoundError), part.open("rb") as file:
                lock_open_file(file, part)
                part.unlink(missing_ok=True)

    def _has(self, path: str, file: LocalFile) -> bool:
        self._refuse_links(path)
        return not (self._folder / path).is_symlink() and super()._has(path, file)

    def _refuse_links(self, path: str) -> None:
        """Raise RecipeError if a folder in the path is a link, which would lead writes out of the remote."""
        for parent in Path(path).parents:
            if (self._folder / parent).is_symlink() and parent != Path():
                raise RecipeError(
                    f"{str(self._folder / parent)!r} is a link, and lsmix does not write through links to folders. "
                    "Remove it, or choose another folder."
                )

    def entries(self, folder: str) -> dict[str, bool]:
        home = self._folder / folder
        if home.exists() and not home.is_dir():
            raise RecipeError(f"{str(home)!r} is not a folder. Choose another path.")
        return {path.name: path.is_dir() for path in home.iterdir()} if home.is_dir() else {}

    def sizes(self, folder: str) -> dict[str, int]:
        home = self._folder / folder
        files = (path for path in home.rglob("*") if path.is_file())
        return {path.relative_to(home).as_posix(): path.stat().st_size for path in files}

    def remove(self, path: str) -> None:
        self._refuse_links(path)
        (self._folder / path).unlink(missing_ok=True)
        if "/" in path:
            with suppress(OSError):  # it is not empty
                (self._folder / path).parent.rmdir()


class _Web(RemoteFS):
    """A folder on a web server. Files are resumed with range requests if the server supports them."""

    def _file(self, path: str) -> str:
        if not path:
            return self.url
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(path)}"))

    @retried
    def size(self, path: str) -> int | None:
        with open_web(self._file(path)) as response:
            return None if response is None else response.length

    @retried
    def first(self, path: str, count: int) -> bytes | None:
        with open_web(self._file(path)) as response:
            if response is None:
                return None
            content = b"".join(_blocks(response, count))
            if response.length and len(content) < count:  # bytes that were announced but not received
                raise TransientError(f"the connection ended {response.length:,} bytes early")
            return content

    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        with open_web(self._file(path), start) as response:
            if response is None:  # the file does not exist or has no byte ``start``
                self.check_end(path, self.size(path), size)
                raise TransientError(f"the server has no bytes from {start:,} on")
            partial = response.status == http.client.PARTIAL_CONTENT
            if partial and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise DownloadError(f"{self._file(path)!r}: the server sent another range than the requested one.")
            first = start if partial else 0
            if response.length is not None:
                self.check_end(path, first + response.length, size)
            for block in _blocks(response, size - first):
                yield block[max(start - first, 0) :]
                first += len(block)


def _blocks(response: http.client.HTTPResponse, most_bytes: int) -> Iterator[bytes]:
    while most_bytes > 0:
        try:
            block = response.read1(min(_BLOCK_BYTES, most_bytes))
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(str(error) or type(error).__name__) from error
        if not block:
            return
        most_bytes -= len(block)
        yield block


class FsspecFS(RemoteFS):
    """A folder on a file system of fsspec: s3, gs, az, hf or memory.

    Endpoints and credentials come from fsspec's own configuration, such as FSSPEC_S3_ENDPOINT_URL.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        import fsspec

        kind = url.partition("://")[0]
        # huggingface_hub itself waits until a rate limit has passed.
        self._patience_seconds = _HUB_PATIENCE_SECONDS if kind == "hf" else _PATIENCE_SECONDS
        self._is_s3, options = kind in ("s3", "s3a"), {}
        if self._is_s3:
            self.advice = "Check the endpoint, such as FSSPEC_S3_ENDPOINT_URL, and the network, or try again later."
            given = fsspec.config.conf.get(kind, {}).get("config_kwargs", {})
            options = {"config_kwargs": {**_S3_ATTEMPTS, **given}}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except ImportError as error:
            extra = _EXTRAS.get(kind)
            advice = f"Run: pip install 'lsmix[{extra}]'" if extra else f"{error}"
            raise LsmixError(f"{url!r} needs a package that is not installed. {advice}") from error
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{url!r} is not a location that lsmix can open: {error}.") from error
        if self._is_s3:
            self._fs.retries = 1

    def _file(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if self._root else path

    def _info(self, path: str) -> dict[str, Any] | None:
        try:
            self._fs.invalidate_cache()  # to see files that other processes have uploaded
            found: dict[str, Any] = self._call(path, lambda: self._fs.info(self._file(path)))
        except MissingError:
            return None
        return found if found.get("type") == "file" else None

    @retried
    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes, or None if it does not exist."""
        info = self._info(path)
        return None if info is None else int(info["size"])

    @retried
    def first(self, path: str, count: int) -> bytes | None:
        """Return the first ``count`` bytes of a file, or fewer if it is shorter; None if it does not exist."""
        self._fs.invalidate_cache()
        with suppress(MissingError):
            return self._block(path, 0, count)
        return None

    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """Yield a file of ``size`` bytes from byte ``start`` on."""
        while start < size:
            stop = min(start + _RANGE_BYTES, size)
            try:
                block = self._block(path, start, stop)
            except (MissingError, TransientError):  # file systems raise different errors for a range beyond the end
                self.check_end(path, self.size(path), size)
                raise
            if len(block) != stop - start:
                self.check_end(path, self.size(path), size)
                raise TransientError(f"expected {stop - start:,} bytes, got {len(block):,}")
            start = stop
            yield block

    @retried
    def write(self, path: str, source: Path) -> None:
        """Upload a local file, replacing an existing one."""
        self._call(path, lambda: self._fs.put_file(str(source), self._file(path)), source.stat().st_size)

    def _block(self, path: str, start: int, stop: int) -> bytes:
        block: bytes = self._call(
            path, lambda: self._fs.cat_file(self._file(path), start=start, end=stop), stop - start
        )
        return block

    @retried
    def _has(self, path: str, file: LocalFile) -> bool:
        info = self._info(path)
        if info is None or int(info["size"]) != file.path.stat().st_size:
            return False
        # For objects uploaded in one piece the ETag of S3 is their MD5, which saves reading them back.
        if tag := str(info.get("ETag", "")).strip('"'):
            with file.path.open("rb") as stream:
                if hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag:
                    return True
        return super()._has(path, file)

    @retried
    def entries(self, folder: str) -> dict[str, bool]:
        """Return the names directly in a folder, and whether each is a folder."""
        home = self._file(folder).strip("/")
        found = {
            name.strip("/"): info.get("type") == "directory"
            for name, info in self._listing(folder, recursive=False).items()
        }
        return {name.rpartition("/")[2]: is_folder for name, is_folder in found.items() if name != home}

    @retried
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files below a folder."""
        home = self._file(folder).strip("/")
        found = self._listing(folder, recursive=True)
        return {
            name.strip("/").removeprefix(home).lstrip("/"): int(info["size"])
            for name, info in found.items()
            if info.get("type") == "file" and not name.endswith("/")
        }

    def _listing(self, folder: str, *, recursive: bool) -> dict[str, dict[str, Any]]:
        home, depth = self._file(folder), None if recursive else 1
        self._fs.invalidate_cache()
        try:
            found: dict[str, dict[str, Any]] = self._call(
                folder,
                lambda: self._fs.find(home, maxdepth=depth, withdirs=not recursive, detail=True),
                _MOST_LISTING_BYTES,
            )
        except MissingError:
            return {}
        if not found:
            self._check_bucket()
        return found

    @retried
    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        with suppress(MissingError):
            self._call(path, lambda: self._fs.rm_file(self._file(path)))

    def _call(self, path: str, action: Callable[[], Any], size: int = 0) -> Any:
        """Call the file system with a timeout for ``size`` bytes, and translate its exceptions into those of lsmix."""
        where, seconds = self.where(path), self._patience_seconds + size / _LEAST_BYTES_PER_SECOND
        try:
            return bounded(action, seconds)
        except Stopped:
            raise
        except NoAnswerError as error:  # no retry, because the file system has retried within this timeout
            raise DownloadError(f"{where!r} did not answer within {seconds:.0f} s. Try again later.") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            self._check_bucket()
            raise MissingError(f"{where!r} does not exist: {error}.") from error
        except ImportError as error:
            raise LsmixError(f"{where!r} needs a package that is not installed: {error}.") from error
        except Exception as error:  # every file system has its own exceptions, and most of them are temporary
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, PermissionError) or "Credentials" in reason:
                reason = str(error).rstrip(".") or reason
                raise DownloadError(f"no access to {where!r}: {reason}. Check the URL and your credentials.") from error
            raise TransientError(reason) from error

    def _check_bucket(self) -> None:
        """Raise DownloadError if the S3 bucket does not exist, which S3 reports in the same way as a missing file."""
        if not self._is_s3:
            return
        bucket = self._root.partition("/")[0]
        try:
            bounded(lambda: self._fs.call_s3("head_bucket", Bucket=bucket), self._patience_seconds)
        except FileNotFoundError as error:
            raise DownloadError(
                f"{self.url!r} does not exist: {self._fs.s3.meta.endpoint_url} has no bucket {bucket!r}. Check its name and "
                "the endpoint, or create it."
            ) from error
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:  # noqa: BLE001  # users may have access to the files of a bucket only
            _LOG.debug("%r: cannot check whether the bucket exists: %s", self.url, error)
