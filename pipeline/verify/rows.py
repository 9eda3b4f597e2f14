"""Check every row of a pool against its plan and labels, in one pass over all columns except the images.

Checksums detect changes in transfer; these checks detect values that were already wrong or forged at the source.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
import numpy.typing as npt

from lsmix.data.errors import CorruptError
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS, RowRng
from lsmix.data.pool import STATUSES, Pool
from lsmix.data.pool_spec import CORNERS, PLAN_NAME, PoolConfig, PoolSpec
from lsmix.data.rng import generator
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.stages.pair_sampler import PairBatch, PairSampler

__all__ = ["PoolChecks", "check_rows", "plan_of_pool", "planned_shares"]

_ROWS = 1 << 16  # at a time, so that memory does not grow with the pool
_BYTES = 1 << 20  # of dummy images or latents mixed at a time
_OK, _REDRAWN, _REPLACED = (STATUSES.index(name) for name in ("ok", "redrawn", "replaced"))
_Array = npt.NDArray[Any]
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Shares = npt.NDArray[np.float32]
_Rows = dict[str, _Array]  # columns, (n,) each; "source", "label", "lam" and "share": (n, sources − 1), without x₁


class PoolChecks(NamedTuple):
    """Sentences on what was checked in a pool beyond its bytes, and what could not be checked."""

    checked: list[str]
    unchecked: list[str]


def plan_of_pool(pool: Pool) -> PoolSpec | str:
    """Return the plan in a pool, or the reason why rows cannot be checked against a plan.

    Raises:
        FormatError: The plan is invalid or has another format.
        CorruptError: The plan does not belong to this pool.
    """
    plan = pool.spec
    if plan is None or "origin" not in pool.columns.attributes:
        missing = PLAN_NAME if plan is None else "record of the origin of its images"
        return f"plan: this pool has no {missing}, so its rows cannot be compared with the plan"
    _check_metadata(pool, plan)
    if plan.stage_version != MIX.version:
        return (
            f"plan: it was drawn by version {plan.stage_version} of stage 'mix', but this lsmix has version {MIX.version}; "
            "use the version of lsmix that built the pool"
        )
    return plan


def check_rows(pool: Pool, plan: PoolSpec | str, base_labels: _Ints | None = None, base: str = "") -> PoolChecks:
    """Check every row of a pool against the result of ``plan_of_pool``, and its labels against the base set if given.

    ``base_labels`` is the class of each training image, int64 (N,); ``base`` is the name of the base set in messages.

    Raises:
        CorruptError: A row contradicts the plan. The message names the row, the column and the value.
    """
    checker = _RowChecker(pool, plan if isinstance(plan, PoolSpec) else None, base_labels, base)
    for start in range(0, len(pool), _ROWS):
        checker.check(start, min(start + _ROWS, len(pool)))
    checker.check_counts()
    return checker.summary(plan if isinstance(plan, str) else "")


def _check_metadata(pool: Pool, plan: PoolSpec) -> None:
    """Compare the attributes and the manifest of the pool with the plan."""
    attributes, manifest = pool.columns.attributes, pool.manifest
    compared: dict[str, tuple[Any, Any]] = {
        "method": (pool.method, plan.pool.method),
        "copies": (pool.copies, plan.pool.copies_made),
        "sources": (pool.sources, plan.pool.sources),
        "corners": ("corner" in pool.columns, plan.pool.corner != CORNERS[0]),
        "images_per_copy": (pool.images_per_copy, plan.origin.train_images),
        "origin": (attributes["origin"], msgspec.to_builtins(plan.origin)),
        "stage_version": (manifest.stage_version, plan.stage_version),
    }
    compared |= {
        f"content digest of its {item.role}": (item.content_digest, plan.inputs.get(item.role))
        for item in manifest.inputs
    }
    if "method" in manifest.config:
        try:
            made_by = msgspec.convert({k: v for k, v in manifest.config.items() if k != "flow"}, PoolConfig)
        except msgspec.ValidationError as error:
            _reject(pool, f"its manifest has an invalid configuration ({error})")
        for field in PoolConfig.__struct_fields__:
            compared[f"configured {field}"] = getattr(made_by, field), getattr(plan.pool, field)
    for name, (found, planned) in compared.items():
        if found != planned:
            _reject(pool, f"its {name} is {found!r}, but {PLAN_NAME} says {planned!r}")


def _reject(pool: Pool, what: str) -> NoReturn:
    raise CorruptError(f"pool {pool.location!r} is inconsistent: {what}. Download or rebuild it.")


def _name(kind: str, index: int) -> str:
    """Return the column name, for messages, of the second source (index 0) or a later one."""
    if index:
        return f"{kind}_more[{index - 1}]"
    return "lam" if kind == "lam" else f"{kind}_b"


class _RowChecker:
    """Check the rows of a pool in order, and record the label of each source."""

    def __init__(self, pool: Pool, plan: PoolSpec | None, base_labels: _Ints | None, base: str) -> None:
        self._pool, self._plan = pool, plan
        self._base = base if base_labels is not None else ""
        self._label = np.full(pool.images_per_copy, -1, np.int64) if base_labels is None else base_labels.copy()
        self._seen_in = np.full(pool.images_per_copy, -1, np.int64)  # row that provided the label of a source
        self._statuses = np.zeros(len(STATUSES), np.int64)
        self._decode_failed: list[int] = []
        self._shares_unknown = ""
        if plan:
            self._sampler = PairSampler(plan.pool, pool.images_per_copy)

    def check(self, start: int, stop: int) -> None:
        """Check some rows."""
        rows = np.arange(start, stop)
        found: _Rows = self._pool.rows(start, stop)
        for kind in ("source", "label", "lam", "share"):
            second = found.pop(_name(kind, 0))[:, None]
            found[kind] = np.concatenate([second, found.pop(f"{kind}_more", second[:, :0])], axis=1)
        bad = (found["status"] == _REPLACED)[:, None] & (found["share"] != 0)
        self._reject_first(rows, "share", found["share"], bad, lambda _: "replaced rows have share 0")
        if self._plan:  # before labels, since a wrong source also has a wrong label
            self._check_plan(rows, found, self._plan)
        self._check_labels(rows, "label_a", found["source_a"], found["label_a"])
        for index in range(self._pool.sources - 1):
            self._check_labels(rows, _name("label", index), found["source"][:, index], found["label"][:, index])
        self._statuses += np.bincount(found["status"], minlength=len(STATUSES))
        self._decode_failed += rows[found["status"] != _OK].tolist()

    def check_counts(self) -> None:
        """Compare the statuses with the counts in the manifest, if present."""
        counts = self._pool.manifest.counts
        for name, found in zip(STATUSES, self._statuses.tolist(), strict=True):
            if counts.get(name, found) != found:
                what = f"its manifest counts {counts[name]} rows as {name!r}, but the column status has {found}"
                _reject(self._pool, what)
        redraws = self._plan is not None and self._plan.pool.on_decode_failure == "redraw"
        listed = counts.get("decode_failed_rows", self._decode_failed)
        if redraws and listed != self._decode_failed:
            wrong = sorted(set(self._decode_failed) ^ set(listed))[:1] or ["in another order"]
            _reject(self._pool, f"decode_failed_rows in its manifest do not match the column status: {wrong[0]}")

    def summary(self, without_plan: str) -> PoolChecks:
        """Return what was checked; ``without_plan`` is the reason if there is no plan."""
        images = self._pool.images_per_copy
        checked = [f"sources: all {len(self._pool):,} rows use only the {images:,} images of the training split"]
        unchecked = []
        if self._base:
            checked.append(f"labels: equal to those of {self._base}")
        else:
            checked.append("labels: every source image has the same label throughout the pool")
            unchecked.append("labels of the base set: it was not found; name it with --data")
        if without_plan:
            return PoolChecks(checked, [*unchecked, without_plan])
        counts = f"{self._statuses[_REDRAWN]:,} rows redrawn, {self._statuses[_REPLACED]:,} replaced"
        checked.append(f"plan: sources, λ and corners match {PLAN_NAME} ({counts})")
        if self._shares_unknown:
            unchecked.append(f"shares: {self._shares_unknown}")
        else:
            checked.append(f"shares: match {self._pool.method!r} at each λ")
        return PoolChecks(checked, unchecked)

    def _check_labels(self, rows: _Ints, name: str, source: _Ints, label: _Ints) -> None:
        new = self._label[source] < 0
        self._seen_in[source[new]] = rows[new]
        self._label[source[new]] = label[new]

        def why(at: tuple[int, ...]) -> str:
            image = int(source[at])
            reference = self._base or f"row {self._seen_in[image]}"
            return f"{reference} has label {self._label[image]} for the same training image {image}"

        self._reject_first(rows, name, label, self._label[source] != label, why)

    def _check_plan(self, rows: _Ints, found: _Rows, plan: PoolSpec) -> None:
        draw = self._sampler.pairs(rows)
        draw = draw._replace(others=draw.others.copy(), lam=draw.lam.copy())
        fixed = plan.pool.corner not in (CORNERS[0], "random")
        corner = np.full_like(draw.corner, CORNERS.index(plan.pool.corner)) if fixed else draw.corner
        self._check_equal(rows, found, {"source_a": draw.source_a, "corner": corner})
        attempts = self._redrawn(rows, found, draw, plan)
        self._check_equal(rows, found, {"source": draw.others, "lam": draw.lam.astype(np.float32)})
        if self._shares_unknown:
            return

        def row_rng(at: int) -> np.random.Generator:
            return self._sampler.row_rng(rows, int(attempts[at]))(at)

        shares = planned_shares(plan, self._pool.image_shape, draw.lam, row_rng)
        if isinstance(shares, str):
            self._shares_unknown = shares
            return
        shares[found["status"] == _REPLACED] = 0
        self._check_equal(rows, found, {"share": shares})

    def _redrawn(self, rows: _Ints, found: _Rows, draw: PairBatch, plan: PoolSpec) -> _Ints:
        """Update ``draw`` to the last attempt of each row; return these attempts, 0 for the first draw."""
        config, status = plan.pool, found["status"]
        if not plan.latent or config.on_decode_failure == "keep":
            reason = "mixing pixels never fails" if not plan.latent else "on_decode_failure is 'keep'"
            why = f"no row is redrawn, since {reason}"
            self._reject_first(rows, "status", status, status != _OK, lambda _: why)
        attempts = np.where(status == _REPLACED, config.attempts, 0)
        source, lam = found["source"], found["lam"]
        for at in np.flatnonzero(status == _REDRAWN).tolist():
            for attempt in range(1, config.attempts + 1):
                others, rates = self._sampler.resample(int(rows[at]), attempt)
                if (others == source[at]).all() and (rates.astype(np.float32) == lam[at]).all():
                    attempts[at] = attempt
                    break
            else:
                value = f"{source[at].tolist()} at λ {lam[at].tolist()}"
                why = f"none of the attempts 1 to {config.attempts} to redraw the row produces this"
                _reject(self._pool, f"in row {rows[at]} source_b is {value}, but {why}")
        for at in np.flatnonzero(attempts).tolist():
            draw.others[at], draw.lam[at] = self._sampler.resample(int(rows[at]), int(attempts[at]))
        return attempts

    def _check_equal(self, rows: _Ints, found: _Rows, planned: _Rows) -> None:
        for name in [name for name in planned if name in found]:  # pools without corners lack that column

            def why(at: tuple[int, ...], name: str = name) -> str:
                return f"the plan has {planned[name][at]}"

            self._reject_first(rows, name, found[name], found[name] != planned[name], why)

    def _reject_first(
        self, rows: _Ints, name: str, values: _Array, bad: npt.NDArray[np.bool_], why: Callable[[tuple[int, ...]], str]
    ) -> None:
        """Reject the pool if a value is bad; ``why`` maps the index of the first one in ``values`` to the reason."""
        if bad.any():
            row, *index = at = tuple(np.argwhere(bad)[0].tolist())
            column = _name(name, *index) if index else name
            _reject(self._pool, f"in row {rows[row]} {column} is {values[at]}, but {why(at)}")


def planned_shares(plan: PoolSpec, image_shape: tuple[int, int, int], lam: _Floats, row_rng: RowRng) -> _Shares | str:
    """Return the share of every source except the first, (n, sources − 1), or the reason why it is unknown.

    ``lam`` contains the planned λ, (n, sources − 1); ``row_rng`` returns the generator of each row.
    """
    method, registry = plan.pool.method, LATENT_METHODS if plan.latent else PIXEL_METHODS
    if method not in registry:
        return f"the method {method!r} is not installed; install its package"
    shape = image_shape if plan.dim is None else (plan.dim,)
    formula = registry.entry(method).share
    if formula:  # thousands of times faster than running the method
        sizes = shape[:2]
        return _of_all_sources(lam, lambda rates: formula(rates, sizes).astype(np.float32))

    def of_zeros(rates: _Floats) -> _Shares:
        return _run_method(method, rates, row_rng, lambda size: np.zeros((size, *shape)))

    if method in registry.builtin():
        return _of_all_sources(lam, of_zeros)
    noise = generator(1, "verify", "dummies")

    def of_noise(rates: _Floats) -> _Shares:
        return _run_method(method, rates, row_rng, lambda size: noise.integers(0, 256, (size, *shape)))

    try:
        shares, others = _of_all_sources(lam, of_zeros), _of_all_sources(lam, of_noise)
    except Exception as error:  # noqa: BLE001 - other packages may raise anything for dummy images
        return f"the method {method!r} fails for dummy images ({error})"
    if (shares == others).all():
        return shares
    return f"the method {method!r} of another package depends on the images; use --deep to recompute a sample"


def _of_all_sources(lam: _Floats, of_rates: Callable[[_Floats], _Shares]) -> _Shares:
    taken = np.zeros((len(lam), lam.shape[1] + 1), np.float32)  # column k: total share of the first k others
    for index in range(lam.shape[1]):
        taken[:, index + 1] = of_rates(np.minimum(lam[:, : index + 1].sum(axis=1), 1.0))
    return np.diff(taken, axis=1)


def _run_method(method: str, rates: _Floats, row_rng: RowRng, make: Callable[[int], _Array]) -> _Shares:
    """Return the shares of a method for dummies, (n, D) or (n, H, W, C), created by ``make``."""
    from lsmix.classifiers.pixel_mixing import mix_images
    from lsmix.glow.latent_mixing import mix_latents

    step = max(1, _BYTES // (4 * make(1).size))
    shares = [np.empty(0, np.float32)]
    for start in range(0, len(rates), step):
        part = rates[start : start + step]
        first, second = make(len(part)), make(len(part))
        rng = partial(lambda start, row: row_rng(start + row), start)
        if first.ndim == 2:
            z1, z2 = first.astype(np.float32), second.astype(np.float32)
            shares.append(mix_latents(method, z1, z2, part, draws=rng)[1])
        else:
            x1, x2 = first.astype(np.uint8), second.astype(np.uint8)
            shares.append(mix_images(method, x1, x2, part, draws=rng)[1])
    return np.concatenate(shares)
