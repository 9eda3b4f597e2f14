"""What a stage is: a plain function of its configuration, its inputs and an output folder.

Stages know neither the recipe nor each other; the runner gives them complete inputs and writes the manifest.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsmix.data.artifact import WORK_FOLDER, Artifact, InputRecord
from lsmix.data.errors import RecipeError
from lsmix.data.loaders.ranks import ALONE, Ranks
from lsmix.data.progress import Progress
from lsmix.data.table import Table
from lsmix.glow.config import FlowShape
from lsmix.pipeline.engine.shards import Executor

if TYPE_CHECKING:
    from lsmix.data.readers.images.memory import MemorySource

__all__ = [
    "Cost",
    "DatasetSize",
    "Node",
    "Stage",
    "StageResult",
    "StageTask",
    "check_chunk_rows",
    "check_translate",
    "upto",
]

_MAX_SHARD_BYTES = 1 << 30  # of memory for one shard


@dataclass(frozen=True, kw_only=True)
class StageTask:
    """One piece of work: make ``folder`` from ``config`` and ``inputs``.

    ``folder / "work"`` keeps what lets the work resume after an interrupt; it is removed at the end.
    """

    stage: str
    name: str  # of the artifact, in the recipe
    cache_key: str
    folder: Path
    config: Any  # the stage's own configuration model
    inputs: Mapping[str, Artifact]
    records: list[InputRecord]  # of the inputs, for the manifest
    device: str
    executor: Executor | None  # None: no shard may be made, so all must be complete
    progress: Progress
    url: str = ""  # of the artifact in a remote workspace
    ranks: Ranks = ALONE  # that share the work
    source: "MemorySource | None" = None  # of a stage that reads the source, where that is in memory

    @property
    def label(self) -> str:
        """The artifact for messages: "mix lsmix"."""
        return f"{self.stage} {self.name}"

    @property
    def work(self) -> Path:
        """The folder for unfinished work, created if need be."""
        path = self.folder / WORK_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True, kw_only=True)
class DatasetSize:
    """How big the work is: what an estimate depends on besides the stage's own configuration."""

    images: int = 0  # in the training split
    test_images: int = 0
    height: int = 0  # pixels
    width: int = 0  # pixels
    channels: int = 0
    flow: FlowShape = field(default_factory=FlowShape)

    @property
    def image_bytes(self) -> int:
        """Size of one image."""
        return self.height * self.width * self.channels

    @property
    def flow_flops(self) -> int:
        """Operations of one pass of one image through the flow, in either direction."""
        return 2 * sum(
            cells * (_network_weights(channels, self.flow.hidden) + channels**2)
            for cells, channels in self._flow_steps()
        )

    @property
    def flow_parameters(self) -> int:
        """Number of weights of the flow."""
        return sum(_network_weights(channels, self.flow.hidden) + 2 * channels**2 for _, channels in self._flow_steps())

    def _flow_steps(self) -> Iterator[tuple[int, int]]:
        """Yield the cells and the channels of each step of the flow."""
        cells, channels = self.height * self.width, self.channels
        for _ in range(self.flow.levels):
            cells, channels = cells // 4, channels * 4
            yield from [(cells, channels)] * self.flow.steps
            channels //= 2


def _network_weights(channels: int, hidden: int) -> int:
    return 9 * (channels // 2) * hidden + hidden**2 + 9 * hidden * channels


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an artifact will cost."""

    bytes: int  # on the disk, with unfinished work
    flops: float = 0.0  # floating-point operations


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage returns; of ranks that share it, the first one's counts."""

    payload: frozenset[str] = frozenset()  # files, or first parts of paths, that the next stages read
    counts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 by path, where known from writing


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: what it does, and what its cache key depends on."""

    name: str
    version: int  # raised whenever the same inputs would give other bytes
    run: Callable[[StageTask], StageResult]
    estimate: Callable[[Any, DatasetSize], Cost]  # what a configuration costs on a data set of some size
    not_in_key: frozenset[str] = frozenset()
    uses_torch: bool = True
    on_ranks: bool = False  # whether the ranks of torchrun share it
    lower: str = ""  # the fields to lower where it takes too long
    reads_source: bool = False  # whether its input is the data set that its configuration names, not an artifact
    check: Callable[[Any, DatasetSize], None] = lambda config, size: None  # what depends on the size of the data
    create: Callable[[StageTask], Table] | None = None  # of a stage with shards: writes the store's metadata
    processor: str = ""  # of a stage with shards: "module:class" of its ``ShardProcessor``


def check_translate(field: str, translate: int, size: DatasetSize) -> None:
    """Raise RecipeError if images would be moved by their whole side or more."""
    side = min(size.height, size.width)
    if translate and translate >= side:
        raise RecipeError(
            f"{field}: expected at most {side - 1} for images of {size.height}×{size.width}, got {translate}. Lower it."
        )


def check_chunk_rows(field: str, chunk_rows: int, total_bytes: int, rows: int) -> None:
    """Raise RecipeError where a shard of ``chunk_rows`` of these ``rows``, in all ``total_bytes``, would take too much memory."""
    row_bytes = max(1, total_bytes // max(1, rows))
    if min(chunk_rows, rows) * row_bytes > _MAX_SHARD_BYTES:
        raise RecipeError(
            f"{field}: expected at most {_MAX_SHARD_BYTES // row_bytes} for rows of {row_bytes} bytes, since a shard is held "
            f"in memory, got {chunk_rows}. Lower it, or leave it out."
        )


@dataclass(frozen=True, kw_only=True)
class Node:
    """One artifact that a recipe wants."""

    stage: Stage
    name: str
    config: Any  # the stage's configuration model
    inputs: dict[str, "Node | Artifact"] = field(default_factory=dict)  # by role; an artifact is one from elsewhere
    source: "MemorySource | None" = None  # of a stage that reads the source: what takes the place of its files

    @property
    def label(self) -> str:
        """How to call it to a user."""
        return f"{self.stage.name} {self.name}"

    def ancestry(self) -> Iterator["Node | Artifact"]:
        """Go through the node and all that it is made from, directly or not."""
        yield self
        for source in self.inputs.values():
            if isinstance(source, Node):
                yield from source.ancestry()
            else:
                yield source


def upto(nodes: Sequence[Node], stage: str) -> list[Node]:
    """Return the nodes of one stage and all that they need, in order."""
    wanted = {id(source) for node in nodes if node.stage.name == stage for source in node.ancestry()}
    return [node for node in nodes if id(node) in wanted]
