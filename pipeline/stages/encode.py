"""The encode stage: data set + flow → ``latents.zarr``, the latent vectors of all training images.

Latents are useful only if they decode to the same images. Unless the recipe disables it, the stage checks this for all
images and records the count in the manifest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError
from lsmix.data.latents import create_latents, latent_store, write_latent_shard
from lsmix.data.pool_spec import EncodeConfig
from lsmix.data.table import Table, table_in
from lsmix.pipeline.engine.device import device_memory, prepare_device
from lsmix.pipeline.engine.sharding import make_shards
from lsmix.pipeline.engine.shards import Advance, ShardJob
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask, check_chunk_rows
from lsmix.pipeline.stages.ingest import provenance_of

__all__ = ["ENCODE", "EncodeProcessor"]

_PROCESSOR = "lsmix.pipeline.stages.encode:EncodeProcessor"


class _Loaded(NamedTuple):
    first: int  # row of the first image
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


class EncodeProcessor:
    """Encode the shards of one artifact."""

    def __init__(self, job: ShardJob, folder: Path, inputs: Mapping[str, Artifact], device: str) -> None:
        from lsmix.glow.checkpoint import load_flow

        self._label, self._folder, self._device = job.label, folder, device
        self._config = msgspec.convert(job.config, EncodeConfig)
        self._train = open_dataset(inputs["dataset"]).train
        self._store = latent_store(folder)
        prepare_device(device)
        with device_memory(job.label, device):
            self._flow = load_flow(inputs["flow"], device=device)

    def load(self, shard: int) -> _Loaded:
        """Read the images and labels of a shard."""
        rows = self._store.shard_range(shard)
        return _Loaded(
            rows.start, self._train.gather(np.asarray(rows)), np.array(self._train.labels[rows.start : rows.stop])
        )

    def compute(self, loaded: _Loaded, advance: Advance) -> dict[str, npt.NDArray[Any]]:
        """Encode the images of a shard; optionally check that they decode to the same bytes."""
        with device_memory(self._label, self._device, "latents.batch_size", self._config.batch_size):
            return self._encode(loaded, advance)

    def _encode(self, loaded: _Loaded, advance: Advance) -> dict[str, npt.NDArray[Any]]:
        config = self._config
        passes = 2 if config.check_round_trip else 1  # encoding advances progress by 1 / passes, decoding by the rest
        z, log_prob = self._flow.encode(
            loaded.images,
            dequantise=config.dequantise,
            batch_size=config.batch_size,
            seed=config.seed,
            first_index=loaded.first,
            return_log_prob=True,
            advance=lambda images: advance(images // passes),
        )
        if not (np.isfinite(z).all() and np.isfinite(log_prob).all()):
            raise CorruptError(
                f"{self._label}: the flow produces latents that are not finite: its weights are unusable. Train the flow "
                "again."
            )
        columns: dict[str, npt.NDArray[Any]] = {
            "z": z,
            "label": loaded.labels,
            "log_prob": log_prob,
            "bits_per_dim": self._flow.bits_per_dim(log_prob).astype(np.float32),
        }
        if config.check_round_trip:
            decoded = self._flow.decode(
                z, batch_size=config.batch_size, advance=lambda images: advance(images - images // passes)
            )
            columns["exact"] = (decoded == loaded.images).all(axis=(1, 2, 3))
        return columns

    def store(self, shard: int, computed: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, str], dict[str, Any]]:
        """Write a shard of latents."""
        exact = computed.pop("exact", None)
        counts = {"images": len(computed["z"]), "bits_sum": float(computed["bits_per_dim"].sum(dtype=np.float64))}
        if exact is not None:
            counts["exact_round_trips"] = int(exact.sum())
        return write_latent_shard(self._folder, shard, computed), counts

    def close(self) -> None:
        """Release the memory of recorded CUDA graphs."""
        self._flow.forget_recordings()


def _run(task: StageTask) -> StageResult:
    """Encode all shards, sum their counts, and warn about images that do not decode to the same bytes."""
    store = _create(task)
    counts, digests = make_shards(task, store, _PROCESSOR)
    rows = store.rows
    counts["bits_per_dim"] = counts.pop("bits_sum") / rows
    counts["image_shape"] = table_in(store.folder)[1]["image_shape"]
    if counts.get("exact_round_trips", rows) < rows:
        task.progress.warning(
            f"{task.label}: {rows - counts['exact_round_trips']:,} of {rows:,} images do not decode exactly; their "
            "mixes at λ = 0 will differ from the originals."
        )
    return StageResult(payload=frozenset({"latents.zarr"}), counts=counts, digests=digests)


def _create(task: StageTask) -> Table:
    """Write the metadata of the latents."""
    from lsmix.glow.checkpoint import load_flow

    config: EncodeConfig = task.config
    dataset = open_dataset(task.inputs["dataset"])
    flow = load_flow(task.inputs["flow"])
    rows = len(dataset.train)
    attributes = {
        "dequantise": config.dequantise,
        "image_shape": list(dataset.image_shape),
        "bits": flow.config.bits,
        "class_names": list(dataset.class_names),
        "origin": msgspec.to_builtins(provenance_of(task.inputs["dataset"], dataset)),
    }
    return create_latents(task.folder, rows=rows, dim=flow.dim, chunk_rows=config.chunk_rows, attributes=attributes)


def _estimate(config: EncodeConfig, size: DatasetSize) -> Cost:
    passes = 2 if config.check_round_trip else 1
    return Cost(bytes=size.images * (4 * size.image_bytes + 20), flops=float(passes) * size.images * size.flow_flops)


def _check(config: EncodeConfig, size: DatasetSize) -> None:
    check_chunk_rows("latents.chunk_rows", config.chunk_rows, _estimate(config, size).bytes, size.images)


ENCODE = Stage(
    name="encode",
    version=4,
    run=_run,
    estimate=_estimate,
    check=_check,
    create=_create,
    processor=_PROCESSOR,
    lower="data.limit, data.size, flow.steps or flow.hidden",
)
