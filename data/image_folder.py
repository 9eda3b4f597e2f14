"""Data sets as folders of image files: one sub-folder a class, or train/ and test/ (or val/) with such sub-folders.

The one rule: every image counts or is named in an error. All have one size, nothing is resized, and the classes are the
folders' names in order. Pixels are taken as stored: an EXIF rotation is not applied. Where test/ and val/ are both
there, val/ is not read. Names that begin with a dot, and files that have no image's ending, are passed over.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lsmix.data.errors import SourceError
from lsmix.data.source_images import PublishedData, SourceFormat, Split

__all__ = ["IMAGE_FOLDER"]

# The formats that Pillow decodes by itself; others start programs (EPS) or are no images of a data set.
_PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ENDINGS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])
_GREY_MODES = frozenset(["1", "L"])
_COLOUR_MODES = frozenset(["CMYK", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"])
_LOOKS_FOR = "a folder with one sub-folder of images a class, or with such a train/ (and test/ or val/)"


def _recognise(path: Path) -> bool:
    return path.is_dir() and any(_image_files(folder) for folder in _class_folders(_split_folders(path)["train"]))


def _split_folders(path: Path) -> dict[str, Path]:
    if not (path / "train").is_dir():
        return {"train": path}
    folders = {"train": path / "train"}
    for name in ("val", "test"):  # the later wins
        if (path / name).is_dir():
            folders["test"] = path / name
    return folders


def _visible(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _class_folders(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.is_dir()]


def _image_files(folder: Path) -> list[Path]:
    return [entry for entry in _visible(folder) if entry.suffix.lower() in _ENDINGS and entry.is_file()]


def _list_split(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class of one split."""
    listed = {}
    for class_folder in _class_folders(folder):
        listed[class_folder.name] = _image_files(class_folder)
        if not listed[class_folder.name]:
            raise SourceError(
                f"class folder {str(class_folder)!r} holds no images ({', '.join(sorted(_ENDINGS))}); "
                "expected them directly in it. Move them there, or remove the folder."
            )
    if not listed:
        raise SourceError(f"{str(folder)!r} has no class folders; expected {_LOOKS_FOR}. Check the path.")
    return listed


def _list_all(path: Path) -> dict[str, dict[str, list[Path]]]:
    if not path.is_dir():
        raise SourceError(f"{str(path)!r} is no folder; expected {_LOOKS_FOR}. Check the path.")
    listed = {split: _list_split(folder) for split, folder in _split_folders(path).items()}
    unknown = sorted(set(listed.get("test", ())) - set(listed["train"]))
    if unknown:
        raise SourceError(
            f"{str(_split_folders(path)['test'])!r} has the classes {unknown[:10]}, which train/ has not. "
            "Every class needs training images."
        )
    return listed


def _files(path: Path) -> list[Path]:
    return [file for classes in _list_all(path).values() for files in classes.values() for file in files]


def _read(path: Path) -> PublishedData:
    listed = _list_all(path)
    class_names = tuple(listed["train"])
    # The first image of all says the size; it is named where another differs.
    first = next(iter(listed["train"].values()))[0]
    pixels: dict[str, list[npt.NDArray[np.uint8]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        size = _read_image(first).shape[:2]
        for split, classes in listed.items():
            pixels[split] = [
                _same_size(file, _read_image(file), first, size) for files in classes.values() for file in files
            ]
    grey = all(image.ndim == 2 for images in pixels.values() for image in images)
    splits = {}
    for split, classes in listed.items():
        labels = [class_names.index(name) for name, files in classes.items() for _ in files]
        splits[split] = Split(_stack(pixels.pop(split), grey), np.array(labels, np.int64))
    return PublishedData(splits=splits, class_names=class_names)


def _read_image(file: Path) -> npt.NDArray[np.uint8]:
    """Return uint8 (H, W) of a grey image, (H, W, 3) of any other."""
    try:
        with Image.open(file, formats=_PILLOW_FORMATS) as image:
            mode = image.mode
            if mode in _GREY_MODES | _COLOUR_MODES:
                return np.array(image.convert("L" if mode in _GREY_MODES else "RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SourceError(f"{str(file)!r} is far too big for an image of a data set ({error}). Remove it.") from error
    # Pillow's decoders raise these, and more kinds than it documents, on damaged files.
    except (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, OverflowError) as error:
        raise SourceError(f"{str(file)!r} cannot be read as an image ({error}). Mend or remove it.") from error
    raise SourceError(f"{str(file)!r} has pixels of the kind {mode!r}; expected 8-bit grey or colour. Convert it.")


def _same_size(file: Path, image: npt.NDArray[np.uint8], first: Path, size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    if image.shape[:2] != size:
        raise SourceError(
            f"images differ in size: {str(first)!r} has {size[1]}×{size[0]} pixels, {str(file)!r} has "
            f"{image.shape[1]}×{image.shape[0]}. Bring all to one size first."
        )
    return image


def _stack(images: list[npt.NDArray[np.uint8]], grey: bool) -> npt.NDArray[np.uint8]:
    """Return uint8 (N, H, W, 1) where all are grey, else (N, H, W, 3) with the grey ones in three equal channels."""
    shape: tuple[Any, ...] = (len(images), *images[0].shape[:2], 1 if grey else 3)
    stacked = np.empty(shape, np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[...] = image[..., None] if image.ndim == 2 else image
    return stacked


IMAGE_FOLDER = SourceFormat(name="image-folder", looks_for=_LOOKS_FOR, recognise=_recognise, files=_files, read=_read)
