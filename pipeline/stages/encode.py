"""The encode stage: data set + flow → ``latents.zarr``, the latent vector of every training image.

The latents are only worth something if they decode back to the very images, so the stage checks that for all of them
unless told not to, and puts the count into the manifest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError
from lsmix.data.latents import create_latents, latent_store, write_latent_shard
from lsmix.data.pool_spec import EncodeConfig
from lsmix.data.table import ColumnStore
from lsmix.pipeline.engine.device_memory import BatchSetting, artifact_label, device_memory
from lsmix.pipeline.engine.shards import ShardedWork
from lsmix.pipeline.engine.stage import (
    Cost,
    DatasetSize,
    Stage,
    StageResult,
    StageTask,
    check_shard_rows,
)
from lsmix.pipeline.stages.ingest import provenance_of

if TYPE_CHECKING:
    from lsmix.glow.flow import Flow

__all__ = ["ENCODE"]


class _Loaded(NamedTuple):
    first: int  # row of the first image
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


class EncodeWorker:
    """Encodes the shards of one artifact."""

    def __init__(self, folder: Path, config: EncodeConfig, inputs: Mapping[str, Artifact], device: str) -> None:
        self._folder = folder
        self._config = config
        self._device = device
        self._train = open_dataset(inputs["dataset"]).train
        with device_memory(None, label=" ".join(artifact_label(folder)), device=device):
            self._flow = _open_flow(inputs["flow"], device)
        self._store = latent_store(folder)

    def load(self, shard: int) -> _Loaded:
        """Read the images of a shard."""
        rows = self._store.shard_range(shard)
        return _Loaded(
            rows.start, self._train.gather(np.asarray(rows)), np.array(self._train.labels[rows.start : rows.stop])
        )

    def compute(self, loaded: _Loaded) -> dict[str, npt.NDArray[Any]]:
        """Encode the images of a shard, and check that they come back."""
        setting = BatchSetting(
            label=" ".join(artifact_label(self._folder)),
            device=self._device,
            field="latents.batch_size",
            value=self._config.batch_size,
        )
        with device_memory(setting):
            return self._encode(loaded)

    def _encode(self, loaded: _Loaded) -> dict[str, npt.NDArray[Any]]:
        config = self._config
        z, log_prob = self._flow.encode_scored(
            loaded.images,
            dequantise=config.dequantise,
            batch_size=config.batch_size,
            seed=config.seed,
            first_index=loaded.first,
        )
        if not (np.isfinite(z).all() and np.isfinite(log_prob).all()):
            raise CorruptError(
                f"{' '.join(artifact_label(self._folder))}: the flow gives latents that are no finite numbers, so its weights "
                "are unusable. Do not use this flow; train it again."
            )
        columns: dict[str, npt.NDArray[Any]] = {
            "z": z,
            "label": loaded.labels,
            "log_prob": log_prob,
            "bits_per_dim": self._flow.bits_per_dim(log_prob).astype(np.float32),
        }
        if config.check_round_trip:
            back = self._flow.decode(z, batch_size=config.batch_size)
            columns["exact"] = (back == loaded.images).all(axis=(1, 2, 3))
        return columns

    def close(self) -> None:
        """Give back the memory of recorded CUDA graphs."""
        self._flow.forget_recordings()

    def store(self, shard: int, computed: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, str], dict[str, Any]]:
        """Write a shard of latents."""
        exact = computed.pop("exact", None)
        digests = write_latent_shard(self._folder, shard, computed)
        counts: dict[str, Any] = {"images": len(computed["z"]), "log_prob_sum": float(computed["log_prob"].sum())}
        if exact is not None:
            counts["exact_round_trips"] = int(exact.sum())
        return digests, counts


def _open_flow(flow: Artifact, device: str) -> "Flow":
    from lsmix.glow.checkpoint import load_flow
    from lsmix.pipeline.engine.device import prepare_device

    prepare_device(device)
    return load_flow(flow, device=device)


def open_worker(folder: Path, config: dict[str, Any], inputs: Mapping[str, Artifact], device: str) -> EncodeWorker:
    """Open what encodes the shards of an unfinished artifact."""
    return EncodeWorker(folder, msgspec.convert(config, EncodeConfig), inputs, device)


def _create(task: StageTask) -> ColumnStore:
    """Write the metadata of the latents."""
    config: EncodeConfig = task.config
    dataset = open_dataset(task.inputs["dataset"])
    flow = _open_flow(task.inputs["flow"], "cpu")
    rows = len(dataset.train)
    attributes = {
        "dequantise": config.dequantise,
        "image_shape": list(dataset.image_shape),
        "bits": flow.config.bits,
        "class_names": list(dataset.class_names),
        "origin": msgspec.to_builtins(provenance_of(task.inputs["dataset"], dataset)),
    }
    shard_rows = min(config.shard_rows, rows) or None  # one longer than the latents would be padded on the disk
    return create_latents(task.folder, rows=rows, dim=flow.dim, shard_rows=shard_rows, attributes=attributes)


def _conclude(task: StageTask, store: ColumnStore, counts: dict[str, Any], digests: dict[str, str]) -> StageResult:
    """Sum up the latents, and warn of images that do not come back."""
    rows = store.rows
    flow = _open_flow(task.inputs["flow"], "cpu")
    log_prob = counts.pop("log_prob_sum") / rows
    counts["bits_per_dim"] = float(flow.bits_per_dim(np.array([log_prob]))[0])
    counts["image_shape"] = list(open_dataset(task.inputs["dataset"]).image_shape)
    if counts.get("exact_round_trips", rows) < rows:
        task.progress.warning(
            f"{task.label}: {rows - counts['exact_round_trips']} of {rows} images do not decode back exactly; "
            "mixes at λ = 0 will differ from their sources there."
        )
    return StageResult(payload=frozenset({"latents.zarr"}), counts=counts, digests=digests)


def _estimate(config: EncodeConfig, size: DatasetSize) -> Cost:
    passes = 2 if config.check_round_trip else 1
    return Cost(bytes=size.images * (4 * size.image_bytes + 20), flops=float(passes) * size.images * size.flow_flops)


def _check(config: EncodeConfig, size: DatasetSize) -> None:
    check_shard_rows("latents.shard_rows", config.shard_rows, _estimate(config, size).bytes, size.images)


_WORK = ShardedWork(__name__, _create, _conclude)
ENCODE = Stage(name="encode", version=3, run=_WORK.run, estimate=_estimate, check=_check, make_part=_WORK.make_part)
