"""Mixing images by a pool's method, in latent or in pixel space, behind one interface.

The one rule: an image depends on its sources, its λ and its own draws alone, so it is the same in any batch and any split.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lsmix.data.dataset import open_dataset
from lsmix.data.latents import open_latents
from lsmix.data.methods import Draws
from lsmix.data.pool import CORNERS

if TYPE_CHECKING:
    import torch

__all__ = ["LatentMixer", "LatentSource", "Mixed", "Mixer", "PixelMixer", "Sources"]

Sources = npt.NDArray[Any]  # what a mixer gathers: latents float32 (n, D), or images uint8 (n, H, W, C)
_TOGETHER_BYTES = 1 << 20  # of x₁ that are mixed at a time: MixUp takes some 25 times as much on the way


class Mixed(NamedTuple):
    """Some mixed images."""

    images: npt.NDArray[np.uint8]  # (n, H, W, C)
    share: npt.NDArray[np.float32]  # (n, sources − 1), of each source but the first
    corrupted: npt.NDArray[np.bool_]  # (n,)


class Mixer(Protocol):
    """Gathers what is mixed, and mixes it."""

    labels: npt.NDArray[np.int64]  # of all training images

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return what stands for some training images."""

    def mix(
        self,
        first: Sources,
        others: list[Sources],
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        draws: Draws,
    ) -> Mixed:
        """Mix row by row: x₁ with the others, whose shares are λ, float64 (n, others)."""

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images themselves."""


class PixelMixer:
    """Mixes images as they are."""

    def __init__(self, dataset: Path, method: str) -> None:
        self._train = open_dataset(dataset).train
        self._method = method
        self.labels = self._train.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return images, uint8 (n, H, W, C)."""
        return self._train.gather(rows)

    def mix(
        self,
        first: Sources,
        others: list[Sources],
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        draws: Draws,
    ) -> Mixed:
        """Mix pairs of images; nothing can come out corrupted."""
        from lsmix.classifiers.mixing import mix_images

        images, shares = np.empty_like(first), np.empty(lam.shape, np.float32)
        for part in _parts(first):
            images[part], shares[part, 0] = mix_images(
                self._method, first[part], others[0][part], lam[part, 0], draws=_shifted(draws, part.start)
            )
        return Mixed(images, shares, np.zeros(len(images), bool))

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images themselves."""
        return first


class LatentSource(Protocol):
    """Where latents come from."""

    order: Literal["morton", "raster"]
    labels: npt.NDArray[np.int64]  # of all training images

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return the latents of some training images, float32 (n, D)."""


class _StoredLatents:
    def __init__(self, folder: Path) -> None:
        self._latents = open_latents(folder)
        self.order: Literal["morton", "raster"] = self._latents.attributes["order"]
        self.labels: npt.NDArray[np.int64] = self._latents.label[:]

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        return self._latents.z.gather(rows)


class LatentMixer:
    """Mixes latents and decodes them.

    Args:
        latents: folder of the latents, or another place where they come from.
        flow: folder of the flow that made them.
        method: a name in LATENT_METHODS.
        device: where the flow computes.
        output: "8bit" or "5bit".
        batch_size: images a pass.
        margin: how far outside [−½, ½] a pixel counts as broken.
        broken_share: share of broken pixels above which an image is corrupted.
    """

    def __init__(
        self,
        latents: Path | LatentSource,
        flow: Path,
        *,
        method: str,
        device: str,
        output: Literal["8bit", "5bit"],
        batch_size: int,
        margin: float,
        broken_share: float,
    ) -> None:
        from lsmix.glow.checkpoint import load_flow

        self._latents = _StoredLatents(latents) if isinstance(latents, Path) else latents
        self._flow = load_flow(flow, device=device)
        self._method = method
        self._output = output
        self._batch_size = batch_size
        self._margin = margin
        self._broken_share = broken_share
        self._order = self._latents.order
        self.labels = self._latents.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return latents, float32 (n, D)."""
        return self._latents.gather(rows)

    def mix(
        self,
        first: Sources,
        others: list[Sources],
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        draws: Draws,
    ) -> Mixed:
        """Mix latents and decode them.

        More than two sources are mixed one after another, the last one first: each time the sum of the λ that are still
        to come is given away, so that in the end every one has its own share, one region behind the other.
        """
        mixed = [
            self._mix(first[part], [z[part] for z in others], lam[part], corner[part], _shifted(draws, part.start))
            for part in _parts(first, multiple=self._batch_size)  # so that only the last batch is filled up
        ]
        return Mixed(*(np.concatenate(column) for column in zip(*mixed, strict=True)))

    def _mix(
        self,
        first: Sources,
        others: list[Sources],
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        draws: Draws,
    ) -> Mixed:
        from lsmix.glow.mixing import mix_latents

        z = self._turn(first, corner)
        taken = np.zeros((len(z), len(others) + 1), np.float32)  # the first k columns together, for k = 0, 1, …
        for place in reversed(range(len(others))):
            rates = np.minimum(lam[:, : place + 1].sum(axis=1), 1.0)
            z, taken[:, place + 1] = mix_latents(self._method, z, self._turn(others[place], corner), rates, draws=draws)
        images, corrupted = self._decode(self._turn(z, corner, back=True))
        return Mixed(images, np.diff(taken, axis=1), corrupted)

    def try_batch(self, images: int) -> None:
        """Decode so many latents of zeros in one pass, to learn whether they fit, once memory has run out."""
        self._flow.forget_recordings()
        self._decode(np.zeros((images, self._flow.dim), np.float32), images)

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images that the latents stand for."""
        return self._decode(first)[0]

    def _turn(self, z: Sources, corner: npt.NDArray[np.uint8], *, back: bool = False) -> Sources:
        """Return latents in the order that begins at each row's corner, or undo that."""
        if not corner.any():
            return z
        index = np.argsort(self._corner_order, axis=1) if back else self._corner_order
        return np.take_along_axis(z, index[corner], axis=1)

    @cached_property
    def _corner_order(self) -> npt.NDArray[np.int64]:
        """Where each component stands in the usual order, by corner, (4, D)."""
        from lsmix.glow.latent_order import corner_index

        shapes, order = self._flow.part_shapes, self._order
        words = [corner.split("-") for corner in CORNERS]
        rows = [corner_index(shapes, order, bottom=down == "bottom", right=side == "right") for down, side in words]
        return np.stack([row.numpy() for row in rows])

    def _decode(self, z: Sources, batch_size: int = 0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        from lsmix.glow.mixing import is_corrupted

        def judge(y_BCHW: "torch.Tensor") -> "torch.Tensor":
            return is_corrupted(y_BCHW, margin=self._margin, share=self._broken_share)

        size = batch_size or self._batch_size
        return self._flow.decode_judged(z, judge, order=self._order, output=self._output, batch_size=size)


def _parts(first: Sources, multiple: int = 1) -> Iterator[slice]:
    """Cut rows, at least one, into parts of some megabytes; each but the last has a multiple of so many rows."""
    row_bytes = first[0].nbytes
    step = multiple * max(_TOGETHER_BYTES // (multiple * row_bytes), 1)
    return (slice(start, min(start + step, len(first))) for start in range(0, len(first), step))


def _shifted(draws: Draws, start: int) -> Draws:
    """Return the generators of a part's rows, the first of which is row ``start`` of the whole."""
    return lambda row: draws(start + row)
