"""All that ``lsmix verify`` does with a pool once its bytes fit their checksums.

What could not be checked is said as plainly as what was.
"""

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
    """Check that a pool is what it says: as zarr-python reads it, row by row against its plan, and by a sample made again.

    Args:
        artifact: the pool, its files on this machine.
        deep: whether to make a sample of rows again.
        sample: rows of that sample, at least 1.
        seed: of their choice.
        data: the base set, see ``find_base``; None looks in the pool's workspace.
        flow: likewise.
        device: where a sample is made.
        progress: is told what happens.

    Returns:
        ``checked`` and ``unchecked``, a sentence each, and ``deep``, what came of the sample, or None.

    Raises:
        RecipeError: what was given is not what the pool was made from, or it has no plan to be made again by.
        MissingError: a deep check lacks the data set or the flow.
        CorruptError: on the first row that cannot be, or comes out differently.
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
        facts: dict[str, Any] = {"checked": result.checked, "unchecked": result.unchecked, "deep": None}
        if deep:
            from lsmix.pipeline.verify.recompute import check_deep

            facts["deep"] = check_deep(pool, plan, base, sample=sample, seed=seed, device=device, progress=progress)
        else:
            facts["unchecked"].append(_PIXELS_UNCHECKED)
    return facts


_PIXELS_UNCHECKED = "pixels against their sources: --deep makes a sample of them again"
