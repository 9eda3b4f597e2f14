"""The dataset card of a pool: a folder with README.md, card.png, samples.csv, croissant.json and LICENSES/.

A card is a separate artifact, since a finished pool never changes. ``push`` and ``export`` store its files next to the
pool's files.
"""

from pathlib import Path
from typing import Any, Final

from lsmix.data.artifact import (
    Artifact,
    FileRecord,
    InputRecord,
    Manifest,
    content_digest,
    is_description,
    record_files,
    write_manifest,
)
from lsmix.data.atomic import atomic_folder, write_atomic
from lsmix.data.errors import FormatError
from lsmix.data.exports.format import ExportFormat
from lsmix.data.pool import Pool, open_pool
from lsmix.data.sharing.descriptions import description_records
from lsmix.data.sharing.transfer import folder_name
from lsmix.data.store import local_target, open_artifact
from lsmix.pipeline.views.dataset_card.croissant import CROISSANT_FILE, croissant
from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, Licence, read_licence
from lsmix.pipeline.views.dataset_card.markup import clean
from lsmix.pipeline.views.dataset_card.readme import PoolDescription, write_readme
from lsmix.pipeline.views.dataset_card.samples import SAMPLES_FILE, write_samples
from lsmix.pipeline.views.dataset_card.statistics import card_statistics
from lsmix.pipeline.views.pool_sources import source_images

__all__ = ["CARD_STAGE", "card_text", "write_card", "write_card_files"]

CARD_STAGE: Final = "card"
PICTURE_FILE: Final = "card.png"
_VERSION: Final = 1
_PAYLOAD: Final = {SAMPLES_FILE, CROISSANT_FILE, PICTURE_FILE}


def write_card(
    pool: Path | str | Artifact,
    dest: Path | str | None = None,
    *,
    licence: str | None = None,
    creator: str = "",
) -> dict[str, Any]:
    """Write the dataset card of a finished pool to a new folder, as ``lsmix card`` does.

    Args:
        pool: The pool artifact, its folder or its URL.
        dest: The folder to create; None creates ``<pool folder>-card`` in the current folder.
        licence: Licence of the images, an SPDX identifier or free text; None uses the licence of the base set.
        creator: Who made the pool; "" if unknown.

    Returns:
        ``folder``, ``content_digest`` of the pool, ``licence`` ("" if unknown) and ``files`` of the card.

    Raises:
        MissingError: The pool does not exist or is unfinished, or the parent folder of ``dest`` does not exist.
        FormatError: The artifact is not a pool, or has a format that this version cannot read.
        CorruptError: The pool is damaged.
        RecipeError: ``dest`` already exists.
        LockedError: Another process is writing to ``dest``.
        DownloadError: The URL cannot be reached.
    """
    artifact = open_artifact(pool)
    manifest = artifact.manifest
    name = artifact.folder.resolve().name if artifact.is_local else folder_name(artifact.url)
    target = local_target(dest or f"{name}-card", "a card")
    if manifest.stage != "mix":
        raise FormatError(
            f"Only pools have a card; {artifact.location!r} is an artifact of the stage {manifest.stage!r}."
        )
    opened = open_pool(artifact)
    with atomic_folder(target) as card:
        named = write_card_files(
            card,
            opened,
            [file for file in manifest.files if not is_description(file)],
            licence=licence,
            creator=creator,
        )
        files = record_files(card, _PAYLOAD)
        config = {"licence": named.text, "creator": clean(creator)}
        write_manifest(
            card,
            Manifest(
                stage=CARD_STAGE,
                stage_version=_VERSION,
                name=manifest.name,
                cache_key="",
                content_digest=content_digest(files),
                config=config,
                inputs=[InputRecord(role="pool", cache_key=manifest.cache_key, content_digest=manifest.content_digest)],
                files=files,
                counts={"images": len(opened)},
            ),
        )
    return {
        "folder": str(target),
        "content_digest": manifest.content_digest,
        "licence": named.text,
        "files": [file.path for file in files],
    }


def write_card_files(
    folder: Path,
    pool: Pool,
    files: list[FileRecord],
    *,
    form: ExportFormat | None = None,
    encoding: str = "",
    licence: str | None = None,
    creator: str = "",
) -> Licence:
    """Write the files of a card into a folder and return the licence that they state.

    Args:
        folder: Folder of the card or the export.
        pool: The pool.
        files: The files that the card describes: of the pool, or of its export.
        form: Format of the export; None for the pool itself.
        encoding: Image encoding of the export.
        licence: Licence of the images, an SPDX identifier or free text; None uses the licence of the base set.
        creator: Who made the pool; "" if unknown.
    """
    described = PoolDescription.of(pool)
    named = read_licence(described.spec.origin.licence if licence is None else licence)
    statistics = card_statistics(pool, sum(file.bytes for file in files), source_images(pool))
    if form and form.folder_images:  # image-folder readers would load card.png as a sample
        statistics = statistics._replace(picture=b"")
    if statistics.picture:
        write_atomic(folder / PICTURE_FILE, statistics.picture)
    write_samples(pool, folder / SAMPLES_FILE, in_zarr=form is None)
    write_readme(folder, described, named, card=statistics, form=form, encoding=encoding)
    described_files = sorted([*files, *description_records(folder, CARD_STAGE)], key=lambda file: file.path)
    content = croissant(described, pool, named, clean(creator), described_files, in_zarr=form is None)
    write_atomic(folder / CROISSANT_FILE, content)
    return named


def card_text(facts: dict[str, Any]) -> str:
    """Return the result of ``write_card`` as text for the terminal."""
    return (
        f"card        {facts['folder']}\n"
        f"licence     {facts['licence'] or NO_LICENCE}\n"
        f"written     {', '.join(facts['files'])}"
    )
