"""Rebuilding a pool from its plan, the flow and the base set that the receiver already has.

A rebuilt pool counts as the original only by its root digest, or by comparison with the original pixel by pixel.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lsmix.data.artifact import MANIFEST_NAME, Manifest, read_manifest
from lsmix.data.atomic import fsync_folder, sha256_file
from lsmix.data.dataset import DATASET_NAME
from lsmix.data.errors import CorruptError, DeviceMemoryError, FormatError, RecipeError
from lsmix.data.pool import POOL_NAME, open_pool
from lsmix.data.pool_spec import PLAN_NAME, PoolSpec, check_pool, read_spec
from lsmix.data.progress import NullProgress, Progress, graceful_signals
from lsmix.data.remote import local_folder, local_target
from lsmix.data.sharing.store import download_artifact, download_file, naming_urls, without_store
from lsmix.pipeline.engine.dask import make_executor
from lsmix.pipeline.engine.executor import Executor
from lsmix.pipeline.engine.runner import Built, bring_up_to_date
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.stages.encode import ENCODE
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.verify.compare import PoolComparison, compare_pools, same_kind_of_device
from lsmix.pipeline.verify.inputs import check_flow, provide_dataset
from lsmix.pipeline.workspace.local import Workspace
from lsmix.pipeline.workspace.remote import open_workspace

__all__ = ["RebuildResult", "rebuild"]

_NAME = "rebuilt"


@dataclass(frozen=True, kw_only=True)
class RebuildResult:
    """A pool that was made again."""

    folder: Path
    manifest: Manifest  # of the new pool
    expected: str  # root digest of the original; "" if it is not known
    comparison: PoolComparison | None  # with the original; None where it was not at hand, or not needed
    cached: bool  # whether the workspace had it already, so that nothing was made
    seconds: float

    @property
    def root(self) -> str:
        """Root digest of the new pool."""
        return self.manifest.root

    @property
    def equal(self) -> bool | None:
        """Whether it is the original, byte for byte; None if the original's digest is not known."""
        return self.root == self.expected if self.expected else None

    def to_dict(self) -> dict[str, Any]:
        """Return all results, ready for JSON."""
        return {
            "folder": str(self.folder),
            "root": self.root,
            "expected": self.expected or None,
            "equal": self.equal,
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
            "images": self.manifest.counts.get("images"),
            "comparison": self.comparison.to_dict() if self.comparison else None,
        }


class _Original(NamedTuple):
    """What is at hand of the pool that the plan belongs to."""

    manifest: Manifest | None
    pool: Path | None  # its folder, where its images are there too


@naming_urls()
def rebuild(
    plan: Path | str,
    *,
    data: Path | str,
    flow: Path | str | None = None,
    out: Path | str | None = None,
    workspace: Path | str = "runs",
    expect: str = "",
    compare: Path | str | None = None,
    device: str = "auto",
    workers: int = 0,
    scheduler: str = "",
    progress: Progress | None = None,
) -> RebuildResult:
    """Make a pool again from its plan: what ``lsmix rebuild`` does. After an interrupt, it continues where it stopped.

    Args:
        plan: plan.json, or the folder of a pool with one; a manifest beside it gives the expected digest. Here, and for
            ``data``, ``flow`` and ``compare``, a URL may be given; of the plan's pool only these two files are downloaded.
        data: the published files that the pool was made from, or "digits", or a data set that ingest made of them.
        flow: folder of the flow that the plan names; None for a pool mixed in pixel space.
        out: folder of the new pool, which must not exist; None leaves the pool in the workspace.
        workspace: where artifacts are found and made; with ``out``, a temporary hidden folder beside it is used instead.
        expect: root digest of the original, or its first 12 digits or more; "" takes that of the manifest.
        compare: folder of the original pool, to compare pixels; None compares, if needed, with the one that holds the plan.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: make shards in this many Dask workers on this machine; 0 in this process.
        scheduler: make shards on the Dask cluster at this address.
        progress: optional progress reporter.

    Raises:
        RecipeError: data set or flow are not those of the plan, or there is something at ``out`` already.
        FormatError: the plan is of a version that this lsmix does not read or mix.
        CorruptError: the result is another pool: its root digest is not the expected one, and either there is no original
            to compare with, or pixels differ by more than another kind of device explains, or anything else differs.
        LsmixError: any error of a stage.
    """
    begun = time.monotonic()
    progress = progress or NullProgress()
    target = local_target(out, "a rebuilt pool") if out is not None else None
    plan = local_folder(plan) or download_file(str(plan), PLAN_NAME, progress)
    data = _fetched(data, progress)
    flow, compare = (None if place is None else _fetched(place, progress) for place in (flow, compare))
    content = read_spec(plan)
    original = _original(plan, compare)
    _check_version(content, plan, original)
    check_pool(content.pool)
    expected, flow = _expected(expect, original), _flow_of(content, flow)
    place = open_workspace(_scratch(target) if target else workspace)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    with graceful_signals(), executor:
        dataset = provide_dataset(Path(data), content.origin, place, progress)
        nodes = _nodes(content, dataset, flow, original.manifest.name if original.manifest else _NAME)
        made = _run(nodes, content, place, executor, progress, device)
    if original.pool and made.folder.resolve() == original.pool.resolve():
        raise RecipeError(
            f"{str(made.folder)!r} is the original itself, which the workspace has already: nothing was made again. "
            "Give '--out', or another '--workspace'."
        )
    folder = made.folder
    if target:
        folder = folder.replace(target)
        fsync_folder(target.absolute().parent)
        shutil.rmtree(place.root)
    if expected and made.manifest.root.startswith(expected):
        expected = made.manifest.root  # of which the beginning was given
    comparison = None
    if original.pool and (compare is not None or made.manifest.root != expected):
        comparison = compare_pools(open_pool(folder), open_pool(original.pool))
    result = RebuildResult(
        folder=folder,
        manifest=made.manifest,
        expected=expected,
        comparison=comparison,
        cached=made.cached,
        seconds=time.monotonic() - begun,
    )
    _check_result(result, content, original)
    return result


def _fetched(place: Path | str, progress: Progress) -> Path:
    return download_artifact(without_store(without_store(place, DATASET_NAME), POOL_NAME), progress)


def _check_version(spec: PoolSpec, plan: Path, original: _Original) -> None:
    """Raise FormatError unless this lsmix mixes as the one that made the pool."""
    if spec.stage_version != MIX.version:
        versions = original.manifest.environment.get("versions") if original.manifest else None
        made_with = f" (lsmix {versions.get('lsmix')})" if isinstance(versions, dict) else ""
        age = "a newer" if spec.stage_version > MIX.version else "the older"
        raise FormatError(
            f"the pool of plan {str(plan)!r}{made_with} was made by version {spec.stage_version} of stage 'mix'; this lsmix has version {MIX.version}, which "
            f"gives other bytes. Use {age} lsmix (a pool's {MANIFEST_NAME} lists the versions that made it)."
        )


def _original(plan: Path, compare: Path | str | None) -> _Original:
    """Return what is available of the original: the pool that was named, else what is beside the plan."""
    home = plan if plan.is_dir() else plan.parent
    folder = Path(compare) if compare is not None else home
    manifest = None
    if compare is not None or (folder / MANIFEST_NAME).is_file():
        manifest = read_manifest(folder)
        if manifest.stage != MIX.name:
            raise RecipeError(f"{str(folder)!r} is no pool but the result of stage {manifest.stage!r}. Name a pool.")
        planned = {file.path: file.sha256 for file in manifest.files}.get(PLAN_NAME)
        if planned != sha256_file(home / PLAN_NAME if plan.is_dir() else plan):
            if compare is None:
                raise CorruptError(
                    f"{str(plan)!r} is not the plan of the pool that it is in: its sha256 is not the listed one."
                )
            manifest = None if planned is None else manifest
    return _Original(manifest, folder if (folder / POOL_NAME).is_dir() else None)


def _expected(expect: str, original: _Original) -> str:
    """Return the root digest that must come out, or ""."""
    expect = expect.strip().lower().removesuffix("…")
    if not expect:
        return original.manifest.root if original.manifest else ""
    if not 12 <= len(expect) <= 64 or set(expect) - set("0123456789abcdef"):
        raise RecipeError(f"{expect!r} is no root digest: expected 64 hex digits, or 12 or more to begin with.")
    return expect


def _flow_of(plan: PoolSpec, flow: Path | str | None) -> Path | None:
    if flow is not None:
        check_flow(Path(flow), plan)
        return Path(flow)
    if plan.latent:
        raise RecipeError(
            f"the plan mixes latents of the flow {plan.inputs['flow'][:12]}…: name that flow's folder with '--flow'."
        )
    return None


def _nodes(plan: PoolSpec, dataset: Path, flow: Path | None, name: str) -> list[Node]:
    if plan.latents is None or flow is None:
        return [Node(stage=MIX, name=name, config=plan.pool, inputs={"dataset": dataset})]
    latents = Node(stage=ENCODE, name=name, config=plan.latents, inputs={"dataset": dataset, "flow": flow})
    return [latents, Node(stage=MIX, name=name, config=plan.pool, inputs={"latents": latents, "flow": flow})]


def _run(
    nodes: list[Node], plan: PoolSpec, place: Workspace, executor: Executor, progress: Progress, device: str
) -> Built:
    """Make the nodes; return the last one, the pool."""
    try:
        built = bring_up_to_date(nodes, place, executor=executor, progress=progress, device=device)
    except DeviceMemoryError as error:
        raise DeviceMemoryError(
            f"{error} But a rebuild keeps the batch of its plan, since another would make another pool: take a device with "
            "more memory."
        ) from error
    for item in built:
        if item.stage == ENCODE.name and item.manifest.root != plan.inputs["latents"]:
            progress.warning(
                f"the latents came out with root digest {item.manifest.root[:12]}…, not {plan.inputs['latents'][:12]}… as "
                "in the plan: another kind of device or version of torch rounds differently. So will the pool's digest."
            )
    return built[-1]


def _scratch(out: Path) -> Path:
    """Return where a pool for ``out`` is made, so that it appears there whole or not at all."""
    if os.path.lexists(out):
        raise RecipeError(f"there is something at {str(out)!r} already. Remove it, or choose another '--out'.")
    if not out.absolute().parent.is_dir():
        raise RecipeError(
            f"there is no folder {str(out.parent)!r} to put the pool into. Make it, or choose another '--out'."
        )
    scratch = out.parent / f".{out.name}.rebuild"
    if scratch.is_symlink() or (scratch.exists() and not scratch.is_dir()):
        raise RecipeError(f"{str(scratch)!r} is in the way: it is not a folder that lsmix made. Rename or remove it.")
    return scratch


def _check_result(result: RebuildResult, plan: PoolSpec, original: _Original) -> None:
    """Raise CorruptError if the new pool is known to differ from the original."""
    if result.equal and result.comparison is None:
        return
    source = original.manifest or (open_pool(original.pool).manifest if original.pool else None)
    before = source.environment if source else {}
    exact = not plan.latent or same_kind_of_device(result.manifest.environment, before)
    if result.comparison:
        if not result.comparison.within(0 if exact else 1):
            raise CorruptError(
                f"{str(result.folder)!r} is not the original {str(original.pool)!r}, although made on "
                f"{'the same' if exact else 'another'} kind of device: {result.comparison.text()}."
            )
        return
    if result.expected:
        why = "" if exact or not before else " It was made on another kind of device, so pixels may differ by 1."
        raise CorruptError(
            f"{str(result.folder)!r} is not the original: its root digest is {result.root[:12]}…, expected "
            f"{result.expected[:12]}….{why} Name the original pool with '--compare' to see how they differ."
        )
