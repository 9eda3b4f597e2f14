"""A pool: mixed images with their two labels, the second label's share, and where each image comes from.

``POOL_COLUMNS`` declares every column once. Row ``copy · images_per_copy + i`` is copy ``copy`` of the i-th pair. A pool may
mix more than two sources, or begin at drawn corners; then it has extra columns, and the others mean the same.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, SupportsIndex

import msgspec
import numpy as np
from numpy.typing import NDArray

from lsmix.data.artifact import Artifact
from lsmix.data.errors import CorruptError, FormatError
from lsmix.data.pool_spec import CORNERS, PLAN_NAME, PoolSpec, read_spec
from lsmix.data.store import CACHE_BYTES, open_artifact
from lsmix.data.table import Column, Dtype, Table, default_chunk_rows, table_in
from lsmix.data.table_reader import ColumnReader, TableReader, open_artifact_table

__all__ = [
    "POOL_COLUMNS",
    "POOL_FORMAT",
    "POOL_NAME",
    "STATUSES",
    "Pool",
    "PoolAttributes",
    "PoolColumn",
    "Sample",
    "Source",
    "create_pool",
    "open_pool",
    "pool_store",
    "write_pool_shard",
]

POOL_NAME: Final = "pool.zarr"
POOL_FORMAT: Final = 1
_STATUS_MEANINGS: Final = {
    "ok": "as first drawn",
    "redrawn": "the first draw could not be decoded; partner and λ are from a later draw",
    "replaced": "no draw could be decoded; the image is its first source, and share_b is 0",
}
STATUSES: Final = tuple(_STATUS_MEANINGS)


@dataclass(frozen=True)
class PoolColumn:
    """The declaration of a column."""

    name: str
    dtype: Dtype
    # What values may be: any, a row of the base set's train split, a class, a number in 0 to 1, or the index of a word.
    kind: Literal["pixel", "source", "label", "share", "word"]
    description: str  # one line
    row: Literal["number", "image", "more"] = "number"  # shape of a row: (), (H, W, C) or (sources − 2,)
    words: Mapping[str, str] = field(default_factory=dict)  # with the meaning of each

    def as_text(self, values: NDArray[Any]) -> list[Any]:
        """Return values (n,) as text shows them: words, and the shortest decimals that give a float32 back."""
        shown = np.array(tuple(self.words))[values] if self.words else values
        return list((shown.astype("U") if shown.dtype.kind == "f" else shown).tolist())


_STATUS = "whether the image is as first drawn, from a later draw, or replaced by x₁"
_CORNER_WORDS = {corner: f"x₂ begins at the {corner.replace('-', ' ')}" for corner in CORNERS}
_COLUMNS = (
    PoolColumn("image", "uint8", "pixel", "the mixed image", "image"),
    PoolColumn("source_a", "int64", "source", "row of x₁, the first source, in the train split"),
    PoolColumn("source_b", "int64", "source", "row of x₂, the second source, in the train split"),
    PoolColumn("label_a", "int64", "label", "class of x₁"),
    PoolColumn("label_b", "int64", "label", "class of x₂"),
    PoolColumn("lam", "float32", "share", "λ as drawn, the share of x₂ that was asked for"),
    PoolColumn("share_b", "float32", "share", "true share of x₂, the weight of label_b; x₁ has the rest"),
    PoolColumn("status", "uint8", "word", _STATUS, words=_STATUS_MEANINGS),
    PoolColumn("source_more", "int64", "source", "rows of x₃ and the sources after it in the train split", "more"),
    PoolColumn("label_more", "int64", "label", "classes of x₃ and the sources after it", "more"),
    PoolColumn("lam_more", "float32", "share", "λ as drawn of x₃ and the sources after it", "more"),
    PoolColumn("share_more", "float32", "share", "shares of x₃ and the sources after it, as share_b", "more"),
    PoolColumn("corner", "uint8", "word", "where x₂ begins", words=_CORNER_WORDS),
)
POOL_COLUMNS: Final = {column.name: column for column in _COLUMNS}


class PoolAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """What the pool's group says of the pool, and so which columns it has and what their values may be."""

    format_version: int  # of the pool, see POOL_FORMAT
    class_names: Annotated[list[str], msgspec.Meta(min_length=1)]  # by label
    images_per_copy: Annotated[int, msgspec.Meta(ge=1)]  # pairs in one copy
    copies: Annotated[int, msgspec.Meta(ge=1)]  # times that each source image was mixed
    method: str  # "ls-mix", "mixup", ...
    sources: Annotated[int, msgspec.Meta(ge=2, le=64)] = 2  # images in each mix
    corners: bool = False  # whether each row began at a drawn corner

    def columns(self) -> list[PoolColumn]:
        """Return the columns that the pool has, ``image`` first."""
        present = {"number": True, "image": True, "more": self.sources > 2}
        return [column for column in _COLUMNS if present[column.row] and (self.corners or column.name != "corner")]

    def row_shape(self, column: PoolColumn, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a row of a column."""
        return {"number": (), "image": image_shape, "more": (self.sources - 2,)}[column.row]

    def largest(self, column: PoolColumn) -> int:
        """Return the largest value that a column may hold; the smallest is 0."""
        return {
            "pixel": 255,
            "source": self.images_per_copy - 1,
            "label": len(self.class_names) - 1,
            "share": 1,
            "word": len(column.words) - 1,
        }[column.kind]

    def first_wrong(self, arrays: Mapping[str, NDArray[Any]], rows: Sequence[int] | NDArray[np.int64]) -> str:
        """Return which value of some ``rows``, by column, is out of its range, and why; "" for none."""
        for name, values in arrays.items():
            column = POOL_COLUMNS[name]
            if column.kind == "pixel":
                continue  # any uint8
            largest = self.largest(column)
            wrong = np.argwhere(~((values >= 0) & (values <= largest)))  # not "<": NaN is on neither side
            if len(wrong):
                place = tuple(wrong[0].tolist())
                which = f"{name}{list(place[1:])}" if place[1:] else name
                why = {
                    "source": f"the training split has rows 0 to {largest}: an image from elsewhere, such as a test image",
                    "label": f"there are classes 0 to {largest}",
                    "share": "expected 0 to 1",
                    "word": f"expected 0 to {largest} ({', '.join(column.words)})",
                }[column.kind]
                return f"in row {rows[place[0]]} {which} is {values[place]}, but {why}"
        return ""


class Source(NamedTuple):
    """One image more in a mix, behind the first two."""

    source: int  # its row in the train split
    label: int  # its class
    share: float  # effective, 0 to 1
    lam: float  # as drawn, 0 to 1


class Sample(NamedTuple):
    """One mixed image and all that is known of it."""

    image: NDArray[np.uint8]  # (H, W, C)
    label_a: int  # class of the first source image
    label_b: int  # class of the second
    share_b: float  # the second label's effective share, 0 to 1
    lam: float  # λ as drawn, 0 to 1
    source_a: int  # row of the first source image in the train split
    source_b: int  # row of the second
    status: str  # one of STATUSES
    more: tuple[Source, ...] = ()  # the third image and those behind it
    corner: str = CORNERS[0]  # where x₂ begins


class _ColumnOf:
    """Makes a column of a pool an attribute of the same name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, pool: "Pool", owner: type) -> ColumnReader:
        return pool.columns[self._name]


class Pool:
    """A complete pool, opened for reading; use ``open_pool``.

    Its columns read like arrays: ``pool.image[a:b]`` is uint8 (b−a, H, W, C). ``POOL_COLUMNS`` describes each of them.
    """

    image = _ColumnOf()
    source_a = _ColumnOf()
    source_b = _ColumnOf()
    label_a = _ColumnOf()
    label_b = _ColumnOf()
    lam = _ColumnOf()
    share_b = _ColumnOf()
    status = _ColumnOf()

    def __init__(
        self,
        artifact: Artifact,
        columns: TableReader,
        attributes: PoolAttributes,
        **options: Any,
    ) -> None:
        self.artifact = artifact
        self.location = artifact.location  # its folder, or its URL
        self._options = options  # of open_pool
        self.manifest = artifact.manifest
        self.columns = columns
        self.attributes = attributes
        self.class_names = tuple(attributes.class_names)
        self.copies = attributes.copies
        self.images_per_copy = attributes.images_per_copy
        self.method = attributes.method
        self.sources = attributes.sources  # images in each mix, at least 2

    @property
    def path(self) -> Path:
        """Its folder.

        Raises:
            MissingError: it is stored at a URL.
        """
        return self.artifact.folder

    @property
    def spec(self) -> PoolSpec | None:
        """What it was made from; None where it comes without plan.json.

        Raises:
            MissingError: plan.json was removed.
            FormatError: plan.json is no plan, or of a version that this lsmix does not read.
            CorruptError: plan.json contradicts itself, or is not the file that the manifest lists.
        """
        listed = {file.path: file.sha256 for file in self.manifest.files if file.payload}
        if PLAN_NAME not in listed:
            return None
        return read_spec(
            self.artifact.file(PLAN_NAME), expected=listed[PLAN_NAME], where=self.artifact.where(PLAN_NAME)
        )

    def reopen(self, *, check_crc: bool | None = None) -> "Pool":
        """Open the same pool once more, as another process must; ``check_crc`` as before, unless it is given."""
        crc = self.columns.check_crc if check_crc is None else check_crc
        return open_pool(self.location, check_crc=crc, **self._options)

    def rows(self, start: int, stop: int, names: Sequence[str] = ()) -> dict[str, NDArray[Any]]:
        """Return rows ``start`` to ``stop`` (exclusive) by column, each value within its range.

        Args:
            start: the first row.
            stop: the row after the last one.
            names: which columns; none for all but ``image``.

        Raises:
            CorruptError: a value is out of its range, or a chunk is damaged.
        """
        names = names or [name for name in self.columns if name != "image"]
        return self._checked({name: self.columns[name][start:stop] for name in names}, range(start, stop))

    def gather(self, rows: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the given rows, in the given order, by column, as ``rows`` does."""
        return self._checked({name: self.columns[name].gather(rows) for name in names}, rows)

    def _checked(self, found: dict[str, NDArray[Any]], rows: Sequence[int] | NDArray[np.int64]) -> dict[str, Any]:
        if wrong := self.attributes.first_wrong(found, rows):
            raise CorruptError(f"pool {self.location!r} is damaged: {wrong}. Do not use it; fetch or make it again.")
        return found

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = self.image.shape
        return height, width, channels

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the pool, from its manifest and its metadata; ready for JSON."""
        return {
            "path": self.location,
            "name": self.manifest.name,
            "cache_key": self.manifest.cache_key,
            "content_digest": self.manifest.content_digest,
            "method": self.method,
            "images": len(self),
            "copies": self.copies,
            "images_per_copy": self.images_per_copy,
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "counts": dict(self.manifest.counts),
            "config": dict(self.manifest.config),
            "attributes": dict(self.columns.attributes),
        }

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, index: SupportsIndex) -> Sample:
        row = index.__index__()
        if not -len(self) <= row < len(self):
            raise IndexError(f"sample {row} is outside of pool {self.location!r}, which has {len(self)} images.")
        row %= len(self)
        found = {name: values[0] for name, values in self.rows(row, row + 1).items()}
        further = (
            zip(*(found[f"{name}_more"].tolist() for name in Source._fields), strict=True) if self.sources > 2 else ()
        )
        return Sample(
            image=self.image[row],
            status=STATUSES[found["status"]],
            more=tuple(Source(*values) for values in further),
            corner=CORNERS[found.get("corner", 0)],
            **{name: found[name].item() for name in Sample._fields if name in found and not POOL_COLUMNS[name].words},
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return f"Pool({self.location!r}, {len(self)} images {height}×{width}×{channels}, method={self.method!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # A map of a file belongs to one process; another opens its own.
        return functools.partial(open_pool, check_crc=self.columns.check_crc, **self._options), (self.location,)


def create_pool(
    folder: Path,
    *,
    images_per_copy: int,
    copies: int,
    image_shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    method: str,
    chunk_rows: int = 0,
    sources: int = 2,
    corners: bool = False,
    attributes: Mapping[str, Any] | None = None,
) -> Table:
    """Write the metadata of a pool in an artifact's folder, and return its layout.

    Args:
        folder: the artifact; the pool becomes "pool.zarr" in it.
        images_per_copy: number of pairs in each copy, at least 1.
        copies: at least 1.
        image_shape: height, width, channels.
        class_names: by label.
        method: what mixed the images.
        chunk_rows: images in a chunk; 0 takes ``default_chunk_rows``, about 25 MB.
        sources: images in each mix, at least 2.
        corners: whether each row begins at a corner of its own.
        attributes: more facts to keep with the pool, ready for JSON.

    Raises:
        ValueError: the pool would have no images or no classes.
    """
    if images_per_copy < 1 or copies < 1 or not class_names:
        raise ValueError(
            f"a pool needs images, copies and classes; got {copies} copies of {images_per_copy} images "
            f"in {len(class_names)} classes."
        )
    rows = images_per_copy * copies
    known = PoolAttributes(
        format_version=POOL_FORMAT,
        class_names=list(class_names),
        images_per_copy=images_per_copy,
        copies=copies,
        method=method,
        sources=sources,
        corners=corners,
    )
    columns = tuple(
        Column(name=column.name, dtype=column.dtype, row_shape=known.row_shape(column, image_shape))
        for column in known.columns()
    )
    chunk_rows = min(chunk_rows, rows) or default_chunk_rows(max(column.row_bytes for column in columns), rows)
    table = Table(folder=folder / POOL_NAME, columns=columns, rows=rows, chunk_rows=chunk_rows)
    table.create({**(attributes or {}), **msgspec.to_builtins(known)})
    return table


def pool_store(folder: Path) -> Table:
    """Return the layout of the pool in an artifact's folder, finished or not."""
    return table_in(folder / POOL_NAME)[0]


def write_pool_shard(folder: Path, shard: int, arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Write one shard of the pool in an artifact's folder.

    Args:
        folder: the artifact.
        shard: which one; its rows are ``pool_store(folder).shard_range(shard)``.
        arrays: by column, in the column's dtype: ``image`` (n, H, W, C), the others (n,).

    Returns:
        The SHA-256 of each file written, by its path relative to ``folder``.

    Raises:
        ValueError: a column is left out, or its values are of another shape, dtype or range.
    """
    table, attributes = table_in(folder / POOL_NAME)
    known = {name: values for name, values in arrays.items() if name in POOL_COLUMNS}  # the table refuses others
    if wrong := _read_attributes(str(folder), attributes).first_wrong(known, table.shard_range(shard)):
        raise ValueError(f"shard {shard} of pool {str(folder)!r}: {wrong}.")
    return {f"{POOL_NAME}/{path}": digest for path, digest in table.write_shard(shard, arrays).items()}


def open_pool(
    path: Path | str | Artifact,
    *,
    check_crc: bool = True,
    cache: Path | str | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> Pool:
    """Open the pool in an artifact's folder, or at a URL.

    From a URL, such as "s3://bucket/pool" or "https://host/pool", only the metadata is fetched at once. Each shard comes
    when it is first touched, is checked against its SHA-256, and stays in a cache on the disk that all processes share.

    Sizes of all files are checked at once, each chunk's CRC32C when it is first touched; ``lsmix verify`` checks
    every byte against the manifest.

    Args:
        path: the artifact, its folder or URL, or "pool.zarr" in it.
        check_crc: False skips the checksums of chunks.
        cache: folder that shards from a URL are kept in; None for LSMIX_CACHE, else "~/.cache/lsmix".
        cache_bytes: how much may be kept there, of all pools together; what was used longest ago goes first. A shuffled
            epoch needs room for all images that it goes over, or it fetches shards again and again.

    Raises:
        MissingError: there is no pool, or it is not finished.
        FormatError: it is of a format that this version does not read.
        CorruptError: a file is missing, altered in size, or damaged.
        DownloadError: the URL cannot be reached.
    """
    options: dict[str, Any] = {"cache": cache, "cache_bytes": cache_bytes}
    artifact = open_artifact(path, **options)
    return _pool(artifact, open_artifact_table(artifact, POOL_NAME, check_crc=check_crc), **options)


def _pool(artifact: Artifact, columns: TableReader, **options: Any) -> Pool:
    where = artifact.location
    attributes = _read_attributes(where, columns.attributes)
    image_shape = columns["image"].shape[1:] if "image" in columns else ()
    expected = {item.name: (item.dtype, attributes.row_shape(item, image_shape)) for item in attributes.columns()}
    found = {name: (column.dtype.name, column.shape[1:]) for name, column in columns.items()}
    if found != expected or len(image_shape) != 3:
        raise FormatError(f"{where!r} is no pool: expected the columns {expected}, got {found}.")
    if attributes.images_per_copy * attributes.copies != columns.table.rows:
        raise CorruptError(
            f"pool {where!r} is damaged: {attributes.copies} copies of {attributes.images_per_copy} images "
            f"do not make {columns.table.rows} rows. Fetch or make it again."
        )
    return Pool(artifact, columns, attributes, **options)


def _read_attributes(where: str, attributes: dict[str, Any]) -> PoolAttributes:
    version = attributes.get("format_version")
    if version != POOL_FORMAT:
        raise FormatError(
            f"pool {where!r} has format {version!r}; this version of lsmix reads format {POOL_FORMAT}. "
            "Use a newer lsmix, or make the pool again."
        )
    try:
        return msgspec.convert(attributes, PoolAttributes)
    except msgspec.ValidationError as error:
        raise CorruptError(f"pool {where!r} is damaged: its attributes are wrong: {error}.") from error
