"""Building rows of a pool: read the sources, mix them with the pool's method, and redraw failed decodes.

A row depends only on its sources, its λ and its own random draws, never on its batch or on how the work is divided.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lsmix.data.mixing import RowRng
from lsmix.data.pool import STATUSES
from lsmix.data.pool_spec import CORNERS, PoolConfig
from lsmix.pipeline.engine.shards import Advance
from lsmix.pipeline.stages.pair_sampler import PairBatch, PairSampler

if TYPE_CHECKING:
    import torch

    from lsmix.glow.flow import Flow

__all__ = ["LoadedRows", "PoolBuilder", "RowSource"]

_OK, _REDRAWN, _REPLACED = (STATUSES.index(name) for name in ("ok", "redrawn", "replaced"))
_Shapes = tuple[tuple[int, int, int], ...]  # (channels, height, width) of each part of a latent
_PIXEL_BATCH_BYTES = 1 << 20  # size of x₁ per batch; MixUp needs about 25 times as much memory


class RowSource(Protocol):
    """The sources of mixes: the images of a train split, or ``Latents``."""

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """The labels of all training images."""

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return some training images, uint8 (n, H, W, C), or their latents, float32 (n, D)."""


class LoadedRows(NamedTuple):
    """Some rows of a pool with their sources."""

    rows: npt.NDArray[np.int64]  # rows of the pool, (n,)
    pairs: PairBatch
    first: npt.NDArray[Any]  # x₁ or z₁, (n, …)
    others: list[npt.NDArray[Any]]  # x₂ or z₂, and any further sources


class _Mixed(NamedTuple):
    images: npt.NDArray[np.uint8]  # (n, H, W, C)
    share: npt.NDArray[np.float32]  # (n, sources − 1), of every source except the first
    decode_failed: npt.NDArray[np.bool_]  # (n,)


class PoolBuilder:
    """Build rows of a pool from latents and a flow, or from images for methods in pixel space."""

    def __init__(self, config: PoolConfig, source: RowSource, flow: "Flow | None" = None) -> None:
        self._config = config
        self._source = source
        self._flow = flow
        self._sampler = PairSampler(config, len(source.labels))
        self._mix: Callable[[LoadedRows, RowRng, Advance], _Mixed] = (
            partial(self._mix_latents, flow) if flow else self._mix_pixels
        )

    def load(self, rows: npt.NDArray[np.int64]) -> LoadedRows:
        """Read the sources of rows (n,) of the pool; n is at least 1, and rows are in ascending order."""
        pairs, gather = self._sampler.pairs(rows), self._source.gather
        return LoadedRows(rows, pairs, gather(pairs.source_a), [gather(column) for column in pairs.others.T])

    def build(self, loaded: LoadedRows, advance: Advance = lambda images: None) -> dict[str, npt.NDArray[Any]]:
        """Mix rows and redraw failed decodes; return the pool's columns and ``decode_failed``, bool (n,).

        ``advance`` is called after each batch with the number of its images, or with 0 for redrawn images.
        """
        config, rows = self._config, loaded.rows
        others, lam = loaded.pairs.others.copy(), loaded.pairs.lam.copy()
        images, share, decode_failed = self._mix(loaded, self._sampler.row_rng(rows, 0), advance)
        status, bad = np.full(len(rows), _OK, np.uint8), np.flatnonzero(decode_failed)
        if config.on_decode_failure == "redraw":
            for attempt in range(1, config.attempts + 1):
                if not len(bad):
                    break
                drawn = [self._sampler.resample(row, attempt) for row in rows[bad].tolist()]
                others[bad], lam[bad] = (np.stack(column) for column in zip(*drawn, strict=True))
                pairs = PairBatch(loaded.pairs.source_a[bad], others[bad], lam[bad], loaded.pairs.corner[bad])
                again = [self._source.gather(column) for column in pairs.others.T]
                batch = LoadedRows(rows[bad], pairs, loaded.first[bad], again)
                images[bad], share[bad], still = self._mix(
                    batch, self._sampler.row_rng(rows[bad], attempt), lambda _: advance(0)
                )
                status[bad] = _REDRAWN
                bad = bad[still]
            if len(bad) and self._flow:
                images[bad] = self._flow.decode(loaded.first[bad], output=config.output, batch_size=config.batch_size)
                share[bad], status[bad] = 0, _REPLACED
        pairs = loaded.pairs._replace(others=others, lam=lam)
        return {"image": images, "status": status, "decode_failed": decode_failed, **self._columns(pairs, share)}

    def close(self) -> None:
        """Release the memory of recorded CUDA graphs."""
        if self._flow:
            self._flow.forget_recordings()

    def _columns(self, pairs: PairBatch, share: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[Any]]:
        labels, lam = self._source.labels[pairs.others], pairs.lam.astype(np.float32)
        columns: dict[str, npt.NDArray[Any]] = {
            "source_a": pairs.source_a,
            "source_b": pairs.others[:, 0],
            "label_a": self._source.labels[pairs.source_a],
            "label_b": labels[:, 0],
            "lam": lam[:, 0],
            "share_b": share[:, 0],
        }
        if self._config.sources > 2:
            more: dict[str, npt.NDArray[Any]] = {"source": pairs.others, "label": labels, "lam": lam, "share": share}
            columns |= {f"{name}_more": values[:, 1:] for name, values in more.items()}
        if self._config.corner != CORNERS[0]:
            columns["corner"] = pairs.corner
        return columns

    def _mix_pixels(self, loaded: LoadedRows, rng: RowRng, advance: Advance) -> _Mixed:
        """Mix pairs of images. Without decoding, no row can fail."""
        from lsmix.classifiers.pixel_mixing import mix_images

        first, (second,), lam = loaded.first, loaded.others, loaded.pairs.lam
        images, share = np.empty_like(first), np.empty(lam.shape, np.float32)
        step = max(_PIXEL_BATCH_BYTES // first[0].nbytes, 1)
        for start in range(0, len(first), step):
            batch = slice(start, min(start + step, len(first)))
            images[batch], share[batch, 0] = mix_images(
                self._config.method, first[batch], second[batch], lam[batch, 0], draws=_shifted(rng, start)
            )
            advance(batch.stop - start)
        return _Mixed(images, share, np.zeros(len(images), bool))

    def _mix_latents(self, flow: "Flow", loaded: LoadedRows, rng: RowRng, advance: Advance) -> _Mixed:
        """Mix latents and decode them on the flow's device."""
        from lsmix.glow.latent_mixing import is_failed_decode

        config, pairs = self._config, loaded.pairs
        share = np.empty(pairs.lam.shape, np.float32)

        def mix(rows: slice, batch: "Sequence[torch.Tensor]") -> "torch.Tensor":
            z_BD, share[rows] = self._mix_batch(
                batch, pairs.lam[rows], pairs.corner[rows], tuple(flow.part_shapes), _shifted(rng, rows.start)
            )
            return z_BD

        images, decode_failed = flow.decode(
            loaded.first,
            validate=partial(
                is_failed_decode, tolerance=config.tolerance, bad_pixel_fraction=config.bad_pixel_fraction
            ),
            output=config.output,
            batch_size=config.batch_size,
            others=loaded.others,
            mix=mix,
            advance=advance,
        )
        return _Mixed(images, share, decode_failed)

    def _mix_batch(
        self,
        batch: "Sequence[torch.Tensor]",
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        shapes: _Shapes,
        rng: RowRng,
    ) -> "tuple[torch.Tensor, npt.NDArray[np.float32]]":
        """Mix a batch of latents; return them, float32 (n, D), and the shares (n, sources − 1).

        More than two sources are mixed one after another, starting with the last. Each step uses the sum of its own λ
        and the λ of the remaining steps, so that finally every source has its own share, in adjacent regions.
        """
        from lsmix.glow.latent_mixing import mix_on_device

        z_BD, *others = (_reorder(z_BD, corner, shapes) for z_BD in batch)
        taken = np.zeros((len(z_BD), len(others) + 1), np.float32)  # column k: total share of the first k others
        for index in reversed(range(len(others))):
            rates = np.minimum(lam[:, : index + 1].sum(axis=1), 1.0)
            z_BD, share_B = mix_on_device(self._config.method, z_BD, others[index], rates, rng)
            taken[:, index + 1] = share_B.numpy()
        return _reorder(z_BD, corner, shapes, back=True), np.diff(taken, axis=1)


def _reorder(
    z_BD: "torch.Tensor", corner: npt.NDArray[np.uint8], shapes: _Shapes, *, back: bool = False
) -> "torch.Tensor":
    """Reorder latents to start at each row's corner; ``back`` restores the usual order."""
    import torch

    from lsmix.data.loaders.batch import to_device

    if not corner.any():
        return z_BD
    corner_B = to_device(torch.from_numpy(corner.astype(np.int64)), z_BD.device)
    return z_BD.gather(1, _corner_orders(shapes, z_BD.device)[int(back)].index_select(0, corner_B))


@lru_cache(maxsize=2)
def _corner_orders(shapes: _Shapes, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
    """Return the reordering index of each corner, int64 (4, D), and its inverse."""
    import torch

    from lsmix.glow.latent_order import corner_index

    words = [corner.split("-") for corner in CORNERS]
    rows = [corner_index(shapes, bottom=down == "bottom", right=side == "right") for down, side in words]
    index = torch.stack(rows)
    return index.to(device), index.argsort(dim=1).to(device)


def _shifted(rng: RowRng, start: int) -> RowRng:
    """Return the generators of a batch that starts at row ``start``."""
    return lambda row: rng(start + row)
