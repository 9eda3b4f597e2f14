"""A workspace at a URL: artifacts lie there, and are worked on in a folder of this machine's cache.

What is at the URL with a manifest counts, and nothing else; the folder here is a copy of it or work under way.
Object stores know no locks: runs on one machine keep out of each other's way, and those on several make the same bytes.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from lsmix.data.artifact import (
    MANIFEST_NAME,
    WORK_FOLDER,
    Artifact,
    Manifest,
    check_sizes,
    read_manifest,
    verify_files,
)
from lsmix.data.cache import cache_folder, private_folder, with_retries
from lsmix.data.errors import CorruptError, LockedError, LsmixError, MissingError
from lsmix.data.progress import NullProgress, Progress, pause
from lsmix.data.remote import fetch_manifest, local_folder, open_remote
from lsmix.data.sharing.transfer import pull_artifact, push_artifact
from lsmix.pipeline.workspace.cache_key import is_key
from lsmix.pipeline.workspace.local import Entry, Workspace, check_identity
from lsmix.pipeline.workspace.locks import artifact_lock, removal_lock

__all__ = ["RemoteWorkspace", "open_workspace"]

_Answer = TypeVar("_Answer")
_PAUSE_SECONDS = 0.5  # while another process fetches what this one wants
_checked: set[tuple[Path, str]] = set()  # copies whose bytes this process has compared, by folder and root digest


def open_workspace(where: Path | str) -> Workspace:
    """Return the workspace at a path or a URL; nothing is read or written there yet.

    Raises:
        RecipeError: lsmix reads no URLs of this kind.
        LsmixError: the cache, where a URL's artifacts are worked on, is not ours alone.
    """
    folder = local_folder(where)
    return Workspace(folder) if folder is not None else RemoteWorkspace(str(where))


class RemoteWorkspace(Workspace):
    """The artifacts below the URL of an object store."""

    def __init__(self, url: str) -> None:
        self._place = open_remote(url)
        self._url = self._place.url
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", self._url)[-40:].strip("-.")
        digest = hashlib.sha256(self._url.encode()).hexdigest()[:12]
        super().__init__(private_folder(cache_folder(), "workspaces") / f"{name}-{digest}")

    @property
    def location(self) -> str:
        """Its URL."""
        return self._url

    def url_of(self, folder: Path) -> str:
        """Return where the artifact in a folder of the copy lies."""
        return f"{self._url.rstrip('/')}/{folder.parent.name}/{folder.name}"

    def folder(self, stage: str, name: str, key: str) -> Path:
        """Return the folder here of an artifact: called as it is at the URL, if it was begun there."""
        there = [other for other in self._names(stage) if other.endswith(f"-{key}")]
        return self.root / stage / there[0] if there else super().folder(stage, name, key)

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact at the URL; where there is none, one here that was not sent yet; or None.

        Raises:
            CorruptError: it is there, but a file is missing or has another size, or its manifest is another artifact's.
            DownloadError: the URL cannot be reached.
        """
        for name in self._names(stage):
            manifest = self._manifest(stage, name) if name.endswith(f"-{key}") else None
            if manifest:
                folder = self.root / stage / name
                url = self.url_of(folder)
                check_identity(url, manifest, stage, key)
                self._check_sizes(f"{stage}/{name}", url, manifest)
                return Artifact(folder=folder, manifest=manifest, url=url)
        return super().find(stage, key)

    def ensure_local(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Return an artifact with its files in the folder here, fetched and checked if they were not.

        Raises:
            CorruptError, DiskSpaceError, DownloadError: as ``pull_artifact``.
        """
        if not artifact.url:
            return artifact
        while not _is_copy(artifact):
            try:
                # What else is there is unfinished work that others have finished meanwhile, or another's copy.
                with artifact_lock(self.root, artifact.manifest.key, artifact.url):
                    if artifact.folder.exists() and not _is_copy(artifact):
                        shutil.rmtree(artifact.folder)
                    pull_artifact(artifact.url, artifact.folder, progress)
                    _checked.add((artifact.folder, artifact.manifest.root))
            except LockedError:
                pause(_PAUSE_SECONDS)
        return artifact

    def exists(self, folder: Path) -> bool:
        """Tell whether there is an artifact, be it whole or damaged, at the URL or here."""
        path = f"{folder.parent.name}/{folder.name}/{MANIFEST_NAME}"
        return super().exists(folder) or self._ask(self._place.size, path) is not None

    def local_path(self, path: str) -> Path:
        """Return the folder here of a finished artifact at the URL, fetched if need be."""
        folder = self.root / path
        if not folder.is_relative_to(self.root):  # an absolute path: not of this workspace
            return folder
        stage, _, name = path.partition("/")
        manifest = self._manifest(stage, name)
        if manifest is None:
            raise MissingError(f"no artifact at {self.url_of(folder)!r}: it is unfinished, or was removed.")
        return self.ensure_local(
            Artifact(folder=folder, manifest=manifest, url=self.url_of(folder)), NullProgress()
        ).folder

    def upload(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Send a finished artifact to the URL, unless another machine has sent its own meanwhile, of the same bytes.

        Raises:
            CorruptError: that one's payload has other bytes, as another kind of device makes.
            DownloadError: the URL cannot be reached; the next run sends the rest.
        """
        url = self.url_of(artifact.folder)
        there = self._manifest(artifact.folder.parent.name, artifact.folder.name)
        if there is None:
            push_artifact(artifact.folder, url, progress, owned=True)
            self._clear(f"{artifact.folder.parent.name}/{artifact.folder.name}/{WORK_FOLDER}")
            return Artifact(folder=artifact.folder, manifest=artifact.manifest, url=url)
        if there.root != artifact.manifest.root:
            raise CorruptError(
                f"{url!r} was made by another run meanwhile, with root digest {there.root[:12]} where this one has "
                f"{artifact.manifest.root[:12]}: on another kind of device, perhaps. Remove {str(artifact.folder)!r} to take it."
            )
        return Artifact(folder=artifact.folder, manifest=there, url=url)

    def remove(self, folder: Path, key: str, label: str) -> None:
        """Remove an artifact or unfinished work, here and at the URL; the manifest first.

        Raises:
            LockedError: another run on this machine works on it, or reads it.
        """
        with artifact_lock(self.root, key, label), removal_lock(self.root, key, label):
            path = f"{folder.parent.name}/{folder.name}"
            self._ask(self._place.remove, f"{path}/{MANIFEST_NAME}")
            self._clear(path)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def entries(self, stage: str) -> Iterator[Entry]:
        """Go through all folders of a stage at the URL, and those that are only here, with their sizes."""
        names = self._names(stage)
        for name in names:
            sizes = self._ask(self._place.sizes, f"{stage}/{name}")
            label, _, key = name.rpartition("-")
            if sizes and is_key(key):  # some list a folder whose files are gone
                folder = self.root / stage / name
                yield Entry(label, key, folder, self.url_of(folder), sum(sizes.values()))
        yield from (entry for entry in super().entries(stage) if entry.folder.name not in names)

    def manifests(self, stage: str) -> Iterator[tuple[Path, Manifest]]:
        """Go through the complete artifacts of a stage at the URL; unreadable ones are passed over."""
        for name in self._names(stage):
            try:
                manifest = self._manifest(stage, name)
            except LsmixError:
                continue
            if manifest:
                yield self.root / stage / name, manifest

    def _names(self, stage: str) -> list[str]:
        return self._ask(self._place.names, stage)

    def _clear(self, path: str) -> None:
        """Remove all files below a folder at the URL."""
        for name in self._ask(self._place.sizes, path):
            self._ask(self._place.remove, f"{path}/{name}")

    def _ask(self, action: Callable[[str], _Answer], path: str) -> _Answer:
        return with_retries(repr(self._url), partial(action, path))

    def _manifest(self, stage: str, name: str) -> Manifest | None:
        place = open_remote(self.url_of(self.root / stage / name))
        try:
            return with_retries(repr(place.url), partial(fetch_manifest, place))[0]
        except MissingError:
            return None

    def _check_sizes(self, path: str, url: str, manifest: Manifest) -> None:
        there = self._ask(self._place.sizes, path)
        for file in manifest.files:
            if there.get(file.path) != file.bytes:
                got = "nothing" if file.path not in there else f"{there[file.path]} bytes"
                raise CorruptError(
                    f"{url + '/' + file.path!r} is damaged: expected {file.bytes} bytes, got {got}. Make the artifact again."
                )


def _is_copy(artifact: Artifact) -> bool:
    """Tell whether the folder here holds the very artifact: by its bytes, once they were checked in this process by their sizes."""
    known = artifact.folder, artifact.manifest.root
    try:
        manifest = read_manifest(artifact.folder)
        if set(manifest.files) != set(artifact.manifest.files):
            return False
        if known in _checked:
            check_sizes(artifact.folder, manifest)
        else:
            verify_files(artifact.folder, manifest)
    except LsmixError:
        return False
    _checked.add(known)
    return True
