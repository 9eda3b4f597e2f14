"""Where the images behind latents and pools come from, as it travels with them.

The one rule: no paths; the data set is named by its contents, so that whoever has the published files can make it again.
"""

from typing import Any

import msgspec

from lsmix.data.errors import CorruptError

__all__ = ["Origin", "read_origin"]


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """The data set that the images are from."""

    root: str  # root digest of its artifact
    config: dict[str, Any]  # how its splits were chosen from the published files
    licence: str  # "" where it is unknown
    citation: str  # "" where it is unknown
    train_images: int  # rows of the train split, which sources are counted in


def read_origin(attributes: dict[str, Any], what: str) -> Origin:
    """Return the origin that a store's attributes hold under ``origin``.

    Raises:
        CorruptError: it is missing or not whole; ``what`` begins the message.
    """
    try:
        return msgspec.convert(attributes.get("origin"), Origin)
    except msgspec.ValidationError as error:
        raise CorruptError(f"{what} does not say where its images are from: {error}. Make it again.") from error
