"""Decode an image file to 8-bit pixels: orientation, transparency, colour spaces, and resizing.

The type and size of an image are read from its header and checked before its pixels are decoded.
"""

import io
import math
from functools import cache
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor
from PIL.TiffImagePlugin import TiffImageFile

from lsmix.data.errors import format_bytes
from lsmix.data.readers.source_images import ImageConfig, ImageError, most_unpacked

__all__ = ["IMAGE_ENDINGS", "Picture", "decode_image", "flatten_image", "is_image_name", "resize_pixels"]

_HEIC_ENDINGS = frozenset([".heic", ".heif"])
IMAGE_ENDINGS = _HEIC_ENDINGS | frozenset(
    [
        ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
        ".tif", ".tiff", ".webp",
    ]
)  # fmt: skip

# Formats that Pillow decodes itself. Others start programs (EPS) or do not occur in data sets.
_PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_ANIMATED = frozenset(["AVIF", "GIF", "HEIF", "PNG", "TIFF", "WEBP"])  # not MPO, whose frames are no animation
_COLOUR_MODES = frozenset(["CMYK", "P", "RGB", "YCbCr"])
_SPARE_BYTES = 16 << 20  # any compression ratio is allowed up to this size; photographs do not reach 100:1
_TILE_TAGS = (322, 323)  # TIFF tags for the width and height of a tile
_ORIENTATION_TAG = 0x0112  # of EXIF
_FIRST_TRANSPOSED = 5  # orientations from this number on swap width and height
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REDUCING_GAP = 3.0  # Pillow's documentation: results are then almost indistinguishable from Lanczos alone


def is_image_name(name: str) -> bool:
    """Return whether a file name has the extension of a supported image type."""
    return PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS


class Picture(NamedTuple):
    """A decoded image."""

    pixels: npt.NDArray[np.uint8]  # (H, W) for grey images, (H, W, 3) for others
    more_frames: bool  # whether the file has further frames, which are ignored
    enlarged: bool  # whether the image was smaller than the target size


def decode_image(content: bytes | Image.Image, config: ImageConfig, *, size_only: bool = False) -> Picture:
    """Decode an image file and resize it to ``config.target``, if that is set.

    The caller must turn Pillow's DecompressionBombWarning into an error; ``load.load_images`` does so for all threads.

    Args:
        content: Content of an image file, or an image from ``flatten_image``.
        config: Target size, fit and background.
        size_only: Return zeros of the image's own size, without allocating memory.

    Raises:
        ImageError: The content is damaged, far too large, or not a supported image.
    """
    if isinstance(content, Image.Image):
        return _size_of(content) if size_only else _picture(content, config, content.size)
    try:
        # From memory, because Pillow would allocate the size that a chunk claims when it reads a file.
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return _size_of(image) if size_only else _decode(image, len(content), config)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("is far too large for an image of a data set", "Remove it.") from error
    except Exception as error:  # for damaged files, Pillow's decoders raise too many types of exceptions to list
        if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS and "HEIF" not in _formats():
            raise ImageError(
                "is a HEIC image, which needs the extra 'heic'",
                "Run: pip install 'lsmix[heic]', or convert it.",
            ) from error
        raise ImageError("is not an image that lsmix can read") from error


def resize_pixels(images: npt.NDArray[np.uint8], config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Resize images uint8 (N, H, W, C) with C = 1 or 3 to ``config.target``, in the same way as image files."""
    pictures = (Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in images)
    rows = [np.asarray(_resized(picture, config)) for picture in pictures]
    stacked = np.stack([row if row.ndim == 3 else row[..., None] for row in rows])
    return np.ascontiguousarray(stacked)


@cache
def _formats() -> tuple[str, ...]:
    if not find_spec("pillow_heif"):
        return _PILLOW_FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return (*_PILLOW_FORMATS, "HEIF")


def _decode(image: Image.Image, file_bytes: int, config: ImageConfig) -> Picture:
    unpacked = 3 * max(math.prod(image.size), _tile_pixels(image))
    if unpacked > most_unpacked(file_bytes, _SPARE_BYTES):
        raise ImageError(
            f"would unpack from {format_bytes(file_bytes)} to {format_bytes(unpacked)}, which is not plausible for a "
            "photograph",
            "Remove it.",
        )
    if config.target and image.format in ("JPEG", "MPO"):
        # Decode at no less than twice the target size and leave the rest to the Lanczos filter. The longer target side
        # is compared with the shorter image side, because the image may still be rotated.
        factor = 2 * max(config.target) / min(image.size)
        image.draft(None, (math.ceil(factor * image.size[0]), math.ceil(factor * image.size[1])))  # None keeps the mode
    more_frames = image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
    size = image.size
    image.load()
    return _picture(flatten_image(image, config.background), config, size)._replace(more_frames=more_frames)


def _picture(image: Image.Image, config: ImageConfig, size: tuple[int, int]) -> Picture:
    """Resize an upright image, grey or RGB; ``size`` is its original size."""
    enlarged = bool(config.target) and min(size) < min(config.target or (0,))
    return Picture(np.array(_resized(image, config)), more_frames=False, enlarged=enlarged)


def _size_of(image: Image.Image) -> Picture:
    height, width = image.size if _orientation(image) >= _FIRST_TRANSPOSED else image.size[::-1]
    return Picture(np.broadcast_to(np.uint8(0), (height, width)), more_frames=False, enlarged=False)


def _tile_pixels(image: Image.Image) -> int:
    """Return the pixels of a TIFF tile, which is decoded completely even if the image is smaller; 0 for others."""
    if not isinstance(image, TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_TAGS)
    return width * height


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001  # damaged metadata raise many types of exceptions; use the image as stored
        return 1


def flatten_image(image: Image.Image, background: str) -> Image.Image:
    """Return an image rotated by its EXIF orientation, on the background if it is transparent, in mode L or RGB.

    Raises:
        ImageError: The image has an unsupported pixel type.
    """
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # compared with None because a Transpose can be 0
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # keep the high byte, like Pillow does for 16-bit RGB
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    if not transparent and image.mode in ("1", "L"):
        return image.convert("L")
    if not transparent and image.mode in _COLOUR_MODES:
        return image.convert("RGB")
    if not transparent or image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise ImageError(f"has the pixel type {image.mode!r}; expected 8 or 16 bits, grey or colour", "Convert it.")
    colour = ImageColor.getrgb(background)
    canvas = Image.new("RGBA", image.size, colour)
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("L" if image.mode in ("1", "L", "LA", "La") and len(set(colour[:3])) == 1 else "RGB")


def _resized(image: Image.Image, config: ImageConfig) -> Image.Image:
    if not config.target or image.size == config.target[::-1]:
        return image
    height, width = config.target
    across, down = width / image.size[0], height / image.size[1]
    if config.fit == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    if config.fit == "crop":
        scale = max(across, down)
        left, top = ((side - wanted / scale) / 2 for side, wanted in zip(image.size, (width, height), strict=True))
        left, top = max(0.0, left), max(0.0, top)
        box = (left, top, image.size[0] - left, image.size[1] - top)
        return image.resize((width, height), Image.Resampling.LANCZOS, box, _REDUCING_GAP)
    scale = min(across, down)
    inner = (max(1, round(image.size[0] * scale)), max(1, round(image.size[1] * scale)))
    colour = ImageColor.getrgb(config.background)
    mode = "L" if image.mode == "L" and len(set(colour)) == 1 else "RGB"
    canvas = Image.new(mode, (width, height), colour[0] if mode == "L" else colour)
    small = image.convert(mode).resize(inner, Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)
    canvas.paste(small, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return canvas
