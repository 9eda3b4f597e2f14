"""Rebuilding a pool from its plan, the flow and the base set that the receiver already has.

A rebuilt pool counts as the original only by its content digest, or by comparison with the original pixel by pixel.
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
_WORK = "work"  # the workspace beside the new pool, while it is made


@dataclass(frozen=True, kw_only=True)
class RebuildResult:
    """A pool that was made again."""

    folder: Path
    content_digest: str  # of the new pool
    expected: str  # content digest of the original; "" if it is not known
    equal: bool | None  # whether it is the original, byte for byte; None if the original's digest is not known
    cached: bool  # whether the workspace had it already, so that nothing was made
    seconds: float
    images: int
    comparison: PoolComparison | None  # with the original; None where it was not at hand, or not needed

    def to_dict(self) -> dict[str, Any]:
        """Return all results, ready for JSON."""
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
    """Make a pool again from its plan: what ``lsmix rebuild`` does. After an interrupt, it continues where it stopped.

    Args:
        plan: plan.json, or the folder of a pool with one; a manifest beside it gives the expected digest. Here, and for
            ``data``, ``flow`` and ``compare``, a URL may be given; of the plan's pool only these two files are downloaded.
        data: the published files that the pool was made from, or "digits", or a data set that ingest made of them.
        flow: folder of the flow that the plan names; None for a pool mixed in pixel space.
        out: folder of the new pool, which must not exist or be empty; None leaves the pool in the workspace.
        workspace: where artifacts are found and made; with ``out``, a temporary folder beside it, "OUT.part", instead.
        expect: content digest of the original, or its first 12 digits or more; "" takes that of the manifest.
        compare: folder of the original pool, to compare pixels; None compares, if needed, with the one that holds the plan.
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: make shards in this many Dask workers on this machine; 0 in this process.
        scheduler: make shards on the Dask cluster at this address.
        progress: optional progress reporter.

    Raises:
        RecipeError: data set or flow are not those of the plan, or there is something at ``out`` already.
        MissingError: there is no folder to put ``out`` in.
        LockedError: another process makes ``out``.
        FormatError: the plan is of a version that this lsmix does not read or mix.
        CorruptError: the result is another pool: its content digest is not the expected one, and either there is no original
            to compare with, or pixels differ by more than another kind of device explains, or anything else differs.
        LsmixError: any error of a stage.
    """
    begun = time.monotonic()
    progress = progress or NullProgress()
    target = local_target(out, "a rebuilt pool") if out is not None else None
    text, where, beside = _open_plan(plan)
    content = parse_spec(text, where)
    original = beside if compare is None else open_artifact(compare)
    if original:
        _check_original(original, text, where if compare is None else "")
    _check_version(content, where, original)
    check_pool(content.pool)
    expected, opened = _expected(expect, original), _flow_of(content, flow)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    with ExitStack() as stack:
        part = stack.enter_context(atomic_folder(target, resume=True)) if target else None
        place = Workspace(part.with_name(_WORK) if part else workspace)
        stack.enter_context(graceful_signals())
        stack.enter_context(executor)
        dataset = provide_dataset(data, content.origin, place, progress)
        nodes = _nodes(content, dataset, opened, original.manifest.name if original else _NAME)
        made = _run(nodes, content, place, executor, progress, device, original)
        if part:
            shutil.rmtree(part)
            made.folder.replace(part)
    folder = target or made.folder
    digest = made.manifest.content_digest
    if expected and digest.startswith(expected):
        expected = digest  # of which the beginning was given
    needed = compare is not None or digest != expected
    result = RebuildResult(
        folder=folder,
        content_digest=digest,
        expected=expected,
        equal=digest == expected if expected else None,
        cached=made.cached,
        seconds=round(time.monotonic() - begun, 3),
        images=made.manifest.counts["images"],
        comparison=_compare(folder, original) if original and needed else None,
    )
    _check_result(result, made.manifest.environment, content, original)
    return result


def _open_plan(place: Path | str) -> tuple[bytes, str, Artifact | None]:
    """Return the content and the location of a plan, and the artifact that it is in, if there is a manifest beside it.

    ``place`` is the folder or the URL of a pool, or a plan.json.
    """
    path = local_folder(place)
    if path is not None:
        home = path if path.is_dir() else path.parent
        file = path / PLAN_NAME if path.is_dir() else path
        if not file.is_file():
            raise MissingError(f"no plan at {str(file)!r}: there is no such file. Name a pool's {PLAN_NAME}.")
        beside = Artifact(folder=home, manifest=read_manifest(home)) if (home / MANIFEST_NAME).is_file() else None
        with file.open("rb") as stream:
            return stream.read(MOST_SPEC_BYTES + 1), str(file), beside
    url, name = trim_location(str(place)), PLAN_NAME
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
    """Compare a pool with the original; None where only the plan and the manifest of that are at hand."""
    if original.is_local and not (original.folder / POOL_NAME).is_dir():
        return None
    return compare_pools(open_pool(folder), open_pool(original.location))


def _check_original(pool: Artifact, plan: bytes, where: str) -> None:
    """Check that the original is a pool, and, if ``where`` names a plan that is in it, that the plan is listed."""
    if pool.manifest.stage != MIX.name:
        raise RecipeError(f"{pool.location!r} is no pool but the result of stage {pool.manifest.stage!r}. Name a pool.")
    listed = pool.records.get(PLAN_NAME)
    if where and not (listed and listed.sha256 == hashlib.sha256(plan).hexdigest()):
        raise CorruptError(f"{where!r} is not the plan of its pool: its sha256 is not the one in {MANIFEST_NAME}.")


def _check_version(spec: PoolSpec, plan: str, original: Artifact | None) -> None:
    """Raise FormatError unless this lsmix mixes as the one that made the pool."""
    if spec.stage_version != MIX.version:
        versions = original.manifest.environment.get("versions") if original else None
        made_with = f" (lsmix {versions.get('lsmix')})" if isinstance(versions, dict) else ""
        age = "a newer" if spec.stage_version > MIX.version else "the older"
        raise FormatError(
            f"the pool of plan {plan!r}{made_with} was made by version {spec.stage_version} of stage 'mix'; this lsmix has version {MIX.version}, which "
            f"gives other bytes. Use {age} lsmix (a pool's {MANIFEST_NAME} lists the versions that made it)."
        )


def _expected(expect: str, original: Artifact | None) -> str:
    """Return the content digest that must come out, or ""."""
    expect = expect.strip().lower().removesuffix("…")
    if not expect:
        return original.manifest.content_digest if original and PLAN_NAME in original.records else ""
    if not 12 <= len(expect) <= 64 or set(expect) - set("0123456789abcdef"):
        raise RecipeError(f"{expect!r} is no content digest: expected 64 hex digits, or 12 or more to begin with.")
    return expect


def _flow_of(plan: PoolSpec, flow: Path | str | None) -> Artifact | None:
    if flow is not None:
        return check_flow(flow, plan)
    found = shipped_flow(plan.inputs.get("flow"))
    if plan.latent and not found:
        raise RecipeError(
            f"the plan mixes latents of the flow {plan.inputs['flow'][:12]}…: name that flow's folder with '--flow'."
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
    place: Workspace,
    executor: Executor,
    progress: Progress,
    device: str,
    original: Artifact | None,
) -> Built:
    """Make the nodes; return the last one, the pool, which is not the original itself."""
    try:
        built = bring_up_to_date(nodes, place, executor=executor, progress=progress, device=device)
    except DeviceMemoryError as error:
        raise DeviceMemoryError(
            f"{error} But a rebuild keeps the batch of its plan, since another would make another pool: take a device with "
            "more memory."
        ) from error
    for item in built:
        if item.stage == ENCODE.name and item.manifest.content_digest != plan.inputs["latents"]:
            progress.warning(
                f"the latents came out with content digest {item.manifest.content_digest[:12]}…, not {plan.inputs['latents'][:12]}… as "
                "in the plan: another kind of device or version of torch rounds differently. So will the pool's digest."
            )
    made = built[-1]
    if original and _resolved(made.artifact) == _resolved(original):
        raise RecipeError(
            f"{made.location!r} is the original itself, which the workspace has already: nothing was made again. "
            "Give '--out', or another '--workspace'."
        )
    return made


def _check_result(
    result: RebuildResult, environment: Mapping[str, Any], plan: PoolSpec, original: Artifact | None
) -> None:
    """Raise CorruptError if the new pool is known to differ from the original."""
    if result.equal and result.comparison is None:
        return
    before = original.manifest.environment if original else {}
    exact = not plan.latent or same_kind_of_device(environment, before)
    if original and result.comparison:
        if not result.comparison.within(0 if exact else 1):
            raise CorruptError(
                f"{str(result.folder)!r} is not the original {original.location!r}, although made on "
                f"{'the same' if exact else 'another'} kind of device: {result.comparison.text()}."
            )
    elif result.expected:
        why = "" if exact or not before else " It was made on another kind of device, so pixels may differ by 1."
        raise CorruptError(
            f"{str(result.folder)!r} is not the original: its content digest is {result.content_digest[:12]}…, expected "
            f"{result.expected[:12]}….{why} Name the original pool with '--compare' to see how they differ."
        )
