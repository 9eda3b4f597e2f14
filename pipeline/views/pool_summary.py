"""Label distributions and representative rows of a pool, for its page, its card and the report.

The pool is read once, block by block, so memory does not grow with its size.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import CorruptError
from lsmix.data.pool import STATUSES, Pool, Sample
from lsmix.data.rng import generator

__all__ = ["BINS", "EVENTS", "PoolSummary", "source_parts", "summarise_pool"]

BINS = 20  # of the histograms over 0 to 1
EVENTS = (*STATUSES, "decode failed")  # what happened to a row; "decode failed": kept although decoding failed
_COLUMNS = ("label_a", "label_b", "lam", "share_b", "status")
_BLOCK_ROWS = 65536
_MAX_CLASSES = 1024  # pairs of more classes are not counted: the table would take over 8 MB
_CANDIDATES = 64  # candidate rows per chosen row
_BANDS = 10  # intervals of the share, from which rows are chosen evenly


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolSummary:
    """Statistics of a pool's labels, and rows to show."""

    lam: NDArray[np.int64]  # (BINS,), number of rows by sampled λ
    share: NDArray[np.int64]  # (BINS,), number of rows by share of the second label
    events: dict[str, int]  # number of rows by event, in the order of EVENTS
    pairs: NDArray[np.int64] | None  # (classes, classes), by first and second label; None for more than 1,024 classes
    chosen: dict[int, str]  # rows to show and their events, in true proportion; clearly mixed rows come first
    decode_failed: list[int]  # rows whose first attempt failed to decode, as listed in the manifest


def summarise_pool(pool: Pool, count: int = 1, *, seed: int = 0) -> PoolSummary:
    """Read the labels of a pool and choose up to ``count`` representative rows.

    Each event has its true proportion among the chosen rows, and their shares are spread evenly. Rows of two classes
    with 20 % to 80 % of the second come first, in random order; the remaining rows follow, ordered by share.

    Raises:
        CorruptError: A label, λ, share or status is out of range, or the manifest lists rows that do not exist.
    """
    classes = len(pool.class_names)
    decode_failed = _decode_failed_rows(pool)
    random = generator(seed, "pool summary")
    candidates = np.sort(random.choice(len(pool), min(len(pool), _CANDIDATES * count), replace=False))
    lam_counts, share_counts = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    event_counts = np.zeros(len(EVENTS), np.int64)
    pairs = np.zeros(classes * classes, np.int64) if classes <= _MAX_CLASSES else None
    found = []
    for start in range(0, len(pool), _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, len(pool))
        block = pool.rows(start, stop, _COLUMNS)
        event = block["status"].astype(np.int64)
        event[(event == 0) & np.isin(np.arange(start, stop), decode_failed)] = EVENTS.index("decode failed")
        lam_counts += np.histogram(block["lam"], BINS, (0, 1))[0]
        share_counts += np.histogram(block["share_b"], BINS, (0, 1))[0]
        event_counts += np.bincount(event, minlength=len(EVENTS))
        if pairs is not None:
            pairs += np.bincount(block["label_a"] * classes + block["label_b"], minlength=classes * classes)
        own = candidates[slice(*np.searchsorted(candidates, (start, stop)))] - start
        found.append((event[own], block["share_b"][own], (block["label_a"] != block["label_b"])[own]))
    order = random.permutation(len(candidates))
    event, share, differ = (np.concatenate(parts)[order] for parts in zip(*found, strict=True))
    chosen = _choose(event, share, differ, count * event_counts / len(pool))
    return PoolSummary(
        lam=lam_counts,
        share=share_counts,
        events={name: int(number) for name, number in zip(EVENTS, event_counts, strict=True)},
        pairs=None if pairs is None else pairs.reshape(classes, classes),
        chosen=dict(zip(candidates[order][chosen].tolist(), (EVENTS[one] for one in event[chosen]), strict=True)),
        decode_failed=decode_failed.tolist(),
    )


def source_parts(sample: Sample) -> list[tuple[int, int, float]]:
    """Return (row in the train split, class, share) for each source of a mix, in order."""
    others = [(sample.source_b, sample.label_b, sample.share_b)]
    others += [(one.source, one.label, one.share) for one in sample.more]
    return [(sample.source_a, sample.label_a, max(0.0, 1 - sum(share for *_, share in others))), *others]


def _choose(
    event: NDArray[np.int64], share: NDArray[np.float32], differ: NDArray[np.bool_], wanted: NDArray[np.float64]
) -> NDArray[np.intp]:
    """Return the indices, (n,), of the candidates to show; ``wanted`` is the number to choose for each event."""
    quota = np.floor(wanted).astype(np.int64)
    quota[np.argsort(quota - wanted, kind="stable")[: round(wanted.sum()) - int(quota.sum())]] += 1
    band = np.minimum((share * _BANDS).astype(np.int64), _BANDS - 1)
    turn = np.zeros(len(share), np.int64)  # position of a candidate within its event and band
    for group in np.unique(event * _BANDS + band):
        own = event * _BANDS + band == group
        turn[own] = np.arange(own.sum())
    evenly = np.argsort(turn, kind="stable")
    chosen = np.concatenate([evenly[event[evenly] == number][:most] for number, most in enumerate(quota)])
    mixed = (differ & (share > 0.2) & (share < 0.8))[chosen]
    return chosen[np.lexsort((np.where(mixed, chosen, share[chosen]), ~mixed))]


def _decode_failed_rows(pool: Pool) -> NDArray[np.int64]:
    named = pool.manifest.counts.get("decode_failed_rows", [])
    try:
        rows = np.asarray(msgspec.convert(named, list[int]), np.int64)
    except (msgspec.ValidationError, OverflowError) as error:
        raise CorruptError(f"The manifest of {pool.location!r} is damaged: decode_failed_rows: {error}.") from error
    if rows.size and not 0 <= rows.min() <= rows.max() < len(pool):
        raise CorruptError(
            f"The manifest of {pool.location!r} is damaged: decode_failed_rows lists rows {rows.min()} to {rows.max()} "
            f"but the pool has {len(pool):,} rows. Download or build it again."
        )
    return rows
