"""What the card of a pool tells: its plan, its statistics and one row of it as an example.

Everything is read from the pool itself, block by block, and checked for its range first, so that a
stranger's pool of any size can be described in bounded memory.
"""

import math
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import FileRecord, Manifest, Provenance, read_provenance
from lsmix.data.errors import CorruptError
from lsmix.data.pool import STATUSES, Pool, Sample
from lsmix.data.pool_spec import PLAN_NAME, PoolSpec

__all__ = ["BLOCK_ROWS", "CardFacts", "ClassCount", "Spread", "blocks", "card_facts"]

BLOCK_ROWS: Final = 16_384  # rows of the narrow columns that are looked at together, some 10 MB as Python objects
_BINS: Final = 10_000  # of λ and share, so that quantiles are exact to 0.0001 whatever the number of rows
_LOOKED_AT: Final = 4096  # rows that the example is chosen from
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)


class Spread(NamedTuple):
    """How numbers in 0 to 1 are spread."""

    least: float
    most: float
    mean: float
    quantiles: tuple[float, ...]  # at 5, 25, 50, 75 and 95 %, to 0.0001


class ClassCount(NamedTuple):
    """How much of a pool belongs to one class."""

    name: str
    first: int  # images whose x₁ is of this class
    others: int  # … whose x₂ is, or one behind it
    weight: float  # sum of the class's weights in all labels: in images


class CardFacts(NamedTuple):
    """All that a card tells of a pool."""

    pool: Pool
    spec: PoolSpec
    origin: Provenance
    statuses: dict[str, int]  # rows by status
    lam: Spread
    share: Spread  # of x₂
    classes: tuple[ClassCount, ...]
    example_row: int
    example: Sample
    files: tuple[FileRecord, ...]  # of the pool, without those of the card

    @property
    def manifest(self) -> Manifest:
        """What is known of the artifact."""
        return self.pool.manifest

    @property
    def decode_failed(self) -> int | None:
        """Images that failed to decode at the first draw; None where the manifest doesn't say, as in pixel space."""
        count = self.manifest.counts.get("decode_failed")
        return count if isinstance(count, int) and self.spec.latent else None

    @property
    def version(self) -> str:
        """Version of lsmix that made the pool; "unknown" where its manifest doesn't say."""
        versions = self.manifest.environment.get("versions")
        return str(versions.get("lsmix", "unknown")) if isinstance(versions, dict) else "unknown"


def card_facts(pool: Pool) -> CardFacts:
    """Return what there is to tell of a pool; its manifest lists the files without those of the card.

    Raises:
        FormatError: the plan is none, or of a version that this lsmix does not read.
        CorruptError: the plan is damaged or missing, or a value is out of its range.
    """
    spec = pool.spec
    if spec is None:
        raise CorruptError(f"pool {pool.location!r} comes without {PLAN_NAME}. Fetch or make it again.")
    spread = {"lam": _Histogram(), "share_b": _Histogram()}
    statuses = np.zeros(len(STATUSES), np.int64)
    count = len(pool.class_names)
    first, others, weight = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count)
    for _, block in blocks(pool):
        statuses += np.bincount(block["status"], minlength=len(STATUSES))
        for name, histogram in spread.items():
            histogram.add(block[name])
        shares = [block["share_b"], *_columns(block, "share_more")]
        labels = [block["label_b"], *_columns(block, "label_more")]
        rest = np.clip(1 - sum(share.astype(np.float64) for share in shares), 0, 1)
        first += np.bincount(block["label_a"], minlength=count)
        weight += np.bincount(block["label_a"], weights=rest, minlength=count)
        for label, share in zip(labels, shares, strict=True):
            others += np.bincount(label, minlength=count)
            weight += np.bincount(label, weights=share, minlength=count)
    row = _example_row(pool)
    counts = zip(pool.class_names, first.tolist(), others.tolist(), weight.tolist(), strict=True)
    return CardFacts(
        pool=pool,
        spec=spec,
        origin=read_provenance(pool.columns.attributes, f"pool {pool.location!r}"),
        statuses=dict(zip(STATUSES, statuses.tolist(), strict=True)),
        lam=spread["lam"].spread(),
        share=spread["share_b"].spread(),
        classes=tuple(ClassCount(*fields) for fields in counts),
        example_row=row,
        example=pool[row],
        files=tuple(pool.manifest.files),
    )


def blocks(pool: Pool) -> Iterator[tuple[range, dict[str, NDArray[Any]]]]:
    """Go through the narrow columns of a pool, with the rows of each block.

    Raises:
        CorruptError: a number lies outside of its range.
    """
    for start in range(0, len(pool), BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, len(pool)))
        yield rows, pool.rows(rows.start, rows.stop)


def _columns(block: dict[str, NDArray[Any]], name: str) -> list[NDArray[Any]]:
    return list(block[name].T) if name in block else []


class _Histogram:
    """Counts numbers in 0 to 1, so that their quantiles need no sorting of all of them."""

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS + 1, np.int64)
        self._least, self._most, self._sums = math.inf, -math.inf, list[float]()

    def add(self, values: NDArray[np.float32]) -> None:
        """Count some numbers."""
        wide = values.astype(np.float64)
        self._counts += np.bincount(np.rint(wide * _BINS).astype(np.int64), minlength=_BINS + 1)
        self._least, self._most = min(self._least, wide.min()), max(self._most, wide.max())
        self._sums.append(float(wide.sum()))

    def spread(self) -> Spread:
        """Return how they are spread."""
        below = np.cumsum(self._counts)
        total = int(below[-1])
        at = [int(np.searchsorted(below, math.ceil(quantile * total))) / _BINS for quantile in QUANTILES]
        return Spread(float(self._least), float(self._most), math.fsum(self._sums) / total, tuple(at))


def _example_row(pool: Pool) -> int:
    """Return a row that shows most: two classes that differ, and much of both; else the first row."""
    share, differ = pool.share_b[:_LOOKED_AT], pool.label_a[:_LOOKED_AT] != pool.label_b[:_LOOKED_AT]
    good = differ & (share > 0.2) & (share < 0.8) & (pool.status[:_LOOKED_AT] == STATUSES.index("ok"))
    return int(good.argmax())
