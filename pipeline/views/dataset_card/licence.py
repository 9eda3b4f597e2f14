"""Licences of images, and their identifiers at SPDX and on the Hugging Face Hub.

Unrecognised licences map to ``other`` and missing licences to ``unknown``; nothing is guessed.
"""

import re
from typing import Final, NamedTuple

from lsmix.pipeline.views.dataset_card.markup import clean

__all__ = ["NO_LICENCE", "Licence", "read_licence"]

NO_LICENCE: Final = "No licence is recorded for these images. Set data.licence in the recipe."

# SPDX identifiers whose lower-case form is the identifier on the Hugging Face Hub.
_ON_THE_HUB: Final = (
    "Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-2.0", "CC-BY-2.5", "CC-BY-3.0", "CC-BY-4.0",
    "CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC-BY-NC-2.0", "CC-BY-NC-3.0", "CC-BY-NC-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-3.0",
    "CC-BY-NC-ND-4.0", "CC-BY-NC-SA-2.0", "CC-BY-NC-SA-3.0", "CC-BY-NC-SA-4.0", "CDLA-Permissive-2.0", "GPL-3.0",
)  # fmt: skip
_HUB_NAMES: Final = {
    "PDDL-1.0": "pddl",
    "ODC-By-1.0": "odc-by",
    "ODbL-1.0": "odbl",
    "CDLA-Sharing-1.0": "cdla-sharing-1.0",
}


class Licence(NamedTuple):
    """A licence as free text and as identifiers."""

    text: str  # as given; "" if none is named
    spdx: str  # SPDX identifier; "" if unrecognised
    hub: str  # value for the front matter of a dataset card: a Hub identifier, "other" or "unknown"

    @property
    def url(self) -> str:
        """The page of the licence at spdx.org, or ""."""
        return f"https://spdx.org/licenses/{self.spdx}" if self.spdx else ""


def read_licence(text: str) -> Licence:
    """Return the licence for an SPDX identifier or free text from a data set or a user; "" means none.

    Example:
        >>> from lsmix.pipeline.views.dataset_card.licence import read_licence
        >>> read_licence("CC BY 4.0").spdx, read_licence("for research only").hub, read_licence("").hub
        ('CC-BY-4.0', 'other', 'unknown')
    """
    text = " ".join(clean(text).split())
    spdx = _KNOWN.get(_squeezed(text), "")
    hub = _HUB_NAMES.get(spdx, spdx.lower()) if spdx else "other"
    return Licence(text=text, spdx=spdx, hub=hub if text else "unknown")


def _squeezed(text: str) -> str:
    return re.sub(r"[\s_-]+", "", text).lower()


_KNOWN: Final = {_squeezed(name): name for name in (*_ON_THE_HUB, *_HUB_NAMES)}
