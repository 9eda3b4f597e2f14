"""Push to the Hugging Face Hub: up to 100 files per commit, compared by the checksums that the Hub reports."""

import hashlib
import http.client
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from lsmix.data.errors import DownloadError, MissingError, RecipeError
from lsmix.data.progress import pause
from lsmix.data.remote import FsspecFS, LocalFile, RemoteFS, open_remote, retried
from lsmix.data.web import TransientError

__all__ = ["open_target"]

_LOG = logging.getLogger("lsmix")
_HUB_PATH = re.compile(r"(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/[^/]+/[^/]+|[^/]+))?(?:/(.*))?")
_MOST_WAIT_SECONDS = 3600
_TRANSIENT_REFUSALS = (408, 409, 412)  # 412: another commit came first


def open_target(url: str) -> RemoteFS:
    """Return the remote at a URL or path, as the target of a push."""
    remote = open_remote(url)
    return _Hub(remote.url) if remote.url.startswith("hf://") and not remote.url.startswith("hf://buckets/") else remote


class _Hub(FsspecFS):
    """A folder in a repository of the Hugging Face Hub; the first push creates the repository. Each update is one commit.

    The Hub reports the SHA-256 of large files and the git checksum of others, so files are compared without downloads.
    """

    files_at_once = 100

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from huggingface_hub import HfApi

        found = _HUB_PATH.fullmatch(self._root)
        if not found:
            raise RecipeError(f"{url!r} does not name a repository. Write it as hf://datasets/OWNER/NAME.")
        kind, name, revision, self._home = found.groups("")
        self._api: Any = HfApi(endpoint=self._fs.endpoint, token=self._fs.token)
        self._repository = {"repo_id": name, "repo_type": kind.removesuffix("s") or "model"}
        self._revision = unquote(revision) or None

    def _in_repository(self, path: str) -> str:
        return f"{self._home}/{path}" if self._home else path

    def missing(self, files: Mapping[str, LocalFile]) -> set[str]:
        paths = {self._in_repository(path): path for path in files}
        stored = {paths[found.path]: found for found in self._stored(list(paths))}
        return {path for path, file in files.items() if path not in stored or not _is_same(stored[path], file)}

    @retried
    def _stored(self, paths: list[str]) -> list[Any]:
        """Return the Hub's metadata of the paths that exist."""
        if not paths:  # the Hub rejects an empty request
            return []
        try:
            found: list[Any] = self._call(
                "", lambda: self._api.get_paths_info(paths=paths, revision=self._revision, **self._repository)
            )
        except MissingError:  # the repository does not exist yet
            return []
        return found

    def update(self, files: Mapping[str, LocalFile], remove: Iterable[str] = ()) -> None:
        removed = [found.path for found in self._stored([self._in_repository(path) for path in remove])]
        if files or removed:
            self._commit(files, removed)

    @retried
    def _commit(self, files: Mapping[str, LocalFile], removed: list[str]) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        def commit() -> None:
            if not self._api.repo_exists(**self._repository):
                self._api.create_repo(**self._repository, private=True, exist_ok=True)
                _LOG.info("created the private repository %s", self._repository["repo_id"])
            added = [CommitOperationAdd(self._in_repository(path), file.path) for path, file in files.items()]
            deleted = [CommitOperationDelete(path, is_folder=False) for path in removed]
            message = f"lsmix push: {len(added)} files"
            self._api.create_commit(
                operations=[*added, *deleted], commit_message=message, revision=self._revision, **self._repository
            )

        had_bars = not are_progress_bars_disabled()
        disable_progress_bars()  # lsmix shows its own
        try:
            self._call("", commit, sum(file.path.stat().st_size for file in files.values()))
        finally:
            if had_bars:
                enable_progress_bars()

    def write(self, path: str, source: Path) -> None:
        self.update({path: LocalFile(source, "")})

    def remove(self, path: str) -> None:
        self.update({}, [path])

    def _call(self, path: str, action: Callable[[], Any], size: int = 0) -> Any:
        waited = 0
        while True:
            try:
                return super()._call(path, action, size)
            except TransientError as failure:
                response = _response_of(failure)
                status = getattr(response, "status_code", 500)
                if status == http.client.NOT_FOUND:
                    raise MissingError(f"{f'{self.url}/{path}'!r} does not exist: {failure}.") from failure
                if status == http.client.TOO_MANY_REQUESTS:
                    seconds = _seconds_to_wait(getattr(response, "headers", {}))
                    waited += seconds
                    if waited > _MOST_WAIT_SECONDS:
                        raise DownloadError(
                            f"{self.url!r}: the Hub accepts no requests for the next {seconds} s (rate limit). "
                            "Run again later to resume."
                        ) from failure
                    _LOG.warning("the Hub accepts no requests for the next %d s (rate limit). Waiting", seconds)
                    pause(seconds)
                elif status < http.client.INTERNAL_SERVER_ERROR and status not in _TRANSIENT_REFUSALS:
                    raise DownloadError(
                        f"{self.url!r}: the Hub refused the request: {str(failure).splitlines()[0]}. "
                        "Check the URL, and log in with 'hf auth login' or HF_TOKEN."
                    ) from failure
                else:
                    raise


def _response_of(error: BaseException | None) -> Any:
    """Return the HTTP response of an error or of one of its causes, or None."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _is_same(stored: Any, file: LocalFile) -> bool:
    """Return whether the Hub's metadata of a file matches the local file."""
    if getattr(stored, "size", None) != file.path.stat().st_size:  # folders have no size
        return False
    if stored.lfs:
        return bool(stored.lfs.sha256 == file.sha256)
    content = file.path.read_bytes()  # a few MB at most
    return bool(
        stored.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )


def _seconds_to_wait(headers: Mapping[str, str]) -> int:
    """Return the waiting time that a rate limit asks for, or 60 s if it is not given."""
    limit = re.search(r"\bt=(\d{1,9})", headers.get("ratelimit", ""))
    text = headers.get("retry-after", "")
    return int(text) if text.isdecimal() else int(limit[1]) if limit else 60
