"""The runner: brings artifacts up to date, one after another, and touches nothing that is.

The one rule: an artifact becomes visible by its manifest, which is written after everything else is on the disk; so
whatever stops a run, what is there is whole, and what is unfinished goes on where it stopped.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lsmix.data.durable import write_durably
from lsmix.data.errors import CorruptError, DiskSpaceError, MissingError
from lsmix.data.manifest import (
    MANIFEST_NAME,
    InputRecord,
    Manifest,
    check_sizes,
    read_manifest,
    record_files,
    root_digest,
    write_manifest,
)
from lsmix.data.sources import source_files, source_version
from lsmix.pipeline.environment import describe_environment, resolve_device
from lsmix.pipeline.executors import Executor
from lsmix.pipeline.graph import Node
from lsmix.pipeline.ingest import INGEST
from lsmix.pipeline.keys import artifact_key, key_fields
from lsmix.pipeline.locks import artifact_lock
from lsmix.pipeline.progress import Progress
from lsmix.pipeline.stage import InputArtifact, StageTask
from lsmix.pipeline.train_glow import TRAIN_GLOW
from lsmix.pipeline.workspace import Workspace

__all__ = ["Built", "Resolver", "bring_up_to_date"]

_SECONDS_FILE = "seconds.json"


@dataclass(frozen=True, kw_only=True)
class Built:
    """An artifact that a run brought up to date, or found so."""

    stage: str
    name: str
    key: str
    folder: Path
    manifest: Manifest
    cached: bool  # whether it was there already
    seconds: float  # of this run


class Resolver:
    """Knows the inputs, the key and the artifact of every node of a graph, as far as they can be known yet."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._sources: dict[int, InputRecord] = {}
        self._found: dict[int, InputArtifact] = {}  # finished artifacts don't change under a run

    def inputs(self, node: Node) -> dict[str, InputArtifact] | None:
        """Return the finished inputs of a node by role; None while one isn't there yet."""
        found = {}
        for role, source in node.inputs.items():
            artifact = self.artifact(source) if isinstance(source, Node) else _outside_artifact(source)
            if artifact is None:
                return None
            found[role] = artifact
        return found

    def records(self, node: Node) -> list[InputRecord] | None:
        """Return what goes into a node's key for its inputs; None while one isn't there yet."""
        if node.stage is INGEST:
            return [self._source_record(node)]
        inputs = self.inputs(node)
        if inputs is None:
            return None
        return [
            InputRecord(role=role, key=artifact.manifest.key, root=artifact.manifest.root)
            for role, artifact in inputs.items()
        ]

    def key(self, node: Node) -> str | None:
        """Return the key of a node; None while an input isn't there yet."""
        records = self.records(node)
        if records is None:
            return None
        return artifact_key(node.stage.name, node.stage.version, self.fields(node), records)

    def artifact(self, node: Node) -> InputArtifact | None:
        """Return the finished artifact of a node, or None."""
        if id(node) not in self._found:
            key = self.key(node)
            there = self.workspace.find(node.stage.name, key) if key else None
            if there is None:
                return None
            self._found[id(node)] = there
        return self._found[id(node)]

    def forget(self, node: Node) -> None:
        """Look for a node's artifact anew next time, since it was removed."""
        self._found.pop(id(node), None)

    @staticmethod
    def fields(node: Node) -> dict[str, Any]:
        """Return the configuration fields that are part of a node's key."""
        return key_fields(node.config, node.stage.not_in_key)

    def _source_record(self, node: Node) -> InputRecord:
        if id(node) not in self._sources:
            files = source_files(node.config)
            root = Path(node.config.path)
            base = root if root.is_dir() else root.parent
            digest = self.workspace.sources.digest(files, base) if files else source_version(node.config)
            self._sources[id(node)] = InputRecord(role="source", key="", root=digest)
        return self._sources[id(node)]


def _outside_artifact(folder: Path) -> InputArtifact:
    """Return a finished flow from outside; one that was only saved, without a manifest, counts by its two files."""
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        if manifest.stage != TRAIN_GLOW.name:
            raise MissingError(
                f"{str(folder)!r} is no flow but the result of stage {manifest.stage!r}. Check 'flow.path'."
            )
        check_sizes(folder, manifest)
        return InputArtifact(folder=folder, manifest=manifest)
    files = [record for record in record_files(folder) if record.path in {"glow.safetensors", "glow.json"}]
    root = root_digest(files)
    manifest = Manifest(
        stage=TRAIN_GLOW.name,
        stage_version=TRAIN_GLOW.version,
        name=folder.name,
        key="",
        root=root,
        config={},
        inputs=[],
        files=files,
    )
    return InputArtifact(folder=folder, manifest=manifest)


def bring_up_to_date(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
    force: str = "",
) -> list[Built]:
    """Make every node that isn't there yet, in order.

    Args:
        nodes: inputs before what is made from them.
        workspace: where artifacts are.
        executor: makes the shards of sharded stages.
        progress: is told what happens.
        device: "auto", "cpu", "cuda" or "cuda:N".
        force: name of a stage to make again although it is there; "" for none.

    Raises:
        LockedError: another run works on one of them.
        DiskSpaceError: one would not fit on the disk.
        LsmixError: whatever a stage has to say.
    """
    resolver = Resolver(workspace)
    built = []
    for node in nodes:
        there = resolver.artifact(node)
        if there and node.stage.name == force:
            _remove(there.folder)
            resolver.forget(node)
            there = None
        if there:
            shutil.rmtree(there.folder / "work", ignore_errors=True)  # left by a kill between manifest and clean-up
            progress.say(f"{node.label}: up to date ({there.folder})")
            built.append(_built(node, there, cached=True, seconds=0.0))
            continue
        begun = time.monotonic()
        made = _make(node, resolver, executor, progress, device)
        built.append(_built(node, made, cached=False, seconds=time.monotonic() - begun))
    return built


def _remove(folder: Path) -> None:
    (folder / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that what is half removed is never read
    shutil.rmtree(folder)


def _built(node: Node, artifact: InputArtifact, *, cached: bool, seconds: float) -> Built:
    return Built(
        stage=node.stage.name,
        name=node.name,
        key=artifact.manifest.key,
        folder=artifact.folder,
        manifest=artifact.manifest,
        cached=cached,
        seconds=seconds,
    )


def _make(node: Node, resolver: Resolver, executor: Executor, progress: Progress, device: str) -> InputArtifact:
    inputs, records, key = resolver.inputs(node), resolver.records(node), resolver.key(node)
    if inputs is None or records is None or key is None:
        raise MissingError(
            f"{node.label} cannot be made: one of its inputs is not there. Run its recipe from the start."
        )
    workspace = resolver.workspace
    folder = workspace.folder(node.stage.name, node.name, key)
    with artifact_lock(workspace.root, key, node.label):
        finished = workspace.find(node.stage.name, key)
        if finished:  # another run made it while this one waited for nothing but the lock
            return finished
        _check_disk(node, inputs, folder)
        folder.mkdir(parents=True, exist_ok=True)
        task = StageTask(
            stage=node.stage.name,
            label=node.label,
            folder=folder,
            config=node.config,
            inputs=inputs,
            device=resolve_device(device) if node.stage.uses_torch else "",
            executor=executor,
            progress=progress,
        )
        manifest = _run_stage(node, task, records, key)
        shutil.rmtree(folder / "work", ignore_errors=True)
    progress.say(f"{node.label}: done in {manifest.seconds:.1f} s ({folder})")
    return InputArtifact(folder=folder, manifest=manifest)


def _run_stage(node: Node, task: StageTask, records: list[InputRecord], key: str) -> Manifest:
    if task.device:
        from lsmix.pipeline.environment import prepare_device

        prepare_device(task.device)
    seconds_file = task.work / _SECONDS_FILE
    before = msgspec.json.decode(seconds_file.read_bytes(), type=float) if seconds_file.is_file() else 0.0
    begun = time.monotonic()
    try:
        outcome = node.stage.run(task)
    except BaseException:
        if task.folder.is_dir():
            write_durably(seconds_file, msgspec.json.encode(before + time.monotonic() - begun))
        raise
    files = record_files(task.folder, set(outcome.payload), outcome.digests)
    if not files:
        raise CorruptError(f"{node.label} left nothing in {str(task.folder)!r}.")
    manifest = Manifest(
        stage=node.stage.name,
        stage_version=node.stage.version,
        name=node.name,
        key=key,
        root=root_digest(files),
        config=msgspec.to_builtins(node.config),
        inputs=records,
        files=files,
        counts=outcome.counts,
        seconds=round(before + time.monotonic() - begun, 3),
        environment=describe_environment(task.device),
    )
    write_manifest(task.folder, manifest)
    return manifest


def _check_disk(node: Node, inputs: dict[str, InputArtifact], folder: Path) -> None:
    expected = node.stage.estimate_bytes(node.config, inputs)
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if expected - there > free:
        raise DiskSpaceError(
            f"{node.label} needs about {(expected - there) / 1e9:.2f} GB below {str(place)!r}, where {free / 1e9:.2f} GB "
            "are free. Free some space ('lsmix gc' helps), or choose another '--workspace'."
        )
