"""Checking every row of a pool against what it says of itself: its plan, its labels, and the training split alone.

Checksums find what changed on the way, this finds what was wrong, or forged, before they were taken; a row
that cannot be what the plan says is refused with its number and its value.
"""

from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.errors import CorruptError
from lsmix.data.pool import STATUSES, Pool
from lsmix.data.pool_spec import CORNERS, PLAN_NAME, PoolConfig, PoolSpec
from lsmix.pipeline.stages.mix import MIX, make_plan
from lsmix.pipeline.stages.pair_sampler import PairBatch
from lsmix.pipeline.verify.shares import Shares

__all__ = ["PoolChecks", "check_rows", "plan_of_pool"]

_ROWS = 1 << 16  # at a time, so that memory does not grow with the pool
_OK, _REDRAWN, _REPLACED = (STATUSES.index(name) for name in ("ok", "redrawn", "replaced"))
_COUNTED = ("ok", "redrawn", "replaced")
_Array = npt.NDArray[Any]
_Ints = npt.NDArray[np.int64]


class PoolChecks(NamedTuple):
    """What was checked of a pool beyond its bytes, and what could not be; a sentence each."""

    checked: list[str]
    unchecked: list[str]


def plan_of_pool(pool: Pool) -> PoolSpec | str:
    """Return the plan that travels with a pool, or why rows cannot be checked against one.

    Raises:
        FormatError, CorruptError: there is a plan, but it is none, or it does not belong to this pool.
    """
    plan = pool.spec
    if plan is None or "origin" not in pool.columns.attributes:
        missing = PLAN_NAME if plan is None else "the origin of its images"
        return f"plan: this pool comes without {missing}, so its rows cannot be compared with what was to be drawn"
    _check_facts(pool, plan)
    if plan.stage_version != MIX.version:
        return (
            f"plan: it was drawn by version {plan.stage_version} of stage 'mix', and this lsmix draws as version "
            f"{MIX.version}; use the lsmix that made the pool"
        )
    return plan


def check_rows(pool: Pool, plan: PoolSpec | str, base_labels: _Ints | None = None, base: str = "") -> PoolChecks:
    """Check every row of a pool, some ten thousand at a time.

    Args:
        pool: whose files fit their checksums.
        plan: what ``plan_of_pool`` said.
        base_labels: the class of each training image, int64 (N,), where the base set is at hand.
        base: how to call it.

    Raises:
        CorruptError: on the first row that cannot be; the message names the row, the column and the value.
    """
    checker = _RowChecker(pool, plan if isinstance(plan, PoolSpec) else None, base_labels, base)
    for start in range(0, len(pool), _ROWS):
        checker.check(start, min(start + _ROWS, len(pool)))
    return checker.conclude(plan if isinstance(plan, str) else "")


def _check_facts(pool: Pool, plan: PoolSpec) -> None:
    """Compare what the pool and its manifest say of themselves with the plan."""
    attributes = pool.columns.attributes
    said: dict[str, tuple[Any, Any]] = {
        "method": (pool.method, plan.pool.method),
        "copies": (pool.copies, plan.pool.copies_made),
        "sources": (pool.sources, plan.pool.sources),
        "corners": ("corner" in pool.columns, plan.pool.corner != CORNERS[0]),
        "images_per_copy": (pool.images_per_copy, plan.origin.train_images),
        "origin": (attributes["origin"], msgspec.to_builtins(plan.origin)),
        "stage_version": (pool.manifest.stage_version, plan.stage_version),
    }
    for record in pool.manifest.inputs:
        said[f"root of its {record.role}"] = record.root, plan.inputs.get(record.role)
    if "method" in pool.manifest.config:
        try:
            made_by = msgspec.convert(
                {name: value for name, value in pool.manifest.config.items() if name != "flow"}, PoolConfig
            )
        except msgspec.ValidationError as error:
            _refuse(pool, f"its manifest has an impossible configuration ({error})")
        for field in PoolConfig.__struct_fields__:
            said[f"configured {field}"] = getattr(made_by, field), getattr(plan.pool, field)
    for name, (found, planned) in said.items():
        if found != planned:
            _refuse(pool, f"its {name} is {found!r}, but {PLAN_NAME} says {planned!r}")


def _refuse(pool: Pool, what: str) -> NoReturn:
    raise CorruptError(f"pool {pool.location!r} is not what it says: {what}. Do not use it; fetch or make it again.")


class _Chunk(NamedTuple):
    rows: _Ints  # (n,)
    status: _Array  # (n,)
    source_a: _Ints  # (n,)
    label_a: _Ints  # (n,)
    source: _Ints  # (n, sources − 1), of all but the first
    label: _Ints
    lam: npt.NDArray[np.float32]
    share: npt.NDArray[np.float32]
    corner: _Array | None  # (n,)


class _RowChecker:
    """Goes through a pool from its first row to its last, and remembers each source's label on the way."""

    def __init__(self, pool: Pool, plan: PoolSpec | None, base_labels: _Ints | None, base: str) -> None:
        self._pool = pool
        self._planned = plan
        self._images = pool.images_per_copy
        self._base = base if base_labels is not None else ""
        self._label = np.full(self._images, -1, np.int64) if base_labels is None else base_labels.copy()
        self._seen_in = np.full(self._images, -1, np.int64)  # the row that told a source's label
        self._statuses = np.zeros(len(STATUSES), np.int64)
        self._decode_failed: list[_Ints] = []
        self._shares_unknown = ""
        if plan:
            self._plan = make_plan(plan.pool, self._images)
            self._shares = Shares(plan, pool.image_shape)
            if not self._shares.installed:
                self._shares_unknown = f"shares: the method {plan.pool.method!r} is not installed; install its package"

    def check(self, start: int, stop: int) -> None:
        """Check some rows."""
        chunk = self._read(start, stop)
        self._check_replaced(chunk)
        if self._planned:  # before labels, since a wrong source has the wrong label too
            self._check_plan(chunk, self._planned.pool)
        self._check_labels(chunk.rows, "label_a", chunk.source_a, chunk.label_a)
        for place in range(self._pool.sources - 1):
            self._check_labels(chunk.rows, _name("label", place), chunk.source[:, place], chunk.label[:, place])
        self._statuses += np.bincount(chunk.status, minlength=len(STATUSES))
        self._decode_failed.append(chunk.rows[chunk.status != _OK])

    def conclude(self, without_plan: str) -> PoolChecks:
        """Compare the sums with the manifest; return what was checked."""
        self._check_counts()
        count, images = len(self._pool), self._images
        checked = [f"sources: all {count} rows take from the {images} images of the training split alone"]
        unchecked = []
        if self._base:
            checked.append(f"labels: those of {self._base}")
        else:
            checked.append("labels: one for each source image throughout the pool")
            unchecked.append("labels against the base set: it is not at hand; name it with --data")
        if without_plan:
            return PoolChecks(checked, [*unchecked, without_plan])
        redrawn, replaced = (int(self._statuses[status]) for status in (_REDRAWN, _REPLACED))
        checked.append(
            f"plan: sources, λ and corners are those that {PLAN_NAME} draws ({redrawn} rows redrawn, {replaced} replaced)"
        )
        if self._shares_unknown:
            unchecked.append(self._shares_unknown)
        else:
            checked.append(f"shares: what {self._pool.method!r} gives for each λ")
        return PoolChecks(checked, unchecked)

    def _read(self, start: int, stop: int) -> _Chunk:
        found = self._pool.rows(start, stop)
        others = {}
        for kind, first in (("source", "source_b"), ("label", "label_b"), ("lam", "lam"), ("share", "share_b")):
            more = found.get(f"{kind}_more")
            parts = [found[first][:, None]] if more is None else [found[first][:, None], more]
            others[kind] = np.concatenate(parts, axis=1)
        return _Chunk(
            rows=np.arange(start, stop),
            status=found["status"],
            source_a=found["source_a"],
            label_a=found["label_a"],
            corner=found.get("corner"),
            **others,
        )

    def _check_replaced(self, chunk: _Chunk) -> None:
        replaced = chunk.status == _REPLACED
        for place in range(self._pool.sources - 1):
            share = chunk.share[:, place]
            self._first(replaced & (share != 0), chunk.rows, _name("share", place), share, "a replaced row has share 0")

    def _check_labels(self, rows: _Ints, name: str, source: _Ints, label: _Ints) -> None:
        new = self._label[source] < 0
        self._seen_in[source[new]] = rows[new]
        self._label[source[new]] = label[new]
        bad = np.flatnonzero(self._label[source] != label)
        if len(bad):
            at = int(bad[0])
            image = int(source[at])
            teller = self._base or f"row {self._seen_in[image]}"
            why = f"{teller} has label {self._label[image]} for the same training image {image}"
            self._refuse_row(int(rows[at]), name, label[at], why)

    def _check_plan(self, chunk: _Chunk, config: PoolConfig) -> None:
        draw = self._plan.rows(int(chunk.rows[0]), int(chunk.rows[-1]) + 1)
        draw = draw._replace(others=draw.others.copy(), lam=draw.lam.copy())
        rows = chunk.rows
        self._same(rows, "source_a", chunk.source_a, draw.source_a)
        if chunk.corner is not None:
            fixed = config.corner not in (CORNERS[0], "random")
            corner = np.full_like(draw.corner, CORNERS.index(config.corner)) if fixed else draw.corner
            self._same(rows, "corner", chunk.corner, corner)
        attempt = self._attempts(chunk, draw, config)
        for place in range(config.sources - 1):
            self._same(rows, _name("source", place), chunk.source[:, place], draw.others[:, place])
            self._same(rows, _name("lam", place), chunk.lam[:, place], draw.lam[:, place].astype(np.float32))
        if not self._shares_unknown:
            self._check_shares(chunk, draw, attempt)

    def _attempts(self, chunk: _Chunk, draw: PairBatch, config: PoolConfig) -> _Ints:
        """Return the attempt of each row, and put what was drawn then into ``draw``; 0 is the first draw."""
        attempt = np.zeros(len(chunk.rows), np.int64)
        if not self._planned or not self._planned.latent or config.on_decode_failure == "keep":
            why = (
                "pixels are mixed, which never fails"
                if config.on_decode_failure == "redraw"
                else "on_decode_failure is 'keep'"
            )
            self._first(chunk.status != _OK, chunk.rows, "status", chunk.status, f"no row is drawn again, since {why}")
            return attempt
        for at in np.flatnonzero(chunk.status != _OK).tolist():
            row, last = int(chunk.rows[at]), config.attempts
            if chunk.status[at] == _REDRAWN:
                attempt[at] = self._attempt_of(chunk, at, last)
            else:
                attempt[at] = last
            if attempt[at]:
                draw.others[at], draw.lam[at] = self._plan.again(row, int(attempt[at]))
        return attempt

    def _attempt_of(self, chunk: _Chunk, at: int, last: int) -> int:
        row = int(chunk.rows[at])
        for attempt in range(1, last + 1):
            others, lam = self._plan.again(row, attempt)
            if (others == chunk.source[at]).all() and (lam.astype(np.float32) == chunk.lam[at]).all():
                return attempt
        found = f"{chunk.source[at].tolist()} at λ {chunk.lam[at].tolist()}"
        return self._refuse_row(row, "source_b", found, f"none of the attempts 1 to {last} at a redrawn row draws that")

    def _check_shares(self, chunk: _Chunk, draw: PairBatch, attempt: _Ints) -> None:
        expected = self._expected_shares(chunk.rows, draw, attempt)
        replaced = chunk.status == _REPLACED
        if not self._shares.known and self._shares_unknown:
            return
        expected[replaced] = 0
        if not self._shares.known and (expected != chunk.share).any():
            again = self._expected_shares(chunk.rows, draw, attempt, dummies=1)
            again[replaced] = 0
            if self._shares_unknown or (again != expected).any():
                self._shares_unknown = self._shares_unknown or (
                    f"shares: the method {self._pool.method!r} of another package looks at the images; --deep mixes some"
                )
                return
        for place in range(expected.shape[1]):
            self._same(chunk.rows, _name("share", place), chunk.share[:, place], expected[:, place])

    def _expected_shares(
        self, rows: _Ints, draw: PairBatch, attempt: _Ints, dummies: int = 0
    ) -> npt.NDArray[np.float32]:
        def draws(at: int) -> np.random.Generator:
            return self._plan.method_draws(rows, int(attempt[at]))(at)

        try:
            return self._shares.of(draw.lam, draws, dummies=dummies)
        except Exception as error:
            if self._shares.known:
                raise
            # Another package's code may raise anything at images that are none.
            self._shares_unknown = f"shares: the method {self._pool.method!r} fails at stand-ins for images ({error})"
            return np.zeros(draw.lam.shape, np.float32)

    def _check_counts(self) -> None:
        """Compare what the manifest counts with the rows, as far as it counts."""
        counts = self._pool.manifest.counts
        for name, found in zip(_COUNTED, self._statuses.tolist(), strict=True):
            if name in counts and counts[name] != found:
                _refuse(
                    self._pool, f"its manifest counts {counts[name]} rows {name!r}, but the column status has {found}"
                )
        redraws = self._planned is not None and self._planned.pool.on_decode_failure == "redraw"
        if redraws and "decode_failed_rows" in counts:
            found = np.concatenate(self._decode_failed).tolist()
            if counts["decode_failed_rows"] != found:
                odd = sorted(set(found) ^ set(counts["decode_failed_rows"]))[:1] or ["in another order"]
                _refuse(self._pool, f"decode_failed_rows in its manifest do not fit the column status at row {odd[0]}")

    def _same(self, rows: _Ints, name: str, found: _Array, planned: _Array) -> None:
        bad = np.flatnonzero(found != planned)
        if len(bad):
            at = int(bad[0])
            self._refuse_row(int(rows[at]), name, found[at], f"the plan has {planned[at]}")

    def _first(self, bad: _Array, rows: _Ints, name: str, values: _Array, why: str) -> None:
        where = np.flatnonzero(bad)
        if len(where):
            self._refuse_row(int(rows[where[0]]), name, values[where[0]], why)

    def _refuse_row(self, row: int, name: str, value: Any, why: str) -> NoReturn:
        _refuse(self._pool, f"in row {row} {name} is {value}, but {why}")


def _name(kind: str, place: int) -> str:
    """Return how to call a value of the second source, or of one behind it."""
    if place:
        return f"{kind}_more[{place - 1}]"
    return "lam" if kind == "lam" else f"{kind}_b"
