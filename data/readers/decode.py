"""Decoding image files of a data set in which all images have one size.

An image's kind and size are known from its header and checked before its pixels are decoded, and every
error names the file. Pixels are taken as stored: an EXIF rotation is not applied.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import check_file

__all__ = ["IMAGE_ENDINGS", "ImageDecoder"]

IMAGE_ENDINGS = frozenset([".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"])

# The formats that Pillow decodes by itself; others start programs (EPS) or are no images of a data set.
_PILLOW_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GREY_MODES = frozenset(["1", "L"])
_MAX_FILE_BYTES = 64 << 20  # of an image in a data set, packed
_RATIO = 100  # an image of more than this many times its file's size …
_RATIO_BYTES = 16 << 20  # … and of more than this is a bomb: no photograph shrinks so far
_TILE_TAGS = (322, 323)  # of TIFF: width and height of a tile
_COLOUR_MODES = frozenset(["CMYK", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"])


class ImageDecoder:
    """Decodes one image after another; the first says the size that all others must have, unless it is known before."""

    def __init__(self, width: int = 0, height: int = 0) -> None:
        self._first = "the data set" if width and height else ""
        self._size = (width, height)

    def decode(self, source: Path | bytes, name: str) -> npt.NDArray[np.uint8]:
        """Return uint8 (H, W) of a grey image, (H, W, 3) of any other.

        Args:
            source: the file, or its bytes.
            name: what to call it in messages.

        Raises:
            SourceError: it is no image that is read here, damaged, far too big, or of another size than the first.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what Pillow thinks of a file's metadata
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                return self._decode(source if isinstance(source, bytes) else _content(source, name), name)
        except SourceError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise SourceError(f"{name} is far too big for an image of a data set ({error}). Remove it.") from error
        except Exception as error:  # Pillow's decoders raise more kinds than anybody lists, on damaged files
            raise SourceError(f"{name} cannot be read as an image ({error}). Mend or remove it.") from error

    def _decode(self, source: bytes, name: str) -> npt.NDArray[np.uint8]:
        # From memory alone: a chunk that claims more bytes than there are would be given room for them otherwise.
        with Image.open(io.BytesIO(source), formats=_PILLOW_FORMATS) as image:
            if image.mode not in _GREY_MODES | _COLOUR_MODES:
                raise SourceError(
                    f"{name} has pixels of the kind {image.mode!r}; expected 8-bit grey or colour. Convert it."
                )
            if not self._first:
                self._first, self._size = name, image.size
            if image.size != self._size:
                raise SourceError(
                    f"images differ in size: {self._first} has {self._size[0]}×{self._size[1]} pixels, {name} has "
                    f"{image.size[0]}×{image.size[1]}. Bring all to one size first."
                )
            size = 3 * max(image.size[0] * image.size[1], _tile_pixels(image))
            if size > max(_RATIO_BYTES, _RATIO * len(source)):
                raise SourceError(
                    f"{name} would unpack from {len(source)} to {size} bytes, as no image of a data set does. Remove it."
                )
            return np.array(image.convert("L" if image.mode in _GREY_MODES else "RGB"))


def _tile_pixels(image: Image.Image) -> int:
    """Return the pixels of a tile of a TIFF, which is unpacked as a whole however small the image is; 0 of other images."""
    if not isinstance(image, TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_TAGS)
    return width * height


def _content(path: Path, name: str) -> bytes:
    check_file(path)
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise SourceError(f"{name} has more than {_MAX_FILE_BYTES} bytes, as no image of a data set has. Remove it.")
    return content
