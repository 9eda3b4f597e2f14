"""Verify an artifact: every byte against its manifest, and every row of a pool against its plan.

The deep check of a pool recomputes a sample of its rows with the code of the mix stage and compares them.
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

_ROWS = 256  # recomputed at a time
_STRAYS = "added files: URLs are not searched for files that the manifest does not list, and such files are never read"
_PIXELS = "pixels: use --deep to recompute a sample of them"


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
    """Check every byte of an artifact against its manifest, and every row of a pool against its plan.

    For latents and pools, it also checks that zarr-python reads the same values.

    Args:
        artifact: Folder or URL of the artifact; from a URL, every byte is downloaded again.
        deep: For pools: recompute a sample of rows and compare every pixel.
        sample: Number of rows in this sample, at least 1.
        seed: Seed that selects the rows.
        data: The base set: published files, "digits", or the folder or URL of a data set that the ingest stage built.
            None searches the pool's workspace.
        flow: Folder or URL of the flow; None searches the pool's workspace.
        device: Device for recomputing rows: "auto", "cpu", "cuda" or "cuda:N".
        progress: Optional progress reporter.

    Returns:
        Identity and size of the artifact; ``edited``, descriptions that differ from the manifest, which owners may
        edit; ``ignored``, files added by file managers and hubs. For pools also ``checked`` and ``unchecked``, lists
        of sentences, and ``deep``. Artifacts at a URL also have ``unchecked``.

    Raises:
        MissingError: The artifact does not exist or is incomplete, or a deep check lacks the data set or the flow.
        RecipeError: The pool was not built from ``data`` or ``flow``, or has no plan.
        FormatError: This version of lsmix does not read the format of the artifact.
        CorruptError: The artifact is damaged. The message names the first bad file, or row and value.
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
                f"{opened.location!r} is the result of stage {manifest.stage!r}; these options apply to pools only."
            )
        if sample < 1:
            raise RecipeError(f"the sample must have at least 1 row, got {sample}.")
        summary: dict[str, Any] = {
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
            summary |= _verify_pool(opened, data, flow, how, progress)
    return {**summary, "unchecked": [*summary.get("unchecked", ()), _STRAYS]} if url else summary


def _verify_pool(
    artifact: Artifact, data: Path | str | None, flow: Path | str | None, deep: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Check a pool against zarr-python and its plan; if ``deep`` contains options, also recompute a sample of rows."""
    pool = open_pool(artifact)
    pool.columns.check_against_zarr()
    plan = plan_of_pool(pool)
    if isinstance(plan, str):
        if deep or data or flow:
            raise RecipeError(f"pool {pool.location!r} cannot be compared with its inputs. {plan}.")
        result = check_rows(pool, plan)
        return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS], "deep": None}
    with tempfile.TemporaryDirectory(prefix="lsmix-verify-") as scratch:
        base = find_base(artifact.folder, plan, data=data, flow=flow, scratch=Path(scratch), progress=progress)
        result = check_rows(pool, plan, *base.labels())
        if not deep:
            return {"checked": result.checked, "unchecked": [*result.unchecked, _PIXELS], "deep": None}
        recomputed = _check_deep(pool, plan, base, **deep, progress=progress)
        return {"checked": result.checked, "unchecked": result.unchecked, "deep": recomputed}


def _check_deep(
    pool: Pool, plan: PoolSpec, base: PoolInputs, *, sample: int, seed: int, device: str, progress: Progress
) -> dict[str, Any]:
    """Recompute ``sample`` rows of a pool, selected by ``seed``, and compare every column and pixel.

    Returns:
        ``rows``, the number of recomputed rows; ``same_device``, whether bytes must be equal; ``redrawn_otherwise``,
        the number of rows at the limit of a failed decode that were redrawn only here or only originally; and the
        comparison.

    Raises:
        MissingError: The data set or the flow was not found.
        CorruptError: A row differs. The message names it.
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
        with device_memory(label, device):  # the plan fixes the batch size
            recomputed = builder.build(builder.load(some))
        stored = {name: column.gather(some) for name, column in pool.columns.items()}
        same = np.ones(len(some), bool) if exact else recomputed["status"] == stored["status"]
        otherwise += int((~same).sum())
        comparison.add(some[same], *({name: table[name][same] for name in stored} for table in (stored, recomputed)))
        if not comparison.within(0 if exact else 1):
            kind = "the same kind of device" if exact else "another kind of device, which changes pixels by at most 1"
            raise CorruptError(
                f"pool {pool.location!r} does not match its plan: recomputed on {kind}, {comparison.text()}. "
                "Download or rebuild it."
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
        else _OnDemandLatents(require(base.dataset, "data set", "--data"), flow, plan.latents, device)
    )
    return PoolBuilder(plan.pool, source, load_flow(flow, device=device))


class _OnDemandLatents:
    """Latents that are encoded on demand."""

    def __init__(self, dataset: Artifact, flow: Artifact, config: EncodeConfig, device: str) -> None:
        from lsmix.glow.checkpoint import load_flow

        train = open_dataset(dataset).train
        self._images = train.images
        self._flow = load_flow(flow, device=device)
        self._config = config
        self.labels: npt.NDArray[np.int64] = train.labels

    def gather(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Encode some training images; return latents, float32 (n, D)."""
        config = self._config
        # Uniform noise depends on the image's row; without noise, any rows can share a batch.
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
