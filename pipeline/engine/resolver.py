"""Resolve the nodes of a graph to artifacts: their inputs, keys and costs, as far as these are known yet.

Costs count the operations of convolutions and matrix products, a multiply-add as two. Times are estimated from the
speed of the stage's earlier artifacts, or if there are none, from a rough guess.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from lsmix.data.artifact import Artifact, InputRecord
from lsmix.data.errors import CorruptError, LsmixError, RecipeError, format_duration
from lsmix.data.readers.registry import is_listed, source_files, source_version, summarise_source
from lsmix.data.readers.source_images import SourceSummary
from lsmix.glow.config import FlowShape
from lsmix.pipeline.config.schema import DataConfig
from lsmix.pipeline.engine.device import likely_device
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Node
from lsmix.pipeline.workspace.cache_key import artifact_key, key_fields
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["Resolver", "expected_size", "slow_warning"]

# Floating-point operations per second: two cores with AVX2 on small images; an H200, from disk to disk.
_GUESSED_RATES = {"cpu": 3e10, "cuda": 1.2e13}
_SLOW_SECONDS = 86_400.0  # longer runs get a warning
_STARTING_SECONDS = 1.0  # for imports and opening files, most of the time of small artifacts
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


class _Counts(msgspec.Struct):
    """The counts in the manifest of a data set."""

    image_shape: tuple[_Size, _Size, _Size]  # height, width, channels
    train: _Size
    test: Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class Resolver:
    """Finds the inputs, key, cost and artifact of every node of a graph, as far as they are known yet.

    Args:
        workspace: The workspace to search.
        remember: Whether to cache checksums of source files in the workspace, which saves time on the next call.
    """

    def __init__(self, workspace: Workspace, *, remember: bool = False) -> None:
        self.workspace = workspace
        self._remember = remember
        self._sources: dict[int, InputRecord] = {}
        self._found: dict[int, Artifact] = {}  # complete artifacts do not change during a run
        self._expected: dict[int, DatasetSize | None] = {}
        self._rates: dict[str, float] = {}  # operations per second, by stage

    def inputs(self, node: Node) -> dict[str, Artifact] | None:
        """Return the complete inputs of a node by role; None if one is missing."""
        found = {}
        for role, source in node.inputs.items():
            artifact = self.artifact(source) if isinstance(source, Node) else source
            if artifact is None:
                return None
            found[role] = artifact
        return found

    def records(self, node: Node) -> list[InputRecord] | None:
        """Return the input records that a node's key depends on; None if an input is missing."""
        if node.stage.reads_source:
            return [self._source_record(node)]
        inputs = self.inputs(node)
        if inputs is None:
            return None
        return [
            InputRecord(
                role=role, cache_key=artifact.manifest.cache_key, content_digest=artifact.manifest.content_digest
            )
            for role, artifact in inputs.items()
        ]

    def key(self, node: Node) -> str | None:
        """Return the key of a node; None if an input is missing."""
        records = self.records(node)
        if records is None:
            return None
        return artifact_key(node.stage.name, node.stage.version, self.fields(node), records)

    def artifact(self, node: Node) -> Artifact | None:
        """Return the complete artifact of a node, or None."""
        if id(node) not in self._found:
            key = self.key(node)
            found = self.workspace.find(node.stage.name, key) if key else None
            if found is None:
                return None
            self._found[id(node)] = found
        return self._found[id(node)]

    def missing(self, node: Node) -> list[str]:
        """Return the labels of a node's inputs that have not been made yet."""
        sources = [source for source in node.inputs.values() if isinstance(source, Node)]
        return [source.label for source in sources if self.artifact(source) is None]

    def forget(self, node: Node) -> None:
        """Drop a node's artifact from the cache, because it was removed."""
        self._found.pop(id(node), None)

    @staticmethod
    def fields(node: Node) -> dict[str, Any]:
        """Return the configuration fields that are part of a node's key."""
        return key_fields(node.config, node.stage.not_in_key)

    def cost(self, node: Node) -> Cost | None:
        """Return the cost of a node; None if neither the data set nor a listing of its files is available."""
        if node.stage.reads_source:
            return node.stage.estimate(node.config, self._listed_size(node) or DatasetSize())
        size = self._size(node) or self._listed_size(node)
        return node.stage.estimate(node.config, size) if size else None

    def slow_seconds(self, nodes: Sequence[Node]) -> list[float] | None:
        """Return the seconds that each node still needs; [] if all together take less than a day; None if unknown."""
        costs = [self.cost(node) for node in nodes]
        if None in costs:
            return None
        if sum(cost.flops for cost in costs if cost) / _GUESSED_RATES["cpu"] < _SLOW_SECONDS:
            return []
        return [
            self.seconds(node.stage.name, cost) if cost and self.artifact(node) is None else 0.0
            for node, cost in zip(nodes, costs, strict=True)
        ]

    def seconds(self, stage: str, cost: Cost) -> float:
        """Estimate the seconds for this cost from the stage's last artifact on such a device, or from a guess."""
        if stage not in self._rates:
            self._rates[stage] = self._rate(stage)
        return _STARTING_SECONDS + cost.flops / self._rates[stage]

    def _rate(self, stage: str) -> float:
        """Return the floating-point operations per second of a stage on this machine."""
        device = likely_device()
        rates: list[float] = [
            gflop * 1e9 / manifest.seconds
            for _, manifest in self.workspace.manifests(stage)
            if manifest.seconds > _STARTING_SECONDS
            and manifest.environment.get("device_kind", device) == device
            and isinstance(gflop := manifest.counts.get("gflop"), float)
            and gflop > 0
        ]
        return rates[-1] if rates else _GUESSED_RATES[device]

    def check(self, node: Node) -> bool:
        """Check a node's configuration against the data set; return False if the data set has not been read yet.

        Raises:
            RecipeError: The images are too small, or the rows too large, for the configuration.
        """
        if node.stage.reads_source:
            return True
        size = self._size(node)
        if size is None:
            return False
        try:
            node.stage.check(node.config, size)
        except RecipeError as error:
            raise RecipeError(f"{node.label}: {error}") from error
        return True

    def _size(self, node: Node) -> DatasetSize | None:
        dataset = self._ancestor(node, "ingest")
        dataset = self.artifact(dataset) if isinstance(dataset, Node) else dataset
        if dataset is None:
            return None
        try:
            counts = msgspec.convert(dataset.manifest.counts, _Counts)
        except msgspec.ValidationError as error:
            raise CorruptError(
                f"the manifest of {dataset.location!r} has invalid counts: {error}. Recreate it with 'lsmix ingest --force'."
            ) from error
        height, width, channels = counts.image_shape
        shape = {"height": height, "width": width, "channels": channels}
        return DatasetSize(images=counts.train, test_images=counts.test, **shape, flow=self._flow_shape(node))

    def _listed_size(self, node: Node) -> DatasetSize | None:
        """Return the size of the data set from a listing of its image files, which is cached; None if there is none."""
        dataset = self._ancestor(node, "ingest")
        if not isinstance(dataset, Node) or dataset.source:
            return None
        if id(dataset) not in self._expected:
            self._expected[id(dataset)] = None
            with contextlib.suppress(LsmixError):  # ingest raises the error
                if is_listed(dataset.config):
                    self._expected[id(dataset)] = expected_size(dataset.config, summarise_source(dataset.config))
        size = self._expected[id(dataset)]
        return size and replace(size, flow=self._flow_shape(node))

    def _flow_shape(self, node: Node) -> FlowShape:
        """Return the shape of the flow that a node uses; the default shape if it is unknown."""
        flow = self._ancestor(node, "train-glow")
        if flow is None:
            return FlowShape()
        fields = msgspec.to_builtins(flow.config) if isinstance(flow, Node) else flow.manifest.config
        try:
            return msgspec.convert(
                {name: fields[name] for name in FlowShape.__struct_fields__ if name in fields}, FlowShape
            )
        except msgspec.ValidationError:  # an external flow; loading it raises the error
            return FlowShape()

    @staticmethod
    def _ancestor(node: Node, stage: str) -> Node | Artifact | None:
        for source in node.ancestry():
            if stage == (source.stage.name if isinstance(source, Node) else source.manifest.stage):
                return source
        return None

    def _source_record(self, node: Node) -> InputRecord:
        if node.source:
            return InputRecord(role="source", cache_key="", content_digest=node.source.digest)
        if id(node) not in self._sources:
            files = source_files(node.config)
            root = Path(node.config.path)
            base = root if root.is_dir() else root.parent
            sources = self.workspace.sources
            digest = sources.digest(files, base, remember=self._remember) if files else source_version(node.config)
            self._sources[id(node)] = InputRecord(role="source", cache_key="", content_digest=digest)
        return self._sources[id(node)]


def expected_size(config: DataConfig, summary: SourceSummary) -> DatasetSize:
    """Return the size of a data set after splitting, from its summary."""
    train, test = len(summary.labels["train"]), len(summary.labels.get("test", ()))
    taken = sum(getattr(config, name) for name in ("test", "heldout") if name not in summary.labels)
    height, width = config.target or summary.sizes.most_common(1)[0][0]
    return DatasetSize(
        images=max(1, min(train, config.limit or train) - taken),
        test_images=config.test or test,
        height=height,
        width=width,
        channels=summary.channels,
    )


def slow_warning(nodes: Sequence[Node], seconds: Sequence[float]) -> str:
    """Return a warning that lists slow stages and the fields to lower; "" if all nodes take less than a day."""
    total, stages = sum(seconds), {node.stage.name: node.stage for node in nodes}
    if total < _SLOW_SECONDS:
        return ""
    parts = []
    for name, stage in stages.items():
        its = sum(each for node, each in zip(nodes, seconds, strict=True) if node.stage.name == name)
        if its >= total / 10:
            parts.append(f"{name} {format_duration(its)} (lower {stage.lower})")
    where, instead = ("CPU", " Or use a GPU.") if likely_device() == "cpu" else ("GPU", "")
    return f"this run will take about {format_duration(total)} on this {where}: {', '.join(parts)}.{instead}"
