"""The workspace: a folder or a URL of artifacts, ``<workspace>/<stage>/<name>-<key>/``.

The key identifies an artifact; the name is for people. So an artifact that another recipe made of the same contents is
found and used, whatever its name.

In a workspace at a URL finished artifacts are at the URL, and unfinished work is in this machine's cache. Object stores
have no locks: runs on one machine exclude each other, and runs on several machines make the same bytes.
"""

import contextlib
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lsmix.data.artifact import MANIFEST_NAME, WORK_FOLDER, Artifact, Manifest, read_manifest
from lsmix.data.atomic import folder_bytes
from lsmix.data.cache import RemoteArtifact
from lsmix.data.errors import CorruptError, LockedError, LsmixError, MissingError
from lsmix.data.progress import NullProgress, Progress, pause
from lsmix.data.sharing.hub import open_target
from lsmix.data.sharing.transfer import pull_artifact, push_artifact
from lsmix.data.store import local_folder, open_artifact, shipped_flow
from lsmix.pipeline.workspace.cache_key import SourceDigests, is_key
from lsmix.pipeline.workspace.locks import artifact_lock, removal_lock, work_root

__all__ = ["Entry", "Workspace", "pool_inputs"]

_PAUSE_SECONDS = 0.5  # while another process copies the same artifact
_STAGE_OF_ROLE = {"latents": "encode", "flow": "train-glow", "dataset": "ingest"}  # of a pool's inputs


class Entry(NamedTuple):
    """A folder of an artifact or of unfinished work."""

    name: str  # of the artifact, in the recipe
    cache_key: str
    folder: Path  # on this machine
    location: str  # the folder, or its URL
    bytes: int


class Workspace:
    """The artifacts below a folder, which is made when something is first written, or below the URL of an object store.

    Raises:
        RecipeError: lsmix reads no URLs of this kind.
        LsmixError: other users may write to the cache, which holds unfinished work.
    """

    def __init__(self, where: Path | str) -> None:
        folder = local_folder(where)
        self.remote = open_target(str(where)) if folder is None else None
        self.location = self.remote.url if self.remote else str(folder)
        self.root = folder or work_root(self.location.rstrip("/"))

    def url_of(self, folder: Path) -> str:
        """Return the URL of the artifact that is made in a folder here; "" in a workspace on this machine."""
        return f"{self.location.rstrip('/')}/{folder.parent.name}/{folder.name}" if self.remote else ""

    @property
    def sources(self) -> SourceDigests:
        """The remembered checksums of source files."""
        return SourceDigests(self.root / ".sources.json")

    def folder(self, stage: str, name: str, key: str) -> Path:
        """Return the folder of an artifact: the one that has this key, be it at the URL, else a new one with this name."""
        names = [other for other in self._remote_names(stage) if other.endswith(f"-{key}")]
        names += sorted(folder.name for folder in (self.root / stage).glob(f"*-{key}"))
        return self.root / stage / (names[0] if names else f"{name}-{key}")

    def exists(self, folder: Path) -> bool:
        """Return whether a folder of this workspace, or its URL, has an artifact, complete or damaged."""
        if (folder / MANIFEST_NAME).is_file():
            return True
        return self.remote is not None and self.remote.size(_path(folder, MANIFEST_NAME)) is not None

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact of a stage with this key, or None; of one that was not sent yet, the one here.

        Raises:
            CorruptError: a file of it is missing or has another size, or its manifest is another artifact's.
            DownloadError: the URL cannot be reached.
        """
        for name in self._remote_names(stage):
            artifact = self._open_remote(stage, name) if name.endswith(f"-{key}") else None
            if artifact:
                _check_identity(artifact, stage, key)
                self._check_sizes(f"{stage}/{name}", artifact)
                return artifact
        for folder in sorted((self.root / stage).glob(f"*-{key}")):
            if not (folder / MANIFEST_NAME).is_file():
                continue
            try:
                found = open_artifact(folder)
                _check_identity(found, stage, key)
            except (CorruptError, MissingError):
                if (folder / MANIFEST_NAME).is_file():  # else it was removed meanwhile
                    raise
                continue
            return found
        return None

    def remove(self, folder: Path, key: str, label: str) -> None:
        """Remove an artifact or unfinished work, the manifest first, so that what is half removed is never read.

        Raises:
            LockedError: another run on this machine works on it, or reads it.
        """
        with artifact_lock(self.root, key, label), removal_lock(self.root, key, label):
            if self.remote:
                self.remote.remove(_path(folder, MANIFEST_NAME))
                self._clear(_path(folder))
            (folder / MANIFEST_NAME).unlink(missing_ok=True)
            while folder.is_dir():
                with contextlib.suppress(FileNotFoundError):  # another process removes it, too
                    shutil.rmtree(folder)

    def entries(self, stage: str) -> Iterator[Entry]:
        """Go through the artifacts and the unfinished work of a stage with their sizes, links excepted."""
        names = self._remote_names(stage)
        for name in names:
            sizes = self.remote.sizes(f"{stage}/{name}") if self.remote else {}
            label, _, key = name.rpartition("-")
            if sizes and is_key(key):  # some list a folder whose files are gone
                folder = self.root / stage / name
                yield Entry(label, key, folder, self.url_of(folder), sum(sizes.values()))
        for folder in self._folders(stage):
            name, _, key = folder.name.rpartition("-")
            if is_key(key) and not folder.is_symlink() and folder.name not in names:
                yield Entry(name, key, folder, str(folder), folder_bytes(folder))

    def manifest(self, entry: Entry) -> Manifest | None:
        """Return the manifest of an artifact that ``entries`` found; None of unfinished work, and if it is unreadable."""
        try:
            here = entry.location == str(entry.folder)
            return read_manifest(entry.folder) if here else open_artifact(entry.location).manifest
        except LsmixError:
            return None

    def folder_names(self, stage: str) -> list[str]:
        """Return the names of all folders of a stage, at the URL and on this machine, complete or not."""
        return list(dict.fromkeys([*self._remote_names(stage), *(folder.name for folder in self._folders(stage))]))

    def manifests(self, stage: str) -> Iterator[tuple[Path, Manifest]]:
        """Go through the complete artifacts of a stage, those on this machine oldest first; unreadable ones are left out."""
        for name in self._remote_names(stage):
            try:
                artifact = self._open_remote(stage, name)
            except LsmixError:
                continue
            if artifact:
                yield self.root / stage / name, artifact.manifest
        for folder in self._folders(stage):
            if (folder / MANIFEST_NAME).is_file():
                try:
                    manifest = read_manifest(folder)
                except LsmixError:
                    continue
                yield folder, manifest

    def local_copy(self, artifact: Artifact) -> Path:
        """Return a folder on this machine that holds all files of an artifact, downloaded and checked if need be.

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

    def upload(self, artifact: Artifact, progress: Progress) -> Artifact:
        """Send a finished artifact to the URL, unless another machine sent the same bytes meanwhile; return it there.

        Raises:
            CorruptError: the one at the URL has another payload, as another kind of device makes.
            DownloadError: the URL cannot be reached; the next run sends the rest.
        """
        if self.remote is None or not artifact.is_local:
            return artifact
        folder = artifact.folder
        sent = self._open_remote(folder.parent.name, folder.name)
        if sent is None:
            push_artifact(artifact, self.url_of(folder), progress, owned=True)
            self._clear(_path(folder, WORK_FOLDER))
            sent = open_artifact(self.url_of(folder))
        elif sent.manifest.content_digest != artifact.manifest.content_digest:
            raise CorruptError(
                f"{sent.location!r} was made by another run meanwhile, with content digest {sent.manifest.content_digest[:12]} where this "
                f"one has {artifact.manifest.content_digest[:12]}: on another kind of device, perhaps. Remove {str(folder)!r} to take it."
            )
        elif set(sent.manifest.files) != set(artifact.manifest.files):  # cards may differ
            shutil.rmtree(folder)
            return sent
        if isinstance(sent, RemoteArtifact):
            for record in artifact.manifest.files:
                sent.adopt(record, folder / record.path)
        shutil.rmtree(folder)
        return sent

    def _folders(self, stage: str) -> list[Path]:
        """Return all folders of a stage on this machine, complete or not, oldest first."""
        below = []
        for path in (self.root / stage).glob("*-*"):
            with contextlib.suppress(FileNotFoundError):  # others remove folders meanwhile
                facts = path.stat()
                if stat.S_ISDIR(facts.st_mode):
                    below.append((facts.st_mtime_ns, path))
        return [path for _, path in sorted(below)]

    def _remote_names(self, stage: str) -> list[str]:
        entries = self.remote.entries(stage) if self.remote else {}
        return sorted(name for name, is_folder in entries.items() if is_folder)

    def _open_remote(self, stage: str, name: str) -> Artifact | None:
        try:
            return open_artifact(self.url_of(self.root / stage / name))
        except MissingError:
            return None

    def _clear(self, path: str) -> None:
        """Remove all files below a folder at the URL."""
        if self.remote:
            self.remote.update({}, [f"{path}/{name}" for name in self.remote.sizes(path)])

    def _check_sizes(self, path: str, artifact: Artifact) -> None:
        found = self.remote.sizes(path) if self.remote else {}
        for file in artifact.manifest.files:
            if found.get(file.path) != file.bytes:
                got = "nothing" if file.path not in found else f"{found[file.path]} bytes"
                raise CorruptError(
                    f"{artifact.where(file.path)!r} is damaged: expected {file.bytes} bytes, got {got}. Make the artifact again."
                )


def _path(folder: Path, *names: str) -> str:
    """Return the path of a folder's file below the workspace."""
    return "/".join([folder.parent.name, folder.name, *names])


def _check_identity(artifact: Artifact, stage: str, key: str) -> None:
    """Raise CorruptError if an artifact is not the one of a stage with this key."""
    manifest = artifact.manifest
    if (manifest.stage, manifest.cache_key) != (stage, key):
        raise CorruptError(
            f"{artifact.location!r} holds {manifest.stage} {manifest.cache_key} by its manifest: it was moved there. "
            "Give it its own name again, or remove it."
        )


def pool_inputs(pool: Artifact) -> dict[str, Artifact] | None:
    """Return what a pool was made from, by role; None unless its own workspace, on this machine, has all of it, or the flow is NATURAL_32."""
    if not pool.is_local:
        return None
    workspace, found = Workspace(pool.folder.resolve().parent.parent), {}
    for record in pool.manifest.inputs:
        try:
            artifact = workspace.find(_STAGE_OF_ROLE.get(record.role, record.role), record.cache_key)
        except LsmixError:
            return None
        if artifact is None and record.role == "flow":
            artifact = shipped_flow(record.content_digest)
        if artifact is None or artifact.manifest.content_digest != record.content_digest:
            return None
        found[record.role] = artifact
    return found if "dataset" in found or {"latents", "flow"} <= found.keys() else None
