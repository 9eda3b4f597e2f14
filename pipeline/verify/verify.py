"""Checking an artifact: every byte against its manifest, and every row of a pool against its plan."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lsmix.data.artifact import Artifact, read_manifest, verify_files
from lsmix.data.errors import RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.pool import open_pool
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.sharing.descriptions import edited_descriptions
from lsmix.data.sharing.transfer import temporary_copy
from lsmix.data.store import local_folder, trim_location
from lsmix.pipeline.verify.inputs import find_base
from lsmix.pipeline.verify.rows import check_rows, plan_of_pool

__all__ = ["verify"]

_STRAYS = "files that were added: a URL is not searched for unlisted files, and none of them is read"
_PIXELS = "pixels against their sources: --deep makes a sample of them again"


def verify(
    artifact: Path | str,
    *,
    deep: bool = False,
    sample: int = 256,
    seed: int = 0,
    data: Path | str | None = None,
    flow: Path | str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check every byte of an artifact against its manifest, and every row of a pool against its plan; return the facts.

    Of latents and pools it also opens the store, and compares it with what zarr-python reads.

    Args:
        artifact: its folder or its URL, of which every byte is downloaded again; the other arguments are for pools.
        deep: make a sample of rows again, and compare every pixel.
        sample: rows of that sample, at least 1.
        seed: of their choice.
        data: the base set: published files, "digits", or a data set that ingest made, or the URL of such; None looks in
            the pool's workspace.
        flow: folder or URL of the flow; None looks in the pool's workspace.
        device: where the sample is made: "auto", "cpu", "cuda" or "cuda:N".
        progress: optional progress reporter.

    Returns:
        What it is and how big; ``edited``, descriptions that differ from the manifest, as their owner may edit them; of a
        pool also ``checked`` and ``unchecked``, a sentence each, and ``deep``; ``unchecked`` also of an artifact at a URL.

    Raises:
        MissingError: there is no artifact, or it is unfinished; or a deep check lacks the data set or the flow.
        RecipeError: the pool was not made from ``data`` or ``flow``, or it has no plan.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: on the first damage, with the file's name, or the row and its value.
    """
    progress = progress or NullProgress()
    folder, url = local_folder(artifact), ""
    with ExitStack() as stack:
        if folder is None:
            url = trim_location(str(artifact))
            folder = stack.enter_context(temporary_copy(url, progress))
        manifest = read_manifest(folder)
        opened = Artifact(manifest=manifest, folder=folder, url=url)
        if (deep or data is not None or flow is not None) and manifest.stage != "mix":
            raise RecipeError(
                f"{opened.location!r} is no pool but the result of stage {manifest.stage!r}: only pools are checked so."
            )
        if sample < 1:
            raise RecipeError(f"a sample has at least 1 row, got {sample}.")
        facts: dict[str, Any] = {
            "folder": url or str(folder),
            "stage": manifest.stage,
            "name": manifest.name,
            "cache_key": manifest.cache_key,
            "content_digest": manifest.content_digest,
            "files": len(manifest.files),
            "bytes": verify_files(folder, manifest, opened.location),
            "counts": manifest.counts,
            "edited": edited_descriptions(folder, manifest),
        }
        if manifest.stage == "export":
            from lsmix.data.exports.writing import check_sums

            check_sums(folder, manifest)
        elif manifest.stage == "encode":
            open_latents(opened).columns.check_against_zarr()
        elif manifest.stage == "mix":
            how: dict[str, Any] = {"sample": sample, "seed": seed, "device": device} if deep else {}
            facts |= _verify_pool(opened, data, flow, how, progress)
    return {**facts, "unchecked": [*facts.get("unchecked", ()), _STRAYS]} if url else facts


def _verify_pool(
    artifact: Artifact, data: Path | str | None, flow: Path | str | None, deep: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Check a pool as zarr-python reads it, row by row, and, if ``deep`` says how, by making a sample of rows again."""
    pool = open_pool(artifact)
    pool.columns.check_against_zarr()
    plan = plan_of_pool(pool)
    if isinstance(plan, str):
        if deep or data or flow:
            raise RecipeError(f"pool {pool.location!r} cannot be compared with what it was made from. {plan}.")
        result = check_rows(pool, plan)
        return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS], "deep": None}
    with tempfile.TemporaryDirectory(prefix="lsmix-verify-") as scratch:
        base = find_base(artifact.folder, plan, data=data, flow=flow, scratch=Path(scratch), progress=progress)
        result = check_rows(pool, plan, *base.labels())
        if not deep:
            return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS], "deep": None}
        from lsmix.pipeline.verify.recompute import check_deep

        made = check_deep(pool, plan, base, **deep, progress=progress)
        return {"checked": result.checked, "unchecked": result.unchecked, "deep": made}
