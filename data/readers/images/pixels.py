"""Decoding one image file to 8-bit pixels: orientation, transparency, colour spaces, and the wanted size.

An image's kind and size are known from its header and are checked before its pixels are decoded.
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

from lsmix.data.readers.source_images import ImageConfig, ImageError, most_unpacked

__all__ = ["IMAGE_ENDINGS", "Picture", "decode_image", "flatten_image", "is_image_name", "resize_pixels"]

_HEIC_ENDINGS = frozenset([".heic", ".heif"])
IMAGE_ENDINGS = _HEIC_ENDINGS | frozenset(
    [
        ".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm",
        ".tif", ".tiff", ".webp",
    ]
)  # fmt: skip

# The formats that Pillow decodes by itself; others start programs (EPS) or are no images of a data set.
_PILLOW_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_ANIMATED = frozenset(["AVIF", "GIF", "HEIF", "PNG", "TIFF", "WEBP"])  # an MPO's other frames are no animation
_COLOUR_MODES = frozenset(["CMYK", "P", "RGB", "YCbCr"])
_SPARE_BYTES = 16 << 20  # that any image may unpack to: no photograph shrinks to a hundredth
_TILE_TAGS = (322, 323)  # of TIFF: width and height of a tile
_ORIENTATION_TAG = 0x0112  # of EXIF
_FIRST_TRANSPOSED = 5  # from this orientation on width and height change places
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REDUCING_GAP = 3.0  # Pillow: from here on reducing by whole factors first looks the same as Lanczos alone


def is_image_name(name: str) -> bool:
    """Tell whether a file's name ends as those of images do."""
    return PurePosixPath(name).suffix.lower() in IMAGE_ENDINGS


class Picture(NamedTuple):
    """A decoded image."""

    pixels: npt.NDArray[np.uint8]  # (H, W) of a grey image, (H, W, 3) of any other
    more_frames: bool  # whether the file has further frames, which are not used
    enlarged: bool  # whether it was smaller than the wanted size


def decode_image(content: bytes | Image.Image, config: ImageConfig, *, size_only: bool = False) -> Picture:
    """Decode the content of an image file, and bring it to ``config.target`` if that is set; or an image as ``flatten_image`` returns it.

    With ``size_only`` the pixels are zeros that take no memory.

    Pillow's warnings about file sizes must be errors while this runs; ``load.load_images`` sees to it for all threads.

    Raises:
        ImageError: it is no image that is read here, damaged, or far too big.
    """
    if isinstance(content, Image.Image):
        return _size_of(content) if size_only else _picture(content, config, content.size)
    try:
        # From memory alone: a chunk that claims more bytes than there are would be given room for them otherwise.
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return _size_of(image) if size_only else _decode(image, len(content), config)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("is far too big for an image of a data set", "Remove it.") from error
    except Exception as error:  # Pillow's decoders raise more kinds than can be listed, on damaged files
        if content[4:8] == b"ftyp" and content[8:12] in _HEIC_BRANDS and "HEIF" not in _formats():
            raise ImageError(
                "is a HEIC image, which needs the extra 'heic'",
                "Run: pip install 'lsmix[heic]', or convert it.",
            ) from error
        raise ImageError("is not an image that lsmix can read") from error


def resize_pixels(images: npt.NDArray[np.uint8], config: ImageConfig) -> npt.NDArray[np.uint8]:
    """Bring images uint8 (N, H, W, C), C 1 or 3, to ``config.target``, each as an image file would be."""
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
            f"would unpack from {file_bytes} to {unpacked} bytes, as no image of a data set does", "Remove it."
        )
    if config.target and image.format in ("JPEG", "MPO"):
        # Twice the wanted size, so that the Lanczos filter decides what remains; either side may become the other.
        factor = 2 * max(config.target) / min(image.size)
        image.draft(None, (math.ceil(factor * image.size[0]), math.ceil(factor * image.size[1])))  # None keeps the mode
    more_frames = image.format in _ANIMATED and bool(getattr(image, "is_animated", False))
    size = image.size
    image.load()
    return _picture(flatten_image(image, config.background), config, size)._replace(more_frames=more_frames)


def _picture(image: Image.Image, config: ImageConfig, size: tuple[int, int]) -> Picture:
    """Return an upright image, grey or RGB, at the wanted size; ``size`` is its own."""
    enlarged = bool(config.target) and min(size) < min(config.target or (0,))
    return Picture(np.array(_resized(image, config)), more_frames=False, enlarged=enlarged)


def _size_of(image: Image.Image) -> Picture:
    height, width = image.size if _orientation(image) >= _FIRST_TRANSPOSED else image.size[::-1]
    return Picture(np.broadcast_to(np.uint8(0), (height, width)), more_frames=False, enlarged=False)


def _tile_pixels(image: Image.Image) -> int:
    """Return the pixels of a tile of a TIFF, which is unpacked as a whole however small the image is; 0 of other images."""
    if not isinstance(image, TiffImageFile):
        return 0
    width, height = (int(image.tag_v2.get(tag, 0)) for tag in _TILE_TAGS)
    return width * height


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # noqa: BLE001  # damaged metadata of a sound image raise many kinds; the image is used as stored
        return 1


def flatten_image(image: Image.Image, background: str) -> Image.Image:
    """Return an image turned as its EXIF data say: mode L of a grey one, RGB of any other, with transparent pixels on the background.

    Raises:
        ImageError: its pixels are of another kind.
    """
    turn = _TURNS.get(_orientation(image))
    if turn is not None:  # one of them is 0
        image = image.transpose(turn)
    if image.mode.startswith("I;16"):  # the high byte, as Pillow takes it of 16-bit colours
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    transparent = "A" in image.mode or "a" in image.mode or "transparency" in image.info
    if not transparent and image.mode in ("1", "L"):
        return image.convert("L")
    if not transparent and image.mode in _COLOUR_MODES:
        return image.convert("RGB")
    if not transparent or image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa"):
        raise ImageError(f"has pixels of the kind {image.mode!r}; expected 8 or 16 bits, grey or colour", "Convert it.")
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
