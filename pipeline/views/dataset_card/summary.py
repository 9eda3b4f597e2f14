"""What the card of a pool tells: its plan, its statistics and one row of it as an example.

The one rule: everything is read from the pool itself, block by block, and checked for its range first, so that a
stranger's pool of any size can be described in bounded memory.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import FileRecord, Manifest, Provenance, read_provenance
from lsmix.data.errors import CorruptError
from lsmix.data.pool import PLAN_NAME, STATUSES, Pool, Sample

__all__ = ["BLOCK_ROWS", "CardFacts", "ClassCount", "Spread", "blocks", "card_facts"]

BLOCK_ROWS: Final = 16_384  # rows of the narrow columns that are looked at together, some 10 MB as Python objects
_PLAN_BYTES: Final = 1 << 20  # a plan has a few kilobytes
_BINS: Final = 10_000  # of λ and share, so that quantiles are exact to 0.0001 whatever the number of rows
_LOOKED_AT: Final = 4096  # rows that the example is chosen from
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of plan.json, see ``pipeline/stages/mix.py``."""

    stage_version: int
    pool: dict[str, Any]  # settings of the pool
    inputs: dict[str, str]  # root digest by role
    latents: dict[str, Any] = {}  # settings of the latents
    dim: int = 0  # length of a latent vector; 0 in pixel space


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
    plan: _Plan
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
        return count if isinstance(count, int) and "flow" in self.plan.inputs else None

    @property
    def version(self) -> str:
        """Version of lsmix that made the pool; "unknown" where its manifest doesn't say."""
        versions = self.manifest.environment.get("versions")
        return str(versions.get("lsmix", "unknown")) if isinstance(versions, dict) else "unknown"


def card_facts(pool: Pool) -> CardFacts:
    """Return what there is to tell of a pool; its manifest lists the files without those of the card.

    Raises:
        CorruptError: the plan is damaged, or a number lies outside of its range.
    """
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
        plan=_read_plan(pool.path),
        origin=read_provenance(pool.columns.attributes, f"pool {str(pool.path)!r}"),
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
    limits: dict[str, float] = {"status": len(STATUSES) - 1, "lam": 1, "share_b": 1, "lam_more": 1, "share_more": 1}
    limits |= dict.fromkeys(("label_a", "label_b", "label_more"), len(pool.class_names) - 1)
    for start in range(0, len(pool), BLOCK_ROWS):
        rows = range(start, min(start + BLOCK_ROWS, len(pool)))
        block = {name: pool.columns[name][rows.start : rows.stop] for name in pool.columns if name != "image"}
        for name, values in block.items():
            least, most = values.min(initial=0), values.max(initial=0)
            if not (least >= 0 and most <= limits.get(name, most)):  # not "or": NaN is on neither side
                raise CorruptError(
                    f"pool {str(pool.path)!r} is damaged: {name!r} holds {least} to {most} in rows {rows.start} to "
                    f"{rows.stop - 1}, expected 0 to {limits.get(name, 'any')}. Do not use it; make or fetch it again."
                )
        yield rows, block


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


def _read_plan(folder: Path) -> _Plan:
    path = folder / PLAN_NAME
    try:
        if path.stat().st_size > _PLAN_BYTES:
            raise CorruptError(f"{str(path)!r} is too long for a plan: more than {_PLAN_BYTES} bytes. Do not use it.")
        return msgspec.json.decode(path.read_bytes(), type=_Plan)
    except FileNotFoundError as error:
        raise CorruptError(f"{str(path)!r} is missing. Fetch or make the pool again.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Fetch or make the pool again.") from error
