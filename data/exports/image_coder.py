"""Images as PNG or WebP, without loss.

What is written is read back to the same bytes, so only what these formats hold exactly is taken: grey and
colour images of 8 bits, and grey ones as PNG only.
"""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lsmix.data.errors import RecipeError

__all__ = ["Encoding", "ImageCoder"]

Encoding = Literal["png", "webp"]
# Of 32×32 photographs zlib's level 6 saves 3% over level 1 and takes 9% longer; WebP's slower methods save as little.
_PNG_LEVEL = 1
_GREY, _COLOUR = 1, 3


class ImageCoder:
    """Encodes one image after the other.

    Raises:
        RecipeError: images of so many channels cannot be kept exactly.
    """

    def __init__(self, encoding: Encoding, image_shape: tuple[int, int, int]) -> None:
        channels = image_shape[2]
        if channels not in (_GREY, _COLOUR):
            raise RecipeError(
                f"PNG and WebP keep images of 1 or 3 channels, and this pool's have {channels}. Choose hdf5."
            )
        if encoding == "webp" and channels == _GREY:
            raise RecipeError("WebP has no grey images, and this pool's have one channel. Choose png.")
        self.ending: str = encoding
        self._grey = channels == _GREY

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Return the file of an image uint8 (H, W, C)."""
        content = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if self._grey else image)
        if self.ending == "png":
            picture.save(content, "PNG", compress_level=_PNG_LEVEL)
        else:
            picture.save(content, "WEBP", lossless=True, quality=0, method=0, exact=True)
        return content.getvalue()
