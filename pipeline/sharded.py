"""What the sharded stages share: write the reference for workers, make the shards that are missing, add up the facts."""

from typing import Any

import msgspec

from lsmix.data.columns import ColumnStore
from lsmix.pipeline.shards import ShardRecord, ShardSpec, finished_shards, merge_counts, write_spec
from lsmix.pipeline.stage import StageTask

__all__ = ["run_sharded"]


def run_sharded(task: StageTask, *, module: str, store: ColumnStore) -> tuple[dict[str, Any], dict[str, str]]:
    """Make all shards of ``task`` that are not done yet.

    Args:
        task: the work.
        module: name of the stage's module, whose ``open_worker`` the workers call.
        store: what is written, with its metadata on the disk already.

    Returns:
        The counts of all shards added up with their number, and the SHA-256 of each shard's files by path.

    Raises:
        PartialError: some shards failed.
    """
    inputs = {role: str(artifact.folder.resolve()) for role, artifact in task.inputs.items()}
    config: dict[str, Any] = msgspec.to_builtins(task.config)
    write_spec(task.folder, ShardSpec(module=module, config=config, inputs=inputs, device=task.device))
    finished = {shard: record for shard, record in finished_shards(task.folder).items() if store.is_written(shard)}
    done = sum(len(store.shard_range(shard)) for shard in finished)
    task.progress.start(task.label, store.rows, "image", done=done)

    def report(record: ShardRecord) -> None:
        finished[record.shard] = record
        task.progress.advance(len(store.shard_range(record.shard)))

    task.executor.run(task.folder, [shard for shard in range(store.shards) if shard not in finished], report)
    task.progress.finish()
    digests = {path: digest for record in finished.values() for path, digest in record.digests.items()}
    return {**merge_counts(finished, store.shards), "shards": store.shards}, digests
