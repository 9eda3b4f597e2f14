"""``lsmix demo --photos``: mix the user's own photos with the flow that is bundled with lsmix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.atomic import write_atomic
from lsmix.data.dataset import open_dataset
from lsmix.data.errors import MissingError, RecipeError, SourceError, format_count
from lsmix.data.latents import open_latents
from lsmix.data.progress import Progress
from lsmix.data.readers.registry import SourceConfig, summarise_source
from lsmix.data.readers.source_images import ImageConfig, ImageError
from lsmix.data.store import NATURAL_32
from lsmix.pipeline.engine.runner import Built
from lsmix.pipeline.starter import split_sizes
from lsmix.pipeline.views.figures import draw_figure, figure_png

__all__ = ["draw_photos", "photos_recipe"]

_SIDE = 32  # pixels, of the flow's images
_MAX_IMAGES = 600  # approximate limit, so that the demo takes a few minutes
_COPIES, _EPOCHS = 6, 12
_SHEET, _SHEET_ROWS = "photos.png", 16


def photos_recipe(folder: Path | str, progress: Progress) -> tuple[dict[str, Any], Any]:
    """Return a recipe that mixes the photos in a folder, and its in-memory data (None if it reads the folder).

    With class folders, classifiers are compared as in the demo. Otherwise the photos are loaded into memory without
    labels, and the recipe only makes a pool.

    Raises:
        MissingError: The folder does not exist or contains fewer than two readable photos.
    """
    source = Path(folder).expanduser()
    if not source.is_dir():
        raise MissingError(f"folder {str(folder)!r} does not exist. Give a folder that contains photos.")
    recipe: dict[str, Any] = {
        "name": "photos",
        "data": {},
        "flow": {"path": NATURAL_32},
        "pools": {"lsmix": {"alpha": 0.4, "copies": _COPIES}},
        "report": {"title": "Your photos, mixed", "bits_images": 256},
    }
    fields: dict[str, Any] = {"path": source, "format": "image-folder", "size": _SIDE, "on_error": "skip"}
    try:
        summary = summarise_source(SourceConfig(path=str(source), format="image-folder"))
        fields |= split_sizes(summary)
    except (SourceError, RecipeError) as error:
        progress.info(f"no class folders with enough photos; mixing all photos without labels ({error})")
        pixels = _read_all(source, progress)
        recipe["data"] = {"test": 1}
        return recipe, (pixels, np.zeros(len(pixels), np.int64))
    if len(summary.labels["train"]) > 2 * _MAX_IMAGES:  # some may be unreadable
        fields["limit"] = _MAX_IMAGES
    recipe["data"] = fields
    if len(summary.class_names) > 1:
        recipe["classifier"] = {"architecture": "wrn-10-1", "epochs": _EPOCHS, "batch_size": 64, "schedule": "cosine"}
        cutmix, lsmix = {"method": "cutmix"}, {"pool": "lsmix"}
        arms = {"baseline": [], "cutmix": [cutmix], "lsmix": [lsmix], "cutmix-lsmix": [cutmix, lsmix]}
        recipe["runs"] = {name: {"mix": mix, "seeds": [0, 1]} for name, mix in arms.items()}
    return recipe, None


def _read_all(folder: Path, progress: Progress) -> npt.NDArray[np.uint8]:
    """Return photos in a folder and its subfolders as RGB (N, 32, 32, 3); warn about unreadable files."""
    from lsmix.data.readers.images.pixels import IMAGE_ENDINGS, decode_image

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS and file.is_file())
    files = files[:: -(-len(files) // _MAX_IMAGES) or 1]
    rows, unread = [], []
    progress.start("reading photos", len(files), "image")
    for file in files:
        try:
            pixels = decode_image(file.read_bytes(), ImageConfig(size=_SIDE)).pixels
            rows.append(np.broadcast_to(pixels if pixels.ndim == 3 else pixels[..., None], (_SIDE, _SIDE, 3)))
        except (ImageError, OSError):
            unread.append(file.name)
        progress.advance()
    progress.finish()
    if unread:
        more = ", …" if len(unread) > 3 else ""
        progress.warning(f"skipped {format_count(len(unread), 'unreadable image')}: {', '.join(unread[:3])}{more}")
    if len(rows) < 2:
        raise MissingError(f"{str(folder)!r} has {format_count(len(rows), 'readable photo')}; at least 2 are needed.")
    return np.stack(rows)


def draw_photos(built: Sequence[Built]) -> Path:
    """Draw pairs of photos, mixed at increasing λ, to photos.png in the current folder; return its path."""
    from lsmix.glow.checkpoint import load_flow

    made = {item.stage: item.artifact for item in built}
    drawn = draw_figure(
        "fig4",
        load_flow(NATURAL_32),
        open_latents(made["encode"]),
        open_dataset(made["ingest"]),
        pairs=_SHEET_ROWS,
    )
    write_atomic(Path(_SHEET), figure_png(drawn))
    return Path(_SHEET).resolve()
