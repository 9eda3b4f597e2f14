"""Pushing to the Hugging Face Hub: a hundred files a commit, compared by the checksums that it tells."""

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
    """Return the place that a URL or a path names, to push to it."""
    place = open_remote(url)
    return _Hub(place.url) if place.url.startswith("hf://") and not place.url.startswith("hf://buckets/") else place


class _Hub(FsspecFS):
    """A folder in a repository of the Hugging Face Hub, which the first push creates; each update is one commit.

    The Hub tells the SHA-256 of large files and the git checksum of others, so nothing is read back to compare it.
    """

    files_at_once = 100

    def __init__(self, url: str) -> None:
        super().__init__(url)
        from huggingface_hub import HfApi

        found = _HUB_PATH.fullmatch(self._root)
        if not found:
            raise RecipeError(f"{url!r} names no repository. Write it as hf://datasets/OWNER/NAME.")
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
        """Return what the Hub knows of those of the paths that it has."""
        if not paths:  # which the Hub refuses
            return []
        try:
            found: list[Any] = self._asked(
                "", lambda: self._api.get_paths_info(paths=paths, revision=self._revision, **self._repository)
            )
        except MissingError:  # the repository
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
        disable_progress_bars()  # beside our own
        try:
            self._asked("", commit, sum(file.path.stat().st_size for file in files.values()))
        finally:
            if had_bars:
                enable_progress_bars()

    def write(self, path: str, source: Path) -> None:
        self.update({path: LocalFile(source, "")})

    def remove(self, path: str) -> None:
        self.update({}, [path])

    def _asked(self, path: str, action: Callable[[], Any], size: int = 0) -> Any:
        waited = 0
        while True:
            try:
                return super()._asked(path, action, size)
            except TransientError as failure:
                answer = _answer_of(failure)
                status = getattr(answer, "status_code", 500)
                if status == http.client.NOT_FOUND:
                    raise MissingError(f"{f'{self.url}/{path}'!r} is not there: {failure}.") from failure
                if status == http.client.TOO_MANY_REQUESTS:
                    seconds = _seconds_to_wait(getattr(answer, "headers", {}))
                    waited += seconds
                    if waited > _MOST_WAIT_SECONDS:
                        raise DownloadError(
                            f"{self.url!r} is refused: the Hub takes no more requests for {seconds} s. "
                            "What was sent is kept; run again later to go on."
                        ) from failure
                    _LOG.warning("the Hub takes no more requests for %d s (rate limit). Waiting", seconds)
                    pause(seconds)
                elif status < http.client.INTERNAL_SERVER_ERROR and status not in _TRANSIENT_REFUSALS:
                    raise DownloadError(
                        f"{self.url!r} is refused: {str(failure).splitlines()[0]}. Check the URL, and log in with 'hf auth login' or HF_TOKEN."
                    ) from failure
                else:
                    raise


def _answer_of(error: BaseException | None) -> Any:
    """Return the HTTP response that an error, or one that caused it, is about; None if there is none."""
    while error is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    return getattr(error, "response", None)


def _is_same(stored: Any, file: LocalFile) -> bool:
    """Tell whether what the Hub knows of a file fits the local one."""
    if getattr(stored, "size", None) != file.path.stat().st_size:  # a folder has none
        return False
    if stored.lfs:
        return bool(stored.lfs.sha256 == file.sha256)
    content = file.path.read_bytes()  # of a few MB at most
    return bool(
        stored.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    )


def _seconds_to_wait(headers: Mapping[str, str]) -> int:
    """Return how long a server wants to be left alone; a minute if it does not say."""
    limit = re.search(r"\bt=(\d{1,9})", headers.get("ratelimit", ""))
    text = headers.get("retry-after", "")
    return int(text) if text.isdecimal() else int(limit[1]) if limit else 60
