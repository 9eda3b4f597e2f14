"""The README of an export: what it is, what its columns mean, and a line that loads it.

Text from data (names, licences, citations) stands in indented blocks, where Markdown leaves it alone, and what does not
print is shown as its escape.
"""

import textwrap

from lsmix.data.errors import escape_terminal, printable_words
from lsmix.data.exports.format import ExportFormat
from lsmix.data.exports.metadata import ExportFacts
from lsmix.data.pool import Pool, PoolAttributes

__all__ = ["readme_text"]

_TEXT = """\
# A pool of mixed images

{images} images of {height}×{width}×{channels}, each mixed from training images of the base set; made and exported by lsmix.
To read them, start Python in another folder, set `folder` to the path of this one, and import the package named here:

    {loads_with}

For each image:

{columns}


    (1 - share_b) * cross_entropy(output, label_a) + share_b * cross_entropy(output, label_b)

{form_note}`lsmix-export.json` has all that is known of the pool, `SHA256SUMS` a checksum of every file: `sha256sum -c SHA256SUMS`, or
`lsmix verify` on this folder.

Root digest of the pool:

    {root}

SHA-256 over the bytes of all images, row by row:

    {pixels}

Class names by number:

{class_names}

Licence of the base set:

{licence}

Citation of the base set:

{citation}
"""


def readme_text(pool: Pool, facts: ExportFacts, form: ExportFormat) -> str:
    """Return the README of a pool's export in some form."""
    height, width, channels = facts.image_shape
    return _TEXT.format(
        images=facts.images,
        height=height,
        width=width,
        channels=channels,
        loads_with=form.loads_with,
        columns=_columns(pool.attributes),
        form_note=f"{form.note}\n\n" if form.note else "",
        root=facts.root,
        pixels=facts.digests["image"],
        class_names=_class_list(facts.class_names),
        licence=_block(facts.licence or "unknown: ask whoever gave you the base set before you share this"),
        citation=_block(facts.citation or "unknown"),
    )


def _class_list(names: list[str]) -> str:
    digits = len(str(len(names) - 1))
    return _block("\n".join(f"{label:{digits}}  {printable_words(name)}" for label, name in enumerate(names)))


def _columns(attributes: PoolAttributes) -> str:
    lines = []
    for column in attributes.columns():
        words = ", ".join(f"{number} {word}" for number, word in enumerate(column.words))
        lines.append(f"- `{column.name}`: {column.description}" + (f" ({words})" if words else ""))
    return "\n".join(lines)


def _block(text: str) -> str:
    lines = [escape_terminal(line).rstrip() for line in text.splitlines() if line.strip()]
    return textwrap.indent("\n".join(lines) or "(empty)", "    ")
