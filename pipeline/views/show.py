"""What ``lsmix show`` tells of one artifact: its facts, and a sheet of its pictures or a page."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import numpy as np

from lsmix.data.artifact import Manifest, check_sizes, read_manifest
from lsmix.data.atomic import check_replaceable, write_atomic
from lsmix.data.dataset import DATASET_NAME
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.pool import POOL_NAME
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.readers.source_images import SourceReport
from lsmix.data.remote import local_folder, local_target
from lsmix.data.sharing.store import download_artifact, naming_urls, without_store
from lsmix.data.sharing.transfer import folder_name
from lsmix.pipeline.config.results import DATASET_FILE, SHEET_FILE
from lsmix.pipeline.workspace.local import input_folders

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Drawn", "artifact_facts", "draw_artifact", "write_sheet"]

_CLASSES = 30  # named in the facts of a data set
_SHEET_COLUMNS = 12
_SHEET_ROWS = 8
_MOST_SHEET_ROWS = 64  # a picture of more is too tall for most programs


class Drawn(NamedTuple):
    """A file that shows an artifact."""

    kind: str  # "sheet" or "html"
    target: Path
    what: str  # what it shows; "" where there is nothing to show, and so no file


@naming_urls()
def artifact_facts(artifact: Path | str, progress: Progress | None = None) -> dict[str, Any]:
    """Return the facts of an artifact, in the order in which a reader wants them.

    Args:
        artifact: its folder, or its URL, from which it is fetched to the cache first.
        progress: is told of that; None tells nobody.

    Raises:
        MissingError, FormatError, CorruptError: it is not there, unfinished, of another version, or damaged.
        DownloadError: the URL cannot be reached.
    """
    folder = _folder_of(artifact, progress)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    facts: dict[str, Any] = {
        "artifact": f"{manifest.stage} {manifest.name}",
        "key": manifest.key,
        "root": manifest.root,
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "seconds": manifest.seconds,
        "made with": ", ".join(f"{name} {value}" for name, value in manifest.environment.get("versions", {}).items()),
        "device": manifest.environment.get("device", "none"),
        "inputs": ", ".join(f"{record.role} {record.key or record.root[:12]}" for record in manifest.inputs),
    }
    facts |= {name: _COUNT_TEXTS.get(name, _short)(value) for name, value in manifest.counts.items()}
    facts |= {f"config.{name}": _short(value) for name, value in manifest.config.items()}
    return facts


def _folder_of(artifact: Path | str, progress: Progress | None) -> Path:
    return download_artifact(without_store(artifact, POOL_NAME), progress or NullProgress())


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, … {len(value)} in all]"
    return value


def _class_text(numbers: Any) -> Any:
    """Return the classes of a data set with their numbers of training images, as far as they fit."""
    if not isinstance(numbers, dict):
        return numbers
    more = [f"… {len(numbers)} in all"] if len(numbers) > _CLASSES else []
    return ", ".join([*(f"{name} {number}" for name, number in list(numbers.items())[:_CLASSES]), *more])


def _source_text(source: Any) -> Any:
    """Return what became of the files of a data set; what is no such report is returned as it is."""
    try:
        return "; ".join(msgspec.convert(source, SourceReport).lines())
    except msgspec.ValidationError:
        return source


_COUNT_TEXTS = {"class_images": _class_text, "source": _source_text}


@naming_urls()
def draw_artifact(
    artifact: Path | str,
    *,
    sheet: Path | str | None = None,
    html: Path | str | None = None,
    data: Path | str | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Draw an artifact: a sheet of its pictures, or for a pool a page to look through, or both.

    Args:
        artifact: its folder, or its URL, from which it is fetched to the cache first.
        sheet: the PNG to write; without it and without ``html``, one with the artifact's name in the current folder.
        html: the page to write.
        data: the data set's artifact or its URL, for the page; see ``show_page.write_pool_page``.
        rows: rows of the sheet, 1 to 64, or samples on the page; None for 8, or 120.
        progress: is told of what is fetched; None tells nobody.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    if data and not html:
        raise RecipeError("--data names the sources for a page; say with --html where to write it.")
    picture = local_target(sheet, "a sheet") if sheet else None
    page = local_target(html, "a page") if html else None
    for target in filter(None, (picture, page)):
        check_replaceable(target)
    folder, drawn = _folder_of(artifact, progress), []
    if picture or not page:
        if rows and rows > _MOST_SHEET_ROWS:
            raise RecipeError(
                f"a sheet has 1 to {_MOST_SHEET_ROWS} rows, got --rows {rows}. More fit on a page: --html."
            )
        here = local_folder(artifact)
        target = picture or Path(
            f"{here.resolve().name if here else folder_name(str(without_store(artifact, POOL_NAME)))}.png"
        )
        drawn.append(Drawn("sheet", target, write_sheet(folder, target, rows=rows or _SHEET_ROWS)))
    if page:
        from lsmix.pipeline.views.pool_page import PAGE_SAMPLES, write_pool_page

        base = download_artifact(without_store(data, DATASET_NAME), progress or NullProgress()) if data else None
        drawn.append(Drawn("html", page, write_pool_page(folder, page, samples=rows or PAGE_SAMPLES, data=base)))
    return drawn


def write_sheet(folder: Path, target: Path, *, rows: int) -> str:
    """Write a PNG of the pictures in an artifact; return what it shows, or "" where the stage has none.

    A pool is shown as x₁ | mixes at growing λ | x₂ where its latents and flow are in the same workspace, one in pixel
    space as x₁ | mix | x₂ where its data set is; else, and where x₂ begins elsewhere or there are more sources, as its
    own images in order of their share.
    """
    from lsmix.pipeline.views.images import png_bytes

    manifest = read_manifest(folder)
    draw = {
        "mix": _pool_sheet,
        "ingest": _dataset_sheet,
        "train-glow": _flow_sheet,
        "naturalness": _naturalness_sheet,
    }.get(manifest.stage)
    if draw is None:
        return ""
    picture, what = draw(folder, manifest, rows)
    write_atomic(target, png_bytes(picture))
    return what


def _pool_sheet(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.pool import open_pool
    from lsmix.pipeline.views.images import sheet

    pool = open_pool(folder)
    inputs = input_folders(folder, manifest)
    plain = pool.sources == 2 and "corner" not in pool.columns  # a sweep shows two sources, and the first corner
    if inputs is None or not (plain or "dataset" in inputs):
        order = np.argsort(pool.share_b[: rows * _SHEET_COLUMNS], kind="stable")
        images = pool.image[: len(order)][order]
        grid = [list(images[start : start + _SHEET_COLUMNS]) for start in range(0, len(images), _SHEET_COLUMNS)]
        return sheet(grid), "images of the pool by growing share of the second"
    if "dataset" in inputs:
        from lsmix.data.dataset import open_dataset
        from lsmix.pipeline.views.images import SHEET_TITLES, pool_rows

        train = open_dataset(inputs["dataset"]).train.images
        return sheet(pool_rows(pool, train, rows), column_titles=SHEET_TITLES), "x₁ | mix | x₂"
    from lsmix.data.latents import open_latents
    from lsmix.glow.checkpoint import load_flow
    from lsmix.pipeline.views.interpolation import FIG4_RATES, choose_pairs, mix_sweep

    latents, flow = open_latents(inputs["latents"]), load_flow(inputs["flow"])
    sweep = mix_sweep(flow, latents, choose_pairs(pool, rows), method=pool.method)
    titles = ["x₁", *(f"λ={rate}" for rate in FIG4_RATES), "x₂"]
    return sheet(sweep, column_titles=titles), "x₁ | mixes at growing λ | x₂"


def _dataset_sheet(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.dataset import open_dataset
    from lsmix.pipeline.views.images import thumbnails

    train = open_dataset(folder / DATASET_FILE).train
    return thumbnails(train.images[: rows * _SHEET_COLUMNS], columns=_SHEET_COLUMNS), "the first training images"


def _flow_sheet(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.training import sample
    from lsmix.pipeline.views.images import thumbnails

    temperature = _config_number(folder, manifest, "temperature")
    images = sample(load_flow(folder), rows * _SHEET_COLUMNS, temperature=temperature)
    return thumbnails(images, columns=_SHEET_COLUMNS), f"samples at temperature {temperature}"


def _naturalness_sheet(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    rate = _config_number(folder, manifest, "lam")
    return _read_sheet(folder / SHEET_FILE), f"x₁ | mixes of each method at λ = {rate:g} | x₂"


def _read_sheet(path: Path) -> "Image.Image":
    """Return a sheet that an artifact brings along: a PNG only, since Pillow starts a program for some other formats."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as picture:
                return picture.copy()
    except Exception as error:  # Pillow raises more kinds than anybody lists
        raise CorruptError(f"{str(path)!r} is no PNG, or damaged ({error}). Make the artifact again.") from error


def _config_number(folder: Path, manifest: Manifest, name: str) -> float:
    value = manifest.config.get(name)
    if not isinstance(value, int | float):
        raise CorruptError(f"{str(folder)!r} was made with {name} = {value!r}, expected a number. Do not use it.")
    return float(value)
