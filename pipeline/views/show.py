"""The parts of ``lsmix show``: an artifact's facts, a picture with a grid of its images, and the page of a pool."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lsmix.data.artifact import Manifest, check_sizes, read_manifest
from lsmix.data.atomic import check_replaceable, write_atomic
from lsmix.data.dataset import DATASET_NAME
from lsmix.data.errors import CorruptError, RecipeError
from lsmix.data.pool import POOL_NAME
from lsmix.data.progress import NullProgress, Progress
from lsmix.data.remote import local_folder, local_target
from lsmix.data.sharing.store import download_artifact, naming_urls, without_store
from lsmix.data.sharing.transfer import folder_name
from lsmix.pipeline.config.results import DATASET_FILE, SHEET_FILE
from lsmix.pipeline.workspace.local import input_folders

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Drawn", "artifact_facts", "draw_artifact", "write_image"]

_ROWS = 8  # of a grid by default
_MAX_ROWS = 64  # a higher picture cannot be opened by most programs


class Drawn(NamedTuple):
    """A file that shows an artifact."""

    kind: str  # "image" or "html"
    target: Path
    what: str  # what it shows; "" if the artifact has no images, and so there is no file


@naming_urls()
def artifact_facts(artifact: Path | str, progress: Progress | None = None) -> dict[str, Any]:
    """Return the facts of an artifact, the most important first.

    Args:
        artifact: its folder, or its URL, from which it is downloaded to the cache first.
        progress: optional progress reporter.

    Raises:
        MissingError, FormatError, CorruptError: it is missing, incomplete, of another version, or damaged.
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
    facts |= {name: _short(value) for name, value in manifest.counts.items()}
    facts |= {f"config.{name}": _short(value) for name, value in manifest.config.items()}
    return facts


def _folder_of(artifact: Path | str, progress: Progress | None) -> Path:
    return download_artifact(without_store(artifact, POOL_NAME), progress or NullProgress())


def _short(value: Any) -> Any:
    if isinstance(value, list) and len(value) > 8:
        return f"[{', '.join(map(str, value[:8]))}, … {len(value):,} in total]"
    return value


@naming_urls()
def draw_artifact(
    artifact: Path | str,
    *,
    image: Path | str | None = None,
    html: Path | str | None = None,
    data: Path | str | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> list[Drawn]:
    """Draw an artifact: a grid of its images, or for a pool a page to look through, or both.

    Args:
        artifact: its folder, or its URL, from which it is downloaded to the cache first.
        image: the PNG to write; without it and without ``html``, one with the artifact's name in the current folder.
        html: the page to write.
        data: the data set's artifact or its URL, for the page; see ``pool_page.write_pool_page``.
        rows: rows of the grid, 1 to 64, or samples on the page; None for 8, or 120.
        progress: optional progress reporter.

    Raises:
        LsmixError: with one sentence on what is wrong, where, and what to do.
    """
    if data and not html:
        raise RecipeError("--data names the sources for a page. Choose the page's file with --html.")
    picture = local_target(image, "an image") if image else None
    page = local_target(html, "a page") if html else None
    for target in filter(None, (picture, page)):
        check_replaceable(target)
    folder, drawn = _folder_of(artifact, progress), []
    if picture or not page:
        if rows and rows > _MAX_ROWS:
            raise RecipeError(
                f"an image has 1 to {_MAX_ROWS} rows, got --rows {rows}. Write a page with --html to see more."
            )
        here = local_folder(artifact)
        target = picture or Path(
            f"{here.resolve().name if here else folder_name(str(without_store(artifact, POOL_NAME)))}.png"
        )
        drawn.append(Drawn("image", target, write_image(folder, target, rows=rows or _ROWS)))
    if page:
        from lsmix.pipeline.views.pool_page import PAGE_SAMPLES, write_pool_page

        base = download_artifact(without_store(data, DATASET_NAME), progress or NullProgress()) if data else None
        drawn.append(Drawn("html", page, write_pool_page(folder, page, samples=rows or PAGE_SAMPLES, data=base)))
    return drawn


def write_image(folder: Path, target: Path, *, rows: int) -> str:
    """Write a PNG with images of an artifact; return what it shows, or "" if the stage has no images.

    A pool is shown as x₁ | mixes at growing λ | x₂ if its latents and flow are in the same workspace, a pool mixed in
    pixels as x₁ | mix | x₂ if its data set is. All other pools, and those with more sources or drawn corners, are shown
    as their own images, ordered by their share of x₂.
    """
    from lsmix.pipeline.views.images import png_bytes

    manifest = read_manifest(folder)
    draw = {
        "mix": _pool_grid,
        "ingest": _dataset_grid,
        "train-glow": _flow_grid,
        "naturalness": _naturalness_grid,
    }.get(manifest.stage)
    if draw is None:
        return ""
    picture, what = draw(folder, manifest, rows)
    write_atomic(target, png_bytes(picture))
    return what


def _pool_grid(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.pool import open_pool
    from lsmix.pipeline.views.images import GRID_TITLES, image_grid, mixed_rows, own_images, sample_grid

    pool = open_pool(folder)
    inputs = input_folders(folder, manifest)
    plain = pool.sources == 2 and "corner" not in pool.columns  # growing λ shows two sources, and the first corner
    if inputs is None or not (plain or "dataset" in inputs):
        return image_grid(own_images(pool, rows)), "images of the pool, ordered by their share of x₂"
    if "dataset" in inputs:
        from lsmix.data.dataset import open_dataset

        train = open_dataset(inputs["dataset"]).train.images
        return image_grid(sample_grid(pool, train, rows), column_titles=GRID_TITLES), "x₁ | mix | x₂"
    from lsmix.data.latents import open_latents
    from lsmix.glow.checkpoint import load_flow
    from lsmix.pipeline.views.figures import INTERPOLATION_TITLES, interpolation_grid

    chosen = mixed_rows(pool, rows)
    pairs = list(zip(pool.source_a[chosen].tolist(), pool.source_b[chosen].tolist(), strict=True))
    grid = interpolation_grid(load_flow(inputs["flow"]), open_latents(inputs["latents"]), pairs, method=pool.method)
    return image_grid(grid, column_titles=INTERPOLATION_TITLES), "x₁ | mixes at growing λ | x₂"


def _dataset_grid(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.data.dataset import open_dataset
    from lsmix.pipeline.views.images import GRID_COLUMNS, image_grid, in_rows

    images = open_dataset(folder / DATASET_FILE).train.images[: rows * GRID_COLUMNS]
    return image_grid(in_rows(images, GRID_COLUMNS)), "the first training images"


def _flow_grid(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    from lsmix.glow.checkpoint import load_flow
    from lsmix.glow.training import sample
    from lsmix.pipeline.views.images import GRID_COLUMNS, image_grid, in_rows

    temperature = _config_number(folder, manifest, "temperature")
    images = sample(load_flow(folder), rows * GRID_COLUMNS, temperature=temperature)
    return image_grid(in_rows(images, GRID_COLUMNS)), f"samples at temperature {temperature}"


def _naturalness_grid(folder: Path, manifest: Manifest, rows: int) -> "tuple[Image.Image, str]":
    rate = _config_number(folder, manifest, "lam")
    return _read_png(folder / SHEET_FILE), f"x₁ | mixes of each method at λ = {rate:g} | x₂"


def _read_png(path: Path) -> "Image.Image":
    """Return a picture of an artifact: PNG alone, since Pillow starts a program for some other formats."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as picture:
                return picture.copy()
    except Exception as error:  # Pillow documents no complete list of its errors
        raise CorruptError(f"{str(path)!r} is not a PNG, or damaged ({error}). Rebuild the artifact.") from error


def _config_number(folder: Path, manifest: Manifest, name: str) -> float:
    value = manifest.config.get(name)
    if not isinstance(value, int | float):
        raise CorruptError(f"{str(folder)!r} was made with {name} = {value!r}, expected a number. Do not use it.")
    return float(value)
