"""A look over a whole pool: how λ, shares, statuses and classes spread, and which rows stand for the rest.

The pool is gone through block by block, and of each stratum only the rows with the smallest drawn keys are
kept, so that memory does not grow with the pool, and the same seed chooses the same rows.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import CorruptError
from lsmix.data.pool import STATUSES, Pool
from lsmix.data.rng import generator

__all__ = ["BINS", "EVENTS", "PoolSummary", "summarise_pool"]

BINS = 20  # of the histograms, over 0 to 1
EVENTS = (*STATUSES, "decode failed")  # what became of a row; the last: kept although the flow could not decode it well
_LOOKED_AT = ("label_a", "label_b", "lam", "share_b", "status")
_BLOCK_ROWS = 65536  # gone through at a time
_BANDS = 10  # of the share, among which undisturbed rows are chosen equally
_MOST_CLASSES = 1024  # beyond which pairs of classes are not counted: the table would take over 8 MB
_MOST_EVENTS = 0.75  # of the chosen rows may be ones that something happened to


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolSummary:
    """What a pool holds."""

    lam: NDArray[np.int64]  # (BINS,), rows by λ as drawn
    share: NDArray[np.int64]  # (BINS,), rows by share of the second label
    events: dict[str, int]  # rows by what became of them, in the order of EVENTS
    pairs: NDArray[np.int64] | None  # (classes, classes), rows by first and second label; None for very many classes
    chosen: dict[int, str]  # rows to show, the most telling first, with what became of each


def summarise_pool(pool: Pool, count: int, *, seed: int = 0) -> PoolSummary:
    """Go through the labels of a pool and choose up to ``count`` rows that show all of it.

    Rows that were redrawn, replaced or kept although they failed to decode come first, all of them as long as they are no more than
    three quarters of ``count``; the others are spread equally over ten bands of the share.

    Raises:
        CorruptError: a label, λ, share or status is outside of its range, or the manifest names rows that are not there.
    """
    classes = len(pool.class_names)
    decode_failed = _decode_failed_rows(pool)
    lam_counts, share_counts = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    event_counts = np.zeros(len(EVENTS), np.int64)
    pairs = np.zeros(classes * classes, np.int64) if classes <= _MOST_CLASSES else None
    strata = [_Smallest(count) for _ in range(_BANDS + len(EVENTS) - 1)]  # bands of "ok", then the other events
    for start in range(0, len(pool), _BLOCK_ROWS):
        block = pool.rows(start, min(start + _BLOCK_ROWS, len(pool)), _LOOKED_AT)
        rows = np.arange(start, start + len(block["status"]))
        event = block["status"].astype(np.int64)
        event[(event == 0) & np.isin(rows, decode_failed)] = EVENTS.index("decode failed")
        lam_counts += np.histogram(block["lam"], BINS, (0, 1))[0]
        share_counts += np.histogram(block["share_b"], BINS, (0, 1))[0]
        event_counts += np.bincount(event, minlength=len(EVENTS))
        if pairs is not None:
            pairs += np.bincount(block["label_a"] * classes + block["label_b"], minlength=classes * classes)
        band = np.minimum((block["share_b"] * _BANDS).astype(np.int64), _BANDS - 1)
        stratum = np.where(event == 0, band, _BANDS - 1 + event)
        keys = generator(seed, "pool survey", start).random(len(rows))
        for number in np.unique(stratum).tolist():
            strata[number].add(rows[stratum == number], keys[stratum == number])
    return PoolSummary(
        lam=lam_counts,
        share=share_counts,
        events={name: int(number) for name, number in zip(EVENTS, event_counts, strict=True)},
        pairs=None if pairs is None else pairs.reshape(classes, classes),
        chosen=_choose([stratum.rows for stratum in strata], count),
    )


class _Smallest:
    """The rows of one stratum with the smallest keys, smallest first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._keys = np.empty(0)
        self._rows = np.empty(0, np.int64)

    def add(self, rows: NDArray[np.int64], keys: NDArray[np.float64]) -> None:
        keys, rows = np.concatenate([self._keys, keys]), np.concatenate([self._rows, rows])
        order = np.argsort(keys, kind="stable")[: self._limit]
        self._keys, self._rows = keys[order], rows[order]

    @property
    def rows(self) -> list[int]:
        return [int(row) for row in self._rows]


def _choose(strata: list[list[int]], count: int) -> dict[int, str]:
    """Return the chosen rows with what became of them: events first, then the bands of the share, in turn each."""
    happened = {row: EVENTS[1 + kind] for kind, rows in enumerate(strata[_BANDS:]) for row in rows}
    plain = _in_turn(strata[:_BANDS])
    room = max(round(count * _MOST_EVENTS), count - len(plain), 1)
    events = _in_turn(strata[_BANDS:])[:room]
    return {row: happened.get(row, EVENTS[0]) for row in [*events, *plain][:count]}


def _in_turn(strata: list[list[int]]) -> list[int]:
    longest = max(map(len, strata))
    return [rows[place] for place in range(longest) for rows in strata if place < len(rows)]


def _decode_failed_rows(pool: Pool) -> NDArray[np.int64]:
    named = pool.manifest.counts.get("decode_failed_rows", [])
    try:
        rows = np.asarray(msgspec.convert(named, list[int]), np.int64)
    except (msgspec.ValidationError, OverflowError) as error:
        raise CorruptError(f"the manifest of {pool.location!r} is damaged: decode_failed_rows: {error}.") from error
    if rows.size and not 0 <= rows.min() <= rows.max() < len(pool):
        raise CorruptError(
            f"the manifest of {pool.location!r} is damaged: decode_failed_rows names rows {rows.min()} to {rows.max()}, "
            f"the pool has {len(pool)}. Fetch or make it again."
        )
    return rows
