"""Rebuild a pool from its plan, its flow and its base set.

A rebuilt pool counts as equal to the original only if its content digest matches, or after a pixel-by-pixel comparison.
"""

import hashlib
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lsmix.data.artifact import MANIFEST_NAME, Artifact, read_manifest
from lsmix.data.atomic import atomic_folder
from lsmix.data.errors import CorruptError, DeviceMemoryError, FormatError, MissingError, RecipeError
from lsmix.data.pool import POOL_NAME, open_pool
from lsmix.data.pool_spec import MOST_SPEC_BYTES, PLAN_NAME, PoolSpec, check_pool, parse_spec
from lsmix.data.progress import NullProgress, Progress, graceful_signals
from lsmix.data.remote import open_remote
from lsmix.data.store import local_folder, local_target, open_artifact, shipped_flow, trim_location
from lsmix.pipeline.engine.dask import make_executor
from lsmix.pipeline.engine.runner import Built, bring_up_to_date
from lsmix.pipeline.engine.shards import Executor
from lsmix.pipeline.engine.stage import Node
from lsmix.pipeline.stages.encode import ENCODE
from lsmix.pipeline.stages.mix import MIX
from lsmix.pipeline.verify.compare import PoolComparison, compare_pools, same_kind_of_device
from lsmix.pipeline.verify.inputs import check_flow, provide_dataset
from lsmix.pipeline.workspace.workspace import Workspace

__all__ = ["RebuildResult", "rebuild"]

_NAME = "rebuilt"
_WORK = "work"  # temporary workspace next to the new pool


@dataclass(frozen=True, kw_only=True)
class RebuildResult:
    """A rebuilt pool."""

    folder: Path
    content_digest: str  # of the rebuilt pool
    expected: str  # content digest of the original; "" if unknown
    equal: bool | None  # whether the content digests are equal; None if the original's is unknown
    cached: bool  # whether the pool already existed in the workspace
    seconds: float
    images: int
    comparison: PoolComparison | None  # with the original; None if unavailable or not needed

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary for JSON."""
        return {**asdict(self), "folder": str(self.folder), "expected": self.expected or None}


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
    """Rebuild a pool from its plan, or resume an interrupted rebuild. All inputs may be URLs.

    Args:
        plan: plan.json or the folder of a pool. A manifest next to the plan provides the expected digest. From a URL,
            only these two files are downloaded.
        data: Published files that the pool was built from, "digits", or an ingested data set.
        flow: Folder of the flow that the plan names; None for a pool in pixel space.
        out: Folder for the new pool; it must be empty or not exist. None leaves the pool in the workspace.
        workspace: Folder for artifacts. With ``out``, a temporary folder next to it, "OUT.part", is used instead.
        expect: Content digest of the original, or at least its first 12 digits; "" uses the digest in the manifest.
        compare: Folder of the original pool, to compare pixels. None uses the plan's pool, if necessary.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: Number of local Dask workers that build shards; 0 builds them in this process.
        scheduler: Address of a Dask cluster that builds shards.
        progress: Optional progress reporter.

    Raises:
        RecipeError: The data set or the flow does not match the plan, or ``out`` already exists.
        MissingError: The parent folder of ``out`` does not exist.
        LockedError: Another process is building ``out``.
        FormatError: This version of lsmix does not support the version of the plan.
        CorruptError: The content digest differs from the expected one, and there is no original to compare with, pixels
            differ by more than another kind of device can cause, or other columns differ.
        LsmixError: Any error of a stage.
    """
    started = time.monotonic()
    progress = progress or NullProgress()
    target = local_target(out, "a rebuilt pool") if out is not None else None
    text, where, containing = _open_plan(plan)
    content = parse_spec(text, where)
    original = containing if compare is None else open_artifact(compare)
    if original:
        _check_original(original, text, where if compare is None else "")
    _check_version(content, where, original)
    check_pool(content.pool)
    expected, opened = _expected(expect, original), _flow_of(content, flow)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    with ExitStack() as stack:
        part = stack.enter_context(atomic_folder(target, resume=True)) if target else None
        target_workspace = Workspace(part.with_name(_WORK) if part else workspace)
        stack.enter_context(graceful_signals())
        stack.enter_context(executor)
        dataset = provide_dataset(data, content.origin, target_workspace, progress)
        nodes = _nodes(content, dataset, opened, original.manifest.name if original else _NAME)
        built = _run(nodes, content, target_workspace, executor, progress, device, original)
        if part:
            shutil.rmtree(part)
            built.folder.replace(part)
    folder = target or built.folder
    digest = built.manifest.content_digest
    if expected and digest.startswith(expected):
        expected = digest  # only its first digits may have been given
    needed = compare is not None or digest != expected
    result = RebuildResult(
        folder=folder,
        content_digest=digest,
        expected=expected,
        equal=digest == expected if expected else None,
        cached=built.cached,
        seconds=round(time.monotonic() - started, 3),
        images=built.manifest.counts["images"],
        comparison=_compare(folder, original) if original and needed else None,
    )
    _check_result(result, built.manifest.environment, content, original)
    return result


def _open_plan(location: Path | str) -> tuple[bytes, str, Artifact | None]:
    """Return the content and the location of a plan, and the pool that contains it, if it is next to a manifest.

    ``location`` is the folder or URL of a pool or of a plan.json.
    """
    path = local_folder(location)
    if path is not None:
        home = path if path.is_dir() else path.parent
        file = path / PLAN_NAME if path.is_dir() else path
        if not file.is_file():
            raise MissingError(f"{str(file)!r} does not exist. Name the {PLAN_NAME} of a pool.")
        pool = Artifact(folder=home, manifest=read_manifest(home)) if (home / MANIFEST_NAME).is_file() else None
        with file.open("rb") as stream:
            return stream.read(MOST_SPEC_BYTES + 1), str(file), pool
    url, name = trim_location(str(location)), PLAN_NAME
    if url.endswith(".json"):
        url, _, name = url.rpartition("/")
    try:
        artifact = open_artifact(url)
    except MissingError:
        remote = open_remote(url)
        return remote.read(name, MOST_SPEC_BYTES), f"{remote.url}/{name}", None
    with artifact.open(name) as stream:
        return stream.read(MOST_SPEC_BYTES + 1), artifact.where(name), artifact


def _resolved(artifact: Artifact) -> str:
    return str(artifact.folder.resolve()) if artifact.is_local else artifact.location


def _compare(folder: Path, original: Artifact) -> PoolComparison | None:
    """Compare a pool with the original; return None if only the plan and manifest of the original are available."""
    if original.is_local and not (original.folder / POOL_NAME).is_dir():
        return None
    return compare_pools(open_pool(folder), open_pool(original.location))


def _check_original(pool: Artifact, plan: bytes, where: str) -> None:
    """Check that the original is a pool and, if ``where`` is not empty, that its manifest lists this plan."""
    if pool.manifest.stage != MIX.name:
        raise RecipeError(f"{pool.location!r} is the result of stage {pool.manifest.stage!r}, not a pool. Name a pool.")
    listed = pool.records.get(PLAN_NAME)
    if where and not (listed and listed.sha256 == hashlib.sha256(plan).hexdigest()):
        raise CorruptError(f"{where!r} was altered: its SHA-256 is not in {MANIFEST_NAME}. Download the pool again.")


def _check_version(spec: PoolSpec, plan: str, original: Artifact | None) -> None:
    """Raise FormatError if this version of lsmix mixes differently from the version that built the pool."""
    if spec.stage_version != MIX.version:
        versions = original.manifest.environment.get("versions") if original else None
        built_with = f" (lsmix {versions.get('lsmix')})" if isinstance(versions, dict) else ""
        age = "a newer" if spec.stage_version > MIX.version else "an older"
        raise FormatError(
            f"the pool of plan {plan!r}{built_with} was built by version {spec.stage_version} of stage 'mix'; this lsmix has "
            f"version {MIX.version}. Use {age} lsmix; the pool's {MANIFEST_NAME} lists the versions that built it."
        )


def _expected(expect: str, original: Artifact | None) -> str:
    """Return the expected content digest, or "" if it is unknown."""
    expect = expect.strip().lower().removesuffix("…")
    if not expect:
        return original.manifest.content_digest if original and PLAN_NAME in original.records else ""
    if not 12 <= len(expect) <= 64 or set(expect) - set("0123456789abcdef"):
        raise RecipeError(f"{expect!r} is not a content digest: expected 64 hex digits or at least the first 12.")
    return expect


def _flow_of(plan: PoolSpec, flow: Path | str | None) -> Artifact | None:
    if flow is not None:
        return check_flow(flow, plan)
    found = shipped_flow(plan.inputs.get("flow"))
    if plan.latent and not found:
        raise RecipeError(
            f"the plan needs the flow with content digest {plan.inputs['flow'][:12]}…. Name its folder with '--flow'."
        )
    return found


def _nodes(plan: PoolSpec, dataset: Artifact, flow: Artifact | None, name: str) -> list[Node]:
    if plan.latents is None or flow is None:
        return [Node(stage=MIX, name=name, config=plan.pool, inputs={"dataset": dataset})]
    latents = Node(stage=ENCODE, name=name, config=plan.latents, inputs={"dataset": dataset, "flow": flow})
    return [latents, Node(stage=MIX, name=name, config=plan.pool, inputs={"latents": latents, "flow": flow})]


def _run(
    nodes: list[Node],
    plan: PoolSpec,
    workspace: Workspace,
    executor: Executor,
    progress: Progress,
    device: str,
    original: Artifact | None,
) -> Built:
    """Build the nodes and return the pool, the last one; reject a pool that is the original itself."""
    try:
        built = bring_up_to_date(nodes, workspace, executor=executor, progress=progress, device=device)
    except DeviceMemoryError as error:
        raise DeviceMemoryError(
            f"{error} However, another batch size would change the pool. Use a device with more memory."
        ) from error
    for item in built:
        if item.stage == ENCODE.name and item.manifest.content_digest != plan.inputs["latents"]:
            progress.warning(
                f"the latents have content digest {item.manifest.content_digest[:12]}…, expected "
                f"{plan.inputs['latents'][:12]}…: another device or version of torch rounds differently. The pool will differ, too."
            )
    pool = built[-1]
    if original and _resolved(pool.artifact) == _resolved(original):
        raise RecipeError(
            f"{pool.location!r} is the original itself, which is already in the workspace, so nothing was rebuilt. "
            "Set '--out' or another '--workspace'."
        )
    return pool


def _check_result(
    result: RebuildResult, environment: Mapping[str, Any], plan: PoolSpec, original: Artifact | None
) -> None:
    """Raise CorruptError if the rebuilt pool is known to differ from the original."""
    if result.equal and result.comparison is None:
        return
    before = original.manifest.environment if original else {}
    exact = not plan.latent or same_kind_of_device(environment, before)
    if original and result.comparison:
        if not result.comparison.within(0 if exact else 1):
            how = " despite the same kind of device" if exact else " by more than another kind of device can cause"
            raise CorruptError(
                f"{str(result.folder)!r} differs from the original {original.location!r}{how}: {result.comparison.text()}."
            )
    elif result.expected:
        why = "" if exact or not before else " It was built on another kind of device, so pixels may differ by 1."
        raise CorruptError(
            f"{str(result.folder)!r} differs from the original: its content digest is {result.content_digest[:12]}…, "
            f"expected {result.expected[:12]}….{why} Name the original pool with '--compare' to list the differences."
        )
