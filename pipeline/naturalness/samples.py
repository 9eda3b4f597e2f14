"""The samples that the naturalness stage compares: original images, and the mixes of each method for the same pairs.

Sources are even rows of the train split, and each occurs in at most one pair. The evaluator was trained on odd rows. It
has therefore never seen a source of any mix, and pairs are independent of each other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lsmix.classifiers.pixel_mixing import mix_images
from lsmix.data.dataset import DataSet, SplitArrays
from lsmix.data.latents import Latents
from lsmix.data.mixing import LATENT_METHODS, RowRng, import_object, row_rngs
from lsmix.data.pool_spec import PoolConfig
from lsmix.data.rng import generator
from lsmix.glow.flow import Flow
from lsmix.glow.latent_mixing import is_failed_decode, mix_latents
from lsmix.pipeline.config.schema import HARD_CUT, NaturalnessConfig
from lsmix.pipeline.naturalness.regions import hard_cut, second_region

__all__ = ["Block", "Sample", "SampleSet", "choose_rows_apart"]

Images = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Block(NamedTuple):
    """A block of images of a sample."""

    images: Images  # (b, H, W, C)
    regions: Mask  # (b, H, W); seams are measured along their borders
    share: npt.NDArray[np.floating[Any]] | None = None  # (b,) share of the second image; None for originals
    decode_failed: Mask | None = None  # (b,); None if nothing was decoded


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, created block by block to limit memory."""

    name: str
    kind: Literal["original", "latent", "pixel"]
    seam_of: Literal["own", "ls-mix"]  # whether the blocks have their own regions or those of LS-Mix
    block: Callable[[slice], Block]  # returns the images of some of the n rows


def choose_rows_apart(images: int, pairs: int, seed: int) -> tuple[Rows, Rows]:
    """Return the two source rows of each pair, int64 (pairs,) each: distinct even rows below ``images``."""
    even = np.arange(0, images, 2)
    chosen = generator(seed, "naturalness", "pairs").permutation(even)[: 2 * pairs]
    return chosen[:pairs], chosen[pairs:]


class SampleSet:
    """All samples of one comparison, n images each; mixes are created from latents and flow."""

    def __init__(
        self, dataset: DataSet, latents: Latents, flow: Flow, config: NaturalnessConfig, *, count: int
    ) -> None:
        self._dataset, self._latents, self._flow, self._config = dataset, latents, flow, config
        self._count = count
        self._first, self._second = choose_rows_apart(len(dataset.train), count, config.seed)
        self._taken = math.floor(config.lam * flow.dim)
        self._region = second_region(self._taken, flow.config)

    def all(self) -> list[Sample]:
        """Return the samples: held-out originals, other originals, then the methods in the order of the recipe."""
        originals = [self._original("held-out", self._dataset.heldout)]
        if len(self._dataset.test) >= self._count:  # a smaller sample would have a different bias
            originals.append(self._original("test", self._dataset.test))
        sources = Sample(name="sources", kind="original", seam_of="ls-mix", block=self._sources)
        return [*originals, sources, *(self._method(name) for name in self._config.methods)]

    def pair_sheet(self, rows: int) -> list[tuple[Images, Images]]:
        """Return the two sources of the first ``rows`` pairs."""
        train = self._dataset.train.images
        return [(train[a], train[b]) for a, b in zip(self._first[:rows], self._second[:rows], strict=True)]

    def _original(self, name: str, split: SplitArrays) -> Sample:
        rows = np.sort(generator(self._config.seed, "naturalness", name).permutation(len(split))[: self._count])
        return Sample(
            name=name,
            kind="original",
            seam_of="ls-mix",
            block=lambda part: Block(split.images[rows[part]], self._regions(self._region, part)),
        )

    def _sources(self, part: slice) -> Block:
        return Block(self._dataset.train.images[self._first[part]], self._regions(self._region, part))

    def _method(self, name: str) -> Sample:
        if name == HARD_CUT:
            return Sample(name=name, kind="pixel", seam_of="own", block=self._hard_cut)
        if name not in LATENT_METHODS:
            own_border = self._own_regions(name, slice(0, 1)) is not None
            seam_of: Literal["own", "ls-mix"] = "own" if own_border else "ls-mix"
            return Sample(name=name, kind="pixel", seam_of=seam_of, block=lambda part: self._mixed(name, part))
        own, region = LATENT_METHODS.entry(name).region, self._region
        if own:
            region = import_object(own, f"region of {name!r}")(self._taken, self._flow.config)
        return Sample(
            name=name,
            kind="latent",
            seam_of="own" if own else "ls-mix",
            block=lambda part: self._decoded(name, region, part),
        )

    def _hard_cut(self, part: slice) -> Block:
        train = self._dataset.train.images
        images = hard_cut(train[self._first[part]], train[self._second[part]], self._region)
        share = np.full(len(images), self._region.mean())
        return Block(images, self._regions(self._region, part), share)

    def _mixed(self, method: str, part: slice) -> Block:
        train = self._dataset.train.images
        images, share = self._mix_pixels(method, train[self._first[part]], train[self._second[part]], part)
        regions = self._own_regions(method, part)
        return Block(images, self._regions(self._region, part) if regions is None else regions, share)

    def _mix_pixels(self, method: str, x1: Images, x2: Images, part: slice) -> tuple[Images, npt.NDArray[np.float32]]:
        return mix_images(method, x1, x2, self._config.lam, draws=self._draws(method, part))

    def _own_regions(self, method: str, part: slice) -> Mask | None:
        """Return the region of the second image, found by mixing black with white; None if the method blends pixels."""
        height, width, _ = self._dataset.image_shape
        black = np.zeros((part.stop - part.start, height, width, 1), np.uint8)
        mixed, _ = self._mix_pixels(method, black, np.full_like(black, 255), part)
        return mixed[..., 0] == 255 if np.isin(mixed, (0, 255)).all() else None

    def _draws(self, method: str, part: slice) -> RowRng:
        """Return the generators of a block's rows, which do not depend on how the sample is split into blocks."""
        draws = row_rngs(self._config.seed, "naturalness", method)
        return lambda row: draws(part.start + row)

    def _decoded(self, method: str, region: Mask, part: slice) -> Block:
        z = self._latents.z
        first, second = z.gather(self._first[part]), z.gather(self._second[part])
        mixed, share = mix_latents(method, first, second, self._config.lam, draws=self._draws(method, part))
        limits = PoolConfig()
        validate = partial(is_failed_decode, tolerance=limits.tolerance, bad_pixel_fraction=limits.bad_pixel_fraction)
        images, decode_failed = self._flow.decode(mixed, validate=validate, batch_size=self._config.batch_size)
        return Block(images, self._regions(region, part), share, decode_failed)

    @staticmethod
    def _regions(region: Mask, part: slice) -> Mask:
        return np.broadcast_to(region, (part.stop - part.start, *region.shape))
