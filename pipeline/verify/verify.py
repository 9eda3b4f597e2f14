"""The checks of ``lsmix verify`` on a pool whose bytes fit their checksums."""

import tempfile
from pathlib import Path
from typing import Any

from lsmix.data.artifact import Artifact
from lsmix.data.errors import RecipeError
from lsmix.data.pool import open_pool
from lsmix.data.progress import Progress
from lsmix.pipeline.verify.inputs import find_base
from lsmix.pipeline.verify.rows import check_rows, plan_of_pool

__all__ = ["verify_pool"]


def verify_pool(
    artifact: Artifact,
    *,
    deep: bool,
    sample: int,
    seed: int,
    data: Path | str | None,
    flow: Path | str | None,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    """Check a pool: as zarr-python reads it, row by row against its plan, and by making a sample of rows again.

    Args:
        artifact: the pool, its files on this machine.
        deep: whether to make a sample of rows again.
        sample: number of rows of that sample, at least 1.
        seed: of the choice of these rows.
        data: the base set, see ``find_base``; None looks in the pool's workspace.
        flow: the flow, likewise.
        device: where the sample is made.
        progress: progress reporter.

    Returns:
        ``checked`` and ``unchecked``, lists of sentences, and ``deep``, the result of the sample, or None.

    Raises:
        RecipeError: the pool was not made from ``data`` or ``flow``, or it has no plan.
        MissingError: a deep check lacks the data set or the flow.
        CorruptError: a row is wrong.
    """
    pool = open_pool(artifact)
    pool.columns.check_against_zarr()
    plan = plan_of_pool(pool)
    if isinstance(plan, str):
        if deep or data or flow:
            raise RecipeError(f"pool {pool.location!r} cannot be compared with what it was made from. {plan}.")
        result = check_rows(pool, plan)
        return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS_UNCHECKED], "deep": None}
    with tempfile.TemporaryDirectory(prefix="lsmix-verify-") as scratch:
        base = find_base(artifact.folder, plan, data=data, flow=flow, scratch=Path(scratch), progress=progress)
        result = check_rows(pool, plan, *base.labels())
        if not deep:
            return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS_UNCHECKED], "deep": None}
        from lsmix.pipeline.verify.recompute import check_deep

        made = check_deep(pool, plan, base, sample=sample, seed=seed, device=device, progress=progress)
        return {"checked": result.checked, "unchecked": result.unchecked, "deep": made}


_PIXELS_UNCHECKED = "pixels against their sources: --deep makes a sample of them again"
