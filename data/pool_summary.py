"""One pass over a pool: counts, distributions and rows to show, for its page, its card and its exports.

Memory does not grow with the pool. ``on_block`` shares the pass with other readers, such as digests of the columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.errors import CorruptError
from lsmix.data.pool import STATUSES, Pool
from lsmix.data.rng import generator

__all__ = ["QUANTILES", "Block", "ClassCount", "PoolSummary", "Spread", "pool_blocks", "summarise_pool"]

Block: TypeAlias = dict[str, NDArray[Any]]  # some rows, by column
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
_BINS: Final = 10_000  # of λ and share, so that quantiles are exact to 0.0001 for any number of rows
_BLOCK_ROWS: Final = 16_384  # at most; some 10 MB as Python objects
_BLOCK_BYTES: Final = 8 << 20
_MAX_CLASSES: Final = 1024  # pairs of more classes are not counted: the table would take over 8 MB
_CANDIDATES: Final = 64  # rows that are drawn for each row of the sample
_BANDS: Final = 10  # of the share, from which the sample takes rows evenly


@dataclass(frozen=True, eq=False, kw_only=True)
class Spread:
    """The distribution of numbers in 0 to 1."""

    least: float
    most: float
    mean: float
    counts: NDArray[np.int64]  # (10,001,), numbers by their rounded ten-thousandths

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Quantiles at 5, 25, 50, 75 and 95 %, to 0.0001."""
        below = np.cumsum(self.counts)
        return tuple(int(np.searchsorted(below, math.ceil(q * int(below[-1])))) / _BINS for q in QUANTILES)

    def histogram(self, bins: int) -> NDArray[np.int64]:
        """Return the numbers in each of ``bins`` bins of equal width, int64 (bins,); bins divides 10,000."""
        found: NDArray[np.int64] = self.counts[:-1].reshape(bins, -1).sum(axis=1)
        found[-1] += self.counts[-1]
        return found


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """How much of a pool belongs to one class."""

    name: str
    first: int  # images whose x₁ is of this class
    others: int  # sources after x₁ that are of this class
    weight: float  # sum of the class's weights in all labels, in images


@dataclass(frozen=True, eq=False, kw_only=True)
class PoolSummary:
    """The content of a pool in numbers."""

    statuses: dict[str, int]  # rows by status, in the order of STATUSES
    decode_failed: NDArray[np.int64]  # rows that failed to decode at the first draw, as the manifest lists them
    kept: int  # of these, rows that were kept although they failed: their status is "ok"
    lam: Spread
    share: Spread  # of x₂
    classes: tuple[ClassCount, ...]  # by label
    pairs: NDArray[np.int64] | None  # (classes, classes), rows by class of x₁ and of x₂; None for over 1,024 classes
    sample: tuple[int, ...]  # rows to show: statuses in their true proportion, really mixed rows first


def pool_blocks(pool: Pool, columns: Sequence[str] = ()) -> Iterator[tuple[range, Block]]:
    """Read a pool block by block: rows and their columns, all but ``image`` unless ``columns`` names some.

    Raises:
        CorruptError: a chunk is damaged, or a value is out of its range.
    """
    names = columns or [name for name in pool.columns if name != "image"]
    arrays = [pool.columns[name] for name in names]
    row_bytes = sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays)
    step = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes))
    for start in range(0, len(pool), step):
        rows = range(start, min(start + step, len(pool)))
        yield rows, pool.rows(rows.start, rows.stop, names)


def summarise_pool(
    pool: Pool,
    *,
    samples: int = 1,
    seed: int = 0,
    columns: Sequence[str] = (),
    on_block: Callable[[range, Block], None] | None = None,
) -> PoolSummary:
    """Read the labels of a pool once.

    Args:
        pool: any.
        samples: rows to choose for ``sample``, at most.
        seed: of that choice.
        columns: to read, in blocks of at most 8 MB; none for all but ``image``. Must include those.
        on_block: receives the rows and the columns of each block, in order.

    Raises:
        CorruptError: a chunk is damaged, a value is out of its range, or the manifest lists rows that do not exist.
    """
    count = len(pool.class_names)
    decode_failed = _decode_failed_rows(pool)
    random = generator(seed, "pool sample")
    candidates = np.sort(random.choice(len(pool), min(len(pool), _CANDIDATES * samples), replace=False))
    lam, share = _Histogram(), _Histogram()
    statuses, kept = np.zeros(len(STATUSES), np.int64), 0
    first, others, weight = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
    pairs = np.zeros(count * count, np.int64) if count <= _MAX_CLASSES else None
    found: list[Block] = []
    for rows, block in pool_blocks(pool, columns):
        if on_block:
            on_block(rows, block)
        statuses += np.bincount(block["status"], minlength=len(STATUSES))
        failed = decode_failed[(decode_failed >= rows.start) & (decode_failed < rows.stop)] - rows.start
        kept += int((block["status"][failed] == 0).sum())
        lam.add(block["lam"])
        share.add(block["share_b"])
        labels, shares = [block["label_b"]], [block["share_b"]]
        if pool.sources > 2:
            labels, shares = [*labels, *block["label_more"].T], [*shares, *block["share_more"].T]
        rest = np.clip(1 - sum(one.astype(np.float64) for one in shares), 0, 1)
        first += np.bincount(block["label_a"], minlength=count)
        weight += np.bincount(block["label_a"], weights=rest, minlength=count)
        for label, part in zip(labels, shares, strict=True):
            others += np.bincount(label, minlength=count)
            weight += np.bincount(label, weights=part, minlength=count)
        if pairs is not None:
            pairs += np.bincount(block["label_a"] * count + block["label_b"], minlength=count * count)
        own = candidates[slice(*np.searchsorted(candidates, (rows.start, rows.stop)))] - rows.start
        found.append({name: block[name][own] for name in ("label_a", "label_b", "share_b", "status")})
    order = random.permutation(len(candidates))
    drawn = {name: np.concatenate([block[name] for block in found])[order] for name in found[0]}
    return PoolSummary(
        statuses=dict(zip(STATUSES, statuses.tolist(), strict=True)),
        decode_failed=decode_failed,
        kept=kept,
        lam=lam.spread(),
        share=share.spread(),
        classes=tuple(map(_class_count, pool.class_names, first.tolist(), others.tolist(), weight.tolist())),
        pairs=None if pairs is None else pairs.reshape(count, count),
        sample=tuple(candidates[order][_choose(drawn, statuses, min(samples, len(pool)))].tolist()),
    )


def _class_count(name: str, first: int, others: int, weight: float) -> ClassCount:
    return ClassCount(name=name, first=first, others=others, weight=weight)


class _Histogram:
    """Counts numbers in 0 to 1, so that their quantiles need no sorting."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS + 1, np.int64)
        self._least, self._most, self._sums = math.inf, -math.inf, list[float]()

    def add(self, values: NDArray[np.float32]) -> None:
        wide = values.astype(np.float64)
        self._counts += np.bincount(np.rint(wide * _BINS).astype(np.int64), minlength=_BINS + 1)
        self._least, self._most = min(self._least, float(wide.min())), max(self._most, float(wide.max()))
        self._sums.append(float(wide.sum()))

    def spread(self) -> Spread:
        mean = math.fsum(self._sums) / int(self._counts.sum())
        return Spread(least=self._least, most=self._most, mean=mean, counts=self._counts)


def _choose(drawn: Block, statuses: NDArray[np.int64], count: int) -> NDArray[np.intp]:
    """Return which of the drawn rows to show: each status as often as in the pool, spread evenly over the share."""
    wanted = count * statuses / statuses.sum()
    quota = np.floor(wanted).astype(np.int64)
    quota[np.argsort(quota - wanted, kind="stable")[: count - int(quota.sum())]] += 1  # the largest remainders
    band = np.minimum((drawn["share_b"] * _BANDS).astype(np.int64), _BANDS - 1)
    chosen = np.concatenate(
        [_even(np.flatnonzero(drawn["status"] == status), band)[:number] for status, number in enumerate(quota)]
    )
    share = drawn["share_b"][chosen]
    mixed = (drawn["label_a"] != drawn["label_b"])[chosen] & (share > 0.2) & (share < 0.8)
    # Really mixed rows in their random order, then the others by their share.
    return chosen[np.lexsort((np.where(mixed, chosen, share), ~mixed))]


def _even(places: NDArray[np.intp], band: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return places in turn from each band."""
    turn = np.zeros(len(places), np.int64)
    for number in range(_BANDS):
        own = band[places] == number
        turn[own] = np.arange(own.sum())
    return places[np.argsort(turn, kind="stable")]


def _decode_failed_rows(pool: Pool) -> NDArray[np.int64]:
    named = pool.manifest.counts.get("decode_failed_rows", [])
    try:
        rows = np.unique(np.asarray(msgspec.convert(named, list[int]), np.int64))
    except (msgspec.ValidationError, OverflowError) as error:
        raise CorruptError(f"the manifest of {pool.location!r} is damaged: decode_failed_rows: {error}.") from error
    if rows.size and not 0 <= rows.min() <= rows.max() < len(pool):
        raise CorruptError(
            f"the manifest of {pool.location!r} is damaged: decode_failed_rows lists rows {rows.min()} to {rows.max()}, "
            f"but the pool has {len(pool):,} rows. Download or build it again."
        )
    return rows
