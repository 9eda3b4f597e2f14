"""Make the missing shards of a stage through an executor, with progress."""

from collections.abc import Sequence
from typing import Any

import msgspec

from lsmix.data.errors import PartialError, format_count
from lsmix.data.progress import stop_point
from lsmix.data.table import METADATA_NAME, Table
from lsmix.pipeline.engine.shards import (
    Executor,
    ShardJob,
    ShardRecord,
    fetch_shard,
    finished_shards,
    merge_counts,
    read_ledger,
    send_shard,
)
from lsmix.pipeline.engine.stage import StageTask

__all__ = ["complete_shards", "make_missing_shards", "make_shards"]

_MAX_NAMED = 10  # missing shards to list in a message


def make_shards(task: StageTask, store: Table, processor: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Make all missing shards, and download the shards that other machines made.

    Args:
        task: The artifact to make.
        store: The table, with its metadata already written; a shard is one chunk of each column.
        processor: "module:class" of the stage's ``ShardProcessor``.

    Returns:
        The summed counts of all shards, including ``shards``, and the SHA-256 of each file by path.

    Raises:
        PartialError: Some shards failed.
    """
    records = make_missing_shards(task, store, processor, range(store.shards), complete_shards(task, store))
    absent = sorted(records.keys() - _local_shards(task, store).keys()) if task.url else []
    if absent:
        task.progress.start(f"{task.label}: download", len(absent), "shard")
        for shard in absent:
            stop_point()
            fetch_shard(task.folder, task.url, records[shard])
            task.progress.advance()
        task.progress.finish()
    kinds = sorted({record.made_on for record in records.values() if record.made_on})
    if len(kinds) > 1:
        task.progress.warning(
            f"{task.label}: shards were made on different devices ({', '.join(kinds)}), which round differently. Another run "
            "gives the same content digest only if it makes the same shards on the same kinds of device."
        )
    digests = {file.path: file.sha256 for record in records.values() for file in record.files}
    return {**merge_counts(records, store.shards), "shards": store.shards}, digests


def make_missing_shards(
    task: StageTask, store: Table, processor: str, wanted: Sequence[int], records: dict[int, ShardRecord]
) -> dict[int, ShardRecord]:
    """Make the wanted shards that have no record yet; return the records of all complete shards.

    Raises:
        PartialError: Some shards failed, or some are missing and there is no executor.
    """
    records, missing = dict(records), [shard for shard in wanted if shard not in records]
    total, left = (sum(len(store.shard_range(shard)) for shard in shards) for shards in (wanted, missing))
    task.progress.start(task.label, total, "image", done=total - left)

    def report(record: ShardRecord) -> None:
        records[record.shard] = record
        facts = {"label": task.label, "shard": record.shard, "seconds": record.seconds, "made_on": record.made_on}
        task.progress.event("shard", **facts)

    if task.executor:
        task.executor.run(_job(task, store, task.executor, processor), missing, report, task.progress.advance)
    elif missing:
        named = ", ".join(map(str, missing[:_MAX_NAMED])) + (", …" if len(missing) > _MAX_NAMED else "")
        raise PartialError(
            f"{task.url or str(task.folder)!r} lacks {format_count(len(missing), 'shard')} ({named}): a task of the job array has "
            "not run or has failed. Run that task again, or make the shards here with the stage's command; then finalize."
        )
    task.progress.finish()
    return records


def complete_shards(task: StageTask, store: Table) -> dict[int, ShardRecord]:
    """Return the records of all complete shards, local or in a remote workspace.

    Local shards that are missing in the remote workspace are uploaded first.
    """
    local = _local_shards(task, store)
    if not task.url:
        return local
    remote = read_ledger(task.url, task.stage)
    for shard in local.keys() - remote.keys():
        send_shard(task.folder, task.url, local[shard])
    return local | {shard: record for shard, record in remote.items() if shard < store.shards}


def _local_shards(task: StageTask, store: Table) -> dict[int, ShardRecord]:
    return {
        shard: record
        for shard, record in finished_shards(task.folder).items()
        if shard < store.shards and store.is_written(shard)
    }


def _job(task: StageTask, store: Table, executor: Executor, processor: str) -> ShardJob:
    workspace, inputs = task.folder.resolve().parent.parent, {}
    for role, artifact in task.inputs.items():
        location = artifact.url
        if artifact.is_local:
            folder = artifact.folder.resolve()
            location = str(folder.relative_to(workspace) if folder.is_relative_to(workspace) else folder)
        inputs[role] = location, artifact.manifest.content_digest
    return ShardJob(
        processor=processor,
        stage=task.stage,
        name=task.name,
        config=msgspec.to_builtins(task.config),
        inputs=inputs,
        device=executor.worker_device(task.device),
        folder=str(task.folder.resolve()),
        url=task.url,
        metadata={
            path.relative_to(task.folder).as_posix(): path.read_text(encoding="utf-8")
            for path in (store.folder / METADATA_NAME, *store.folder.glob(f"*/{METADATA_NAME}"))
            if task.url
        },
    )
