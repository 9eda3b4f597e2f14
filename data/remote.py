"""Places that artifacts are sent to and fetched from: a folder, a web server, the Hub, or an object store that fsspec knows.

Callers check all bytes that they read from a place. Web servers are read with the standard library and folders as files, so
that fsspec is imported for other URLs only.
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

_RANGE_BYTES = 8 << 20  # asked for at once of an object store
_BLOCK_BYTES = 1 << 18
_PATIENCE_SECONDS = 120.0  # that an object store may take for an answer, and for each byte a share of a second on top
_HUB_PATIENCE_SECONDS = 900.0
_LEAST_BYTES_PER_SECOND = 4096
_MOST_LISTING_BYTES = 4 << 20  # some ten thousand names
_EXTRAS = {"s3": "s3", "s3a": "s3", "hf": "hub"}  # what to install for a URL of this kind
# So that the first message comes soon and from here: s3fs and what it calls would try again for long, and say nothing.
_S3_ATTEMPTS: Mapping[str, Any] = {"connect_timeout": 3, "retries": {"max_attempts": 0}}
_LOG = logging.getLogger("lsmix")


class LocalFile(NamedTuple):
    """A file to be sent."""

    path: Path
    sha256: str


class RemoteFS(ABC):
    """A place for the files of an artifact; this base can neither write nor list. Paths are relative, with forward slashes.

    Safe to share among threads. Every method may raise DownloadError: the place refuses, or cannot be reached after some
    attempts. ``stream`` raises ``TransientError`` at the first failure that may pass, since its caller knows what came.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def where(self, path: str) -> str:
        """Return how to call a file in messages; "" is the place itself, for a URL that names one file."""
        return f"{self.url}/{path}" if path else self.url

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return a file's size in bytes; None if it is not there."""

    @abstractmethod
    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """Yield what a file of ``size`` bytes holds from byte ``start`` on, in blocks of at most some MB.

        Raises:
            CorruptError: it is missing, or of another size.
        """

    @abstractmethod
    def first(self, path: str, count: int) -> bytes | None:
        """Return at most the first ``count`` bytes of a file; None if it is not there."""

    def read(self, path: str, most_bytes: int) -> bytes:
        """Return a small file whole.

        Raises:
            MissingError: it is not there.
            CorruptError: it is larger than ``most_bytes``.
        """
        content = self.first(path, most_bytes + 1)
        if content is None:
            raise MissingError(f"{self.where(path)!r} is not there.")
        if len(content) > most_bytes:
            raise CorruptError(
                f"{self.where(path)!r} has more than {most_bytes} bytes, the most that lsmix reads of it."
            )
        return content

    files_at_once = 1  # that one ``update`` should send; if more, updates follow one another
    advice = "Try again later."  # on a place that cannot be reached

    def missing(self, files: Mapping[str, LocalFile]) -> set[str]:
        """Return the paths where no file with the size and the checksum of the local one is stored."""
        return {path for path, file in files.items() if not self._has(path, file)}

    def update(self, files: Mapping[str, LocalFile], remove: Iterable[str] = ()) -> None:
        """Put copies of local files there in this order, in place of older ones, and then remove others."""
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
        """Put a copy of a local file there, in place of what may be there already."""
        raise self._refusal()

    def remove(self, path: str) -> None:
        """Remove a file, if it is there, and the folder in this place that it leaves empty."""
        raise self._refusal()

    def entries(self, folder: str) -> dict[str, bool]:
        """Return the names of what is directly in a folder, and whether each is a folder itself; none if it is not there."""
        raise self._refusal()

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of every file below a folder, by its path relative to that; none where it is not there."""
        raise self._refusal()

    def _refusal(self) -> RecipeError:
        return RecipeError(
            f"{self.url!r} is a web server: it can be pulled from, but neither pushed to nor listed. Push to its folder."
        )

    def check_end(self, path: str, got: int | None, size: int) -> None:
        """Raise CorruptError unless a file has ``size`` bytes."""
        if got is None:
            raise CorruptError(f"{self.where(path)!r} is missing; expected a file of {size} bytes. Check the URL.")
        if got != size:
            raise CorruptError(f"{self.where(path)!r} is not the listed file: expected {size} bytes, got {got}.")


def open_remote(url: Path | str) -> RemoteFS:
    """Return the place that a URL or a path names; nothing is read or written yet.

    Raises:
        RecipeError: ``checked_url`` refuses the URL.
        LsmixError: the package that reads them is not installed.
    """
    if isinstance(url, Path) or "://" not in url:
        return _Folder(Path(url))
    if (folder := file_path(url)) is not None:
        return _Folder(folder)
    text = checked_url(url)
    if not text.endswith("://"):  # the root of a file system stays what it is
        text = text.rstrip("/")
    if is_web(text):
        return _Web(text)
    return FsspecFS(text)


PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # before each new attempt
_Asked = ParamSpec("_Asked")
_Answer = TypeVar("_Answer")


def retried(method: Callable[Concatenate[Any, _Asked], _Answer]) -> Callable[Concatenate[Any, _Asked], _Answer]:
    """Let a method of a place try again after each ``TransientError``, and raise DownloadError after the last."""

    @functools.wraps(method)
    def call(place: Any, /, *args: _Asked.args, **options: _Asked.kwargs) -> _Answer:
        for seconds in (*PAUSES_SECONDS, None):
            try:
                return method(place, *args, **options)
            except TransientError as reason:
                if seconds is None:
                    raise DownloadError(f"{place.url!r} cannot be reached: {reason}. {place.advice}") from reason
                wait_to_retry(place.url, reason, seconds)
        raise AssertionError  # unreachable: the last pause is None

    return call


def wait_to_retry(where: str, reason: object, seconds: float) -> None:
    """Log why an attempt failed, and pause before the next one."""
    _LOG.warning("%r cannot be reached: %s. Trying again in %g s", where, reason, seconds)
    pause(seconds)


class _Folder(RemoteFS):
    """A folder on this machine, such as one on a USB stick or a mounted share."""

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
            atomic_path(self._folder / path) as beside,
            beside.open("wb") as file,
            source.open("rb") as origin,
        ):
            lock_open_file(file, beside)
            self._remove_stale_parts(self._folder / path)
            shutil.copyfileobj(origin, file, _BLOCK_BYTES)

    @staticmethod
    def _remove_stale_parts(path: Path) -> None:
        """Remove what killed writers of a file left beside it: no process holds a lock on that."""
        for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            with suppress(BlockingIOError, FileNotFoundError), part.open("rb") as file:
                lock_open_file(file, part)
                part.unlink(missing_ok=True)

    def _has(self, path: str, file: LocalFile) -> bool:
        self._refuse_links(path)
        return not (self._folder / path).is_symlink() and super()._has(path, file)

    def _refuse_links(self, path: str) -> None:
        """Raise RecipeError if a folder in the path is a link, by which a file would be written elsewhere."""
        for parent in Path(path).parents:
            if (self._folder / parent).is_symlink() and parent != Path():
                raise RecipeError(
                    f"{str(self._folder / parent)!r} is a link, and lsmix writes to no folder through one. Remove it, or "
                    "choose another folder."
                )

    def entries(self, folder: str) -> dict[str, bool]:
        home = self._folder / folder
        if home.exists() and not home.is_dir():
            raise RecipeError(f"{str(home)!r} is no folder. Choose another.")
        return {path.name: path.is_dir() for path in home.iterdir()} if home.is_dir() else {}

    def sizes(self, folder: str) -> dict[str, int]:
        home = self._folder / folder
        files = (path for path in home.rglob("*") if path.is_file())
        return {path.relative_to(home).as_posix(): path.stat().st_size for path in files}

    def remove(self, path: str) -> None:
        self._refuse_links(path)
        (self._folder / path).unlink(missing_ok=True)
        if "/" in path:
            with suppress(OSError):  # it holds something else
                (self._folder / path).parent.rmdir()


class _Web(RemoteFS):
    """A folder on a web server. Ranges are asked for, but a server that knows none is read from the beginning."""

    def _file(self, path: str) -> str:
        if not path:
            return self.url
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(path)}"))

    @retried
    def size(self, path: str) -> int | None:
        with open_web(self._file(path)) as answer:
            return None if answer is None else answer.length

    @retried
    def first(self, path: str, count: int) -> bytes | None:
        with open_web(self._file(path)) as answer:
            if answer is None:
                return None
            content = b"".join(_blocks(answer, count))
            if answer.length and len(content) < count:  # what was announced and did not come
                raise TransientError(f"the connection ended {answer.length} bytes early")
            return content

    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        with open_web(self._file(path), start) as answer:
            if answer is None:  # it is not there, or has no such byte
                self.check_end(path, self.size(path), size)
                raise TransientError("the server says that there is nothing from this byte on")
            partial = answer.status == http.client.PARTIAL_CONTENT
            if partial and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise DownloadError(f"{self._file(path)!r} answers with another part than the one asked for.")
            first = start if partial else 0
            if answer.length is not None:
                self.check_end(path, first + answer.length, size)
            for block in _blocks(answer, size - first):
                yield block[max(start - first, 0) :]
                first += len(block)


def _blocks(answer: http.client.HTTPResponse, most_bytes: int) -> Iterator[bytes]:
    while most_bytes > 0:
        try:
            block = answer.read1(min(_BLOCK_BYTES, most_bytes))
        except (OSError, http.client.HTTPException) as error:
            raise TransientError(str(error) or type(error).__name__) from error
        if not block:
            return
        most_bytes -= len(block)
        yield block


class FsspecFS(RemoteFS):
    """A folder on what fsspec has a file system for: s3, gs, az, hf and memory.

    Addresses and credentials come from fsspec's own configuration, such as FSSPEC_S3_ENDPOINT_URL.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        import fsspec

        kind = url.partition("://")[0]
        # The library of the Hub waits by itself for a rate limit to pass.
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
            advice = f"pip install 'lsmix[{extra}]'" if extra else f"what it asks for: {error}"
            raise LsmixError(f"{url!r} needs a package that is not installed. Install it: {advice}") from error
        except (ValueError, TypeError) as error:
            raise RecipeError(f"{url!r} is no place that can be read: {error}.") from error
        if self._is_s3:
            self._fs.retries = 1

    def _file(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}" if self._root else path

    def _facts(self, path: str) -> dict[str, Any] | None:
        try:
            self._fs.invalidate_cache()  # what another process sent meanwhile must be seen
            found: dict[str, Any] = self._asked(path, lambda: self._fs.info(self._file(path)))
        except MissingError:
            return None
        return found if found.get("type") == "file" else None

    @retried
    def size(self, path: str) -> int | None:
        """Return a file's size in bytes; None if it is not there."""
        facts = self._facts(path)
        return None if facts is None else int(facts["size"])

    @retried
    def first(self, path: str, count: int) -> bytes | None:
        """Return at most the first ``count`` bytes of a file; None if it is not there."""
        self._fs.invalidate_cache()
        with suppress(MissingError):
            return self._block(path, 0, count)
        return None

    def stream(self, path: str, start: int, size: int) -> Iterator[bytes]:
        """Yield what a file of ``size`` bytes holds from byte ``start`` on."""
        while start < size:
            stop = min(start + _RANGE_BYTES, size)
            try:
                block = self._block(path, start, stop)
            except (MissingError, TransientError):  # a range beyond the end of a file is an error of any kind
                self.check_end(path, self.size(path), size)
                raise
            if len(block) != stop - start:
                self.check_end(path, self.size(path), size)
                raise TransientError(f"{len(block)} bytes came where {stop - start} were asked for")
            start = stop
            yield block

    @retried
    def write(self, path: str, source: Path) -> None:
        """Put a copy of a local file there."""
        self._asked(path, lambda: self._fs.put_file(str(source), self._file(path)), source.stat().st_size)

    def _block(self, path: str, start: int, stop: int) -> bytes:
        block: bytes = self._asked(
            path, lambda: self._fs.cat_file(self._file(path), start=start, end=stop), stop - start
        )
        return block

    @retried
    def _has(self, path: str, file: LocalFile) -> bool:
        facts = self._facts(path)
        if facts is None or int(facts["size"]) != file.path.stat().st_size:
            return False
        # Of an object that was put in one piece, S3 says the MD5; then it need not be read again.
        if tag := str(facts.get("ETag", "")).strip('"'):
            with file.path.open("rb") as stream:
                if hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() == tag:
                    return True
        return super()._has(path, file)

    @retried
    def entries(self, folder: str) -> dict[str, bool]:
        """Return the names of what is directly in a folder, and whether each is a folder."""
        home = self._file(folder).strip("/")
        found = {
            name.strip("/"): facts.get("type") == "directory"
            for name, facts in self._listing(folder, deep=False).items()
        }
        return {name.rpartition("/")[2]: is_folder for name, is_folder in found.items() if name != home}

    @retried
    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of all files below a folder."""
        home = self._file(folder).strip("/")
        found = self._listing(folder, deep=True)
        return {
            name.strip("/").removeprefix(home).lstrip("/"): int(facts["size"])
            for name, facts in found.items()
            if facts.get("type") == "file" and not name.endswith("/")
        }

    def _listing(self, folder: str, *, deep: bool) -> dict[str, dict[str, Any]]:
        home, depth = self._file(folder), None if deep else 1
        self._fs.invalidate_cache()
        try:
            found: dict[str, dict[str, Any]] = self._asked(
                folder,
                lambda: self._fs.find(home, maxdepth=depth, withdirs=not deep, detail=True),
                _MOST_LISTING_BYTES,
            )
        except MissingError:
            return {}
        if not found:
            self._check_bucket()
        return found

    @retried
    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(MissingError):
            self._asked(path, lambda: self._fs.rm_file(self._file(path)))

    def _asked(self, path: str, action: Callable[[], Any], size: int = 0) -> Any:
        """Return what a call of the file system returns, in the time that ``size`` bytes may take; raise what a place may raise."""
        where, seconds = self.where(path), self._patience_seconds + size / _LEAST_BYTES_PER_SECOND
        try:
            return bounded(action, seconds)
        except Stopped:
            raise
        except NoAnswerError as error:  # our own limit; the file system has tried again meanwhile
            raise DownloadError(f"{where!r} did not answer within {seconds:.0f} s. Try again later.") from error
        except (FileNotFoundError, IsADirectoryError) as error:
            self._check_bucket()
            raise MissingError(f"{where!r} is not there: {error}.") from error
        except ImportError as error:
            raise LsmixError(f"{where!r} needs a package that is not installed: {error}.") from error
        except Exception as error:  # every file system has errors of its own, most of which pass
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, PermissionError) or "Credentials" in reason:
                reason = str(error).rstrip(".") or reason
                raise DownloadError(f"{where!r} is refused: {reason}. Check the URL and your credentials.") from error
            raise TransientError(reason) from error

    def _check_bucket(self) -> None:
        """Raise DownloadError if S3 has no such bucket: of that it says no more than of a missing file."""
        if not self._is_s3:
            return
        bucket = self._root.partition("/")[0]
        try:
            bounded(lambda: self._fs.call_s3("head_bucket", Bucket=bucket), self._patience_seconds)
        except FileNotFoundError as error:
            raise DownloadError(
                f"{self.url!r} is not there: {self._fs.s3.meta.endpoint_url} has no bucket {bucket!r}. Check its name and "
                "the endpoint, or create it."
            ) from error
        except (Stopped, KeyboardInterrupt):
            raise
        except Exception as error:  # noqa: BLE001  # some may read a bucket's files and not ask for itself
            _LOG.debug("%r: its bucket cannot be looked at: %s", self.url, error)
