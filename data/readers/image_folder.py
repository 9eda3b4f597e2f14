"""Data sets as folders of image files: one sub-folder a class, or train/ and test/ (or val/) with such sub-folders.

Every image counts or is named in an error. All have one size, nothing is resized, and the classes are the
folders' names in order. Where test/ and val/ are both there, val/ is not read. Names that begin with a dot, and files
that have no image's ending, are passed over.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lsmix.data.errors import SourceError
from lsmix.data.readers.decode import IMAGE_ENDINGS, ImageDecoder
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split

__all__ = ["IMAGE_FOLDER"]

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
    # Pipes and links to nothing count, so that they are refused by name.
    return [entry for entry in _visible(folder) if entry.suffix.lower() in IMAGE_ENDINGS and not entry.is_dir()]


def _list_split(folder: Path) -> dict[str, list[Path]]:
    """Return the images of each class of one split."""
    listed = {}
    for class_folder in _class_folders(folder):
        listed[class_folder.name] = _image_files(class_folder)
        if not listed[class_folder.name]:
            raise SourceError(
                f"class folder {str(class_folder)!r} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}); "
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
    decoder = ImageDecoder()
    pixels = {
        split: [decoder.decode(file, repr(str(file))) for files in classes.values() for file in files]
        for split, classes in listed.items()
    }
    grey = all(image.ndim == 2 for images in pixels.values() for image in images)
    splits = {}
    for split, classes in listed.items():
        labels = [class_names.index(name) for name, files in classes.items() for _ in files]
        splits[split] = Split(_stack(pixels.pop(split), grey), np.array(labels, np.int64))
    return PublishedData(splits=splits, class_names=class_names)


def _stack(images: list[npt.NDArray[np.uint8]], grey: bool) -> npt.NDArray[np.uint8]:
    """Return uint8 (N, H, W, 1) where all are grey, else (N, H, W, 3) with the grey ones in three equal channels."""
    shape: tuple[Any, ...] = (len(images), *images[0].shape[:2], 1 if grey else 3)
    stacked = np.empty(shape, np.uint8)
    for row, image in zip(stacked, images, strict=True):
        row[...] = image[..., None] if image.ndim == 2 else image
    return stacked


IMAGE_FOLDER = SourceFormat(name="image-folder", looks_for=_LOOKS_FOR, recognise=_recognise, files=_files, read=_read)
