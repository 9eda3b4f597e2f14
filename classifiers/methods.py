"""The mixing methods in pixel space by name. Imports no torch, so that recipes are checked at once."""

from typing import Final

from lsmix.data.methods import Registry

__all__ = ["PIXEL_METHODS"]

PIXEL_METHODS: Final = Registry(
    "mixing method in pixel space",
    "lsmix.pixel_methods",
    {
        "mixup": "lsmix.classifiers.pixel_mixing:mixup",
        "cutmix": "lsmix.classifiers.pixel_mixing:cutmix",
        "resizemix": "lsmix.classifiers.pixel_mixing:resizemix",
        "fmix": "lsmix.classifiers.pixel_mixing:fmix",
    },
)
