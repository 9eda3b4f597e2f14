"""The runner: brings artifacts up to date, one after another, and touches nothing that is.

The one rule: an artifact becomes visible by its manifest, which is written after everything else is on the disk; so
whatever stops a run, what is there is whole, and what is unfinished goes on where it stopped.
"""

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lsmix.data.durable import sweep_parts, write_durably
from lsmix.data.errors import CorruptError, DiskSpaceError, MissingError
from lsmix.data.manifest import (
    MANIFEST_NAME,
    WORK_FOLDER,
    InputRecord,
    Manifest,
    record_files,
    root_digest,
    write_manifest,
)
from lsmix.pipeline.environment import describe_environment, resolve_device
from lsmix.pipeline.estimates import estimate
from lsmix.pipeline.executors import Executor
from lsmix.pipeline.graph import Node
from lsmix.pipeline.interruption import stop_point
from lsmix.pipeline.locks import artifact_lock
from lsmix.pipeline.progress import Progress
from lsmix.pipeline.resolver import Resolver
from lsmix.pipeline.stage import InputArtifact, StageTask
from lsmix.pipeline.units import human_bytes
from lsmix.pipeline.workspace import Workspace

__all__ = ["Built", "bring_up_to_date"]

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
    resolver = Resolver(workspace, remember=True)
    built = []
    for node in nodes:
        stop_point()
        if node.stage.name == force:
            _remove_made(node, resolver)
        there = resolver.artifact(node)
        if there:
            shutil.rmtree(
                there.folder / WORK_FOLDER, ignore_errors=True
            )  # left by a kill between manifest and clean-up
            progress.say(f"{node.label}: up to date ({there.folder})")
            built.append(_built(node, there, cached=True, seconds=0.0))
            continue
        begun = time.monotonic()
        made = _make(node, resolver, executor, progress, device)
        built.append(_built(node, made, cached=False, seconds=time.monotonic() - begun))
    return built


def _remove_made(node: Node, resolver: Resolver) -> None:
    """Remove the artifact of a node, be it whole or damaged; unfinished work is kept, since it goes on."""
    key = resolver.key(node)
    if key is None:
        return
    workspace = resolver.workspace
    folder = workspace.folder(node.stage.name, node.name, key)
    if (folder / MANIFEST_NAME).is_file():
        workspace.remove(folder, key, node.label)
    resolver.forget(node)


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
        _check_disk(node, resolver, folder)
        task_device = resolve_device(device) if node.stage.uses_torch else ""
        made_from = ", ".join(f"{record.role} {record.root[:12]}" for record in records)
        progress.detail(f"{node.label}: key {key} from {made_from}, on {task_device or 'no device'}, in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        task = StageTask(
            stage=node.stage.name,
            label=node.label,
            folder=folder,
            config=node.config,
            inputs=inputs,
            device=task_device,
            executor=executor,
            progress=progress,
        )
        manifest = _run_stage(node, task, resolver, records, key)
        shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    progress.say(f"{node.label}: done in {manifest.seconds:.1f} s ({folder})")
    return InputArtifact(folder=folder, manifest=manifest)


def _run_stage(node: Node, task: StageTask, resolver: Resolver, records: list[InputRecord], key: str) -> Manifest:
    if task.device:
        from lsmix.pipeline.environment import prepare_device

        prepare_device(task.device)
    before = _seconds_before(task)
    begun = time.monotonic()
    try:
        outcome = node.stage.run(task)
    except BaseException:
        _leave_unfinished(task, before + time.monotonic() - begun)
        raise
    sweep_parts(task.folder)
    files = record_files(task.folder, set(outcome.payload), outcome.digests)
    if not files:
        raise CorruptError(f"{node.label} left nothing in {str(task.folder)!r}.")
    cost = estimate(node, resolver)
    manifest = Manifest(
        stage=node.stage.name,
        stage_version=node.stage.version,
        name=node.name,
        key=key,
        root=root_digest(files),
        config=msgspec.to_builtins(node.config),
        inputs=records,
        files=files,
        counts={**outcome.counts, "gflop": round(cost.flops / 1e9, 3) if cost else 0.0},
        seconds=round(before + time.monotonic() - begun, 3),
        environment=describe_environment(task.device),
    )
    write_manifest(task.folder, manifest)
    return manifest


def _seconds_before(task: StageTask) -> float:
    """Return the seconds of earlier sessions; 0 where there are none or their file is damaged, since they only inform."""
    try:
        return msgspec.json.decode((task.work / _SECONDS_FILE).read_bytes(), type=float)
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
        return 0.0


def _leave_unfinished(task: StageTask, seconds: float) -> None:
    """Note the time of a session that did not finish; a folder in which it made nothing is removed."""
    with contextlib.suppress(OSError):  # the disk may be full, and that is what has to be told
        sweep_parts(task.folder)
        if any(path.is_file() and path.name != _SECONDS_FILE for path in task.folder.rglob("*")):
            write_durably(task.work / _SECONDS_FILE, msgspec.json.encode(seconds))
        else:
            shutil.rmtree(task.folder)


def _check_disk(node: Node, resolver: Resolver, folder: Path) -> None:
    cost = estimate(node, resolver)
    expected = cost.bytes if cost else 0
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0
    place = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if expected - there > free:
        raise DiskSpaceError(
            f"{node.label} needs about {human_bytes(expected - there)} below {str(place)!r}, where {human_bytes(free)} are free. "
            "Free some space ('lsmix gc' helps), or choose another '--workspace'."
        )
