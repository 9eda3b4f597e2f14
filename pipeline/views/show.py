"""The functions behind ``lsmix show``: the summary of an artifact, an image grid, and the HTML page of a pool."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from lsmix.data.artifact import Artifact
from lsmix.data.atomic import check_replaceable, write_atomic
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.readers.source_images import SourceReport
from lsmix.data.store import local_target, open_artifact
from lsmix.pipeline.config.results import SHEET_FILE

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Drawn", "artifact_facts", "draw_artifact", "write_image"]

_CLASSES = 30  # listed in the summary of a data set
_ROWS = 8  # rows of a grid by default
_MAX_ROWS = 64  # most programs cannot open a taller image


class Drawn(NamedTuple):
    """A file that shows an artifact."""

    kind: str  # "image" or "html"
    target: Path
    what: str  # what the file shows; "" if the artifact has no images and no file was written


def artifact_facts(artifact: Path | str) -> dict[str, Any]:
    """Return a summary of an artifact, the most important fields first.

    Args:
        artifact: Folder or URL of the artifact.

    Raises:
        MissingError: The artifact does not exist or is incomplete.
        FormatError: The artifact has a format that this version of lsmix cannot read.
        CorruptError: The artifact is damaged.
        DownloadError: The URL cannot be reached.
    """
    manifest = open_artifact(artifact).manifest
    facts = {
        "artifact": f"{manifest.stage} {manifest.name}",
        "cache_key": manifest.cache_key,
        "content_digest": manifest.content_digest,
        "files": len(manifest.files),
        "bytes": sum(file.bytes for file in manifest.files),
        "seconds": manifest.seconds,
        "made with": ", ".join(f"{name} {value}" for name, value in manifest.environment.get("versions", {}).items()),
        "device": manifest.environment.get("device", "none"),
        "inputs": ", ".join(
            f"{record.role} {record.cache_key or record.content_digest[:12]}" for record in manifest.inputs
        ),
    }
    counts = {name: _COUNT_TEXTS.get(name, _short)(value) for name, value in manifest.counts.items()}
    return {**facts, "counts": counts, "config": {name: _short(value) for name, value in manifest.config.items()}}


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, … {len(value):,} in total]"
    return value


def _class_text(numbers: Any) -> Any:
    """Return the first 30 classes of a data set, each with its number of training images, as text."""
    if not isinstance(numbers, dict):
        return numbers
    more = [f"… {len(numbers):,} in total"] if len(numbers) > _CLASSES else []
    return ", ".join([*(f"{name} {number}" for name, number in list(numbers.items())[:_CLASSES]), *more])


def _source_text(source: Any) -> Any:
    """Return the report on a data set's source files as text; other values are returned unchanged."""
    try:
        return "; ".join(msgspec.convert(source, SourceReport).lines())
    except msgspec.ValidationError:
        return source


_COUNT_TEXTS = {"class_images": _class_text, "source": _source_text}


def draw_artifact(
    artifact: Path | str,
    *,
    image: Path | str | None = None,
    html: Path | str | None = None,
    data: Path | str | None = None,
    rows: int | None = None,
) -> list[Drawn]:
    """Write an image grid of an artifact, an HTML page of a pool, or both.

    Args:
        artifact: Folder or URL of the artifact.
        image: PNG file to write, if any.
        html: HTML file to write, if any; for pools only.
        data: Folder or URL of the pool's data set artifact, for the page; see ``render_pool_page``.
        rows: Rows of the grid, 1 to 64 (default 8), or samples on the page (default 120).

    Raises:
        LsmixError: An argument is invalid, the artifact cannot be read, or a file cannot be written.
    """
    if data and not html:
        raise RecipeError("--data needs --html: it names the data set whose images the page shows.")
    if rows and not (image or html):
        raise RecipeError("--rows needs --image or --html: it sets the number of rows that they show.")
    picture = local_target(image, "an image") if image else None
    page = local_target(html, "a page") if html else None
    for target in filter(None, (picture, page)):
        check_replaceable(target)
    opened = open_artifact(artifact)
    drawn = []
    if picture:
        if rows and rows > _MAX_ROWS:
            raise RecipeError(
                f"An image has 1 to {_MAX_ROWS} rows, got --rows {rows}. Write a page with --html to see more."
            )
        drawn.append(Drawn("image", picture, write_image(opened, picture, rows=rows or _ROWS)))
    if page:
        from lsmix.pipeline.views.pool_page import PAGE_SAMPLES, render_pool_page

        content, what = render_pool_page(opened, samples=rows or PAGE_SAMPLES, data=data)
        write_atomic(page, content.encode())
        drawn.append(Drawn("html", page, what))
    return drawn


def write_image(artifact: Path | str | Artifact, target: Path, *, rows: int) -> str:
    """Write images of an artifact to a PNG and return what it shows, or "" if the artifact has no images.

    A pool is shown as x₁ | mix | x₂ if its data set is in the same workspace; otherwise only the mixes are shown,
    ordered by their share of x₂.
    """
    from lsmix.pipeline.views.images import png_bytes

    opened = open_artifact(artifact)
    draw = {
        "mix": _pool_grid,
        "ingest": _dataset_grid,
        "train-glow": _flow_grid,
        "naturalness": _naturalness_grid,
    }.get(opened.manifest.stage)
    if draw is None:
        return ""
    picture, what = draw(opened, rows)
    write_atomic(target, png_bytes(picture))
    return what


def _pool_grid(artifact: Artifact, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.pool import open_pool
    from lsmix.pipeline.views.images import pool_picture
    from lsmix.pipeline.views.pool_sources import source_images

    pool = open_pool(artifact)
    train = source_images(pool)
    what = "x₁ | mix | x₂" if train else "images of the pool, ordered by their share of x₂"
    return pool_picture(pool, train, rows), what


def _dataset_grid(artifact: Artifact, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.dataset import open_dataset
    from lsmix.pipeline.views.images import GRID_COLUMNS, image_grid, in_rows

    images = open_dataset(artifact).train.images[: rows * GRID_COLUMNS]
    return image_grid(in_rows(images, GRID_COLUMNS)), "the first training images"


def _flow_grid(artifact: Artifact, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.training import sample
    from lsmix.pipeline.views.images import GRID_COLUMNS, image_grid, in_rows

    temperature = _config_number(artifact, "temperature")
    images = sample(load_flow(artifact), rows * GRID_COLUMNS, temperature=temperature)
    return image_grid(in_rows(images, GRID_COLUMNS)), f"samples at temperature {temperature}"


def _naturalness_grid(artifact: Artifact, rows: int) -> "tuple[Image.Image, str]":
    rate = _config_number(artifact, "lam")
    return _read_png(artifact), f"x₁ | mixes of each method at λ = {rate:g} | x₂"


def _read_png(artifact: Artifact) -> "Image.Image":
    """Return the stored image grid of an artifact. Only PNG is accepted: for some formats Pillow starts a program."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(artifact.file(SHEET_FILE).read_bytes()), formats=("PNG",)) as picture:
                return picture.copy()
    except Exception as error:  # Pillow documents no complete list of its errors
        raise CorruptError(
            f"{artifact.where(SHEET_FILE)!r} is damaged or not a PNG file ({error}). Rebuild the artifact."
        ) from error


def _config_number(artifact: Artifact, name: str) -> float:
    value = artifact.manifest.config.get(name)
    if not isinstance(value, int | float):
        raise CorruptError(
            f"The manifest of {artifact.location!r} is damaged: expected a number for {name}, got {value!r}. "
            "Rebuild the artifact."
        )
    return float(value)
