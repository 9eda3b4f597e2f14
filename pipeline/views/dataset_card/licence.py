"""The licence of the images behind a pool, under the names by which licence lists and hubs know it.

Unrecognised licences are passed on as ``other``, missing ones as ``unknown``; nothing is guessed.
"""

import re
from typing import Final, NamedTuple

from lsmix.pipeline.views.dataset_card.markup import clean

__all__ = ["NO_LICENCE", "Licence", "read_licence"]

NO_LICENCE: Final = "No licence is recorded for these images. Set data.licence in the recipe."

# SPDX identifiers whose lower-case form is also what the Hugging Face hub calls the licence.
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
    """A licence, as people and programs name it."""

    text: str  # as it is given; "" where none is named
    spdx: str  # identifier in the list at spdx.org; "" where it has none
    hub: str  # what the front matter of a data-set card calls it: an identifier of the hub, "other" or "unknown"

    @property
    def url(self) -> str:
        """Page of the licence at spdx.org, or ""."""
        return f"https://spdx.org/licenses/{self.spdx}" if self.spdx else ""


def read_licence(text: str) -> Licence:
    """Return a licence by its SPDX identifier or in words, as a data set or a user names it; "" is none.

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
