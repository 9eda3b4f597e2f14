"""Images of a pool between the sources that they are made of, for the eye."""

from itertools import chain
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lsmix.data.pool import Pool

__all__ = ["SHEET_TITLES", "SourceImages", "pool_rows"]

_TRIPLES = 3  # of x₁, mix, x₂ in a row
_LOOKED_AT = 4096  # rows of a pool that are chosen from
SHEET_TITLES = ["x₁", "mix", "x₂"] * _TRIPLES


class SourceImages(Protocol):
    """Images of a train split by row, such as an array of them, uint8 (N, H, W, C)."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> NDArray[np.uint8]:
        """Return images, uint8 (n, H, W, C)."""
        ...


def pool_rows(pool: Pool, train: SourceImages, count: int) -> list[list[NDArray[np.uint8]]]:
    """Return up to ``count`` rows of a sheet: three mixes each, between their first two sources.

    ``train`` holds the images of the train split, uint8 (N, H, W, C). Those come first whose two classes differ and that
    have much of both sources.
    """
    share = pool.share_b[:_LOOKED_AT]
    differ = pool.label_a[:_LOOKED_AT] != pool.label_b[:_LOOKED_AT]
    wanted = np.argsort(~(differ & (share > 0.2) & (share < 0.8)), kind="stable")[: _TRIPLES * count]
    sources = train[
        np.concatenate([pool.source_a[wanted], pool.source_b[wanted]])
    ]  # at once: they may have to be decoded
    cells = [*zip(sources[: len(wanted)], pool.image[wanted], sources[len(wanted) :], strict=True)]
    return [[*chain.from_iterable(cells[start : start + _TRIPLES])] for start in range(0, len(cells), _TRIPLES)]
