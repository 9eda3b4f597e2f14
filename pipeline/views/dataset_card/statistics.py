"""The statistics, the example and the image of a pool's card, computed in one pass over the pool."""

from typing import Final, NamedTuple

from lsmix.data.dataset import SplitArrays
from lsmix.data.pool import POOL_COLUMNS, Pool, Sample
from lsmix.pipeline.views.images import png_bytes, pool_picture
from lsmix.pipeline.views.pool_summary import BINS, source_parts, summarise_pool

__all__ = ["CardStatistics", "card_statistics"]

_ROWS = 4  # of the image grid
_CANDIDATES = 48  # rows from which the example is chosen
_DECODE_FAILED: Final = "the mix failed to decode, and the settings say to keep it"


class CardStatistics(NamedTuple):
    """The statistics of a pool's rows that its card shows."""

    content_digest: str  # of the pool
    size: int  # bytes of the files that the card describes
    events: list[tuple[str, int, str]]  # status, number of rows, meaning
    bins: list[tuple[float, float, int, int]]  # from, to, number of rows by λ, and by share of the second label
    classes: list[tuple[str, int | None, int | None]]  # name, rows as first and as second label; None if not counted
    example_row: int
    example: Sample
    parts: list[tuple[int, int, float]]  # of the example: row in the train split, class and share of each source
    picture: bytes  # PNG; b"" if the images are neither grey nor RGB
    picture_has_sources: bool  # whether the picture shows each mix between its source images


def card_statistics(pool: Pool, size: int, train: SplitArrays | None) -> CardStatistics:
    """Return the statistics for the card of a pool.

    ``size`` is the total bytes of the files that the card describes. ``train`` contains the source images of the pool,
    or is None if they are not available.

    Raises:
        CorruptError: A value is out of range, or a chunk is damaged.
    """
    summary = summarise_pool(pool, _CANDIDATES)
    first, second = (
        (summary.pairs.sum(axis=axis).tolist() for axis in (1, 0)) if summary.pairs is not None else ([], [])
    )
    names = pool.class_names
    # Clearly mixed rows come first.
    example_row = next((row for row, event in summary.chosen.items() if event == "ok"), next(iter(summary.chosen)))
    example = pool[example_row]
    picture = png_bytes(pool_picture(pool, train, _ROWS)) if pool.image_shape[2] in (1, 3) else b""
    words = POOL_COLUMNS["status"].words
    meanings = {**words, "decode failed": _DECODE_FAILED}
    return CardStatistics(
        content_digest=pool.manifest.content_digest,
        size=size,
        events=[
            (name, count, meaning)
            for name, meaning in meanings.items()
            if (count := summary.events[name]) or name in words
        ],
        bins=[
            (number / BINS, (number + 1) / BINS, lam, share)
            for number, (lam, share) in enumerate(zip(summary.lam.tolist(), summary.share.tolist(), strict=True))
        ],
        classes=[*zip(names, first or [None] * len(names), second or [None] * len(names), strict=True)],
        example_row=example_row,
        example=example,
        parts=source_parts(example),
        picture=picture,
        picture_has_sources=train is not None,
    )
