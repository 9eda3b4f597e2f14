"""What an export says of its pool: labels' names, where it is from, and a digest of every column.

The same pool gives the same facts, so no paths, no times and no machines are in them; and they travel with
their own SHA-256, so that a byte that flips in them is found.
"""

import hashlib
from collections.abc import Callable
from typing import Annotated, Any, Final

import msgspec

from lsmix.data.artifact import InputRecord, read_provenance
from lsmix.data.exports.rows import ColumnDigests, pool_blocks
from lsmix.data.pool import Pool
from lsmix.data.pool_spec import PoolSpec

__all__ = [
    "FACTS_NAME",
    "ArtifactFacts",
    "ExportFacts",
    "gather_facts",
    "seal_facts",
]

FACTS_NAME: Final = "facts"  # what the facts are called inside of a file
_VERSION: Final = 1
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**48)]


class ArtifactFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the pool's manifest says of how it was made."""

    stage_version: int
    name: str
    key: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{12}$")]
    config: dict[str, Any]
    inputs: list[InputRecord]
    counts: dict[str, Any]


class ExportFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All that is known of an exported pool but for its rows."""

    format_version: int = _VERSION
    root: str  # root digest of the pool
    images: _Count  # rows
    image_shape: tuple[_Count, _Count, _Count]  # height, width, channels
    chunk_rows: _Count  # rows in a chunk of the pool's own columns
    class_names: list[str]  # by label
    licence: str  # of the base set; "" where it is unknown
    citation: str  # of the base set; "" where it is unknown
    digests: dict[str, str]  # by column: SHA-256 over its values, row by row, little-endian
    attributes: dict[str, Any]  # of the pool: method, copies, sources, corners, origin, …
    artifact: ArtifactFacts
    plan: PoolSpec | None  # the content of plan.json; None where there is none


class _Sealed(msgspec.Struct, frozen=True):
    sha256: str  # of the bytes of ``facts``, as they stand
    facts: msgspec.Raw


def gather_facts(pool: Pool, on_rows: Callable[[int], None]) -> ExportFacts:
    """Read the whole pool once, and return its facts.

    Args:
        pool: any.
        on_rows: is told the number of rows that were read, block by block.

    Raises:
        CorruptError: the pool is damaged.
    """
    digests = ColumnDigests(pool.columns)
    for block in pool_blocks(pool, range(len(pool))):
        digests.update(block)
        on_rows(len(block["status"]))
    attributes, manifest = pool.columns.attributes, pool.manifest
    what = f"pool {pool.location!r}"
    origin = read_provenance(attributes, what) if "origin" in attributes else None  # the first pools had none
    return ExportFacts(
        root=manifest.root,
        images=len(pool),
        image_shape=pool.image_shape,
        chunk_rows=pool.columns.table.chunk_rows,
        class_names=list(pool.class_names),
        licence=origin.licence if origin else "",
        citation=origin.citation if origin else "",
        digests=digests.hex(),
        attributes=dict(attributes),
        artifact=ArtifactFacts(
            stage_version=manifest.stage_version,
            name=manifest.name,
            key=manifest.key,
            config=manifest.config,
            inputs=manifest.inputs,
            counts=manifest.counts,
        ),
        plan=pool.spec,
    )


def seal_facts(facts: ExportFacts) -> bytes:
    """Return the facts as JSON, with their checksum; the same facts give the same bytes."""
    content = msgspec.json.encode(facts)  # not sorted: the order of attributes counts in the pool's root digest
    return msgspec.json.encode(_Sealed(hashlib.sha256(content).hexdigest(), msgspec.Raw(content)))
