"""``card.png``, the picture of a card: mixes between their two sources where these are at hand, else the pool's images.

A picture is bounded, however large the images; and an image that is neither grey nor RGB has none.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.pool import Pool

if TYPE_CHECKING:
    from lsmix.pipeline.views.images import SourceImages

__all__ = ["SHEET_FILE", "draw_sheet"]

SHEET_FILE: Final = "card.png"
_ROWS = 4
_LARGEST, _SMALLEST = 128, 48  # pixels of the longer side as drawn


def draw_sheet(pool: Pool, inputs: Mapping[str, Artifact] | None, *, device: str = "cpu") -> tuple[bytes, bool]:
    """Return a picture of some images of a pool as PNG, and whether it shows their sources.

    Args:
        pool: the pool.
        inputs: the artifacts that it was made from, by role; None where they are not known.
        device: where the flow decodes source images.

    Returns:
        b"" where the images are neither grey nor RGB.
    """
    if pool.image_shape[2] not in (1, 3):
        return b"", False
    from lsmix.pipeline.views.images import GRID_TITLES, image_grid, own_images, png_bytes, sample_grid

    side = max(pool.image_shape[:2])
    step, scale = math.ceil(side / _LARGEST), max(1, _SMALLEST // side, min(3, _LARGEST // side))
    if inputs is None:
        rows, titles = own_images(pool, _ROWS), []
    else:
        rows, titles = sample_grid(pool, _source_images(pool, inputs, device), _ROWS), GRID_TITLES
    small = [[image[::step, ::step] for image in row] for row in rows]
    return png_bytes(image_grid(small, scale=scale, column_titles=titles)), inputs is not None


def _source_images(pool: Pool, inputs: Mapping[str, Artifact], device: str) -> "SourceImages":
    if "dataset" in inputs:
        from lsmix.data.dataset import open_dataset

        return open_dataset(inputs["dataset"]).train.images
    return _Decoded(inputs["latents"], inputs["flow"], device)


class _Decoded:
    """The images of the train split, decoded from their latent vectors when they are asked for."""

    def __init__(self, latents: Artifact, flow: Artifact, device: str) -> None:
        from lsmix.data.latents import open_latents
        from lsmix.glow.checkpoint import load_flow

        self._latents, self._flow = open_latents(latents), load_flow(flow, device=device)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        # One at a time, which fits on the device whatever batch the pool was mixed in.
        return self._flow.decode(self._latents.z[rows], batch_size=1)
