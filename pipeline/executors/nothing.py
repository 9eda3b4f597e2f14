"""No executor at all: for whoever wants an artifact concluded from what is there, and nothing computed."""

from collections.abc import Sequence

from lsmix.data.errors import PartialError
from lsmix.pipeline.executors.executor import Report
from lsmix.pipeline.executors.in_process import InProcessExecutor
from lsmix.pipeline.shards import ShardWork

__all__ = ["NoExecutor"]

_NAMED = 10


class NoExecutor(InProcessExecutor):
    """Makes no shards, and says which ones are missing."""

    def run(self, work: ShardWork, shards: Sequence[int], report: Report) -> None:
        """Raise PartialError if any shard is missing."""
        if not shards:
            return
        named = ", ".join(map(str, shards[:_NAMED])) + (", …" if len(shards) > _NAMED else "")
        raise PartialError(
            f"{len(shards)} shards of {work.place!r} are missing ({named}): a part of the job array has not run, or failed. "
            "Run that part again, or make them here with the stage's command; then finish."
        )
