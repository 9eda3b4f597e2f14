"""Stages: plain functions of a configuration, inputs and an output folder; and the nodes of a recipe's graph.

Stages depend neither on the recipe nor on each other. The runner passes them complete inputs and writes the manifest.
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

_MAX_SHARD_BYTES = 1 << 30  # memory of one shard


@dataclass(frozen=True, kw_only=True)
class StageTask:
    """The arguments of a stage: make ``folder`` from ``config`` and ``inputs``.

    ``folder / "work"`` stores what is needed to resume after an interrupt; it is removed at the end.
    """

    stage: str
    name: str  # of the artifact, in the recipe
    cache_key: str
    folder: Path
    config: Any  # the stage's configuration struct
    inputs: Mapping[str, Artifact]
    records: list[InputRecord]  # of the inputs, for the manifest
    device: str
    executor: Executor | None  # None: no shards may be made; all must be complete
    progress: Progress
    url: str = ""  # of the artifact in a remote workspace
    ranks: Ranks = ALONE  # the torchrun ranks that share the work
    source: "MemorySource | None" = None  # the source, if the stage reads it and it is in memory

    @property
    def label(self) -> str:
        """The artifact for messages: "mix lsmix"."""
        return f"{self.stage} {self.name}"

    @property
    def work(self) -> Path:
        """The folder for unfinished work, created if it does not exist."""
        path = self.folder / WORK_FOLDER
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass(frozen=True, kw_only=True)
class DatasetSize:
    """The sizes that a cost estimate depends on, in addition to the stage's configuration."""

    images: int = 0  # in the training split
    test_images: int = 0
    height: int = 0  # pixels
    width: int = 0  # pixels
    channels: int = 0
    flow: FlowShape = field(default_factory=FlowShape)

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.height * self.width * self.channels

    @property
    def flow_flops(self) -> int:
        """Floating-point operations of one image's pass through the flow, in either direction."""
        return 2 * sum(
            cells * (_network_weights(channels, self.flow.hidden) + channels**2)
            for cells, channels in self._flow_steps()
        )

    @property
    def flow_parameters(self) -> int:
        """Number of weights of the flow."""
        return sum(_network_weights(channels, self.flow.hidden) + 2 * channels**2 for _, channels in self._flow_steps())

    def _flow_steps(self) -> Iterator[tuple[int, int]]:
        """Yield the numbers of cells and channels of each step of the flow."""
        cells, channels = self.height * self.width, self.channels
        for _ in range(self.flow.levels):
            cells, channels = cells // 4, channels * 4
            yield from [(cells, channels)] * self.flow.steps
            channels //= 2


def _network_weights(channels: int, hidden: int) -> int:
    return 9 * (channels // 2) * hidden + hidden**2 + 9 * hidden * channels


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The estimated cost of an artifact."""

    bytes: int  # on disk, including unfinished work
    flops: float = 0.0  # floating-point operations


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage; under torchrun, that of rank 0."""

    payload: frozenset[str] = frozenset()  # files, or first components of paths, that later stages read
    counts: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)  # SHA-256 by path, of files that were hashed while writing


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage: its function, and what its cache key depends on."""

    name: str
    version: int  # incremented whenever the same inputs would give different bytes
    run: Callable[[StageTask], StageResult]
    estimate: Callable[[Any, DatasetSize], Cost]  # cost of a configuration on a data set of this size
    not_in_key: frozenset[str] = frozenset()  # configuration fields that do not change the output
    uses_torch: bool = True
    on_ranks: bool = False  # whether torchrun ranks share the work
    lower: str = ""  # the fields to lower if the stage takes too long
    reads_source: bool = False  # whether the input is the data set that the configuration names, not an artifact
    check: Callable[[Any, DatasetSize], None] = lambda config, size: None  # against the data set
    create: Callable[[StageTask], Table] | None = None  # for stages with shards: writes the store's metadata
    processor: str = ""  # for stages with shards: "module:class" of the ``ShardProcessor``


def check_translate(field: str, translate: int, size: DatasetSize) -> None:
    """Raise RecipeError if images would be shifted by their full height or width."""
    side = min(size.height, size.width)
    if translate and translate >= side:
        raise RecipeError(
            f"{field}: expected at most {side - 1} for images of {size.height}×{size.width}, got {translate}. Lower it."
        )


def check_chunk_rows(field: str, chunk_rows: int, total_bytes: int, rows: int) -> None:
    """Raise RecipeError if a shard of ``chunk_rows`` would need too much memory; all ``rows`` have ``total_bytes``."""
    row_bytes = max(1, total_bytes // max(1, rows))
    if min(chunk_rows, rows) * row_bytes > _MAX_SHARD_BYTES:
        raise RecipeError(
            f"{field}: expected at most {_MAX_SHARD_BYTES // row_bytes:,} for rows of {row_bytes:,} bytes, because a shard "
            f"is kept in memory, got {chunk_rows:,}. Lower or remove it."
        )


@dataclass(frozen=True, kw_only=True)
class Node:
    """One artifact of a recipe."""

    stage: Stage
    name: str
    config: Any  # the stage's configuration struct
    inputs: dict[str, "Node | Artifact"] = field(default_factory=dict)  # by role; an ``Artifact`` is external
    source: "MemorySource | None" = None  # if the stage reads the source: images in memory that replace the files

    @property
    def label(self) -> str:
        """The artifact for messages: "mix lsmix"."""
        return f"{self.stage.name} {self.name}"

    def ancestry(self) -> Iterator["Node | Artifact"]:
        """Yield the node and all of its direct and indirect inputs."""
        yield self
        for source in self.inputs.values():
            if isinstance(source, Node):
                yield from source.ancestry()
            else:
                yield source


def upto(nodes: Sequence[Node], stage: str) -> list[Node]:
    """Return the nodes of a stage and all of their inputs, in order."""
    wanted = {id(source) for node in nodes if node.stage.name == stage for source in node.ancestry()}
    return [node for node in nodes if id(node) in wanted]
