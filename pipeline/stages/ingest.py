"""The ingest stage: published files → ``dataset.h5`` with a train, a held-out and a test split.

The stages that build pools read only the train split, so pools cannot contain test images.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.data.errors import LsmixError, RecipeError
from lsmix.data.pool_spec import LOCATION_FIELDS, Provenance
from lsmix.data.progress import Progress
from lsmix.data.readers.hub import hub_folder, is_hub
from lsmix.data.readers.published_sets import files_to_fetch
from lsmix.data.readers.registry import expand_home, read_source, source_files
from lsmix.pipeline.config.results import DATASET_FILE
from lsmix.pipeline.config.schema import DataConfig
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask

if TYPE_CHECKING:
    from lsmix.data.dataset import DataSet

__all__ = ["INGEST", "SPLIT_WORDS", "dataset_counts", "fetch_source", "provenance_of"]


SPLIT_WORDS = {"train": "training", "heldout": "held-out", "test": "test"}
_ZIP_RATIO = 6  # bytes of pixels per byte of zip archive, measured on the JPEGs of TinyImageNet


def fetch_source(config: DataConfig, progress: Progress) -> None:
    """Download the published files of a data set. Existing files are not downloaded again.

    Raises:
        RecipeError: The recipe does not define what to download or where to store it.
        DownloadError, DiskSpaceError, LockedError: See ``download``.
    """
    # Imported here, since the import is slow and most runs download nothing.
    from lsmix.data.readers.published.download import download

    if is_hub(config.path):
        progress.info(f"downloading {config.path}")
        hub_folder(config.path, fetch=True)
        return
    if not config.download or not config.path:
        raise RecipeError(
            "--download needs 'data.download' (what to download) and 'data.path' (where to store it), got "
            f"{config.download!r} and {config.path!r}."
        )
    for file, target in files_to_fetch(config.download, expand_home(config.path)):
        progress.info(f"downloading {file.url} to {target}")
        download(file, target, progress)


def run(task: StageTask) -> StageResult:
    """Read the source, write the data set, and report how the files were used."""
    from lsmix.data.dataset import open_dataset
    from lsmix.data.readers.dataset_writer import plan_splits, write_dataset

    config: DataConfig = task.config
    task.progress.info(f"{task.label}: reading the data set")
    numbers: dict[str, Any] = {
        "heldout": config.heldout,
        "test": config.test,
        "limit": config.limit or None,
        "seed": config.seed,
    }
    check = partial(plan_splits, **numbers)
    reading: dict[str, Any] = {"label": task.label, "folder": task.work, "check": check}
    if task.source:
        published = task.source.read(task.progress, **reading)
    else:
        published = read_source(config, task.progress, **reading)
    own = {name: text for name in ("licence", "citation") if (text := getattr(config, name))}
    published = replace(published, **own)
    path = task.folder / DATASET_FILE
    split = write_dataset(path, published, **numbers)
    dataset = open_dataset(path)
    counts = dataset_counts(dataset)
    images = np.bincount(dataset.train.labels, minlength=counts["classes"]).tolist()
    counts["class_images"] = dict(zip(dataset.class_names, images, strict=True))  # in the training split
    words = ", ".join(f"{split[name]:,} {word}" for name, word in SPLIT_WORDS.items())
    classes = f"{counts['classes']:,} class{'' if counts['classes'] == 1 else 'es'}"
    task.progress.info(f"{task.label}: {words} images in {classes}")
    if report := published.report:
        for line in report.lines(chosen=sum(split.values())):
            task.progress.info(f"  {line}")
        if report.skipped:
            task.progress.warning(f"{task.label}: {report.skipped:,} of {report.found:,} files were skipped")
        for note in report.notes:
            task.progress.warning(f"{task.label}: {note}")
        counts["source"] = msgspec.to_builtins(report)
    return StageResult(payload=frozenset({DATASET_FILE}), counts=counts)


def dataset_counts(dataset: "DataSet") -> dict[str, Any]:
    """Return the counts for the manifest of a data set; later stages estimate their cost from them."""
    return {
        "train": len(dataset.train.images),
        "heldout": len(dataset.heldout.images),
        "test": len(dataset.test.images),
        "classes": len(dataset.class_names),
        "image_shape": list(dataset.image_shape),
    }


def _estimate(config: DataConfig, size: DatasetSize) -> Cost:
    """Estimate from the listing of image files, else from the source's size; uncompressed images exist twice at first."""
    if size.images:
        return Cost(bytes=2 * (size.images + size.test_images) * size.image_bytes)
    try:
        sizes = {str(file): Path(file).stat().st_size for file in source_files(config)}
    except (LsmixError, OSError):  # ingest raises this error
        return Cost(bytes=0)
    return Cost(bytes=sum((_ZIP_RATIO if file.endswith(".zip") else 2) * count for file, count in sizes.items()))


INGEST = Stage(
    name="ingest",
    version=2,
    run=run,
    estimate=_estimate,
    not_in_key=LOCATION_FIELDS | {"on_error", "labels_file"},  # contents matter, not how and where they are read
    uses_torch=False,
    reads_source=True,
)


def provenance_of(artifact: Artifact, dataset: "DataSet") -> Provenance:
    """Return the provenance of a data set, which latents and pools store."""
    config = {name: value for name, value in artifact.manifest.config.items() if name not in INGEST.not_in_key}
    return Provenance(
        content_digest=artifact.manifest.content_digest,
        config=config,
        licence=dataset.licence,
        citation=dataset.citation,
        train_images=len(dataset.train),
    )
