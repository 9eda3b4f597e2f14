"""What the sharded stages share: create the store, make the shards that are missing, add up the facts.

The one rule: all of an artifact's shards may be made at once, or part by part by any number of processes; whoever finds
them all there may conclude it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from lsmix.data.columns import ColumnStore
from lsmix.pipeline.interruption import stop_point
from lsmix.pipeline.shards import InputPlace, ShardRecord, ShardSpec, finished_shards, merge_counts, write_spec
from lsmix.pipeline.shards_afar import fetch_shard, read_ledger, send_shard, send_work
from lsmix.pipeline.stage import Outcome, Part, PartMade, StageTask

__all__ = ["ShardedWork"]


class ShardedWork(NamedTuple):
    """How a stage divides its work."""

    module: str  # the stage's module, whose ``open_worker`` the workers call
    create: Callable[[StageTask], ColumnStore]  # writes the store's metadata; again and again to the same bytes
    conclude: Callable[[StageTask, ColumnStore, dict[str, Any], dict[str, str]], Outcome]  # with all counts and digests

    def run(self, task: StageTask) -> Outcome:
        """Make all shards that are not done yet, and conclude.

        Raises:
            PartialError: some shards failed.
        """
        store = self.create(task)
        finished = self._make_missing(task, store, range(store.shards), _finished(task, store))
        _bring_here(task, store, finished)
        digests = {path: digest for record in finished.values() for path, digest in record.digests.items()}
        counts = {**merge_counts(finished, store.shards), "shards": store.shards}
        _tell_other_devices(task, finished)
        return self.conclude(task, store, counts, digests)

    def make_part(self, task: StageTask, part: Part) -> PartMade:
        """Make the shards of one part that are not done yet, and leave the rest to others.

        Raises:
            PartialError: some of them failed.
        """
        store = self.create(task)
        own = range(part.number - 1, store.shards, part.of)
        before = _finished(task, store)
        finished = self._make_missing(task, store, own, before)
        return PartMade(
            label=task.label,
            folder=str(task.folder),
            shards=len(own),
            made=len(own) - len(before.keys() & set(own)),
            finished=len(finished),
            of=store.shards,
        )

    def _make_missing(
        self, task: StageTask, store: ColumnStore, wanted: Sequence[int], before: dict[int, ShardRecord]
    ) -> dict[int, ShardRecord]:
        """Make the wanted shards that are not done yet; return the records of all that are done then."""
        inputs = {}
        for role, artifact in task.inputs.items():
            folder, workspace = artifact.folder.resolve(), task.folder.resolve().parent.parent
            inside = folder.relative_to(workspace) if folder.is_relative_to(workspace) else folder
            inputs[role] = InputPlace(folder=str(inside), root=artifact.manifest.root)
        config: dict[str, Any] = msgspec.to_builtins(task.config)
        device = task.executor.worker_device(task.device)
        spec = ShardSpec(module=self.module, config=config, inputs=inputs, device=device)
        work = write_spec(task.folder, spec, task.url)
        if task.url:
            send_work(task.folder, task.url, work.spec)
        finished = dict(before)
        done = sum(len(store.shard_range(shard)) for shard in wanted if shard in finished)
        task.progress.start(task.label, sum(len(store.shard_range(shard)) for shard in wanted), "image", done=done)

        def report(record: ShardRecord) -> None:
            finished[record.shard] = record
            facts = {"label": task.label, "shard": record.shard, "seconds": record.seconds, "made_on": record.made_on}
            task.progress.event("shard", **facts)
            task.progress.advance(len(store.shard_range(record.shard)))

        task.executor.run(work, [shard for shard in wanted if shard not in finished], report)
        task.progress.finish()
        return finished


def _finished(task: StageTask, store: ColumnStore) -> dict[int, ShardRecord]:
    """Return the records of all shards that are done; in a remote workspace those that lie at the URL, or will at once."""
    here = _finished_here(task, store)
    if not task.url:
        return here
    afar = read_ledger(task.url)
    for shard in here.keys() - afar.keys():  # made, and not sent before the end
        send_shard(task.folder, task.url, here[shard])
    return here | {shard: record for shard, record in afar.items() if shard < store.shards}


def _finished_here(task: StageTask, store: ColumnStore) -> dict[int, ShardRecord]:
    return {
        shard: record
        for shard, record in finished_shards(task.folder).items()
        if shard < store.shards and store.is_written(shard)
    }


def _bring_here(task: StageTask, store: ColumnStore, finished: dict[int, ShardRecord]) -> None:
    """Fetch the shards that other machines made."""
    missing = sorted(finished.keys() - _finished_here(task, store).keys()) if task.url else []
    if not missing:
        return
    task.progress.start(f"{task.label}: fetch", len(missing), "shard")
    for shard in missing:
        stop_point()
        fetch_shard(task.folder, task.url, finished[shard])
        task.progress.advance()
    task.progress.finish()


def _tell_other_devices(task: StageTask, finished: dict[int, ShardRecord]) -> None:
    """Warn where shards were made on several kinds of device, whose last bits differ."""
    kinds = sorted({record.made_on for record in finished.values() if record.made_on})
    if len(kinds) > 1:
        task.progress.warn(
            f"{task.label}: its shards were made on {' and on '.join(kinds)}; each kind of device rounds in its own way, so "
            "another run's digest will differ unless it divides the work alike."
        )
