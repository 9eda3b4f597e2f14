"""The mix stage: latents + flow → ``pool.zarr``, the mixed images with their labels, shares and sources.

Methods in pixel space need only the data set.
"""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.pool import (
    POOL_NAME,
    STATUSES,
    PoolAttributes,
    create_pool,
    pool_store,
    write_pool_shard,
)
from lsmix.data.pool_spec import (
    CORNERS,
    PLAN_NAME,
    SPEC_FORMAT,
    EncodeConfig,
    PoolConfig,
    PoolSpec,
    in_latent_space,
    read_provenance,
)
from lsmix.data.table import Table, table_in
from lsmix.pipeline.config.schema import PoolRecipe
from lsmix.pipeline.engine.device import device_memory, prepare_device
from lsmix.pipeline.engine.sharding import make_shards
from lsmix.pipeline.engine.shards import Advance, ShardJob
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask, check_chunk_rows
from lsmix.pipeline.stages.ingest import provenance_of
from lsmix.pipeline.stages.pool_builder import LoadedRows, PoolBuilder

__all__ = ["MIX", "MixProcessor"]

_PROCESSOR = "lsmix.pipeline.stages.mix:MixProcessor"


class MixProcessor:
    """Build the shards of one pool."""

    def __init__(self, job: ShardJob, folder: Path, inputs: Mapping[str, Artifact], device: str) -> None:
        self._label, self._folder, self._device = job.label, folder, device
        self._config = config = msgspec.convert(job.config, PoolRecipe)
        self._setting = ""  # pixel-space methods use neither batches nor a device
        self._store = pool_store(folder)
        prepare_device(device)
        if not in_latent_space(config):
            self._builder = PoolBuilder(config, open_dataset(inputs["dataset"]).train)
            return
        from lsmix.glow.checkpoint import load_flow

        self._setting = f"pools.{job.name}.batch_size"
        with device_memory(job.label, device):
            flow = load_flow(inputs["flow"], device=device)
        self._builder = PoolBuilder(config, open_latents(inputs["latents"]), flow)

    def load(self, shard: int) -> LoadedRows:
        """Read the sources of a shard."""
        return self._builder.load(np.asarray(self._store.shard_range(shard)))

    def compute(self, loaded: LoadedRows, advance: Advance) -> dict[str, npt.NDArray[Any]]:
        """Mix a shard; redraw failed decodes."""
        with device_memory(self._label, self._device, self._setting, self._config.batch_size):
            return self._builder.build(loaded, advance)

    def store(self, shard: int, computed: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, str], dict[str, Any]]:
        """Write a shard of the pool."""
        failed_rows = self._store.shard_range(shard).start + np.flatnonzero(computed.pop("decode_failed"))
        by_status = np.bincount(computed["status"], minlength=len(STATUSES)).tolist()
        counts = {
            "images": len(computed["status"]),
            **dict(zip(STATUSES, by_status, strict=True)),
            "decode_failed": len(failed_rows),
            "decode_failed_rows": failed_rows.tolist(),
        }
        return write_pool_shard(self._folder, shard, computed), counts

    def close(self) -> None:
        """Release the memory of recorded CUDA graphs."""
        self._builder.close()


def _run(task: StageTask) -> StageResult:
    """Build all shards, then write the plan, the README and the licence notices of the pool."""
    from lsmix.pipeline.views.dataset_card.licence import read_licence
    from lsmix.pipeline.views.dataset_card.readme import PoolDescription, write_readme

    base = _describe(task)
    store = _create_store(task, base)
    counts, digests = make_shards(task, store, _PROCESSOR)
    write_atomic(task.folder / PLAN_NAME, base.spec.to_json())
    counts |= {"copies": task.config.copies_made, "images_per_copy": store.rows // task.config.copies_made}
    if counts["decode_failed"]:
        task.progress.warning(
            f"{task.label}: {counts['decode_failed']:,} of {counts['images']:,} images failed to decode: "
            f"{counts['redrawn']:,} were redrawn, {counts['replaced']:,} replaced by their first source."
        )
    attributes = msgspec.convert(table_in(store.folder)[1], PoolAttributes)
    described = PoolDescription(task.name, base.spec, attributes, base.image_shape, metadata.version("lsmix"))
    write_readme(task.folder, described, read_licence(base.spec.origin.licence))
    return StageResult(payload=frozenset({POOL_NAME, PLAN_NAME}), counts=counts, digests=digests)


def _create(task: StageTask) -> Table:
    """Write the metadata of the pool."""
    return _create_store(task, _describe(task))


def _create_store(task: StageTask, base: "_Described") -> Table:
    config: PoolConfig = task.config
    images = base.spec.origin.train_images
    if images < config.sources:
        raise RecipeError(
            f"{task.label}: mixing needs at least {config.sources} training images, got {images}. Raise 'data.limit'."
        )
    return create_pool(
        task.folder,
        images_per_copy=images,
        copies=config.copies_made,
        image_shape=base.image_shape,
        class_names=base.class_names,
        method=config.method,
        chunk_rows=config.chunk_rows,
        sources=config.sources,
        corners=config.corner != CORNERS[0],
        attributes={"origin": msgspec.to_builtins(base.spec.origin)},
    )


class _Described(NamedTuple):
    spec: PoolSpec
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def _describe(task: StageTask) -> _Described:
    """Return spec, image shape and class names of a pool, read from the latents or the data set."""
    fields: dict[str, Any] = {name: getattr(task.config, name) for name in PoolConfig.__struct_fields__}
    known: dict[str, Any] = {
        "format_version": SPEC_FORMAT,
        "stage_version": MIX.version,
        "pool": PoolConfig(**fields),
        "inputs": {role: artifact.manifest.content_digest for role, artifact in task.inputs.items()},
    }
    if "dataset" in task.inputs:
        dataset = open_dataset(task.inputs["dataset"])
        spec = PoolSpec(**known, origin=provenance_of(task.inputs["dataset"], dataset))
        return _Described(spec, dataset.image_shape, dataset.class_names)
    latents = open_latents(task.inputs["latents"])
    origin = read_provenance(latents.attributes, f"latents {latents.location!r}")
    encoded = msgspec.convert(task.inputs["latents"].manifest.config, EncodeConfig)
    height, width, channels = latents.attributes["image_shape"]
    spec = PoolSpec(**known, origin=origin, latents=encoded, dim=latents.dim)
    return _Described(spec, (height, width, channels), tuple(latents.attributes["class_names"]))


def _estimate(config: PoolConfig, size: DatasetSize) -> Cost:
    images = size.images * config.copies_made
    flops = float(images) * size.flow_flops if in_latent_space(config) else 0.0
    return Cost(bytes=images * (size.image_bytes + 41 + 24 * (config.sources - 2)), flops=flops)


def _check(config: PoolConfig, size: DatasetSize) -> None:
    cost = _estimate(config, size)
    check_chunk_rows("chunk_rows of the pool", config.chunk_rows, cost.bytes, size.images * config.copies_made)


MIX = Stage(
    name="mix",
    version=5,
    run=_run,
    estimate=_estimate,
    check=_check,
    lower="pools.NAME.copies, data.size, flow.steps or flow.hidden",
    not_in_key=frozenset({"flow"}),
    create=_create,
    processor=_PROCESSOR,
)
