"""Estimate the bytes, floating-point operations and time that an artifact will take.

Operations are counted for convolutions and matrix products, a multiply-add as two. Time follows from what earlier
artifacts of the stage took per operation; without any, from a rough guess that is marked as one.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from lsmix.data.artifact import Artifact
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.glow.config import FlowShape
from lsmix.pipeline.engine.resolver import Resolver
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Node
from lsmix.pipeline.workspace.local import Workspace

__all__ = ["check_against_data", "estimate", "estimate_seconds"]

_GUESSED_FLOPS_PER_SECOND = 3e10  # of two cores with AVX2 on small images
_Size = Annotated[int, msgspec.Meta(ge=1, le=2**48)]
_STARTING_SECONDS = 1.0  # of importing and opening, which small artifacts mostly are


class _Counts(msgspec.Struct):
    """What the manifest of a data set counts."""

    image_shape: tuple[_Size, _Size, _Size]  # height, width, channels
    train: _Size
    test: Annotated[int, msgspec.Meta(ge=0, le=2**48)]


def estimate(node: Node, resolver: Resolver) -> Cost | None:
    """Return what a node will cost; None while its data set was not read yet."""
    size = DatasetSize() if node.stage.name == "ingest" else _work_size(node, resolver)
    return None if size is None else node.stage.estimate(node.config, size)


def check_against_data(node: Node, resolver: Resolver) -> bool:
    """Check what of a node's configuration depends on the data set; return whether that was read yet.

    Raises:
        RecipeError: the images are too small, or the rows too long, for what is asked.
    """
    size = None if node.stage.name == "ingest" else _work_size(node, resolver)
    if size is None:
        return node.stage.name == "ingest"
    try:
        node.stage.check(node.config, size)
    except RecipeError as error:
        raise RecipeError(f"{node.label}: {error}") from error
    return True


def _work_size(node: Node, resolver: Resolver) -> DatasetSize | None:
    """Return how big the work on a node is; None while its data set was not read yet."""
    dataset = _dataset(node, resolver)
    if dataset is None:
        return None
    counts = _counts_of(dataset)
    height, width, channels = counts.image_shape
    return DatasetSize(
        images=counts.train,
        test_images=counts.test,
        height=height,
        width=width,
        channels=channels,
        flow=_flow_shape(node),
    )


def estimate_seconds(node: Node, cost: Cost | None, workspace: Workspace) -> float | None:
    """Return the seconds that a node will take, by what the stage's earlier artifacts took, or by a round guess."""
    if cost is None:
        return None
    rates = [
        gflop * 1e9 / manifest.seconds
        for _, manifest in workspace.manifests(node.stage.name)
        if manifest.seconds > _STARTING_SECONDS
        and isinstance(gflop := manifest.counts.get("gflop"), float)
        and gflop > 0
    ]
    return _STARTING_SECONDS + cost.flops / (rates[-1] if rates else _GUESSED_FLOPS_PER_SECOND)


def _counts_of(dataset: Artifact) -> _Counts:
    try:
        return msgspec.convert(dataset.manifest.counts, _Counts)
    except msgspec.ValidationError as error:
        raise CorruptError(
            f"{dataset.location!r} does not say how many images it has: {error}. Make it again with 'lsmix ingest'."
        ) from error


def _dataset(node: Node, resolver: Resolver) -> Artifact | None:
    """Return the data set that a node is made from, directly or not: of the same graph, or finished elsewhere."""
    own = _find(node, "ingest")
    if own:
        return resolver.artifact(own)
    for role, source in node.inputs.items():
        found = _dataset(source, resolver) if isinstance(source, Node) else None
        if role == "dataset" and not isinstance(source, Node):
            found = source
        if found:
            return found
    return None


def _find(node: Node, stage: str) -> Node | None:
    if node.stage.name == stage:
        return node
    for source in node.inputs.values():
        found = _find(source, stage) if isinstance(source, Node) else None
        if found:
            return found
    return None


def _flow_shape(node: Node) -> FlowShape:
    own = _find(node, "train-glow")
    if own:
        return _shape(msgspec.to_builtins(own.config))
    for source in node.inputs.values():
        if isinstance(source, Node):
            return _flow_shape(source)
        return _shape(source.manifest.config)  # of a flow without a manifest nothing, so the defaults count
    return FlowShape()


def _shape(fields: Mapping[str, Any]) -> FlowShape:
    try:
        return msgspec.convert(
            {name: fields[name] for name in FlowShape.__struct_fields__ if name in fields}, FlowShape
        )
    except msgspec.ValidationError:  # loading the flow will report what is wrong with it
        return FlowShape()
