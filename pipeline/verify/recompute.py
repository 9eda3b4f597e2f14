"""The deep check of a pool: make a sample of its rows again, from the images and the flow, and compare.

The mix stage's own code makes the rows. Pixels may differ by one level if another kind of device made the pool.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError
from lsmix.data.latents import open_latents
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import EncodeConfig, PoolSpec, check_pool
from lsmix.data.progress import Progress
from lsmix.data.rng import generator
from lsmix.pipeline.engine.device import describe_environment, device_memory, prepare_device, resolve_device
from lsmix.pipeline.stages.pool_builder import PoolBuilder, StoredLatents
from lsmix.pipeline.verify.compare import PoolComparison, same_kind_of_device
from lsmix.pipeline.verify.inputs import PoolInputs, require

__all__ = ["check_deep"]

_ROWS = 256  # made at a time


def check_deep(
    pool: Pool, plan: PoolSpec, base: PoolInputs, *, sample: int, seed: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Make ``sample`` rows of a pool, whose choice ``seed`` decides, again, and compare every column and every pixel.

    Returns:
        ``rows`` made again, ``same_device`` (whether bytes must be the same), ``redrawn_otherwise`` (rows that were drawn
        again only here, or only there, since they are at the limit of what counts as a failed decode), and how they differ.

    Raises:
        MissingError: the data set or the flow is not at hand.
        CorruptError: a row comes out differently; the message names it.
    """
    check_pool(plan.pool)
    device = resolve_device(device) if plan.latent else "cpu"
    label = f"deep check of {pool.manifest.name or pool.location}"
    with device_memory(label, device):
        builder = _open_builder(plan, base, device)
    exact = not plan.latent or same_kind_of_device(describe_environment(device), pool.manifest.environment)
    count = min(sample, len(pool))
    rows = np.sort(generator(seed, "verify", "deep").choice(len(pool), count, replace=False)).astype(np.int64)
    comparison, otherwise = PoolComparison(), 0
    progress.start(label, count, "image")
    for start in range(0, count, _ROWS):
        some = rows[start : start + _ROWS]
        with device_memory(label, device):  # in batches that the plan fixes
            made = builder.build(builder.load(some))
        stored = {name: column.gather(some) for name, column in pool.columns.items()}
        same = np.ones(len(some), bool) if exact else made["status"] == stored["status"]
        otherwise += int((~same).sum())
        comparison.add(some[same], *({name: table[name][same] for name in stored} for table in (stored, made)))
        if not comparison.within(0 if exact else 1):
            kind = "the same kind of device" if exact else "another kind of device, which moves pixels by 1 at most"
            raise CorruptError(
                f"pool {pool.location!r} is not what its plan gives: made again on {kind}, {comparison.text()}. Do not use it; "
                "fetch or make it again."
            )
        progress.advance(len(some))
    progress.finish()
    return {"rows": count, "same_device": exact, "redrawn_otherwise": otherwise, **comparison.to_dict()}


def _open_builder(plan: PoolSpec, base: PoolInputs, device: str) -> PoolBuilder:
    registry = LATENT_METHODS if plan.latent else PIXEL_METHODS
    registry.check(plan.pool.method)
    if plan.latents is None:
        return PoolBuilder(plan.pool, open_dataset(require(base.dataset, "data set", "--data")).train)
    from lsmix.glow.checkpoint import load_flow

    prepare_device(device)
    flow = require(base.flow, "flow", "--flow")
    source = (
        StoredLatents(open_latents(base.latents))
        if base.latents
        else _EncodedAgain(require(base.dataset, "data set", "--data"), flow, plan.latents, device)
    )
    return PoolBuilder(plan.pool, source, load_flow(flow, device=device))


class _EncodedAgain:
    """Latents of the images that are asked for, encoded when they are."""

    def __init__(self, dataset: Artifact, flow: Artifact, config: EncodeConfig, device: str) -> None:
        from lsmix.glow.checkpoint import load_flow

        train = open_dataset(dataset).train
        self._images = train.images
        self._flow = load_flow(flow, device=device)
        self._config = config
        self.labels: npt.NDArray[np.int64] = train.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return latents, float32 (n, D)."""
        config = self._config
        # Noise is drawn by an image's number; without any, a batch may hold any images.
        parts = np.split(rows, len(rows)) if config.dequantise == "uniform" and len(rows) else [rows]
        return np.concatenate(
            [
                self._flow.encode(
                    np.array(self._images[part]),
                    dequantise=config.dequantise,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    first_index=int(part[0]) if len(part) else 0,
                )
                for part in parts
            ]
        )
