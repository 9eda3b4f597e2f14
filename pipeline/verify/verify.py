"""Checking an artifact: every byte against its manifest, and every row of a pool against its plan.

The deep check of a pool makes a sample of its rows again, by the mix stage's own code, and compares.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.artifact import Artifact, read_manifest, verify_files
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.mixing import LATENT_METHODS, PIXEL_METHODS
from lsmix.data.pool import Pool, open_pool
from lsmix.data.pool_spec import EncodeConfig, PoolSpec, check_pool
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.rng import generator
from lsmix.data.sharing.descriptions import edited_descriptions, stray_files
from lsmix.data.sharing.transfer import temporary_copy
from lsmix.data.store import local_folder, trim_location
from lsmix.pipeline.engine.device import describe_environment, device_memory, prepare_device, resolve_device
from lsmix.pipeline.stages.pool_builder import PoolBuilder
from lsmix.pipeline.verify.compare import PoolComparison, same_kind_of_device
from lsmix.pipeline.verify.inputs import PoolInputs, find_base, require
from lsmix.pipeline.verify.rows import check_rows, plan_of_pool

__all__ = ["verify"]

_ROWS = 256  # made again at a time
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
        What it is and how big; ``edited``, descriptions that differ from the manifest, as their owner may edit them;
        ``ignored``, what file managers and hubs added; of a pool also ``checked`` and ``unchecked``, a sentence each, and
        ``deep``; ``unchecked`` also of an artifact at a URL.

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
            "ignored": stray_files(folder),
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
        made = _check_deep(pool, plan, base, **deep, progress=progress)
        return {"checked": result.checked, "unchecked": result.unchecked, "deep": made}


def _check_deep(
    pool: Pool, plan: PoolSpec, base: PoolInputs, *, sample: int, seed: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Make ``sample`` rows of a pool, whose choice ``seed`` decides, again, and compare every column and every pixel.

    Returns:
        ``rows`` made again, ``same_device`` (whether bytes must be the same), ``redrawn_otherwise`` (rows that were drawn
        again only here, or only there, since they are at the limit of what counts as a failed decode), and how they differ.

    Raises:
        MissingError: the data set or the flow is not at hand.
        CorruptError: a row comes out differently; the message names it.
    """
    check_pool(plan.pool)
    device = resolve_device(device) if plan.latent else "cpu"
    label = f"deep check of {pool.manifest.name or pool.location}"
    with device_memory(label, device):
        builder = _open_builder(plan, base, device)
    exact = not plan.latent or same_kind_of_device(describe_environment(device), pool.manifest.environment)
    count = min(sample, len(pool))
    rows = np.sort(generator(seed, "verify", "deep").choice(len(pool), count, replace=False)).astype(np.int64)
    comparison, otherwise = PoolComparison(), 0
    progress.start(label, count, "image")
    for start in range(0, count, _ROWS):
        some = rows[start : start + _ROWS]
        with device_memory(label, device):  # in batches that the plan fixes
            made = builder.build(builder.load(some))
        stored = {name: column.gather(some) for name, column in pool.columns.items()}
        same = np.ones(len(some), bool) if exact else made["status"] == stored["status"]
        otherwise += int((~same).sum())
        comparison.add(some[same], *({name: table[name][same] for name in stored} for table in (stored, made)))
        if not comparison.within(0 if exact else 1):
            kind = "the same kind of device" if exact else "another kind of device, which moves pixels by 1 at most"
            raise CorruptError(
                f"pool {pool.location!r} is not what its plan gives: made again on {kind}, {comparison.text()}. Do not use it; "
                "fetch or make it again."
            )
        progress.advance(len(some))
    progress.finish()
    return {"rows": count, "same_device": exact, "redrawn_otherwise": otherwise, **comparison.to_dict()}


def _open_builder(plan: PoolSpec, base: PoolInputs, device: str) -> PoolBuilder:
    registry = LATENT_METHODS if plan.latent else PIXEL_METHODS
    registry.check(plan.pool.method)
    if plan.latents is None:
        return PoolBuilder(plan.pool, open_dataset(require(base.dataset, "data set", "--data")).train)
    from lsmix.glow.checkpoint import load_flow

    prepare_device(device)
    flow = require(base.flow, "flow", "--flow")
    source = (
        open_latents(base.latents)
        if base.latents
        else _EncodedAgain(require(base.dataset, "data set", "--data"), flow, plan.latents, device)
    )
    return PoolBuilder(plan.pool, source, load_flow(flow, device=device))


class _EncodedAgain:
    """Latents of the images that are asked for, encoded when they are."""

    def __init__(self, dataset: Artifact, flow: Artifact, config: EncodeConfig, device: str) -> None:
        from lsmix.glow.checkpoint import load_flow

        train = open_dataset(dataset).train
        self._images = train.images
        self._flow = load_flow(flow, device=device)
        self._config = config
        self.labels: npt.NDArray[np.int64] = train.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return latents, float32 (n, D)."""
        config = self._config
        # Noise is drawn by an image's number; without any, a batch may hold any images.
        parts = np.split(rows, len(rows)) if config.dequantise == "uniform" and len(rows) else [rows]
        return np.concatenate(
            [
                self._flow.encode(
                    np.array(self._images[part]),
                    dequantise=config.dequantise,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    first_index=int(part[0]) if len(part) else 0,
                )
                for part in parts
            ]
        )
