"""The 1,797 handwritten digits of 8×8 grey pixels that come with scikit-learn: a data set that is always there.

Their bytes are known beforehand, so a key can name them without reading them.
"""

import hashlib
from pathlib import Path

import numpy as np

from lsmix.data.errors import SourceError
from lsmix.data.readers.source_images import PublishedData, SourceFormat, Split
from lsmix.data.rng import stratified_sample

__all__ = ["DIGITS", "DIGITS_SHA256", "read_digits"]

DIGITS_SHA256 = "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"  # of the images' bytes, then the labels' as little-endian int64, in scikit-learn's order
_TEST_IMAGES = 297
_LEVELS = 16  # scikit-learn gives counts of set pixels, 0 to 16


def read_digits(path: Path | None = None) -> PublishedData:
    """Return the digits: 1,500 train and 297 test images, uint8 (N, 8, 8, 1); ``path`` is not looked at.

    The authors' split is not kept by scikit-learn, so the test images are a fixed choice, with every class at its share.

    Raises:
        SourceError: scikit-learn carries other digits than the known ones.
    """
    # Imported here since it takes a second, which no other format should pay.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # v·255/16 rounded to the nearest, halves up, without leaving the integers.
    scaled = (images.astype(np.int64) * 255 * 2 + _LEVELS) // (2 * _LEVELS)
    pixels = scaled.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype("<i8")
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    if digest != DIGITS_SHA256:
        raise SourceError(
            f"scikit-learn's digits are not the known ones: expected sha256 {DIGITS_SHA256[:12]}…, got {digest[:12]}…. "
            "Reinstall scikit-learn, or use another data set."
        )
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
    looks_for="nothing: the digits come with scikit-learn and have no path",
    recognise=lambda path: False,
    files=lambda path: [],
    read=read_digits,
)
