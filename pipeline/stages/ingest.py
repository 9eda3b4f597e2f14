"""The ingest stage: published files → ``dataset.h5`` with a train, a held-out and a test split.

Later stages that make pools read the train split alone, so no test image can get into one.
"""

import math
import os
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lsmix.data.artifact import Artifact
from lsmix.data.errors import RecipeError
from lsmix.data.pool_spec import LOCATION_FIELDS, Provenance
from lsmix.data.progress import Progress
from lsmix.data.readers.hub import hub_folder, is_hub
from lsmix.data.readers.published_sets import ARCHIVE_ENDINGS, files_to_fetch
from lsmix.data.readers.registry import expand_home, read_source
from lsmix.pipeline.config.results import DATASET_FILE
from lsmix.pipeline.config.schema import DataConfig
from lsmix.pipeline.engine.stage import Cost, DatasetSize, Stage, StageResult, StageTask

if TYPE_CHECKING:
    from lsmix.data.dataset import DataSet

__all__ = ["INGEST", "SPLIT_WORDS", "dataset_counts", "fetch_source", "provenance_of"]


SPLIT_WORDS = {"train": "training", "heldout": "held-out", "test": "test"}
_JPEG_RATIO = 6  # bytes of pixels for each byte of a JPEG of TinyImageNet


def fetch_source(config: DataConfig, progress: Progress) -> None:
    """Fetch the published files of a data set that are not there yet; what there is, is left alone.

    Raises:
        RecipeError: the recipe does not say what to fetch, or where to.
        DownloadError, DiskSpaceError, LockedError: as ``download``.
    """
    # Imported here since it takes a while, which a run without a download should not pay.
    from lsmix.data.readers.published.download import download

    if is_hub(config.path):
        progress.info(f"fetching {config.path}")
        hub_folder(config.path, fetch=True)
        return
    if not config.download or not config.path:
        raise RecipeError(
            f"--download needs data.download, what to fetch, and data.path, where to; got {config.download!r} and "
            f"{config.path!r}."
        )
    for file, target in files_to_fetch(config.download, expand_home(config.path)):
        progress.info(f"fetching {file.url} to {target}")
        download(file, target, progress)


def run(task: StageTask) -> StageResult:
    """Read the source, write the data set, and print what became of every file."""
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
    counts["class_images"] = dict(zip(dataset.class_names, images, strict=True))  # of the training split
    words = ", ".join(f"{split[name]:,} {word}" for name, word in SPLIT_WORDS.items())
    classes = f"{counts['classes']:,} class{'' if counts['classes'] == 1 else 'es'}"
    task.progress.info(f"{task.label}: {words} images in {classes}")
    if report := published.report:
        for line in report.lines(chosen=sum(split.values())):
            task.progress.info(f"  {line}")
        if report.skipped:
            task.progress.warning(f"{task.label}: {report.skipped:,} of {report.found:,} files are not used")
        for note in report.notes:
            task.progress.warning(f"{task.label}: {note}")
        counts["source"] = msgspec.to_builtins(report)
    return StageResult(payload=frozenset({DATASET_FILE}), counts=counts)


def dataset_counts(dataset: "DataSet") -> dict[str, Any]:
    """Return what the manifest of a data set counts, by which later stages know how big their work is."""
    return {
        "train": len(dataset.train.images),
        "heldout": len(dataset.heldout.images),
        "test": len(dataset.test.images),
        "classes": len(dataset.class_names),
        "image_shape": list(dataset.image_shape),
    }


def _estimate(config: DataConfig, size: DatasetSize) -> Cost:
    """Estimate by the source's size: images are stored uncompressed; small photographs hardly compress but as JPEG."""
    if not config.path or not os.path.exists(config.path):  # noqa: PTH110  # a path may be anything here
        return Cost(bytes=0)
    if os.path.isfile(config.path):  # noqa: PTH113
        return Cost(bytes=_unpacked_bytes(config.path, config))
    files = (os.path.join(folder, name) for folder, _, names in os.walk(config.path) for name in names)  # noqa: PTH118
    return Cost(bytes=sum(_unpacked_bytes(file, config) for file in files))


def _unpacked_bytes(file: str, config: DataConfig) -> int:
    packed = file.lower().endswith((".jpeg", ".jpg", ".jfif", ".zip"))
    if config.target and not file.endswith(ARCHIVE_ENDINGS):
        return 2 * 3 * math.prod(config.target)  # once in the temporary file
    try:
        return (_JPEG_RATIO if packed else 2) * os.stat(file).st_size  # noqa: PTH116  # Path is slow for many files
    except OSError:  # a link to a missing file
        return 0


INGEST = Stage(
    name="ingest",
    version=2,
    run=run,
    estimate=_estimate,
    not_in_key=LOCATION_FIELDS | {"on_error", "labels_file"},  # contents count, not where they are or how they came
    uses_torch=False,
    reads_source=True,
)


def provenance_of(artifact: Artifact, dataset: "DataSet") -> Provenance:
    """Return where the images of a data set are from, as latents and pools keep it."""
    config = {name: value for name, value in artifact.manifest.config.items() if name not in INGEST.not_in_key}
    return Provenance(
        content_digest=artifact.manifest.content_digest,
        config=config,
        licence=dataset.licence,
        citation=dataset.citation,
        train_images=len(dataset.train),
    )
