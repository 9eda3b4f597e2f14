"""Mixing images by a pool's method, in latent or in pixel space, behind one interface.

An image depends on its sources, its λ and its own draws alone, so it is the same in any batch and any split.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact
from lsmix.data.dataset import open_dataset
from lsmix.data.latents import open_latents
from lsmix.data.mixing import RowRng
from lsmix.data.pool_spec import CORNERS

if TYPE_CHECKING:
    import torch

    from lsmix.glow.flow import Mix

__all__ = ["LatentMixer", "LatentSource", "Mixed", "Mixer", "PixelMixer", "Sources"]

Sources = npt.NDArray[Any]  # what a mixer gathers: latents float32 (n, D), or images uint8 (n, H, W, C)
_TOGETHER_BYTES = 1 << 20  # of x₁ that are mixed at a time: MixUp takes some 25 times as much on the way


class Mixed(NamedTuple):
    """Some mixed images."""

    images: npt.NDArray[np.uint8]  # (n, H, W, C)
    share: npt.NDArray[np.float32]  # (n, sources − 1), of each source but the first
    decode_failed: npt.NDArray[np.bool_]  # (n,)


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
        draws: RowRng,
    ) -> Mixed:
        """Mix row by row: x₁ with the others, whose shares are λ, float64 (n, others)."""

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images themselves."""

    def close(self) -> None:
        """Give back what is held on the device."""


class PixelMixer:
    """Mixes images as they are."""

    def __init__(self, dataset: Artifact, method: str) -> None:
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
        draws: RowRng,
    ) -> Mixed:
        """Mix pairs of images; nothing is decoded, so nothing can fail."""
        from lsmix.classifiers.pixel_mixing import mix_images

        images, shares = np.empty_like(first), np.empty(lam.shape, np.float32)
        for part in _parts(first):
            images[part], shares[part, 0] = mix_images(
                self._method, first[part], others[0][part], lam[part, 0], draws=_shifted(draws, part.start)
            )
        return Mixed(images, shares, np.zeros(len(images), bool))

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images themselves."""
        return first

    def close(self) -> None:
        """Do nothing: pixels are mixed on the CPU."""


class LatentSource(Protocol):
    """Where latents come from."""

    labels: npt.NDArray[np.int64]  # of all training images

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        """Return the latents of some training images, float32 (n, D)."""


class _StoredLatents:
    def __init__(self, latents: Artifact) -> None:
        self._latents = open_latents(latents)
        self.labels: npt.NDArray[np.int64] = self._latents.label[:]

    def gather(self, rows: npt.NDArray[np.int64]) -> Sources:
        return self._latents.z.gather(rows)


class LatentMixer:
    """Mixes latents and decodes them.

    Args:
        latents: the latents, or what else gives them.
        flow: the flow that made them.
        method: a name in LATENT_METHODS.
        device: where the flow computes.
        output: "8bit" or "5bit".
        batch_size: images a pass.
        tolerance: how far outside [−½, ½] a pixel counts as bad.
        bad_pixel_fraction: share of bad pixels above which a decode has failed.
    """

    def __init__(
        self,
        latents: Artifact | LatentSource,
        flow: Artifact,
        *,
        method: str,
        device: str,
        output: Literal["8bit", "5bit"],
        batch_size: int,
        tolerance: float,
        bad_pixel_fraction: float,
    ) -> None:
        from lsmix.glow.checkpoint import load_flow

        self._latents = _StoredLatents(latents) if isinstance(latents, Artifact) else latents
        self._flow = load_flow(flow, device=device)
        self._method = method
        self._output = output
        self._batch_size = batch_size
        self._tolerance = tolerance
        self._bad_pixel_fraction = bad_pixel_fraction
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
        draws: RowRng,
    ) -> Mixed:
        """Mix latents and decode them, both on the flow's device.

        More than two sources are mixed one after another, the last one first: each time the sum of the λ that are still
        to come is given away, so that in the end every one has its own share, one region behind the other.
        """
        share = np.empty(lam.shape, np.float32)

        def mixed(rows: slice, batch: "Sequence[torch.Tensor]") -> "torch.Tensor":
            z_BD, share[rows] = self._mix(batch, lam[rows], corner[rows], _shifted(draws, rows.start))
            return z_BD

        images, decode_failed = self._decode(first, others, mixed)
        return Mixed(images, share, decode_failed)

    def _mix(
        self,
        batch: "Sequence[torch.Tensor]",
        lam: npt.NDArray[np.float64],
        corner: npt.NDArray[np.uint8],
        draws: RowRng,
    ) -> "tuple[torch.Tensor, npt.NDArray[np.float32]]":
        from lsmix.glow.latent_mixing import mix_on_device

        z_BD, *others = (self._turn(z_BD, corner) for z_BD in batch)
        taken = np.zeros((len(z_BD), len(others) + 1), np.float32)  # the first k columns together, for k = 0, 1, …
        for place in reversed(range(len(others))):
            rates = np.minimum(lam[:, : place + 1].sum(axis=1), 1.0)
            z_BD, share_B = mix_on_device(self._method, z_BD, others[place], rates, draws)
            taken[:, place + 1] = share_B.numpy()
        return self._turn(z_BD, corner, back=True), np.diff(taken, axis=1)

    def plain(self, first: Sources) -> npt.NDArray[np.uint8]:
        """Return the images that the latents stand for."""
        return self._decode(first)[0]

    def close(self) -> None:
        """Give back the memory of recorded CUDA graphs."""
        self._flow.forget_recordings()

    def _turn(self, z_BD: "torch.Tensor", corner: npt.NDArray[np.uint8], *, back: bool = False) -> "torch.Tensor":
        """Return latents in the order that begins at each row's corner, or undo that."""
        import torch

        from lsmix.data.loaders.batch import to_device

        if not corner.any():
            return z_BD
        corner_B = to_device(torch.from_numpy(corner.astype(np.int64)), z_BD.device)
        return z_BD.gather(1, self._corner_orders[int(back)].index_select(0, corner_B))

    @cached_property
    def _corner_orders(self) -> "tuple[torch.Tensor, torch.Tensor]":
        """Where each component stands in the usual order, by corner, int64 (4, D), and the way back."""
        import torch

        from lsmix.glow.latent_order import corner_index

        shapes = self._flow.part_shapes
        words = [corner.split("-") for corner in CORNERS]
        rows = [corner_index(shapes, bottom=down == "bottom", right=side == "right") for down, side in words]
        index = torch.stack(rows)
        return index.to(self._flow.device), index.argsort(dim=1).to(self._flow.device)

    def _decode(
        self, first: Sources, others: Sequence[Sources] = (), mix: "Mix | None" = None
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        from lsmix.glow.latent_mixing import is_failed_decode

        def judge(y_BCHW: "torch.Tensor") -> "torch.Tensor":
            return is_failed_decode(y_BCHW, tolerance=self._tolerance, bad_pixel_fraction=self._bad_pixel_fraction)

        return self._flow.decode_judged(
            first,
            judge,
            output=self._output,
            batch_size=self._batch_size,
            others=others,
            mix=mix,
        )


def _parts(first: Sources) -> Iterator[slice]:
    """Cut rows, at least one, into parts of some megabytes."""
    step = max(_TOGETHER_BYTES // first[0].nbytes, 1)
    return (slice(start, min(start + step, len(first))) for start in range(0, len(first), step))


def _shifted(draws: RowRng, start: int) -> RowRng:
    """Return the generators of a part's rows, the first of which is row ``start`` of the whole."""
    return lambda row: draws(start + row)
