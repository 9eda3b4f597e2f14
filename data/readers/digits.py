"""The built-in data set: 1,797 handwritten digits of 8×8 grey pixels in ``digits.npz``.

They are the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0, in the same order as in scikit-learn.
Changes: stored as two NumPy arrays, ``counts`` (uint8 (1797, 8, 8), 0 to 16) and ``labels`` (uint8 (1797,)).
"""

import hashlib
from pathlib import Path

import numpy as np

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split
from lsmix.data.rng import stratified_sample

__all__ = ["DIGITS", "DIGITS_SHA256", "read_digits"]

# Of the pixels followed by the labels as little-endian int64; part of the cache key.
DIGITS_SHA256 = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"
_TEST_IMAGES = 297
_LEVELS = 16  # the value of a pixel is the number of set pixels in a block of 4×4 binary pixels


def read_digits(path: Path | None = None) -> PublishedData:
    """Return the digits: 1,500 train and 297 test images, uint8 (N, 8, 8, 1); ``path`` is ignored.

    The file contains only the authors' test set, so the test images are a fixed stratified sample of it.

    Raises:
        SourceError: The installed file was changed.
    """
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        counts, labels = arrays["counts"], arrays["labels"].astype("<i8")
    # v·255/16 in integer arithmetic, rounded to the nearest integer, halves up.
    scaled = (counts.astype(np.int64) * 255 * 2 + _LEVELS) // (2 * _LEVELS)
    pixels = scaled.astype(np.uint8).reshape(-1, 8, 8, 1)
    if hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest() != DIGITS_SHA256:
        raise SourceError("The digits included in lsmix were changed. Reinstall lsmix.")
    test = stratified_sample(labels, _TEST_IMAGES, seed=0, words=("digits", "test"))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return PublishedData(
        splits={"train": Split(pixels[train], labels[train]), "test": Split(pixels[test], labels[test])},
        class_names=tuple("0123456789"),
        licence="CC BY 4.0",
        citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository, 1998, doi:10.24432/C50P49",
    )


DIGITS = SourceFormat(
    name="digits",
    recognise=lambda path: False,
    files=lambda path: [],
    read=read_digits,
)
