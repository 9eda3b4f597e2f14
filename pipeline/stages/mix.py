"""The mix stage: latents + flow + plan → ``pool.zarr``, the mixed images with their labels, shares and sources.

A method in pixel space needs the data set alone. The plan says what is mixed with what; this module only applies it, and
draws again what the flow cannot decode.
"""

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact, read_provenance
from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import DATASET_NAME, open_dataset
from lsmix.data.errors import RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.pool import (
    POOL_FORMAT,
    POOL_NAME,
    STATUSES,
    PoolAttributes,
    create_pool,
    pool_store,
    write_pool_shard,
)
from lsmix.data.pool_spec import CORNERS, PLAN_NAME, SPEC_FORMAT, EncodeConfig, PoolConfig, PoolSpec, in_latent_space
from lsmix.data.table import ColumnStore
from lsmix.pipeline.config.schema import PoolRecipe
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
from lsmix.pipeline.stages.pair_sampler import PairBatch, PairSampler
from lsmix.pipeline.stages.pool_builder import (
    LatentMixer,
    LatentSource,
    Mixed,
    Mixer,
    PixelMixer,
    Sources,
)

__all__ = ["MIX", "LoadedRows", "MixWorker", "RowMaker", "make_plan", "open_latent_mixer", "open_worker"]

_OK, _REDRAWN, _REPLACED = (STATUSES.index(name) for name in ("ok", "redrawn", "replaced"))


class LoadedRows(NamedTuple):
    """Some rows of a pool, with what they are made from."""

    rows: npt.NDArray[np.int64]  # of the pool, (n,)
    draw: PairBatch
    first: Sources
    others: list[Sources]


class RowMaker:
    """Makes rows of a pool, whichever they are: what its shards consist of.

    Args:
        config: of the pool.
        mixer: gathers the training images and mixes them.
    """

    def __init__(self, config: PoolConfig, mixer: Mixer) -> None:
        self._config = config
        self._mixer = mixer
        self.plan = make_plan(config, len(mixer.labels))

    def load(self, rows: npt.NDArray[np.int64], draw: PairBatch) -> LoadedRows:
        """Read what rows of the pool are mixed from; ``draw`` is what the plan has for them."""
        gather = self._mixer.gather
        if self._config.corner not in (CORNERS[0], "random"):
            draw = draw._replace(corner=np.full_like(draw.corner, CORNERS.index(self._config.corner)))
        return LoadedRows(rows, draw, gather(draw.source_a), [gather(source) for source in draw.others.T])

    def make(self, loaded: LoadedRows) -> dict[str, npt.NDArray[Any]]:
        """Mix rows; draw failed decodes again. Returns the pool's columns, and ``decode_failed``, bool (n,)."""
        draw = loaded.draw._replace(others=loaded.draw.others.copy(), lam=loaded.draw.lam.copy())
        images, share, decode_failed = self._mix(loaded, draw, slice(None), attempt=0)
        status = np.full(len(images), _OK, np.uint8)
        bad = np.flatnonzero(decode_failed)
        if self._config.on_decode_failure == "redraw":
            for attempt in range(1, self._config.attempts + 1):
                if not len(bad):
                    break
                again = [self.plan.again(int(row), attempt) for row in loaded.rows[bad]]
                draw.others[bad], draw.lam[bad] = (np.stack(column) for column in zip(*again, strict=True))
                images[bad], share[bad], still = self._mix(loaded, draw, bad, attempt=attempt)
                status[bad] = _REDRAWN
                bad = bad[still]
            if len(bad):
                images[bad] = self._mixer.plain(loaded.first[bad])
                share[bad], status[bad] = 0, _REPLACED
        return {"image": images, "status": status, "decode_failed": decode_failed, **self._columns(draw, share)}

    def _mix(
        self, loaded: LoadedRows, draw: PairBatch, part: "slice | npt.NDArray[np.int64]", *, attempt: int
    ) -> Mixed:
        """Mix some of the rows; partners that were drawn again are read anew."""
        others = loaded.others
        if attempt:
            others = [self._mixer.gather(source) for source in draw.others[part].T]
        draws = self.plan.method_draws(loaded.rows[part], attempt)
        return self._mixer.mix(loaded.first[part], others, draw.lam[part], draw.corner[part], draws)

    def _columns(self, draw: PairBatch, share: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        labels, lam = self._mixer.labels[draw.others], draw.lam.astype(np.float32)
        columns: dict[str, npt.NDArray[Any]] = {
            "source_a": draw.source_a,
            "source_b": draw.others[:, 0],
            "label_a": self._mixer.labels[draw.source_a],
            "label_b": labels[:, 0],
            "lam": lam[:, 0],
            "share_b": share[:, 0],
        }
        if self._config.sources > 2:
            more: dict[str, npt.NDArray[Any]] = {"source": draw.others, "label": labels, "lam": lam, "share": share}
            columns |= {f"{name}_more": values[:, 1:] for name, values in more.items()}
        if self._config.corner != CORNERS[0]:
            columns["corner"] = draw.corner
        return columns


class MixWorker:
    """Makes the shards of one pool."""

    def __init__(self, folder: Path, config: PoolConfig, inputs: Mapping[str, Artifact], device: str) -> None:
        self._folder = folder
        stage, name = artifact_label(folder)
        self._label, self._device = f"{stage} {name}", device
        with device_memory(None, label=self._label, device=device):
            mixer = _open_mixer(config, inputs, device)
        self._mixer, self._maker = mixer, RowMaker(config, mixer)
        self._batch: BatchSetting | None = None  # methods in pixel space go by no batch, and use no device
        if isinstance(mixer, LatentMixer):
            self._batch = BatchSetting(
                label=self._label,
                device=device,
                field=f"pools.{name}.batch_size",
                value=config.batch_size,
            )
        self._store = pool_store(folder)

    def load(self, shard: int) -> LoadedRows:
        """Read what a shard mixes."""
        rows = self._store.shard_range(shard)
        return self._maker.load(np.asarray(rows), self._maker.plan.rows(rows.start, rows.stop))

    def compute(self, loaded: LoadedRows) -> dict[str, npt.NDArray[Any]]:
        """Mix a shard; draw failed decodes again."""
        with device_memory(self._batch, label=self._label, device=self._device):
            return self._maker.make(loaded)

    def store(self, shard: int, computed: dict[str, npt.NDArray[Any]]) -> tuple[dict[str, str], dict[str, Any]]:
        """Write a shard of the pool."""
        decode_failed = computed.pop("decode_failed")
        status = computed["status"]
        digests = write_pool_shard(self._folder, shard, computed)
        first = self._store.shard_range(shard).start
        counts = {
            "images": len(status),
            "ok": int((status == _OK).sum()),
            "redrawn": int((status == _REDRAWN).sum()),
            "replaced": int((status == _REPLACED).sum()),
            "decode_failed": int(decode_failed.sum()),
            "decode_failed_rows": (first + np.flatnonzero(decode_failed)).tolist(),
        }
        return digests, counts

    def close(self) -> None:
        """Give back the memory of recorded CUDA graphs."""
        self._mixer.close()


def _open_mixer(config: PoolConfig, inputs: Mapping[str, Artifact], device: str) -> Mixer:
    from lsmix.pipeline.engine.device import prepare_device

    prepare_device(device)
    if not in_latent_space(config):
        return PixelMixer(inputs["dataset"].folder / DATASET_NAME, config.method)
    return open_latent_mixer(config, inputs["latents"].folder, inputs["flow"].folder, device)


def open_latent_mixer(config: PoolConfig, latents: Path | LatentSource, flow: Path, device: str) -> LatentMixer:
    """Return what mixes the latents of a pool; ``latents`` and ``flow`` are as for ``LatentMixer``."""
    return LatentMixer(
        latents,
        flow,
        method=config.method,
        device=device,
        output=config.output,
        batch_size=config.batch_size,
        tolerance=config.tolerance,
        bad_pixel_fraction=config.bad_pixel_fraction,
    )


def make_plan(config: PoolConfig, images: int) -> PairSampler:
    """Return the plan of a pool over ``images`` training images."""
    return PairSampler(
        images=images,
        copies=config.copies_made,
        alpha=config.alpha,
        lambdas=config.lambdas,
        seed=config.seed,
        sources=config.sources,
        random_corner=config.corner == "random",
    )


def open_worker(folder: Path, config: dict[str, Any], inputs: Mapping[str, Artifact], device: str) -> MixWorker:
    """Open what makes the shards of an unfinished pool."""
    return MixWorker(folder, msgspec.convert(config, PoolRecipe), inputs, device)


def _create(task: StageTask) -> ColumnStore:
    """Write the metadata of the pool."""
    config: PoolConfig = task.config
    base = _describe(task)
    images = base.spec.origin.train_images
    if images < config.sources:
        raise RecipeError(
            f"{task.label}: mixing needs at least {config.sources} training images, got {images}. Raise 'data.limit'."
        )
    plan = make_plan(config, images)
    return create_pool(
        task.folder,
        images_per_copy=plan.images,
        copies=plan.copies,
        image_shape=base.image_shape,
        class_names=base.class_names,
        method=config.method,
        shard_rows=min(config.shard_rows, len(plan)) or None,  # one longer than the pool would be padded on the disk
        sources=config.sources,
        corners=config.corner != CORNERS[0],
        attributes={"origin": msgspec.to_builtins(base.spec.origin)},
    )


def _conclude(task: StageTask, store: ColumnStore, counts: dict[str, Any], digests: dict[str, str]) -> StageResult:
    """Write the plan of the pool, and the README and the notices that describe it."""
    copies = task.config.copies_made
    base = _describe(task)
    write_atomic(task.folder / PLAN_NAME, base.spec.to_json())
    counts |= {"copies": copies, "images_per_copy": store.rows // copies}
    if counts["decode_failed"]:
        task.progress.warning(
            f"{task.label}: {counts['decode_failed']} of {counts['images']} images failed to decode: "
            f"{counts['redrawn']} drawn again, {counts['replaced']} replaced by their first source."
        )
    _write_readme(task, base)
    return StageResult(payload=frozenset({POOL_NAME, PLAN_NAME}), counts=counts, digests=digests)


def _write_readme(task: StageTask, base: "_Described") -> None:
    from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, read_licence
    from lsmix.pipeline.views.dataset_card.readme import PoolDescription, write_readme

    config: PoolConfig = task.config
    licence = read_licence(base.spec.origin.licence)
    if not licence.text:
        task.progress.warning(f"{task.label}: {NO_LICENCE}")
    attributes = PoolAttributes(
        format_version=POOL_FORMAT,
        class_names=list(base.class_names),
        images_per_copy=base.spec.origin.train_images,
        copies=config.copies_made,
        method=config.method,
        sources=config.sources,
        corners=config.corner != CORNERS[0],
    )
    name = task.label.removeprefix(f"{task.stage} ")
    described = PoolDescription(name, base.spec, attributes, base.image_shape, metadata.version("lsmix"))
    write_readme(task.folder, described, licence)


class _Described(NamedTuple):
    spec: PoolSpec
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]


def _describe(task: StageTask) -> _Described:
    """Return what a pool is made from and what its images are, by the latents or by the data set itself."""
    fields: dict[str, Any] = {name: getattr(task.config, name) for name in PoolConfig.__struct_fields__}
    known: dict[str, Any] = {
        "format_version": SPEC_FORMAT,
        "stage_version": MIX.version,
        "pool": PoolConfig(**fields),
        "inputs": {role: artifact.manifest.root for role, artifact in task.inputs.items()},
    }
    if "dataset" in task.inputs:
        dataset = open_dataset(task.inputs["dataset"].folder / DATASET_NAME)
        spec = PoolSpec(**known, origin=provenance_of(task.inputs["dataset"], dataset))
        return _Described(spec, dataset.image_shape, dataset.class_names)
    latents = open_latents(task.inputs["latents"].folder)
    origin = read_provenance(latents.attributes, f"latents {str(latents.path)!r}")
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
    check_shard_rows("shard_rows of the pool", config.shard_rows, cost.bytes, size.images * config.copies_made)


_WORK = ShardedWork(__name__, _create, _conclude)
MIX = Stage(
    name="mix",
    version=4,
    run=_WORK.run,
    estimate=_estimate,
    check=_check,
    not_in_key=frozenset({"flow"}),
    make_part=_WORK.make_part,
)
