"""The Python API behind the command line and the root package: run a recipe; export, push and pull artifacts."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from lsmix.data.artifact import MANIFEST_NAME, Artifact, FileRecord, read_manifest
from lsmix.data.atomic import check_replaceable, write_atomic
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import MissingError, RecipeError, format_count
from lsmix.data.latents import open_latents
from lsmix.data.mixing import LATENT_METHODS, nearest
from lsmix.data.pool import open_pool
from lsmix.data.pool_spec import PLAN_NAME
from lsmix.data.progress import NullProgress, Progress, graceful_signals, stop_point
from lsmix.data.sharing.transfer import Transfer, pull_artifact, push_artifact
from lsmix.data.store import local_target, open_artifact
from lsmix.pipeline.config.recipe import Recipe, RecipeSource, read_recipe, recipe_name, training_name
from lsmix.pipeline.config.results import Naturalness, read_naturalness
from lsmix.pipeline.engine import array_task
from lsmix.pipeline.engine.dask import make_executor
from lsmix.pipeline.engine.device import prepare_device, resolve_device
from lsmix.pipeline.engine.run_log import logged
from lsmix.pipeline.engine.runner import Built, bring_up_to_date
from lsmix.pipeline.engine.stage import Node, upto
from lsmix.pipeline.stages.graph import build_graph
from lsmix.pipeline.stages.ingest import fetch_source
from lsmix.pipeline.stages.registry import STAGE_COMMANDS, STAGES
from lsmix.pipeline.verify.verify import verify
from lsmix.pipeline.views.error_rates import RunSummary, summarise_runs
from lsmix.pipeline.workspace.workspace import Workspace

if TYPE_CHECKING:
    from lsmix.pipeline.views.figures import PaperFigure

__all__ = [
    "RunResult",
    "export_pool",
    "figure",
    "finalize",
    "list_artifacts",
    "plan",
    "pull",
    "push",
    "run",
    "run_array_task",
    "verify",
]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """The artifacts that a run brought up to date, and the results in them."""

    recipe: Recipe
    built: list[Built]

    def __getitem__(self, name: str) -> Built:
        """Return an artifact by "stage/name", such as "mix/lsmix", or by "stage" if the stage has only one."""
        matches = [item for item in self.built if name in (item.stage, f"{item.stage}/{item.name}")]
        if len(matches) != 1:
            known = ", ".join(f"{item.stage}/{item.name}" for item in self.built)
            raise KeyError(f"{name!r} matches {len(matches)} artifacts; this run has {known}")
        return matches[0]

    @property
    def error_rates(self) -> list[RunSummary]:
        """The error rates of all classifier runs, in the recipe's order."""
        made = {item.name: item.artifact for item in self.built if item.stage == "train"}
        runs = {
            name: {seed: made[training_name(name, seed)] for seed in run.seeds if training_name(name, seed) in made}
            for name, run in self.recipe.runs.items()
        }
        finished = {name: trainings for name, trainings in runs.items() if trainings}
        return summarise_runs(finished, self.recipe.report_config().rows)

    @property
    def naturalness(self) -> Naturalness | None:
        """The results of the naturalness stage; None if the run did not include it."""
        return next((read_naturalness(item.artifact) for item in self.built if item.stage == "naturalness"), None)

    @property
    def report(self) -> Path | None:
        """Local path of the report's HTML page; None if the run did not include the report."""
        return next((item.folder / "report.html" for item in self.built if item.stage == "report"), None)

    @property
    def report_place(self) -> str:
        """Path or URL of the report's HTML page; "" if the run did not include the report."""
        return next((f"{item.location}/report.html" for item in self.built if item.stage == "report"), "")

    def _repr_html_(self) -> str:
        from lsmix.pipeline.views.report.results import notebook_html

        made = f"{sum(not item.cached for item in self.built)} of {format_count(len(self.built), 'artifact')} made."
        summary = f"{made} Report: {self.report_place}" if self.report_place else made
        return notebook_html(f"Run of {self.recipe.name}", summary, self.error_rates)

    def to_dict(self) -> dict[str, Any]:
        """Return all results, ready for JSON."""
        return {
            "artifacts": [
                {
                    "stage": item.stage,
                    "name": item.name,
                    "cache_key": item.cache_key,
                    "folder": item.location,
                    "content_digest": item.manifest.content_digest,
                    "cached": item.cached,
                    "seconds": round(item.seconds, 3),
                    "counts": item.manifest.counts,
                }
                for item in self.built
            ],
            "error_rates": [
                {
                    "run": row.name,
                    "label": row.label,
                    "errors": row.errors,
                    "mean": row.mean,
                    "std": row.std,
                    "difference": msgspec.to_builtins(row.difference),
                    "verdict": row.verdict or None,
                    "paper": row.paper or None,
                }
                for row in self.error_rates
            ],
            "naturalness": [
                {name: value for name, value in msgspec.to_builtins(sample).items() if name != "bits_per_dim"}
                for sample in (self.naturalness.samples if self.naturalness else ())
            ],
            "report": self.report_place or None,
        }


def plan(
    recipe: RecipeSource,
    *,
    workspace: Path | str = "runs",
    stage: str = "",
    overrides: Sequence[str] = (),
    scale: str = "",
    data: Any = None,
) -> tuple[Recipe, list[Node], Workspace]:
    """Return a recipe, its nodes up to ``stage`` ("" for all) and the workspace. Arguments are as for ``run``."""
    _check_stage(stage)
    content = read_recipe(recipe, overrides, scale)
    place = Workspace(workspace)
    source = None
    if data is not None:
        from lsmix.data.readers.images.memory import MemorySource  # imports Pillow

        source = MemorySource(data, content.data)
    nodes = build_graph(content, place, source)
    wanted = upto(nodes, stage) if stage else nodes
    if not wanted:
        raise RecipeError(
            f"recipe {recipe_name(recipe)!r} has no section {STAGE_COMMANDS[stage].section}, which stage {stage!r} needs. Add one."
        )
    return content, wanted, place


def _check_stage(name: str) -> None:
    if name and name not in STAGES:
        raise RecipeError(f"unknown stage {name!r}.{nearest(name, list(STAGES))}")


def _log_fields(recipe: RecipeSource, stage: str, overrides: Sequence[str], scale: str, device: str) -> dict[str, Any]:
    """Return the arguments of a run that its log records."""
    fields = {"recipe": recipe_name(recipe), "stage": stage, "overrides": list(overrides)}
    return {**fields, "scale": scale, "device": device}


def run(
    recipe: RecipeSource,
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
    data: Any = None,
    progress: Progress | None = None,
) -> RunResult:
    """Bring a recipe up to date, as ``lsmix run`` does.

    Args:
        recipe: The TOML file, a dictionary with its sections, or a ``Recipe``; relative paths in the last two start at
            the current folder.
        workspace: Folder or URL of the artifacts; created if it does not exist.
        stage: The last stage to run; "" for all.
        overrides: Strings "section.key=value" that override fields of the recipe.
        scale: Name of a section ``[scale.NAME]`` of the recipe whose fields override the recipe's; "" for none.
        workers: Number of local Dask workers that make shards; 0 makes them in this process.
        scheduler: Address of a running Dask cluster that makes shards; "" for none.
        device: "auto", "cpu", "cuda" or "cuda:N".
        force: Name of a stage to rerun even if it is up to date.
        download: First download the data set that ``data.download`` names, if it is missing.
        data: Images in memory instead of ``data.path``, keyed by SHA-256: ``(images, labels)`` with uint8 images (N, H,
            W, C); a data set of ``(image, label)``; or a dictionary of these for "train", "test" and "val", which may
            also contain "class_names".
        progress: Optional progress reporter.

    Raises:
        LsmixError: Says in one sentence what is wrong, where, and what to do.
    """
    progress = progress or NullProgress()
    _check_stage(force)
    content, nodes, place = plan(recipe, workspace=workspace, stage=stage, overrides=overrides, scale=scale, data=data)
    if download:  # before hashing, and outside ``logged``: an interrupt may stop a download anywhere
        fetch_source(content.data, progress)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    fields = _log_fields(recipe, stage, overrides, scale, device)
    cluster = {"workers": workers, "scheduler": scheduler}
    with logged(progress, place.root, "run", **fields, **cluster, force=force) as log, executor:
        built = bring_up_to_date(nodes, place, executor=executor, progress=log, device=device, force=force)
    return RunResult(recipe=content, built=built)


def run_array_task(
    recipe: RecipeSource,
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
) -> list[array_task.ArrayTaskResult]:
    """Make the shards of one task of a job array, as ``lsmix encode`` and ``lsmix mix`` do with ``--array-index``.

    Tasks may run in any number of processes, on any machines that share the workspace. Then call ``finalize``.

    ``stage`` is "encode" or "mix"; its inputs must be complete. ``index`` is the number of the task, from 0, and
    ``size`` is the number of tasks. Other arguments are as for ``run``.

    Returns:
        One result for each artifact of the stage that was not complete before.
    """
    progress = progress or NullProgress()
    _, nodes, place = plan(recipe, workspace=workspace, stage=stage, overrides=overrides, scale=scale)
    executor = make_executor(workers=workers, scheduler=scheduler, device=device, say=progress.info)
    fields = _log_fields(recipe, stage, overrides, scale, device)
    task: dict[str, Any] = {"index": index, "size": size}
    with logged(progress, place.root, "array-task", **fields, **task) as log, executor:
        return array_task.run_array_task(
            nodes, place, stage=stage, **task, executor=executor, progress=log, device=device
        )


def finalize(
    recipe: RecipeSource,
    *,
    workspace: Path | str = "runs",
    overrides: Sequence[str] = (),
    scale: str = "",
    device: str = "auto",
    progress: Progress | None = None,
) -> RunResult:
    """Complete the artifacts of a finished job array, as ``lsmix finalize`` does. Computes no shards.

    Arguments are as for ``run``.

    Raises:
        PartialError: Shards are missing; the message names them.
    """
    progress = progress or NullProgress()
    content, nodes, place = plan(recipe, workspace=workspace, overrides=overrides, scale=scale)
    with logged(
        progress, place.root, "finalize", recipe=recipe_name(recipe), overrides=list(overrides), scale=scale
    ) as log:
        built = array_task.finalize_array(nodes, place, progress=log, device=device)
    return RunResult(recipe=content, built=built)


def figure(
    name: str,
    recipe: RecipeSource,
    target: Path | str,
    *,
    pairs: int = 6,
    workspace: Path | str = "runs",
    overrides: Sequence[str] = (),
    scale: str = "",
    device: str = "auto",
    **options: Any,
) -> "PaperFigure":
    """Draw a figure of the paper from a recipe's images and flow as PNG, as ``lsmix figure`` does.

    First brings the latents up to date. If the recipe has no flow, the first flow that one of its pools names is used.

    ``name`` is a key of ``lsmix.pipeline.views.figures.FIGURES``, ``target`` is the PNG file to write, in an existing
    folder, and ``pairs`` is the number of image pairs to show. Other arguments are as for ``run``.
    """
    from lsmix.pipeline.views.figures import check_figure, draw_figure, figure_png

    check_figure(name)
    target = local_target(target, "a figure")
    if not target.parent.is_dir():
        raise MissingError(f"folder {str(target.parent)!r} does not exist. Create it, or choose another path.")
    check_replaceable(target)
    common: dict[str, Any] = {"workspace": workspace, "stage": "encode", "overrides": overrides, "scale": scale}
    encode = next(node for node in plan(recipe, **common)[1] if node.stage.name == "encode")
    result = run(recipe, **common, device=device, **options)
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


def export_pool(
    pool: Path | str,
    dest: Path | str,
    *,
    format: str,  # noqa: A002  # named like the option
    shard_images: int = 0,
    image: Literal["png", "webp"] = "png",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Export a pool, with its dataset card, to the new folder ``dest``, as ``lsmix export`` does.

    Args:
        pool: Folder or URL of the pool.
        dest: The folder to create.
        format: "hdf5", "parquet", "webdataset", "folder", or a format of another package in ``EXPORT_FORMATS``.
        shard_images: Images per file, or per sub-folder for "folder"; 0 for about 500 MB, or 5,000 images.
        image: Lossless encoding of the images in formats that contain image files.
        progress: Optional progress reporter.

    Returns:
        ``folder``, ``format``, ``images``, ``files``, ``bytes``, ``content_digest`` of the export,
        ``pool_content_digest`` and ``pixel_digest``, ready for JSON.
    """
    from lsmix.data.exports.format import EXPORT_FORMATS
    from lsmix.data.exports.writing import write_export
    from lsmix.pipeline.views.dataset_card.card import write_card_files
    from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE

    target = local_target(dest, "an export")
    progress = progress or NullProgress()
    opened = open_pool(pool)

    def advance(rows: int) -> None:
        progress.advance(rows)
        stop_point()

    def describe(folder: Path, files: list[FileRecord]) -> None:
        if opened.spec is None:
            progress.warning(f"pool {opened.location!r} has no {PLAN_NAME}, so its export has no card.")
        elif not write_card_files(folder, opened, files, form=EXPORT_FORMATS.load(format), encoding=image).text:
            progress.warning(NO_LICENCE)

    progress.start(f"export {target.name}", len(opened), "image")
    options: dict[str, Any] = {"form": format, "shard_images": shard_images, "encoding": image}
    with graceful_signals():
        manifest = write_export(opened, target, **options, describe=describe, on_rows=advance)
    progress.finish()
    return {
        "folder": str(target),
        "format": format,
        "images": len(opened),
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "content_digest": manifest.content_digest,
        "pool_content_digest": opened.manifest.content_digest,
        "pixel_digest": manifest.counts["pixel_digest"],
    }


def list_artifacts(workspace: Path | str = "runs") -> list[dict[str, Any]]:
    """List the artifacts in a workspace in the order of the stages, as ``lsmix ls`` prints them.

    Args:
        workspace: Folder or URL of the workspace.

    Returns:
        Per folder ``stage``, ``name``, ``cache_key``, ``folder``, ``bytes``, ``complete`` (False for unfinished work),
        ``age_seconds`` (None at a URL and for unfinished work) and ``inputs``, the cache keys by role; ready for JSON.
    """
    place, found = Workspace(workspace), []
    for stage in STAGES:
        for entry in place.entries(stage):
            manifest, written = entry.manifest, entry.folder / MANIFEST_NAME
            found.append(
                {
                    "stage": stage,
                    "name": entry.name,
                    "cache_key": entry.cache_key,
                    "folder": entry.location,
                    "bytes": place.size(entry),
                    "complete": manifest is not None,
                    "age_seconds": time.time() - written.stat().st_mtime if written.is_file() else None,
                    "inputs": {each.role: each.cache_key for each in manifest.inputs} if manifest else {},
                }
            )
    return found


def push(
    artifact: Path | str, url: str, *, card: Path | str | None = None, progress: Progress | None = None
) -> Transfer:
    """Upload an artifact to a URL or a folder, as ``lsmix push`` does.

    Files that are already complete at the URL are skipped, each uploaded file is checked, and the manifest is uploaded
    last. After an interruption, call this again to resume. A pool is uploaded with a dataset card: the card's files
    replace the pool's README.md and LICENSES/, and the manifest at the URL lists them.

    Args:
        artifact: Folder or URL of the artifact.
        url: New or empty folder, as a path or a URL such as s3://bucket/pool; it may contain an earlier push of this
            artifact.
        card: For a pool: folder that ``lsmix card`` wrote; None creates a temporary one.
        progress: Optional progress reporter.

    Raises:
        MissingError: The artifact does not exist or is unfinished.
        RecipeError: The URL contains something else, or is not writable.
        CorruptError: A local file is damaged, or an uploaded file arrived damaged twice.
        DownloadError: The URL cannot be reached.
    """
    progress = progress or NullProgress()
    opened = open_artifact(artifact)
    with _card_of(opened, card, progress) as descriptions:
        done = push_artifact(opened, url, progress, card=descriptions)
    return msgspec.structs.replace(done, folder=str(artifact))


@contextmanager
def _card_of(pool: Artifact, card: Path | str | None, progress: Progress) -> Iterator[Path | None]:
    """Yield the folder of a pool's card, by default a temporary one; yield None if the artifact is not a pool."""
    manifest = pool.manifest
    if card is not None:
        given = read_manifest(card)
        if given.stage != "card" or [record.content_digest for record in given.inputs] != [manifest.content_digest]:
            raise RecipeError(f"{str(card)!r} is not a card of {pool.location!r}. Run 'lsmix card {pool.location}'.")
        yield Path(card)
    elif manifest.stage != "mix":
        yield None
    elif PLAN_NAME not in pool.records:
        progress.warning(f"{pool.location!r} has no {PLAN_NAME}, so it is uploaded without a card.")
        yield None
    else:
        from lsmix.pipeline.views.dataset_card.card import write_card
        from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE

        with tempfile.TemporaryDirectory(prefix="lsmix-") as scratch:
            if not write_card(pool, Path(scratch, "card"))["licence"]:
                progress.warning(NO_LICENCE)
            yield Path(scratch, "card")


def pull(url: str, target: Path | str | None = None, *, progress: Progress | None = None) -> Transfer:
    """Download an artifact from a URL or a folder, as ``lsmix pull`` does.

    Each file is checked against the manifest as it arrives. Until all files are complete they are stored in
    "TARGET.part". After an interruption, call this again to resume.

    Args:
        url: The artifact's folder: a path, or the URL of a web server or an object store.
        target: The folder to create; None for one in the current folder, named after the last part of the URL.
        progress: Optional progress reporter.

    Raises:
        MissingError: There is no complete artifact at the URL.
        FormatError: This version of lsmix cannot read the artifact's format version.
        CorruptError: The artifact is damaged, or its manifest names files outside its folder.
        RecipeError: ``target`` contains something else.
        DiskSpaceError: The artifact does not fit on the disk.
        DownloadError: The URL cannot be reached; the downloaded part is kept.
        LockedError: Another pull writes to ``target``.
    """
    folder = local_target(target, "a pulled artifact") if target else None
    return pull_artifact(url, folder, progress or NullProgress())
