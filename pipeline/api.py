"""What the command line and the root package both call: run a recipe; verify, push and pull an artifact."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lsmix.data.artifact import Artifact, read_manifest, verify_files
from lsmix.data.atomic import check_replaceable, write_atomic
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import MissingError, RecipeError
from lsmix.data.latents import open_latents
from lsmix.data.mixing import LATENT_METHODS
from lsmix.data.pool_spec import PLAN_NAME
from lsmix.data.progress import NullProgress, Progress, graceful_signals
from lsmix.data.sharing.descriptions import edited_descriptions
from lsmix.data.sharing.transfer import Transfer, pull_artifact, push_artifact, temporary_copy
from lsmix.data.store import local_folder, local_target, open_artifact, trim_location
from lsmix.pipeline.config.recipe import Recipe, read_recipe
from lsmix.pipeline.engine import array_task
from lsmix.pipeline.engine.array_task import ArrayTaskResult, check_array_task, finalize_array
from lsmix.pipeline.engine.dask import make_executor
from lsmix.pipeline.engine.device import prepare_device, resolve_device
from lsmix.pipeline.engine.run_log import logged
from lsmix.pipeline.engine.runner import bring_up_to_date
from lsmix.pipeline.engine.stage import Node, upto
from lsmix.pipeline.run_result import RunResult
from lsmix.pipeline.stages.graph import build_graph
from lsmix.pipeline.stages.ingest import fetch_source
from lsmix.pipeline.stages.registry import STAGE_COMMANDS
from lsmix.pipeline.workspace.local import Workspace
from lsmix.pipeline.workspace.remote import open_workspace

if TYPE_CHECKING:
    from lsmix.pipeline.views.figures import PaperFigure

__all__ = ["figure", "finalize", "plan", "pull", "push", "run", "run_array_task", "verify"]

_STRAYS = "files that were added: a URL is not searched for what is not listed, and nothing of it is read"


def plan(
    recipe: Path | str,
    *,
    workspace: Path | str = "runs",
    stage: str = "",
    overrides: Sequence[str] = (),
    scale: str = "",
) -> tuple[Recipe, list[Node], Workspace]:
    """Return a recipe, its nodes up to a stage ("" for all), and the workspace; nothing is made."""
    content = read_recipe(recipe, overrides, scale)
    place = open_workspace(workspace)
    nodes = build_graph(content, place)
    wanted = upto(nodes, stage) if stage else nodes
    if not wanted and stage in STAGE_COMMANDS:
        raise RecipeError(
            f"recipe {str(recipe)!r} has no {STAGE_COMMANDS[stage].section}, which the stage {stage!r} needs. Add one."
        )
    return content, wanted, place


def run(
    recipe: Path | str,
    *,
    workspace: Path | str = "runs",
    stage: str = "",
    overrides: Sequence[str] = (),
    scale: str = "",
    workers: int = 0,
    scheduler: str = "",
    device: str = "auto",
    force: str = "",
    download: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Bring a recipe up to date: what ``lsmix run`` does.

    Args:
        recipe: the TOML file.
        workspace: folder of the artifacts; made if need be.
        stage: go no further than this stage; "" for all.
        overrides: "section.key=value" each, over what the recipe says.
        scale: name of one of the recipe's sections ``[scale.NAME]``, whose fields go over the others; "" for none.
        workers: make shards in this many Dask workers on this machine; 0 in this process.
        scheduler: make shards on the Dask cluster at this address.
        device: "auto", "cpu", "cuda" or "cuda:N".
        force: name of a stage to make again although it is up to date.
        download: fetch what ``data.download`` names first, where it is not there yet.
        progress: optional progress reporter.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    progress = progress or NullProgress()
    content, nodes, place = plan(recipe, workspace=workspace, stage=stage, overrides=overrides, scale=scale)
    if download:  # before anything is hashed; and an interrupt may stop it anywhere, since what came is kept
        fetch_source(content.data, progress)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    asked = {"recipe": str(recipe), "stage": stage, "overrides": list(overrides), "scale": scale, "device": device}
    where = {"workers": workers, "scheduler": scheduler}
    with (
        logged(progress, place.root, "run", **asked, **where, force=force) as log,
        graceful_signals(log.interrupted),
        executor,
    ):
        built = bring_up_to_date(nodes, place, executor=executor, progress=log, device=device, force=force)
    return RunResult(recipe=content, built=built)


def run_array_task(
    recipe: Path | str,
    stage: str,
    index: int,
    size: int,
    *,
    workspace: Path | str = "runs",
    overrides: Sequence[str] = (),
    scale: str = "",
    workers: int = 0,
    scheduler: str = "",
    device: str = "auto",
    progress: Progress | None = None,
) -> list[ArrayTaskResult]:
    """Make the shards of one task of a job array: ``lsmix encode`` and ``lsmix mix`` with ``--array-index``.

    Tasks run in any number of processes, on any machines that share the workspace; then ``finalize`` completes the artifact.

    Args:
        recipe: the TOML file.
        stage: "encode" or "mix"; what it needs must be there.
        index: of this task, from 0.
        size: tasks in the array.
        workspace: folder of the artifacts, shared by all tasks.
        overrides: "section.key=value" each, over what the recipe says.
        scale: name of the recipe's sizes to take; "" for none.
        workers: make the shards in this many Dask workers on this machine; 0 in this process.
        scheduler: make the shards on the Dask cluster at this address.
        device: "auto", "cpu", "cuda" or "cuda:N".
        progress: optional progress reporter.

    Returns:
        What the task made of each artifact of the stage that isn't complete.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    check_array_task(index, size)
    progress = progress or NullProgress()
    _, nodes, place = plan(recipe, workspace=workspace, stage=stage, overrides=overrides, scale=scale)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    asked = {
        "recipe": str(recipe),
        "stage": stage,
        "index": index,
        "size": size,
        "overrides": list(overrides),
        "scale": scale,
    }
    with (
        logged(progress, place.root, "array-task", **asked, device=device) as log,
        graceful_signals(log.interrupted),
        executor,
    ):
        return array_task.run_array_task(
            nodes, place, stage=stage, index=index, size=size, executor=executor, progress=log, device=device
        )


def finalize(
    recipe: Path | str,
    *,
    workspace: Path | str = "runs",
    overrides: Sequence[str] = (),
    scale: str = "",
    device: str = "auto",
    progress: Progress | None = None,
) -> RunResult:
    """Complete the artifacts whose shards array tasks made: what ``lsmix finalize`` does. Computes no shard.

    Args:
        recipe: the TOML file.
        workspace: folder of the artifacts.
        overrides: "section.key=value" each, as for the tasks.
        scale: name of the recipe's sizes, as for the tasks; "" for none.
        device: where a pool's card decodes its few pictures.
        progress: optional progress reporter.

    Raises:
        PartialError: shards are missing; the message names them.
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    progress = progress or NullProgress()
    content, nodes, place = plan(recipe, workspace=workspace, overrides=overrides, scale=scale)
    asked = {"recipe": str(recipe), "overrides": list(overrides), "scale": scale}
    with logged(progress, place.root, "finalize", **asked) as log, graceful_signals(log.interrupted):
        built = finalize_array(nodes, place, progress=log, device=device)
    return RunResult(recipe=content, built=built)


def figure(
    name: str,
    recipe: Path | str,
    target: Path | str,
    *,
    pairs: int = 6,
    workspace: Path | str = "runs",
    overrides: Sequence[str] = (),
    scale: str = "",
    device: str = "auto",
    **options: Any,
) -> "PaperFigure":
    """Draw a figure of the paper from a recipe's images and flow, as PNG: what ``lsmix figure`` does.

    Brings the latents up to date first, and what they need; nothing further.

    Args:
        name: a name in ``lsmix.pipeline.views.figures.FIGURES``.
        recipe: the TOML file; where it has no flow of its own, the first flow that a pool of it names.
        target: the PNG to write, in a folder that exists.
        pairs: pairs of images that the figure shows, at least 1.
        workspace: folder of the artifacts.
        overrides: "section.key=value" each, over what the recipe says.
        scale: name of the recipe's sizes to take; "" for none.
        device: where the flow is trained, and where it decodes.
        **options: further ones of ``run``, but stage and force.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    from lsmix.pipeline.views.figures import check_figure, draw_figure, figure_png

    check_figure(name)
    target = local_target(target, "a figure")
    if not target.parent.is_dir():
        raise MissingError(f"no folder {str(target.parent)!r} to write the figure to. Make it, or choose another path.")
    check_replaceable(target)
    asked: dict[str, Any] = {"workspace": workspace, "stage": "encode", "overrides": overrides, "scale": scale}
    encode = next(node for node in plan(recipe, **asked)[1] if node.stage.name == "encode")
    result = run(recipe, **asked, device=device, **options)
    flow = encode.inputs["flow"]
    own = result[f"{flow.stage.name}/{flow.name}"].artifact if isinstance(flow, Node) else flow

    from lsmix.glow.checkpoint import load_flow

    device = resolve_device(device)
    prepare_device(device)
    sheet = draw_figure(
        name,
        load_flow(own, device=device),
        open_latents(result[f"encode/{encode.name}"].artifact),
        open_dataset(result["ingest"].artifact),
        pairs=pairs,
        methods=LATENT_METHODS.names(),
    )
    write_atomic(target, figure_png(sheet))
    return sheet


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
        RecipeError: what was given is not what the pool was made from.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: on the first damage, with the file's name, or the row and its value.
    """
    progress = progress or NullProgress()
    asked: dict[str, Any] = {"deep": deep, "sample": sample, "seed": seed, "data": data, "flow": flow, "device": device}
    folder = local_folder(artifact)
    if folder is not None:
        return _verify(folder, progress=progress, **asked)
    url = trim_location(str(artifact))
    with temporary_copy(url, progress) as folder:
        facts = _verify(folder, url, progress=progress, **asked)
    return {**facts, "folder": url, "unchecked": [*facts.get("unchecked", ()), _STRAYS]}


def _verify(
    folder: Path,
    url: str = "",
    *,
    deep: bool,
    sample: int,
    seed: int,
    data: Path | str | None,
    flow: Path | str | None,
    device: str,
    progress: Progress,
) -> dict[str, Any]:
    manifest = read_manifest(folder)
    artifact = Artifact(manifest=manifest, folder=folder, url=url)
    asked = deep or data is not None or flow is not None
    if asked and manifest.stage != "mix":
        raise RecipeError(
            f"{artifact.location!r} is no pool but the result of stage {manifest.stage!r}: only pools are checked so."
        )
    if sample < 1:
        raise RecipeError(f"a sample has at least 1 row, got {sample}.")
    facts = {
        "folder": str(folder),
        "stage": manifest.stage,
        "name": manifest.name,
        "cache_key": manifest.cache_key,
        "content_digest": manifest.content_digest,
        "files": len(manifest.files),
        "bytes": verify_files(folder, manifest, artifact.location),
        "counts": manifest.counts,
        "edited": edited_descriptions(folder, manifest),
    }
    if manifest.stage == "export":
        from lsmix.data.exports.writing import check_sums

        check_sums(folder, manifest)
    elif manifest.stage == "encode":
        open_latents(artifact).columns.check_against_zarr()
    elif manifest.stage == "mix":
        from lsmix.pipeline.verify.verify import verify_pool

        facts |= verify_pool(
            artifact,
            deep=deep,
            sample=sample,
            seed=seed,
            data=data,
            flow=flow,
            device=device,
            progress=progress,
        )
    return facts


def push(
    artifact: Path | str, url: str, *, card: Path | str | None = None, progress: Progress | None = None
) -> Transfer:
    """Send an artifact to a URL or a folder: what ``lsmix push`` does.

    Files that are there already, whole and right, are not sent again; each file is checked after it was sent; the
    manifest goes last. Stop it whenever you like; the same call goes on. A pool is sent with a card: its files take the
    place of the pool's README.md and LICENSES/, and the manifest at the URL lists them.

    Args:
        artifact: its folder or its URL.
        url: the folder that the artifact becomes: a path, or the URL of an object store, such as s3://bucket/pool. It is
            empty, not there yet, or holds what an earlier push of the same artifact sent.
        card: of a pool: folder that ``lsmix card`` wrote; None writes a card for the occasion.
        progress: optional progress reporter.

    Raises:
        MissingError: there is no artifact, or it is unfinished.
        RecipeError: the place is not empty, or not writable.
        CorruptError: a file here is damaged, or arrives damaged, twice.
        DownloadError: the place cannot be reached.
    """
    progress = progress or NullProgress()
    opened = open_artifact(artifact)
    with _card_of(opened, card, progress) as descriptions:
        done = push_artifact(opened, url, progress, card=descriptions)
    return msgspec.structs.replace(done, folder=str(artifact))


@contextmanager
def _card_of(pool: Artifact, card: Path | str | None, progress: Progress) -> Iterator[Path | None]:
    """Yield the folder of a pool's card, written for the occasion unless it is given; None if the artifact is no pool."""
    manifest = pool.manifest
    if card is not None:
        given = read_manifest(card)
        if given.stage != "card" or [record.content_digest for record in given.inputs] != [manifest.content_digest]:
            raise RecipeError(f"{str(card)!r} is no card of {pool.location!r}. Write one: lsmix card {pool.location}")
        yield Path(card)
    elif manifest.stage != "mix":
        yield None
    elif PLAN_NAME not in pool.records:
        progress.warning(f"{pool.location!r} has no {PLAN_NAME}, so it is sent without a card.")
        yield None
    else:
        from lsmix.pipeline.views.dataset_card.card import write_card

        with tempfile.TemporaryDirectory(prefix="lsmix-") as scratch:
            write_card(pool, Path(scratch, "card"))
            yield Path(scratch, "card")


def pull(url: str, target: Path | str | None = None, *, progress: Progress | None = None) -> Transfer:
    """Fetch an artifact from a URL or a folder: what ``lsmix pull`` does.

    Each file is checked against the manifest when it arrives. Until all have arrived they are in "TARGET.part"; the same call
    resumes a stopped one.

    Args:
        url: the artifact's folder: a path, or a URL of a web server or an object store.
        target: the folder to make; None for one in the current folder, named as the last part of the URL.
        progress: optional progress reporter.

    Raises:
        MissingError: there is no complete artifact at the URL.
        FormatError: it is of a version that this lsmix does not read.
        CorruptError: it is damaged, or its manifest names files outside of it.
        RecipeError: something else is in ``target``.
        DiskSpaceError: it does not fit on the disk.
        DownloadError: the place cannot be reached; what came is kept.
        LockedError: another pull writes there.
    """
    folder = local_target(target, "a pulled artifact") if target else None
    return pull_artifact(url, folder, progress or NullProgress())
