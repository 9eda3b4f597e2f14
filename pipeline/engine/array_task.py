"""Job arrays: processes that share a workspace each make some of a stage's shards; then ``finalize`` completes the artifact.

A task writes shards and their records and nothing else, so tasks may overlap, run twice, or be divided differently later.
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lsmix.data.errors import MissingError, RecipeError
from lsmix.data.progress import Progress
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.runner import Built, bring_up_to_date, locked_task, note_seconds
from lsmix.pipeline.engine.sharding import complete_shards, make_missing_shards
from lsmix.pipeline.engine.shards import Executor, finished_shards, read_ledger
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.workspace.locks import InputLocks
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["ArrayTaskResult", "finalize_array", "run_array_task"]

_MOST_TASKS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ArrayTaskResult:
    """What an array task made of one artifact."""

    label: str  # "mix lsmix"
    folder: str  # of the unfinished artifact
    shards: int  # of this task
    made: int  # of these, now; the others were complete
    finished: int  # of the whole artifact, by all tasks
    of: int  # shards of the whole artifact


def run_array_task(
    nodes: Sequence[Node],
    workspace: Workspace,
    *,
    stage: str,
    index: int,
    size: int,
    executor: Executor,
    progress: Progress,
    device: str = "auto",
) -> list[ArrayTaskResult]:
    """Make shards ``index``, ``index + size``, … of every artifact of a stage that isn't complete.

    Raises:
        RecipeError: the stage's work cannot be divided, or the index is outside of the array.
        LsmixError: as ``locked_task`` and ``make_missing_shards``.
    """
    if not 0 <= index < size <= _MOST_TASKS:
        raise RecipeError(
            f"array index {index} of size {size}: expected a size of 1 to {_MOST_TASKS:,}, and an index from 0 to size - 1."
        )
    resolver = Resolver(workspace, remember=True)
    results = []
    for node in nodes:
        if node.stage.name != stage:
            continue
        if node.stage.create is None:
            raise RecipeError(f"stage {stage!r} has no shards to be divided: only 'encode' and 'mix' have.")
        artifact = resolver.artifact(node)
        if artifact:
            progress.info(f"{node.label}: up to date ({artifact.location})")
            continue
        with InputLocks() as locks, locked_task(node, resolver, locks, executor, progress, device, shared=True) as task:
            begun = time.monotonic()
            store = node.stage.create(task)
            own, before = range(index, store.shards, size), complete_shards(task, store)
            records = make_missing_shards(task, store, node.stage.processor, own, before)
            note_seconds(task, time.monotonic() - begun, f"-{socket.gethostname()}-{os.getpid()}")
        result = ArrayTaskResult(
            label=task.label,
            folder=str(task.folder),
            shards=len(own),
            made=sum(shard not in before for shard in own),
            finished=len(records),
            of=store.shards,
        )
        progress.info(f"{node.label}: array task {index} of {size} done, {result.made} shards made")
        results.append(result)
    return results


def finalize_array(
    nodes: Sequence[Node], workspace: Workspace, *, progress: Progress, device: str = "auto"
) -> list[Built]:
    """Complete every artifact that array tasks have begun; compute no shard.

    Raises:
        MissingError: none was begun.
        PartialError: shards of one are missing.
        LockedError: a task still works on one.
    """
    resolver = Resolver(workspace, remember=True)
    built: list[Built] = []
    for node in nodes:
        key = resolver.key(node) if node.stage.create else None
        if key is None:
            continue
        folder = workspace.folder(node.stage.name, node.name, key)
        url = workspace.url_of(folder)
        if finished_shards(folder) or (url and read_ledger(url, node.stage.name)) or resolver.artifact(node):
            built += bring_up_to_date([node], workspace, executor=None, progress=progress, device=device)
        else:
            progress.info(f"{node.label}: not begun")
    if not built:
        raise MissingError(
            f"nothing in {workspace.location!r} was begun by array tasks. Run them first: lsmix encode RECIPE --array-index 0 "
            "--array-size N, …"
        )
    return built
