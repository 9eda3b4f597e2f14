"""The card of a pool: what it tells a stranger, in files beside ``pool.zarr`` that are no part of its root digest.

A pool stays openable at every moment. Files of the card leave the manifest before they change and join it
again when they are whole, so that a kill in between leaves a pool without a card, never a damaged one.
"""

from pathlib import Path
from typing import Any, Final

import msgspec

from lsmix.data.artifact import (
    MANIFEST_NAME,
    FileRecord,
    InputRecord,
    Manifest,
    check_sizes,
    read_manifest,
    record_files,
    root_digest,
    write_manifest,
)
from lsmix.data.atomic import DECODE_ERRORS, decode_versioned, remove_stale, sha256_file, write_atomic
from lsmix.data.errors import CorruptError, FormatError
from lsmix.data.pool import POOL_NAME, Pool, unsealed_pool
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.remote import check_writable
from lsmix.data.sharing.transfer import amend_artifact, temporary_copy
from lsmix.data.store import local_folder, trim_location
from lsmix.pipeline.engine.device import describe_environment
from lsmix.pipeline.engine.stage import StageTask
from lsmix.pipeline.views.dataset_card.croissant import CROISSANT_FILE, croissant
from lsmix.pipeline.views.dataset_card.image_grid import SHEET_FILE, draw_sheet
from lsmix.pipeline.views.dataset_card.licence import NO_LICENCE, Licence, read_licence
from lsmix.pipeline.views.dataset_card.markup import clean
from lsmix.pipeline.views.dataset_card.readme import (
    IMAGES_NOTICE,
    LSMIX_NOTICE,
    README_FILE,
    describe,
    images_notice,
    lsmix_notice,
    readme,
)
from lsmix.pipeline.views.dataset_card.samples import SAMPLES_FILE, samples_digest, write_samples
from lsmix.pipeline.views.dataset_card.summary import CardFacts, card_facts
from lsmix.pipeline.workspace.local import pool_inputs
from lsmix.pipeline.workspace.locks import artifact_lock

__all__ = ["CARD_FILES", "add_card", "card_text", "write_card"]

_GIVEN_FILE: Final = "card.json"
_GIVEN_BYTES: Final = 1 << 16
_GIVEN_VERSION: Final = 1
CARD_FILES: Final = frozenset(
    {README_FILE, SHEET_FILE, SAMPLES_FILE, CROISSANT_FILE, IMAGES_NOTICE, LSMIX_NOTICE, _GIVEN_FILE}
)


class _Given(msgspec.Struct, frozen=True, kw_only=True):
    """What a card tells that the pool does not hold; kept in card.json, so that the next card tells it too."""

    format_version: int = _GIVEN_VERSION
    licence: str | None = None  # of the images, as given by hand; None takes the base set's
    creator: str = ""  # who made the pool
    sheet_has_sources: bool = False  # whether card.png shows each mix between its sources


def add_card(
    task: StageTask, *, stage_version: int, payload: set[str], digests: dict[str, str], counts: dict[str, Any]
) -> dict[str, str]:
    """Write the card of a pool in the making; its shards and its plan are on the disk.

    Args:
        task: the work of the mix stage.
        stage_version: its version.
        payload: what counts in the root digest.
        digests: SHA-256 of files by path, as far as they are known.
        counts: facts for the manifest.

    Returns:
        The SHA-256 of the card's files by path.
    """
    files = [file for file in record_files(task.folder, payload, digests) if file.path not in CARD_FILES]
    manifest = Manifest(
        stage=task.stage,
        stage_version=stage_version,
        name=task.label.removeprefix(f"{task.stage} "),
        key="",
        root=root_digest(files),
        config=msgspec.to_builtins(task.config),
        inputs=[
            InputRecord(role=role, key=made.manifest.key, root=made.manifest.root) for role, made in task.inputs.items()
        ],
        files=files,
        counts=counts,
        environment=describe_environment(),
    )
    pool = unsealed_pool(task.folder, manifest)
    facts = card_facts(pool)
    licence = read_licence(facts.origin.licence)
    if not licence.text:
        task.progress.warning(f"{task.label}: {NO_LICENCE} 'lsmix card POOL --licence …' names one once you know it.")
    picture, has_sources = draw_sheet(pool, task.inputs, device=task.device)
    given = _Given(sheet_has_sources=has_sources)
    card = _Card(facts, licence, given, picture, samples=write_samples(pool, task.folder / SAMPLES_FILE))
    for name, content in card.contents().items():
        write_atomic(task.folder / name, content)
    return {name: record.sha256 for name, record in card.records().items()}


def write_card(
    pool: Path | str, *, licence: str | None = None, creator: str | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Write or refresh the card of a finished pool: what ``lsmix card`` does.

    At a URL the pool is fetched to the cache, and what changed of a copy is sent back, the manifest last.

    Args:
        pool: the artifact's folder or URL.
        licence: of the images, an SPDX identifier or in words; "" goes back to what the base set says. None keeps what
            was said before.
        creator: who made the pool; None keeps what was said before.
        progress: is told of what is fetched and sent; None tells nobody.

    Returns:
        ``folder``, ``root``, ``licence`` ("" where none is known), ``files`` of the card, and ``written``, those of them
        that changed.

    Raises:
        MissingError: there is no finished artifact.
        FormatError: it is no pool, or of a format that this version does not read.
        CorruptError: it is damaged; then nothing is touched.
        LockedError: a run works on it.
        RecipeError: it lies at a URL and was changed there meanwhile, or nothing can be sent there.
        DownloadError: the URL cannot be reached.
    """
    folder = local_folder(pool)
    if folder is not None:
        return _write_here(folder, licence, creator)
    url, progress = trim_location(str(pool)), progress or NullProgress()
    check_writable(url)
    with temporary_copy(url, progress) as folder:
        before = read_manifest(folder)
        facts = _write_here(folder, licence, creator, url)
        amend_artifact(folder, url, before, progress)
    return {**facts, "folder": url}


def _write_here(folder: Path, licence: str | None, creator: str | None, where: str = "") -> dict[str, Any]:
    folder = folder.parent if folder.name == POOL_NAME else folder
    manifest = read_manifest(folder)
    if manifest.stage != "mix":
        raise FormatError(
            f"{(where or str(folder))!r} holds an artifact of the stage {manifest.stage!r}; only pools have a card."
        )
    place = folder.resolve()
    if place.parent.name == manifest.stage and place.name.endswith(f"-{manifest.key}"):
        with artifact_lock(place.parent.parent, manifest.key, f"mix {manifest.name}"):
            return _refresh(folder, licence, creator)
    return _refresh(folder, licence, creator)


def card_text(facts: dict[str, Any]) -> str:
    """Return what ``write_card`` did, for people."""
    written = ", ".join(facts["written"]) or "nothing, the card is up to date"
    return f"licence     {facts['licence'] or 'NONE NAMED: ' + NO_LICENCE}\nwritten     {written}"


def _refresh(folder: Path, licence: str | None, creator: str | None) -> dict[str, Any]:
    manifest = read_manifest(folder)  # again, now that nobody else changes it
    own = [file for file in manifest.files if file.path not in CARD_FILES]
    bare = msgspec.structs.replace(manifest, files=own)
    check_sizes(folder, bare)
    if manifest.root != root_digest(own):
        raise CorruptError(
            f"{str(folder / MANIFEST_NAME)!r} was altered: its root digest does not fit its list of files."
        )
    pool = unsealed_pool(folder, bare)
    _check_listed(pool, own)
    listed = {file.path: file for file in manifest.files if file.path in CARD_FILES}
    whole = {name for name, file in listed.items() if _is_whole(folder, file)}

    facts = card_facts(pool)
    given = _read_given(folder) if _GIVEN_FILE in whole else _Given()
    if licence is not None:
        given = msgspec.structs.replace(given, licence=clean(licence) or None)
    if creator is not None:
        given = msgspec.structs.replace(given, creator=clean(creator))
    picture, given = _picture(folder, pool, given, whole)
    named = read_licence(facts.origin.licence if given.licence is None else given.licence)
    samples = samples_digest(pool) if SAMPLES_FILE in whole else ""
    written = []
    if not samples or samples != listed[SAMPLES_FILE].sha256:
        write_manifest(folder, bare)
        samples = write_samples(pool, folder / SAMPLES_FILE)
        written.append(SAMPLES_FILE)
    card = _Card(facts, named, given, picture, samples=samples)
    records = card.records()
    changed = [name for name in card.contents() if name not in whole or records[name] != listed[name]]
    gone = [name for name in listed if name not in records]
    if changed or gone or written or any(records[name] != listed[name] for name in records):
        if not written:
            write_manifest(folder, bare)
        remove_stale(folder)
        for name in gone:
            (folder / name).unlink(missing_ok=True)
        for name in changed:
            write_atomic(folder / name, card.contents()[name])
        files = sorted([*own, *records.values()], key=lambda file: file.path.split("/"))
        write_manifest(folder, msgspec.structs.replace(manifest, files=files))
    return {
        "folder": str(folder),
        "root": manifest.root,
        "licence": named.text,
        "files": sorted(records),
        "written": sorted([*written, *changed]),
    }


class _Card:
    """All files of a card, as they must be; the table of samples is on the disk already."""

    def __init__(self, facts: CardFacts, licence: Licence, given: _Given, picture: bytes, *, samples: str) -> None:
        self._folder = facts.pool.path
        self._samples = samples
        sheet = {"sheet": bool(picture), "sheet_has_sources": given.sheet_has_sources}
        self._contents = {
            README_FILE: readme(facts, licence, **sheet),
            IMAGES_NOTICE: images_notice(facts, licence),
            LSMIX_NOTICE: lsmix_notice(),
            _GIVEN_FILE: msgspec.json.format(msgspec.json.encode(given), indent=1) + b"\n",
        }
        if picture:
            self._contents[SHEET_FILE] = picture
        described = sorted([*facts.files, *self.records().values()], key=lambda file: file.path)
        self._contents[CROISSANT_FILE] = croissant(facts, licence, given.creator, described, describe(facts))

    def contents(self) -> dict[str, bytes]:
        """Return the bytes of every file by its path, but for the table of samples."""
        return self._contents

    def records(self) -> dict[str, FileRecord]:
        """Return what the manifest says of every file, by its path."""
        found = {name: _record(name, content) for name, content in self._contents.items()}
        size = (self._folder / SAMPLES_FILE).stat().st_size
        found[SAMPLES_FILE] = FileRecord(path=SAMPLES_FILE, bytes=size, sha256=self._samples, payload=False)
        return found


def _record(path: str, content: bytes) -> FileRecord:
    from hashlib import sha256

    return FileRecord(path=path, bytes=len(content), sha256=sha256(content).hexdigest(), payload=False)


def _check_listed(pool: Pool, files: list[FileRecord]) -> None:
    paths = {file.path for file in files}
    for name in pool.columns.table.chunk_paths():
        if f"{POOL_NAME}/{name}" not in paths:
            raise CorruptError(
                f"{str(pool.path / POOL_NAME / name)!r} is not listed in {MANIFEST_NAME}: it was put there later. "
                "Fetch or make the artifact again."
            )


def _is_whole(folder: Path, record: FileRecord) -> bool:
    path = folder / record.path
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return sha256_file(path) == record.sha256


def _read_given(folder: Path) -> _Given:
    path = folder / _GIVEN_FILE
    if path.stat().st_size > _GIVEN_BYTES:
        raise CorruptError(f"{str(path)!r} is too long to be what a card was told. Remove it.")
    try:
        what, remedy = f"what the card of {str(folder)!r} was told has", "Use a newer lsmix, or remove card.json."
        return decode_versioned(path.read_bytes(), _Given, _GIVEN_VERSION, what=what, remedy=remedy)
    except DECODE_ERRORS as error:
        raise CorruptError(f"{str(path)!r} is damaged: {error}. Remove it.") from error


def _picture(folder: Path, pool: Pool, given: _Given, whole: set[str]) -> tuple[bytes, _Given]:
    """Return the picture: one with sources is kept, since whoever received the pool alone could only draw a poorer one."""
    if SHEET_FILE in whole and given.sheet_has_sources:
        return (folder / SHEET_FILE).read_bytes(), given
    picture, has_sources = draw_sheet(pool, pool_inputs(pool.artifact))
    return picture, msgspec.structs.replace(given, sheet_has_sources=has_sources)
