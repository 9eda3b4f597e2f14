"""A workspace at a URL: finished artifacts are stored there, and unfinished work is in this machine's cache until then.

Only artifacts at the URL with a manifest count. Object stores have no locks: runs on one machine exclude each other, and
runs on several machines make the same bytes.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from lsmix.data.artifact import MANIFEST_NAME, WORK_FOLDER, Artifact, Manifest
from lsmix.data.cache import FileCache
from lsmix.data.errors import CorruptError, LockedError, LsmixError, MissingError
from lsmix.data.progress import NullProgress, Progress, pause
from lsmix.data.remote import open_remote
from lsmix.data.sharing.transfer import pull_artifact, push_artifact
from lsmix.data.store import local_folder, open_artifact
from lsmix.pipeline.workspace.cache_key import is_key
from lsmix.pipeline.workspace.local import Entry, Workspace, check_identity
from lsmix.pipeline.workspace.locks import artifact_lock, removal_lock, work_root

__all__ = ["RemoteWorkspace", "open_workspace"]

_PAUSE_SECONDS = 0.5  # while another process copies the same artifact


def open_workspace(where: Path | str) -> Workspace:
    """Return the workspace at a path or a URL; nothing is read or written there yet.

    Raises:
        RecipeError: lsmix reads no URLs of this kind.
        LsmixError: other users may write to the cache, which holds unfinished work.
    """
    folder = local_folder(where)
    return Workspace(folder) if folder is not None else RemoteWorkspace(str(where))


class RemoteWorkspace(Workspace):
    """The artifacts below the URL of an object store."""

    def __init__(self, url: str) -> None:
        self._place = open_remote(url)
        self._url = self._place.url
        super().__init__(work_root(self._url.rstrip("/")))

    @property
    def location(self) -> str:
        """Its URL."""
        return self._url

    def url_of(self, folder: Path) -> str:
        """Return the URL of the artifact that is made in a folder here."""
        return f"{self._url.rstrip('/')}/{folder.parent.name}/{folder.name}"

    def folder(self, stage: str, name: str, key: str) -> Path:
        """Return the folder here in which an artifact is made, named as it is at the URL if it was begun there."""
        there = [other for other in self._names(stage) if other.endswith(f"-{key}")]
        return self.root / stage / there[0] if there else super().folder(stage, name, key)

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact at the URL; if there is none, one here that was not sent yet; or None.

        Raises:
            CorruptError: a file is missing or has another size, or the manifest is another artifact's.
            DownloadError: the URL cannot be reached.
        """
        for name in self._names(stage):
            artifact = self._open(stage, name) if name.endswith(f"-{key}") else None
            if artifact:
                check_identity(artifact, stage, key)
                self._check_sizes(f"{stage}/{name}", artifact)
                return artifact
        return super().find(stage, key)

    def local_copy(self, artifact: Artifact) -> Path:
        """Return a folder on this machine that holds all files of an artifact, downloaded and checked.

        Raises:
            CorruptError, DiskSpaceError, DownloadError: as ``pull_artifact``.
        """
        if artifact.is_local:
            return artifact.folder
        manifest = artifact.manifest
        folder = self.root / "copies" / f"{manifest.stage}-{manifest.name}-{manifest.content_digest}"
        while True:
            try:
                pull_artifact(artifact.url, folder, NullProgress())
            except LockedError:
                pause(_PAUSE_SECONDS)
            except LsmixError:
                if not folder.exists():
                    raise
                shutil.rmtree(folder)  # it was damaged here
            else:
                return folder

    def exists(self, folder: Path) -> bool:
        """Tell whether there is an artifact, be it whole or damaged, at the URL or here."""
        path = f"{folder.parent.name}/{folder.name}/{MANIFEST_NAME}"
        return super().exists(folder) or self._place.size(path) is not None

    def upload(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Send a finished artifact to the URL, unless another machine sent the same bytes meanwhile; return it there.

        Raises:
            CorruptError: the one at the URL has another payload, as another kind of device makes.
            DownloadError: the URL cannot be reached; the next run sends the rest.
        """
        if not artifact.is_local:
            return artifact
        folder = artifact.folder
        stage, name = folder.parent.name, folder.name
        there = self._open(stage, name)
        if there is None:
            push_artifact(artifact, self.url_of(folder), progress, owned=True)
            self._clear(f"{stage}/{name}/{WORK_FOLDER}")
            there = open_artifact(self.url_of(folder))
        elif there.manifest.content_digest != artifact.manifest.content_digest:
            raise CorruptError(
                f"{there.location!r} was made by another run meanwhile, with content digest {there.manifest.content_digest[:12]} where this "
                f"one has {artifact.manifest.content_digest[:12]}: on another kind of device, perhaps. Remove {str(folder)!r} to take it."
            )
        elif set(there.manifest.files) != set(artifact.manifest.files):  # cards may differ
            shutil.rmtree(folder)
            return there
        if isinstance(there.files, FileCache):
            for record in artifact.manifest.files:
                there.files.adopt(record, folder / record.path)
        shutil.rmtree(folder)
        return there

    def remove(self, folder: Path, key: str, label: str) -> None:
        """Remove an artifact or unfinished work, here and at the URL; the manifest first.

        Raises:
            LockedError: another run on this machine works on it, or reads it.
        """
        with artifact_lock(self.root, key, label), removal_lock(self.root, key, label):
            path = f"{folder.parent.name}/{folder.name}"
            self._place.remove(f"{path}/{MANIFEST_NAME}")
            self._clear(path)
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def entries(self, stage: str) -> Iterator[Entry]:
        """Go through all folders of a stage at the URL, and those that are only here, with their sizes."""
        names = self._names(stage)
        for name in names:
            sizes = self._place.sizes(f"{stage}/{name}")
            label, _, key = name.rpartition("-")
            if sizes and is_key(key):  # some list a folder whose files are gone
                folder = self.root / stage / name
                yield Entry(label, key, folder, self.url_of(folder), sum(sizes.values()))
        yield from (entry for entry in super().entries(stage) if entry.folder.name not in names)

    def manifests(self, stage: str) -> Iterator[tuple[Path, Manifest]]:
        """Go through the complete artifacts of a stage at the URL; unreadable ones are passed over."""
        for name in self._names(stage):
            try:
                artifact = self._open(stage, name)
            except LsmixError:
                continue
            if artifact:
                yield self.root / stage / name, artifact.manifest

    def _names(self, stage: str) -> list[str]:
        return sorted(name for name, is_folder in self._place.entries(stage).items() if is_folder)

    def _clear(self, path: str) -> None:
        """Remove all files below a folder at the URL."""
        for name in self._place.sizes(path):
            self._place.remove(f"{path}/{name}")

    def _open(self, stage: str, name: str) -> Artifact | None:
        try:
            return open_artifact(self.url_of(self.root / stage / name))
        except MissingError:
            return None

    def _check_sizes(self, path: str, artifact: Artifact) -> None:
        there = self._place.sizes(path)
        for file in artifact.manifest.files:
            if there.get(file.path) != file.bytes:
                got = "nothing" if file.path not in there else f"{there[file.path]} bytes"
                raise CorruptError(
                    f"{artifact.where(file.path)!r} is damaged: expected {file.bytes} bytes, got {got}. Make the artifact again."
                )
