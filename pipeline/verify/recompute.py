"""The deep check of a pool: a sample of its rows is made again, from the images and the flow, and compared.

It is the stage's own code that makes them, so a pool passes only if this is what the plan gives; pixels may
be off by one level where another kind of device made the pool, and nowhere else.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import EncodeConfig, PoolSpec, check_pool
from lsmix.data.progress import Progress
from lsmix.data.rng import generator
from lsmix.pipeline.engine.device import describe_environment, prepare_device, resolve_device
from lsmix.pipeline.engine.device_memory import device_memory
from lsmix.pipeline.stages.mix import RowMaker, open_latent_mixer
from lsmix.pipeline.stages.pool_builder import Mixer, PixelMixer, Sources
from lsmix.pipeline.verify.compare import PixelTally, same_kind_of_device
from lsmix.pipeline.verify.inputs import PoolInputs, require

__all__ = ["check_deep"]

_ROWS = 256  # made at a time


def check_deep(
    pool: Pool, plan: PoolSpec, base: PoolInputs, *, sample: int, seed: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Make some rows of a pool again, and compare every column and every pixel.

    Args:
        pool: whose rows fit its plan.
        plan: of the pool.
        base: the data set, or the latents, and the flow behind it.
        sample: number of rows, at least 1; all of them where the pool has no more.
        seed: of the choice of rows.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: is told how far it is.

    Returns:
        ``rows`` made again, ``same_device`` (whether bytes must be the same), ``redrawn_otherwise`` (rows that were drawn
        again only here, or only there, since they are at the limit of what counts as a failed decode), and how pixels differ.

    Raises:
        MissingError: the data set or the flow is not at hand.
        CorruptError: a row comes out differently; the message names it.
    """
    check_pool(plan.pool)
    device = resolve_device(device) if plan.latent else "cpu"
    label = f"deep check of {pool.manifest.name or pool.location}"
    with device_memory(None, label=label, device=device):
        maker = RowMaker(plan.pool, _open_mixer(plan, base, device))
    exact = not plan.latent or same_kind_of_device(describe_environment(device), pool.manifest.environment)
    count = min(sample, len(pool))
    rows = np.sort(generator(seed, "verify", "deep").choice(len(pool), count, replace=False)).astype(np.int64)
    tally, otherwise = PixelTally(), 0
    progress.start(label, count, "image")
    for start in range(0, count, _ROWS):
        some = rows[start : start + _ROWS]
        with device_memory(None, label=label, device=device):  # in batches that the plan fixes
            made = maker.make(maker.load(some, maker.plan.pick(some)))
        stored = {name: column.gather(some) for name, column in pool.columns.items()}
        same = np.ones(len(some), bool) if exact else made["status"] == stored["status"]
        otherwise += int((~same).sum())
        _check_columns(
            pool, some[same], *({name: made_or[name][same] for name in stored} for made_or in (stored, made))
        )
        tally.add(some[same], stored["image"][same], made["image"][same])
        if tally.largest > (0 if exact else 1):
            kind = "the same kind of device" if exact else "another kind of device, which moves pixels by 1 at most"
            raise CorruptError(
                f"pool {pool.location!r} is not what its plan gives: made again on {kind}, {tally.text()}; the first is row "
                f"{tally.first_row}. Do not use it; fetch or make it again."
            )
        progress.advance(len(some))
    progress.finish()
    return {"rows": count, "same_device": exact, "redrawn_otherwise": otherwise, "pixels": tally.facts()}


def _check_columns(pool: Pool, rows: npt.NDArray[np.int64], stored: dict[str, Any], made: dict[str, Any]) -> None:
    for name in stored.keys() - {"image"}:
        bad = np.flatnonzero((stored[name] != made[name]).reshape(len(rows), -1).any(axis=1))
        if len(bad):
            at = bad[0]
            raise CorruptError(
                f"pool {pool.location!r} is not what its plan gives: in row {rows[at]} {name} is {stored[name][at]}, but "
                f"made again it is {made[name][at]}. Do not use it; fetch or make it again."
            )


def _open_mixer(plan: PoolSpec, base: PoolInputs, device: str) -> Mixer:
    registry = LATENT_METHODS if plan.latent else PIXEL_METHODS
    registry.check(plan.pool.method)
    if plan.latents is None:
        return PixelMixer(require(base.dataset, "data set", "--data"), plan.pool.method)
    prepare_device(device)
    flow = require(base.flow, "flow", "--flow")
    latents = base.latents or _EncodedAgain(require(base.dataset, "data set", "--data"), flow, plan.latents, device)
    return open_latent_mixer(plan.pool, latents, flow, device)


class _EncodedAgain:
    """Latents of the images that are asked for, encoded when they are."""

    def __init__(self, dataset: Artifact, flow: Artifact, config: EncodeConfig, device: str) -> None:
        from lsmix.glow.checkpoint import load_flow

        train = open_dataset(dataset).train
        self._images = train.images
        self._flow = load_flow(flow, device=device)
        self._config = config
        self.labels: npt.NDArray[np.int64] = train.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return latents, float32 (n, D)."""
        if not len(rows):
            return np.empty((0, self._flow.dim), np.float32)
        config = self._config
        # Noise is drawn by an image's number; without any, a batch may hold any images.
        one_by_one = config.dequantise == "uniform"
        parts = [(rows[at : at + 1], int(rows[at])) for at in range(len(rows))] if one_by_one else [(rows, 0)]
        return np.concatenate(
            [
                self._flow.encode(
                    np.array(self._images[part]),
                    dequantise=config.dequantise,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    first_index=first,
                )
                for part, first in parts
            ]
        )
